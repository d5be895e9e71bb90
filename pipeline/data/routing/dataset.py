"""The routing set: requests of all experts in balance, each with the expert it belongs to, and its
readers.

Invariant: no picture is in two splits and no held-out wording outside test_held; the same rows,
settings and seed give the same bytes, whatever the order of the rows.
"""

import hashlib
import json
import os
import platform
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ... import __version__
from ...config.routing_set import RoutingSetConfig, RoutingSourceConfig
from ...errors import DataError, DiskFull
from ...protocols import Progress, quiet
from ...store.artifacts import sha256, write_text
from .candidates import CandidateTable
from .prompts import PromptChooser
from .rows import SPLITS, Feed, split_named
from .sampling import Draw

if TYPE_CHECKING:
    from PIL import Image

FORMAT = 1
NAME = "routing.jsonl"
_PLACES = {
    "sources": {"__all__": {"path", "image_root"}}
}  # the same rows elsewhere make the same set


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
    wordings = PromptChooser(settings)
    wordings.check(settings.experts)
    feeds = [feed for i, source in enumerate(settings.sources) for feed in _feeds(i, source, tasks)]
    try:
        manifest = _merge(settings, wordings, feeds, folder / name, progress)
    except sqlite3.OperationalError as error:
        raise DiskFull(
            f"the table of rows beside {folder / name} cannot be written ({error}); make room, about 1.5 kB for each "
            "row while it is made, then run the same command again"
        ) from None
    manifest |= {"labels": dict(labels), "sha256": sha256(folder / name)}
    write_text(
        manifest_of(folder / name), json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    )
    short = {
        f"{lack['expert']} {lack['split']}": f"{lack['found']} of {lack['wanted']}"
        for lack in manifest["short"]
    }
    return {key: manifest[key] for key in ("rows", "groups", "dropped")} | {"short": short}


def _merge(
    settings: RoutingSetConfig,
    wordings: PromptChooser,
    feeds: list[Feed],
    file: Path,
    progress: Progress,
) -> dict:
    with (
        tempfile.TemporaryDirectory(dir=file.parent, prefix=".routing-") as place,
        CandidateTable(Path(place) / "rows.sqlite", settings) as table,
    ):
        rows = [table.add(feed.unit, feed.candidates()) for feed in _told(feeds, progress)]
        progress("grouping by picture, dropping duplicates", 0.5)
        table.settle(settings.splits.model_dump(), 0.5 * wordings.any_held)
        draw = Draw(table, settings, wordings)
        draw.take(progress)
        progress(f"writing {file.name}", 0.9)
        _write(file, settings, table.picked())
        return _manifest(settings, list(zip(feeds, rows, strict=True)), draw)


def manifest_of(file: Path) -> Path:
    """Return where the manifest of a routing set lies: beside it, as an artifact's own is called
    manifest.json."""
    return file.with_name(f"{file.stem}.manifest.json")


class RoutingRows(Sequence):
    """A routing set opened for reading, as a sequence of rows in file order; lines are read when
    they are asked for.

    Raises DataError when the folder has none.
    """

    def __init__(self, folder: Path, name: str = NAME):
        self.folder, self.file = Path(folder), Path(folder) / name
        try:
            self._starts = np.cumsum([0, *map(len, self._lines())], dtype=np.int64)[:-1]
            self.manifest: dict = json.loads(manifest_of(self.file).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.file} is no routing set ({error}); make it with the stage routing"
            ) from None

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, place: int) -> RoutingRow:
        with self.file.open("rb") as file:
            file.seek(self._starts[place])
            return _row(file.readline())

    def __iter__(self) -> Iterator[RoutingRow]:
        return map(_row, self._lines())

    def rows(self, split: str) -> list[RoutingRow]:
        """Return the rows of a split, already shuffled."""
        return [row for row in self if row.split == split]

    def paths(self, row: RoutingRow) -> list[Path]:
        """Return where a row's pictures are."""
        return [self.folder / image for image in row.images]

    def pictures(self, row: RoutingRow) -> "list[Image.Image]":
        """Return a row's pictures, checked. Raises DataError."""
        from ..images.images import open_checked

        return [open_checked(path) for path in self.paths(row)]

    def _lines(self) -> Iterator[bytes]:
        with self.file.open("rb") as file:
            yield from file


