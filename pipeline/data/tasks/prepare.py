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

from ... import interrupts
from ...config.task_data import ImageLimitsConfig, TaskConfig
from ...errors import DataError
from ...protocols import Progress, quiet
from ...store.artifacts import write_text
from ...store.room import writing
from ..drop_stats import DropStats
from ..sources.tasks import Record, records
from ..text.documents import SPLITS
from .as_trained import AsTrained, told
from .build_rows import BuiltRow, DroppedRow, RowBuilder
from .groups import Groups, SplitAssignment, group_name
from .look_alikes import LookAlikes
from .rows import DROPPED, IMAGES, ROWS, TaskRow, TaskRows, read_rows

__all__ = ["TaskRow", "TaskRows", "prepare", "read_rows"]

# Records after which a source of which nothing fits is given up: a wrong column name should not
# cost the hours that a whole source takes.
EARLY = 1000

# Records that one process does at a time: enough that handing them over costs little, few enough
# that decoded pictures (up to 192 MB each) do not pile up.
_CHUNK = 16

# Chunks per process that wait to be read, which bounds memory when writing is the slower part.
_AHEAD = 4

_PROGRESS_EVERY_S = 0.5

# What a row is dropped for whose picture is one of another split, compressed or resized anew. A
# fault: that two are the same is not as sure as of equal pixels, so there may not be many.
_NEARLY = "picture nearly as in"

# Not faults of a source: they come of dividing it.
_HARMLESS = (
    "duplicate",
    "picture also in test",
    "picture also in valid",
    "text also in test",
    "text also in valid",
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
    start = time.perf_counter()
    folder = Path(folder)
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    data = entry.dataset
    builder = RowBuilder(entry, image, folder)
    stats = DropStats(_HARMLESS)
    box_stats = DropStats()
    trained = AsTrained(entry)
    groups = Groups()
    alike = LookAlikes(folder / "looks.part", drop=data.near_duplicates == "drop")
    counts: Counter[str] = Counter()

    # Rows go to disk first: a group is known only when the last row of the source has been seen.
    spool = folder / "rows.part"
    with writing(spool), open(spool, "w", encoding="utf-8") as file:
        outcomes = _outcomes(builder, processes, stats, progress)
        for built in _with_own_ids(outcomes, stats, counts):
            _count_boxes(built, box_stats)
            trained.count(built.row, built.strange)
            groups.join(built.keys)
            alike.add(built)
            file.write(f"{built.keys[0]}\t{built.row.line()}")
    _check_bad(stats, entry.name, data.max_bad_share)
    _check_boxes(box_stats, entry.name, data.max_bad_share)
    trained.check()

    alike.join(groups, _spooled(spool))
    assignment = SplitAssignment(seed, data.valid_share, data.test_share)
    assignment.assign((groups.of(key), row.split) for key, row in _spooled(spool))
    alike.compare(groups, assignment)
    alike.close()
    used = _write_rows(spool, folder, groups, assignment, alike, stats, counts, trained)
    spool.unlink()
    _check_bad(stats, entry.name, data.max_bad_share)
    _sweep_images(folder / IMAGES, used, counts)
    _check_splits(entry.name, counts, stats, len(assignment.splits))
    shown = trained.examples(folder)
    warnings = trained.warnings() + alike.warnings()
    as_trained = {
        "as_trained": shown,
        "warnings": warnings,
        "near_duplicates": alike.as_json(),
    }
    _write_dropped(folder, stats, box_stats, counts, assignment, as_trained)
    for line in told(entry.name, shown, warnings):
        progress(line, None)
    return _metrics(stats, box_stats, counts, assignment, time.perf_counter() - start)


def _with_own_ids(
    outcomes: Iterable[BuiltRow | DroppedRow],
    stats: DropStats,
    counts: Counter[str],
) -> Iterator[BuiltRow]:
    """Pass rows on, each with an id of its own, and count what is dropped."""
    # Hashes and not the ids themselves: 16 bytes a row, however long a path is.
    seen: set[bytes] = set()
    for outcome in outcomes:
        if isinstance(outcome, DroppedRow):
            stats.drop(outcome.reason, outcome.where, outcome.detail)
            continue
        row = outcome.row
        name = row.id
        # Sources that number each of their files from 0 give an id more than once.
        while _hash(name) in seen:
            name = f"{row.id}#{len(seen)}"
        seen.add(_hash(name))
        if name != row.id:
            outcome = replace(outcome, row=replace(row, id=name))
            counts["ids_changed"] += 1
        counts["rows_resized"] += outcome.resized
        counts["rows_without_boxes"] += outcome.unboxed
        counts["rows_without_picture"] += not row.images
        yield outcome


def _outcomes(
    builder: RowBuilder,
    processes: int,
    stats: DropStats,
    progress: Progress,
) -> Iterator[BuiltRow | DroppedRow]:
    """Yield what becomes of each record, in order."""
    name = builder.entry.name
    data = builder.entry.dataset
    chunks = _chunks(records(name, data))
    if processes <= 1:
        built_chunks = _build_here(builder, chunks)
    else:
        built_chunks = _build_in_processes(builder, chunks, processes)

    last_s = time.monotonic()
    fit = 0
    for chunk in built_chunks:
        for outcomes in chunk:
            stats.seen += max(1, len(outcomes))
            fit += sum(isinstance(outcome, BuiltRow) for outcome in outcomes)
            yield from outcomes
        if stats.seen >= EARLY and not fit:
            _check_bad(stats, name, data.max_bad_share)
        if time.monotonic() - last_s > _PROGRESS_EVERY_S:
            last_s = time.monotonic()
            progress(f"{name}: {stats.seen} rows read, {fit} fit", None)


# What a chunk of records becomes: a list of outcomes for each of them.
_BuiltChunk = list[list[BuiltRow | DroppedRow]]


def _chunks(found: Iterator[Record]) -> Iterator[list[Record]]:
    while chunk := list(islice(found, _CHUNK)):
        yield chunk


def _build_here(builder: RowBuilder, chunks: Iterable[list[Record]]) -> Iterator[_BuiltChunk]:
    for chunk in chunks:
        yield [builder.build(record) for record in chunk]


def _build_in_processes(
    builder: RowBuilder,
    chunks: Iterable[list[Record]],
    processes: int,
) -> Iterator[_BuiltChunk]:
    """Yield the same from several processes, at most a few chunks ahead of the reader."""
    waiting: deque[Future[_BuiltChunk]] = deque()
    # Spawned: a fork would copy locks that threads of this process may hold.
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start_worker, (builder,)) as pool:
        try:
            for chunk in chunks:
                # the first of these starts the processes
                with interrupts.held_back():
                    waiting.append(pool.submit(_build_chunk, chunk))
                if len(waiting) > _AHEAD * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                f"{builder.entry.name}: a process that prepares pictures was ended from outside, "
                f"most likely for its memory; run fewer than {processes} at once"
            ) from None
        finally:
            # Whoever reads may stop early, and what waits need not be done then.
            pool.shutdown(cancel_futures=True)


