"""`history export`: rows for other programs, as CSV, as JSON lines, or as events of TensorBoard."""

import csv
import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...store.address import job_of
from ...store.artifacts import Store
from ...store.history import numbers, read
from ...store.history_fold import JOINT
from ...store.room import PART, writing_to
from .lines import Known, PastTraining

FORMATS = {
    "csv": "a line for each row, a column for each number by its dotted path",
    "jsonl": "the rows as they are, with run, stage and item",
    "tensorboard": "a folder of events for each training, by TensorBoard's own writer",
}
PLACES = ("runs", "address", "stage", "item", "step")


def export(
    trainings: Sequence[PastTraining],
    known: Known,
    index: sqlite3.Connection,
    store: Store,
    to: Path,
    format_: str,
) -> int:
    """Write the rows of trainings; return how many. Raises ConfigError where something is at `to`
    already, UnreadableFile, DiskFull, StoreError."""
    if to.exists():
        raise ConfigError(f"--to: there is a {to} already: name what is not there yet")
    if not trainings:
        raise ConfigError("no training has a history here, so there is nothing to export")
    if format_ == "tensorboard":
        # only who asks for it pays for its import
        from .tensorboard import write_events

        rows = 0
        with writing_to(to, "folder"):
            for training in trainings:
                told = read(store.history(training.address)).rows
                rows += write_events(told, to / training.address)
        return rows
    of = _runs_of(known)

    def places(training: PastTraining) -> list[Any]:
        stage, item = job_of(training.address)
        return [" ".join(of.get(training.address, ())), training.address, stage, item or ""]

    part = to.with_name(f"{to.name}{PART}")
    write = _csv if format_ == "csv" else _jsonl
    with writing_to(to, "file"):
        to.parent.mkdir(parents=True, exist_ok=True)
        rows = write(trainings, places, index, store, part)
        part.rename(to)
    return rows


def _runs_of(known: Known) -> dict[str, list[str]]:
    """Return which runs each training is of."""
    found: dict[str, list[str]] = {}
    for run in known.runs:
        for training in run.trainings if run.has_root else ():
            found.setdefault(training.address, []).append(run.id)
    return found


def _csv(
    trainings: Sequence[PastTraining],
    places: Callable[[PastTraining], list[Any]],
    index: sqlite3.Connection,
    store: Store,
    part: Path,
) -> int:
    keys = [key for key in _keys(trainings, index) if key not in PLACES]
    rows = 0
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*PLACES, *keys])
        for training in trainings:
            begin = places(training)
            for row in read(store.history(training.address)).rows:
                found = dict(numbers(row, JOINT))
                writer.writerow([*begin, row["step"], *(found.get(key, "") for key in keys)])
                rows += 1
    return rows


def _keys(trainings: Sequence[PastTraining], index: sqlite3.Connection) -> list[str]:
    """Return every key of the trainings' rows, in order."""
    wanted = {training.address for training in trainings}
    found = set()
    for address, key in index.execute("SELECT address, key FROM series"):
        if address in wanted:
            found.add(key)
    return sorted(found)


def _jsonl(
    trainings: Sequence[PastTraining],
    places: Callable[[PastTraining], list[Any]],
    _index: sqlite3.Connection,
    store: Store,
    part: Path,
) -> int:
    rows = 0
    with part.open("w", encoding="utf-8") as file:
        for training in trainings:
            begin = dict(zip(PLACES, places(training), strict=False))
            for line in _lines(begin, training, store):
                file.write(line)
                rows += 1
    return rows


def _lines(begin: dict[str, Any], training: PastTraining, store: Store) -> Iterator[str]:
    for row in read(store.history(training.address)).rows:
        yield json.dumps(begin | row) + "\n"