def _row(line: bytes) -> RoutingRow:
    found = json.loads(line)
    return RoutingRow(**found | {"images": tuple(found["images"])})


def _feeds(unit: int, source: RoutingSourceConfig, tasks: Mapping[str, Path]) -> Iterator[Feed]:
    """Yield the files of one source. Raises DataError when there is none."""
    name = f"dataset.sources.{unit} ({source.expert})"
    prepared = tasks.get(source.expert)
    if source.origin == "loras" or (prepared and source.expert == "none"):
        if prepared is None:
            raise DataError(
                f"{name}: unknown expert {source.expert}; prepared rows are of {', '.join(sorted(tasks))}"
            )
        yield Feed(
            unit, name, source.expert, Path(prepared) / "rows.jsonl", Path(prepared), artifact=True
        )
        return
    if source.origin == "synthetic":
        raise DataError(
            f"{name}: synthetic rows of {source.expert} are not prepared; make them a task in loras.json"
        )
    path = Path(source.path)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise DataError(
            f"{name}: no .jsonl file in {path}; set the source's path to a file, or a folder of them"
        )
    root = Path(source.image_root or files[0].parent)
    fields = {"images": source.image_field} | source.fields
    for file in files:
        stated = split_named(file.stem) if path.is_dir() else None
        yield Feed(unit, name, source.expert, file, root, False, fields, stated)


def _told(feeds: list[Feed], progress: Progress) -> Iterator[Feed]:
    for i, feed in enumerate(feeds):
        progress(f"reading {feed.expert}: {feed.file}", 0.5 * i / len(feeds))
        yield feed


def _write(file: Path, settings: RoutingSetConfig, rows: Iterator[tuple]) -> None:
    """Write the picked rows, pictures relative to the file's folder; whole or not at all."""
    from_here = _relative(os.path.realpath(file.parent))
    part = file.with_name(file.name + ".part")
    with part.open("w", encoding="utf-8", newline="\n") as out:
        for name, copy, images, prompt, unit, origin, split, neutral, group in rows:
            expert = settings.sources[unit].expert
            row = {
                "id": f"{expert}-{name}" + (f"~{copy}" if copy else ""),
                "images": [from_here(image) for image in json.loads(images)],
                "prompt": prompt,
                "expert": expert,
                "source": json.loads(origin),
                "split": SPLITS[split],
                "ambiguous": bool(neutral),
                "group": group,
            }
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    part.replace(file)


def _relative(here: str) -> Callable[[str], str]:
    @lru_cache(1 << 12)
    def folder_of(folder: str) -> str:
        return Path(os.path.relpath(os.path.realpath(folder), here)).as_posix()

    def relative(path: str) -> str:
        folder, name = os.path.split(path)
        return f"{folder_of(folder)}/{name}"

    return relative


def _manifest(settings: RoutingSetConfig, read: list[tuple[Feed, int]], draw: Draw) -> dict:
    said = json.dumps(settings.model_dump(mode="json", exclude=_PLACES), sort_keys=True)
    groups, largest = draw.table.groups()
    return {
        "format": FORMAT,
        "seed": settings.seed,
        "experts": list(settings.experts),
        "rows": draw.counts(lambda done: done.taken),
        "ambiguous": draw.counts(lambda done: done.neutral),
        "copies": draw.counts(lambda done: done.copies),
        "short": [asdict(lack) for lack in draw.lacks],
        "groups": groups,
        "largest_group_rows": largest or 0,
        "read": [
            {"expert": feed.expert, "rows": n, "sha256": sha256(feed.file)} for feed, n in read
        ],
        "dropped": dict(sorted(draw.table.dropped.items())),
        "config": hashlib.sha256(said.encode()).hexdigest(),
        "versions": {"moleforge": __version__, "python": platform.python_version()},
    }