# Of a worker process: sent once, when it starts, and not with every chunk.
_worker_builder: RowBuilder


def _start_worker(builder: RowBuilder) -> None:
    global _worker_builder
    # It would wait for ever for the chunks of a job that was killed
    interrupts.end_with_starter()
    _worker_builder = builder


def _build_chunk(chunk: list[Record]) -> _BuiltChunk:
    return [_worker_builder.build(record) for record in chunk]


def _spooled(spool: Path) -> Iterator[tuple[str, TaskRow]]:
    with open(spool, encoding="utf-8") as file:
        for line in file:
            key, _, row = line.partition("\t")
            yield key, TaskRow.read(json.loads(row))


def _write_rows(
    spool: Path,
    folder: Path,
    groups: Groups,
    assignment: SplitAssignment,
    alike: LookAlikes,
    stats: DropStats,
    counts: Counter[str],
    trained: AsTrained,
) -> set[str]:
    """Write rows.jsonl without what is there twice or in two splits, count rows by split; return
    the pictures of these rows."""
    used: set[str] = set()
    seen: set[bytes] = set()
    with writing(folder / ROWS), open(folder / ROWS, "w", encoding="utf-8") as file:
        for key, row in _spooled(spool):
            group = groups.of(key)
            split = assignment.splits[group]

            # A source may itself have put one picture in two splits: the stricter one keeps it.
            # Rows of a split that was carved out of the training rows say train, and stay.
            if row.split and row.split != split and split not in assignment.carved:
                twin = alike.told_of(key, split)
                if twin is not None:
                    detail = f"{row.images[0]} of its {row.split} rows, nearly that of {twin}"
                    stats.drop(f"{_NEARLY} {split}", row.id, detail)
                    continue
                what = "picture" if row.images else "text"
                which = row.images[0] if row.images else "the prompt"
                stats.drop(f"{what} also in {split}", row.id, f"{which} of its {row.split} rows")
                continue
            request = _hash(f"{group}\0{' '.join(row.images)}\0{row.prompt}\0{row.answer}")
            if request in seen:
                detail = "same pictures, prompt and answer as an earlier row"
                stats.drop("duplicate", row.id, detail)
                continue

            seen.add(request)
            used.update(row.images)
            counts[split] += 1
            file.write(replace(row, split=split, group=group_name(group)).line())
            if split == "train":
                trained.show(row)
    return used


