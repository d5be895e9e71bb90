"""The routing set: requests of all experts in balance, each with the expert it belongs to, and its
readers.

Invariant: no picture is in two splits and no held-out wording outside test_held; the same rows,
settings and seed give the same bytes, whatever the order of the rows.
"""

import contextlib
import hashlib
import json
import os
import platform
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ... import __version__
from ...config.base import NONE
from ...config.routing_set import RoutingSetConfig, RoutingSourceConfig
from ...errors import DamagedArtifact, DataError
from ...protocols import Progress, quiet
from ...store.artifacts import sha256, write_text
from ...store.reading import damaged, read_object, reading
from ...store.room import writing
from ..drop_stats import DropStats
from ..sources.columns import split_named
from ..tasks.rows import ROWS
from .candidates import CandidateTable
from .prompts import PromptChooser
from .rows import SPLITS, Feed
from .sampling import RoutingSample

if TYPE_CHECKING:
    from PIL import Image

FORMAT = 1
NAME = "routing.jsonl"
_ROOM = "; a table beside it takes about 1.5 kB for each row while it is made"
_PAGE_BYTES = 4096

# Left out of the hash of the settings: the same rows elsewhere make the same set.
_PLACES = {"sources": {"__all__": {"path", "image_root"}}}


@dataclass(frozen=True, slots=True)
class RoutingRow:
    """One request and the expert it belongs to; images are paths relative to the set's folder."""

    id: str
    images: tuple[str, ...]
    prompt: str
    expert: str
    source: dict  # dataset, id, revision as the task row has them; row: the task row's id
    split: str
    ambiguous: bool  # neutral wording: only the picture tells
    group: str


