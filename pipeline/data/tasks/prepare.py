"""Preprocess for one vision task: its source to rows.jsonl, checked pictures, and a report of what
was dropped.

Invariant: the same source, settings and seed give the same bytes, whatever the number of processes;
memory holds a digest, a group and a split per picture and a hash per row, never the rows.
"""

import hashlib
import json
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

from ...config.task_data import ImageLimitsConfig, TaskConfig
from ...errors import DataError
from ...protocols import Progress, quiet
from ...store.artifacts import write_text
from ..drop_stats import DropStats
from ..sources.tasks import Record, records
from ..text.documents import SPLITS
from .build_rows import Lost, Made, RowBuilder
from .groups import Division, Groups, group_name
from .rows import DROPPED, IMAGES, ROWS, TaskRow, TaskRows, read_rows

__all__ = ["TaskRow", "TaskRows", "prepare", "read_rows"]

EARLY = 1000  # records after which a source of which nothing fits is given up
_CHUNK = 16  # records that one process does at a time
_AHEAD = 4  # chunks per process that wait to be read
_SAY_EVERY_S = 0.5
_HARMLESS = (
    "duplicate",
    *(f"{what} also in {split}" for what in ("picture", "text") for split in ("test", "valid")),
)


def prepare(
    entry: TaskConfig,
    image: ImageLimitsConfig,
    seed: int,
    folder: Path,
    progress: Progress = quiet,
    processes: int = 1,
) -> dict:
    """Leave rows.jsonl, images/ and dropped.json of a task in folder, which is empty; return
    metrics.

    Raises DataError for everything about the source that is not as asked.
    """
    folder, start = Path(folder), time.perf_counter()
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    shaper, stats, groups, counts = (
        RowBuilder(entry, image, folder),
        DropStats(_HARMLESS),
        Groups(),
        Counter(),
    )
    division = Division(seed, entry.dataset.valid_share, entry.dataset.test_share)
    spool = folder / "rows.part"
    with open(spool, "w", encoding="utf-8") as file:
        for made in _kept(_shaped(shaper, processes, stats, progress), stats, counts):
            groups.join(made.keys)
            file.write(f"{made.keys[0]}\t{made.row.line()}")
    _check_bad(stats, entry.name, entry.dataset.max_bad_share)
    division.divide((groups.of(key), row.split) for key, row in _spooled(spool))
    counts.update(_write(spool, folder, groups, division, stats))
    spool.unlink()
    _check_splits(entry.name, counts, stats)
    _report(folder, stats, counts, division)
    return _metrics(folder, stats, counts, division, time.perf_counter() - start)


def _kept(shaped: Iterable[Made | Lost], stats: DropStats, counts: Counter) -> Iterator[Made]:
    """Pass rows on, each with an id of its own, and count what is dropped."""
    ids = set()
    for each in shaped:
        if isinstance(each, Lost):
            stats.drop(each.reason, each.where, each.detail)
            continue
        name = each.row.id
        while _hashed(name) in ids:  # sources number each of their files from 0
            name = f"{each.row.id}#{len(ids)}"
        ids.add(_hashed(name))
        renamed = name != each.row.id
        counts.update(
            rows_resized=each.resized, rows_without_boxes=each.unboxed, ids_changed=renamed
        )
        counts.update(rows_without_picture=not each.row.images)
        yield replace(each, row=replace(each.row, id=name)) if renamed else each


def _shaped(
    shaper: RowBuilder, processes: int, stats: DropStats, progress: Progress
) -> Iterator[Made | Lost]:
    """Yield what becomes of each record, in order."""
    name, said_s, made = shaper.entry.name, time.monotonic(), 0
    chunks = _chunks(records(name, shaper.entry.dataset))
    for chunk in (
        _here(shaper, chunks) if processes <= 1 else _among(shaper, chunks, processes, name)
    ):
        for outcome in chunk:
            stats.seen += max(1, len(outcome))
            made += sum(isinstance(each, Made) for each in outcome)
            yield from outcome
        if stats.seen >= EARLY and not made:
            _check_bad(stats, name, shaper.entry.dataset.max_bad_share)
        if time.monotonic() - said_s > _SAY_EVERY_S:
            said_s = time.monotonic()
            progress(f"{name}: {stats.seen} rows read, {made} fit", None)


def _chunks(found: Iterator[Record]) -> Iterator[list[Record]]:
    while chunk := list(islice(found, _CHUNK)):
        yield chunk


def _here(shaper: RowBuilder, chunks: Iterable[list[Record]]) -> Iterator[list]:
    for chunk in chunks:
        yield [shaper.shape(record) for record in chunk]