def _sweep_images(folder: Path, used: set[str], counts: Counter[str]) -> None:
    """Count the pictures of rows, and remove those of no row."""
    for file in folder.iterdir():
        if f"{IMAGES}/{file.name}" not in used:
            file.unlink()
            continue
        counts["pictures"] += 1
        counts["jpegs_as_they_were"] += file.suffix == ".jpg"
        counts["picture_bytes"] += file.stat().st_size


def _hash(text: str) -> bytes:
    # Half of a surrogate pair is no UTF-8, and may still stand in an id.
    encoded = text.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(encoded, digest_size=16).digest()


def _check_bad(stats: DropStats, name: str, max_bad_share: float) -> None:
    """Raise DataError when nothing was seen, or more than max_bad_share of it is bad."""
    where = f"loras.experts.{name}.dataset"
    if not stats.seen:
        raise DataError(f"{where}: the source has no rows; check path, the file names, or limit")
    remedy = (
        "Mend the source, set image_root, image_field or fields to what it has, or raise "
        "max_bad_share"
    )
    if any(reason.startswith(_NEARLY) for reason in stats.counts):
        remedy = (
            "Have such pictures in one split, set near_duplicates to keep, which leaves them where "
            "they are, or raise max_bad_share, which drops them"
        )
    stats.check(
        max_bad_share,
        f"rows of {where} cannot be used",
        "max_bad_share",
        remedy,
    )


def _count_boxes(built: BuiltRow, stats: DropStats) -> None:
    stats.seen += built.boxes
    for fault in built.box_faults:
        stats.drop("bad box", built.where, str(fault))


def _check_boxes(stats: DropStats, name: str, max_bad_share: float) -> None:
    """Raise DataError when more than max_bad_share of the boxes that rows need is bad."""
    stats.check(
        max_bad_share,
        f"boxes of loras.experts.{name}.dataset cannot be used",
        "max_bad_share",
        "Mend the source, set box_format to what it has, or raise max_bad_share",
    )


def _check_splits(name: str, counts: Counter[str], stats: DropStats, groups: int) -> None:
    missing = [split for split in SPLITS if not counts[split]]
    if missing:
        raise DataError(
            f"loras.experts.{name}.dataset gives no {' and no '.join(missing)} row, out of "
            f"{stats.seen} seen and {stats.total} dropped, with {groups} different pictures or "
            "groups of them: name a file or split for it, or give more pictures"
        )


def _write_dropped(
    folder: Path,
    stats: DropStats,
    box_stats: DropStats,
    counts: Counter[str],
    assignment: SplitAssignment,
    as_trained: dict,
) -> None:
    about = {
        "seen": stats.seen,
        "kept": sum(counts[split] for split in SPLITS),
        "bad": stats.bad,
        "dropped": dict(sorted(stats.counts.items())),
        "examples": dict(sorted(stats.examples.items())),
        "splits": {split: counts[split] for split in SPLITS},
        "carved": list(assignment.carved),
        "rows_without_picture": counts["rows_without_picture"],
        "boxes": box_stats.as_json(),
        **as_trained,
    }
    write_text(folder / DROPPED, json.dumps(about, indent=1, ensure_ascii=False) + "\n")


def _metrics(
    stats: DropStats,
    box_stats: DropStats,
    counts: Counter[str],
    assignment: SplitAssignment,
    spent_s: float,
) -> dict:
    return {
        "rows": {split: counts[split] for split in SPLITS},
        "groups": len(assignment.splits),
        "pictures": counts["pictures"],
        "jpegs_as_they_were": counts["jpegs_as_they_were"],
        "picture_bytes": counts["picture_bytes"],
        "rows_resized": counts["rows_resized"],
        "rows_without_boxes": counts["rows_without_boxes"],
        "boxes_dropped": box_stats.total,
        "rows_without_picture": counts["rows_without_picture"],
        "ids_changed": counts["ids_changed"],
        "seen": stats.seen,
        "dropped": dict(stats.counts),
        "notes": [*stats.told(), *box_stats.told("boxes")],
        "seconds": round(spent_s, 3),
        "rows_per_s": round(stats.seen / spent_s, 1),
    }