def generate(
    settings: RoutingSetConfig,
    tasks: Mapping[str, Path],
    labels: Mapping[str, str],
    folder: Path,
    progress: Progress = quiet,
    name: str = NAME,
) -> dict:
    """Write folder/name and its manifest from the experts' rows; return metrics, the manifest's
    main figures.

    tasks has the folder of each expert's prepared rows, and may have none's; sources from jsonl
    that are not in it are read as they are. Raises ConfigError for wordings that contradict each
    other, DataError for rows that do not do, DiskFull.
    """
    folder = Path(folder)
    file = folder / name
    prompts = PromptChooser(settings)
    prompts.check(settings.experts)
    feeds: list[Feed] = []
    for i, source in enumerate(settings.sources):
        feeds += _feeds(i, source, tasks)
    with writing(file, _ROOM):
        manifest = _merge(settings, prompts, feeds, file, progress)
    # The manifest comes last: a set without one is not read.
    manifest |= {"labels": dict(labels), "sha256": sha256(file)}
    write_text(manifest_of(file), json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")

    short = {}
    for shortage in manifest["short"]:
        which = f"{shortage['expert']} {shortage['split']}"
        short[which] = f"{shortage['found']} of {shortage['wanted']}"
    stats = DropStats(counts=Counter(manifest["dropped"]), examples=manifest["examples"])
    return {
        "rows": manifest["rows"],
        "groups": manifest["groups"],
        "dropped": manifest["dropped"],
        "notes": stats.told(),
        "short": short,
    }


def _merge(
    settings: RoutingSetConfig,
    prompts: PromptChooser,
    feeds: list[Feed],
    file: Path,
    progress: Progress,
) -> dict:
    # Beside the set and not in /tmp, which may be small or memory.
    with (
        tempfile.TemporaryDirectory(dir=file.parent, prefix=".routing-") as place,
        _faults_of_table(Path(place) / "rows.sqlite", file),
        CandidateTable(Path(place) / "rows.sqlite", settings) as table,
    ):
        counts = []
        read: dict[str, DropStats] = {}
        for i, feed in enumerate(feeds):
            progress(f"reading {feed.expert}: {feed.file}", 0.5 * i / len(feeds))
            stats = read.setdefault(feed.name, DropStats())
            counts.append(table.add(feed.source_index, feed.candidates(stats)))
        for source_name, stats in read.items():
            stats.check(
                settings.max_bad_share,
                f"rows of {source_name} cannot be used",
                "dataset.max_bad_share",
                "Mend them, set fields, image_field or image_root of the source, or raise "
                "max_bad_share",
            )
            table.stats.merge(stats)
        progress("grouping by picture, dropping duplicates", 0.5)
        # test and test_held divide the test groups in halves, where there is a test_held.
        held_share = 0.5 if prompts.any_held else 0.0
        table.finalize(settings.splits.model_dump(), held_share)
        sample = RoutingSample(table, settings, prompts)
        sample.take(progress)
        progress(f"writing {file.name}", 0.9)
        _write(file, settings, table.picked())
        return _manifest(settings, list(zip(feeds, counts, strict=True)), sample)


@contextlib.contextmanager
def _faults_of_table(table: Path, file: Path) -> Iterator[None]:
    """Tell why SQLite cannot write the table of rows beside file. Raises DataError, OSError."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_FULL:
            raise
        # it says the same of a quota as of a broken disk: ask the system, at a file of no use now
        with table.open("ab") as probe:
            probe.write(bytes(_PAGE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
        raise DataError(f"the table of rows beside {file} cannot be written: {error}") from None


def manifest_of(file: Path) -> Path:
    """Return where the manifest of a routing set lies: beside it, as an artifact's own is called
    manifest.json."""
    return file.with_name(f"{file.stem}.manifest.json")


class RoutingRows:
    """A routing set opened for reading: rows in file order, read when they are asked for.

    Raises DataError when the folder has none, UnreadableFile.
    """

    def __init__(self, folder: Path, name: str = NAME):
        self.folder = Path(folder)
        self.file = self.folder / name
        try:
            # Where each line starts, 8 bytes a row: memory holds no row that is not asked for.
            self._starts = np.cumsum([0, *map(len, self._lines())], dtype=np.int64)[:-1]
            self.manifest = read_object(manifest_of(self.file))
        except (OSError, DamagedArtifact) as error:
            raise DataError(
                f"{self.file} is no routing set ({error}); make it with the stage routing"
            ) from None

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, place: int) -> RoutingRow:
        # Opened each time: a file that stays open would not go to a worker process.
        with reading(self.file), self.file.open("rb") as file:
            file.seek(self._starts[place])
            return self._row(file.readline())

    def __iter__(self) -> Iterator[RoutingRow]:
        return map(self._row, self._lines())

    def rows(self, split: str) -> list[RoutingRow]:
        """Return the rows of a split, already shuffled."""
        return [row for row in self if row.split == split]

    def paths(self, row: RoutingRow) -> list[Path]:
        """Return where a row's pictures are."""
        return [self.folder / image for image in row.images]

    def pictures(self, row: RoutingRow) -> "list[Image.Image]":
        """Return a row's pictures, checked. Raises DataError."""
        # Only who opens a picture pays for importing Pillow.
        from ..images.images import open_checked

        return [open_checked(path) for path in self.paths(row)]

    def _lines(self) -> Iterator[bytes]:
        with reading(self.file), self.file.open("rb") as file:
            yield from file

    def _row(self, line: bytes) -> RoutingRow:
        try:
            columns = json.loads(line)
            columns["images"] = tuple(columns["images"])
            return RoutingRow(**columns)
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise damaged(self.file, f"has a line that is no row ({error})") from None


def look(settings: RoutingSetConfig) -> None:
    """Raise DataError for a source's own rows that are not there; none is read."""
    for source_index, source in enumerate(settings.sources):
        # Those of none are a task of their own, which is looked at as one
        if source.origin != "jsonl" or source.expert == NONE:
            continue
        for feed in _feeds(source_index, source, {}):
            if not feed.file.is_file():
                raise DataError(f"{feed.name}: there is no file {feed.file}; correct path")
            if not feed.root.is_dir():
                raise DataError(f"{feed.name}: there is no folder {feed.root}; correct image_root")


def _feeds(
    source_index: int, source: RoutingSourceConfig, tasks: Mapping[str, Path]
) -> Iterator[Feed]:
    """Yield the files of one source. Raises DataError when there is none."""
    name = f"dataset.sources.{source_index} ({source.expert})"
    prepared = tasks.get(source.expert)
    # Nobody's rows may have been prepared as a task of their own, whatever their source.
    if source.origin == "loras" or (prepared and source.expert == NONE):
        if prepared is None:
            raise DataError(
                f"{name}: unknown expert {source.expert}; prepared rows are of "
                f"{', '.join(sorted(tasks))}"
            )
        folder = Path(prepared)
        yield Feed(source_index, name, source.expert, folder / ROWS, root=folder, artifact=True)
        return
    if source.origin == "synthetic" or source.path is None:
        raise DataError(
            f"{name}: {source.origin} rows of {source.expert} are not prepared; make them a task "
            "in loras.json"
        )
    path = Path(source.path)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise DataError(
            f"{name}: no .jsonl file in {path}; set the source's path to a file, or a folder of "
            "them"
        )
    for file in files:
        yield Feed(
            source_index,
            name,
            source.expert,
            file,
            root=Path(source.image_root or files[0].parent),
            artifact=False,
            fields={"images": source.image_field} | source.fields,
            # In a folder the names of files may say the split; one file is called anything.
            stated=split_named(file.stem) if path.is_dir() else None,
        )


def _write(file: Path, settings: RoutingSetConfig, rows: Iterator[tuple]) -> None:
    """Write the picked rows, pictures relative to the file's folder; whole or not at all."""
    relative = _relative_to(os.path.realpath(file.parent))
    part = file.with_name(file.name + ".part")
    # newline: the same bytes on every system.
    with part.open("w", encoding="utf-8", newline="\n") as out:
        for name, copy, images, prompt, source_index, origin, split, neutral, group in rows:
            expert = settings.sources[source_index].expert
            row_id = f"{expert}-{name}"
            if copy:
                row_id += f"~{copy}"
            row = {
                "id": row_id,
                "images": [relative(image) for image in json.loads(images)],
                "prompt": prompt,
                "expert": expert,
                "source": json.loads(origin),
                "split": SPLITS[split],
                "ambiguous": bool(neutral),
                "group": group,
            }
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    part.replace(file)


def _relative_to(here: str) -> Callable[[str], str]:
    # All pictures of a task lie in one folder, so that links are followed once for it.
    @lru_cache(1 << 12)
    def folder_of(folder: str) -> str:
        return Path(os.path.relpath(os.path.realpath(folder), here)).as_posix()

    def relative(path: str) -> str:
        folder, name = os.path.split(path)
        return f"{folder_of(folder)}/{name}"

    return relative


def _manifest(
    settings: RoutingSetConfig,
    read: list[tuple[Feed, int]],
    sample: RoutingSample,
) -> dict:
    settings_json = json.dumps(settings.model_dump(mode="json", exclude=_PLACES), sort_keys=True)
    groups, largest = sample.table.groups()
    sources = []
    for feed, count in read:
        sources.append({"expert": feed.expert, "rows": count, "sha256": sha256(feed.file)})
    return {
        "format": FORMAT,
        "seed": settings.seed,
        "experts": list(settings.experts),
        "rows": sample.counts(lambda given: given.taken),
        "ambiguous": sample.counts(lambda given: given.neutral),
        "copies": sample.counts(lambda given: given.copies),
        "short": [asdict(shortage) for shortage in sample.shortages],
        "groups": groups,
        "largest_group_rows": largest,
        "read": sources,
        "dropped": dict(sorted(sample.table.stats.counts.items())),
        "examples": dict(sorted(sample.table.stats.examples.items())),
        "config": hashlib.sha256(settings_json.encode()).hexdigest(),
        "versions": {"moleforge": __version__, "python": platform.python_version()},
    }