def _among(
    shaper: RowBuilder, chunks: Iterable[list[Record]], processes: int, name: str
) -> Iterator[list]:
    """Yield the same from several processes, at most a few chunks ahead of the reader."""
    waiting: deque[Future] = deque()
    with ProcessPoolExecutor(processes, get_context("spawn"), _settle, (shaper,)) as pool:
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_shape, chunk))
                if len(waiting) > _AHEAD * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                f"{name}: a process that prepares pictures was ended from outside, most likely for its memory; "
                f"run fewer than {processes} at once"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_shaper: RowBuilder | None = None  # of this process, when it is one of several


def _settle(shaper: RowBuilder) -> None:
    global _shaper
    _shaper = shaper


def _shape(chunk: list[Record]) -> list:
    return [_shaper.shape(record) for record in chunk]


def _spooled(spool: Path) -> Iterator[tuple[str, TaskRow]]:
    with open(spool, encoding="utf-8") as file:
        for line in file:
            key, _, row = line.partition("\t")
            yield key, TaskRow.read(json.loads(row))


def _write(
    spool: Path, folder: Path, groups: Groups, division: Division, stats: DropStats
) -> Counter:
    """Write rows.jsonl without what is there twice or in two splits, remove pictures of no row;
    return counts."""
    counts, seen, used = Counter(), set(), set()
    with open(folder / ROWS, "w", encoding="utf-8") as file:
        for key, row in _spooled(spool):
            group = groups.of(key)
            split = division.splits[group]
            said = _hashed(f"{group}\0{' '.join(row.images)}\0{row.prompt}\0{row.answer}")
            if row.split and row.split != split and split not in division.carved:
                what, which = ("picture", row.images[0]) if row.images else ("text", "the prompt")
                detail = f"{which} of its {row.split} rows"
                stats.drop(f"{what} also in {split}", row.id, detail)
            elif said in seen:
                detail = "same pictures, prompt and answer as an earlier row"
                stats.drop("duplicate", row.id, detail)
            else:
                seen.add(said)
                used.update(row.images)
                counts[split] += 1
                file.write(replace(row, split=split, group=group_name(group)).line())
    for file in (folder / IMAGES).iterdir():
        if f"{IMAGES}/{file.name}" in used:
            counts.update(
                pictures=1,
                jpegs_as_they_were=file.suffix == ".jpg",
                picture_bytes=file.stat().st_size,
            )
        else:
            file.unlink()
    return counts


def _hashed(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _check_bad(stats: DropStats, name: str, max_bad_share: float) -> None:
    """Raise DataError when nothing was seen, or more than max_bad_share of it is bad."""
    where = f"loras.experts.{name}.dataset"
    if not stats.seen:
        raise DataError(f"{where}: the source has no rows; check path, the file names, or limit")
    stats.check(
        max_bad_share,
        f"rows of {where} cannot be used",
        "max_bad_share",
        "Mend the source, set image_root, image_field or fields to what it has, or raise "
        "max_bad_share",
    )


def _check_splits(name: str, counts: Counter, stats: DropStats) -> None:
    missing = [split for split in SPLITS if not counts[split]]
    if missing:
        raise DataError(
            f"loras.experts.{name}.dataset gives no {' and no '.join(missing)} row, out of {stats.seen} seen and "
            f"{stats.total} dropped: name a file or split for it, or give more pictures"
        )


def _report(folder: Path, stats: DropStats, counts: Counter, division: Division) -> None:
    about = {
        "seen": stats.seen,
        "kept": sum(counts[split] for split in SPLITS),
        "bad": stats.bad,
        "dropped": dict(sorted(stats.counts.items())),
        "examples": dict(sorted(stats.examples.items())),
        "splits": {split: counts[split] for split in SPLITS},
        "carved": list(division.carved),
        "rows_without_picture": counts["rows_without_picture"],
    }
    write_text(folder / DROPPED, json.dumps(about, indent=1, ensure_ascii=False) + "\n")


def _metrics(
    folder: Path, stats: DropStats, counts: Counter, division: Division, spent_s: float
) -> dict:
    names = (
        "pictures",
        "jpegs_as_they_were",
        "picture_bytes",
        "rows_resized",
        "rows_without_boxes",
        "rows_without_picture",
        "ids_changed",
    )
    return {
        "rows": {split: counts[split] for split in SPLITS},
        "groups": len(division.splits),
        **{name: counts[name] for name in names},
        "seen": stats.seen,
        "dropped": dict(stats.counts),
        "seconds": round(spent_s, 3),
        "rows_per_s": round(stats.seen / spent_s, 1),
    }
