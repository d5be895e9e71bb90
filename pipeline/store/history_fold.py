"""One file of a store as rows of its history.db: a history, an artifact, the root of a run, the
results of experiments, the note of what is served, what a command has cost.

What cannot be read is no row and a sentence in `files`, so that it is told and stops nobody.
"""

import json
import math
import sqlite3
from collections.abc import Iterable
from pathlib import Path

from ..errors import PipelineError
from ..report.schema.reading import read as read_report
from ..report.schema.reading import read_results
from ..report.scores import scores, verdicts
from . import manifest as manifests
from .bundle import SUMS
from .costs import read_costs
from .history import VALIDATION, Row, numbers, read
from .history_schema import OF_KIND
from .reading import parse_object, read_bytes
from .roots import read_root

REPORT = "report.json"
# Where a row stands, and no figure of it.
PLACES = ("step", "tokens", "time", "epoch")
JOINT = "."
# What SQLite has room for in an integer.
MOST = 2**63
_INSERTS = {
    "histories": 8,
    "series": 9,
    "validations": 6,
    "artifacts": 7,
    "results": 3,
    "evaluations": 7,
    "scores": 6,
    "deploys": 3,
    "runs": 7,
    "run_addresses": 2,
    "served": 3,
    "commands": 8,
    "spent": 7,
    "experiments": 2,
    "trials": 14,
    "trial_runs": 5,
}


def fold(index: sqlite3.Connection, kind: str, subject: str, path: Path) -> str:
    """Put what a file says in the place of what it said before; return what is wrong with it, ""
    when nothing is. Raises sqlite3.Error."""
    forget(index, kind, subject)
    try:
        if kind == "history":
            return _history(index, subject, path)
        if kind == "artifact":
            return _artifact(index, subject, path)
        if kind == "root":
            return _root(index, path)
        if kind == "costs":
            return _costs(index, subject, path)
        if kind == "experiments":
            return _experiments(index, subject, path)
        return _served(index, path)
    except PipelineError as error:
        return str(error)
    except FileNotFoundError:
        # it has gone since it was listed, and the next look finds nothing
        return ""


def forget(index: sqlite3.Connection, kind: str, subject: str) -> None:
    """Remove the rows of a file that is gone, or is about to be folded anew. Raises
    sqlite3.Error."""
    for table, column in OF_KIND[kind]:
        index.execute(f"DELETE FROM {table} WHERE {column} = ?", (subject,))  # noqa: S608
    if kind == "served":
        index.execute("DELETE FROM served")


def _insert(index: sqlite3.Connection, table: str, rows: Iterable[tuple]) -> None:
    marks = ", ".join("?" * _INSERTS[table])
    # a name of ours in the text, and every value beside it
    text = f"INSERT OR REPLACE INTO {table} VALUES ({marks})"  # noqa: S608
    kept = list(rows)
    try:
        index.executemany(text, kept)
    except UnicodeEncodeError:
        # A file may be called by bytes that are no text
        index.executemany(text, [tuple(map(_sayable, row)) for row in kept])


def _sayable(value: object) -> object:
    """Return a value as SQLite takes it: of text, halves of characters as question marks."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def _history(index: sqlite3.Connection, address: str, path: Path) -> str:
    """Fold a history in. Raises UnreadableFile."""
    # of a job that is done it is known how far its rows must reach
    done = index.execute(
        "SELECT value FROM results WHERE address = ? AND key = 'steps'", (address,)
    ).fetchone()
    found = read(path, int(done[0]) if done and done[0] is not None else None)
    # a line that was written by something else may hold whatever JSON can say
    rows = [row for row in found.rows if abs(row["step"]) < MOST]
    times = [time for time in (_real(row.get("time")) for row in rows) if time is not None]
    last_step = rows[-1]["step"] if rows else 0
    first_time = times[0] if times else None
    last_time = max(times, default=None)
    steps = found.steps if abs(found.steps) < MOST else 0
    told = (address, len(rows), last_step, steps, first_time, last_time)
    _insert(index, "histories", [(*told, int(found.torn), found.missing)])
    _insert(index, "series", _series(address, rows))
    _insert(index, "validations", _validations(address, rows))
    return ""


def _real(value: object) -> float | None:
    """Return a number that SQLite can hold, None for anything else."""
    if not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _series(address: str, rows: list[Row]) -> list[tuple]:
    """Return how often each number of a history is there, its first and last value, and where it
    was lowest and highest."""
    columns: dict[str, list[tuple[float, int]]] = {}
    for row in rows:
        step = row["step"]
        for key, value in row.items():
            # most are plain numbers, and there are millions of them
            if isinstance(value, int | float):
                columns.setdefault(key, []).append((value, step))
            elif value is not None:
                for name, each in numbers(value, JOINT, key):
                    columns.setdefault(name, []).append((each, step))
    found = []
    for key, numbered in columns.items():
        points = []
        for number, step in numbered:
            value = _real(number)
            if value is not None:
                points.append((value, step))
        if key == "step" or not points:
            continue
        # of equal ones the earlier step
        low, low_step = min(points)
        high, negative = max((value, -step) for value, step in points)
        ends = (points[0][0], points[-1][0])
        found.append((address, key, len(points), *ends, low, low_step, high, -negative))
    return found


def _validations(address: str, rows: list[Row]) -> list[tuple]:
    found = []
    for row in rows:
        if VALIDATION in row:
            tokens = _real(row.get("tokens"))
            told = (_real(row.get("epoch")), _real(row.get("time")), _real(row[VALIDATION]))
            found.append((address, row["step"], tokens, *told))
    return found


def _artifact(index: sqlite3.Connection, address: str, path: Path) -> str:
    """Fold what is whole in; of a report its figures too. Raises DamagedArtifact,
    UnreadableFile."""
    made = manifests.read(path.parent)
    machine = made.made.get("machine") or {}
    name = machine.get("gpu") or machine.get("cpu") or ""
    at = str(made.made.get("at", ""))
    seconds = made.made.get("seconds")
    row = (address, made.stage, made.item, at, seconds, made.bytes, name)
    _insert(index, "artifacts", [row])
    results = [(address, key, _real(value)) for key, value in numbers(made.metrics, JOINT)]
    _insert(index, "results", results)
    if SUMS in made.files:
        _insert(index, "deploys", [(address, at, made.bytes)])
    elif REPORT in made.files:
        _report(index, address, at, path.with_name(REPORT))
    return ""


def _report(index: sqlite3.Connection, address: str, at: str, path: Path) -> None:
    """Fold the figures of a report in. Raises StoreError, NewerStore, DamagedArtifact,
    UnreadableFile."""
    found = read_report(read_bytes(path))
    ended = verdicts(found)
    criteria = (ended.passed, ended.failed, ended.untold)
    _insert(index, "evaluations", [(address, found.run, found.family, at, *criteria)])
    rows = []
    for place, score in enumerate(scores(found)):
        told = (score.name, score.measure, score.value, int(score.serves))
        rows.append((address, place, *told))
    _insert(index, "scores", rows)


def _root(index: sqlite3.Connection, path: Path) -> str:
    """Fold a run in. Raises DamagedArtifact, UnreadableFile, NewerStore."""
    root = read_root(path)
    run = path.stem
    overrides = json.dumps(root.overrides)
    told = (run, root.name, root.family, root.at, root.file, overrides, int(root.removed))
    _insert(index, "runs", [told])
    _insert(index, "run_addresses", [(run, address) for address in root.makes or root.addresses])
    return ""


def _costs(index: sqlite3.Connection, command: str, path: Path) -> str:
    """Fold in what a command has cost. Raises DamagedArtifact, UnreadableFile, NewerStore."""
    costs = read_costs(path)
    figures = (costs.seconds, costs.usd, costs.estimated_usd)
    told = (command, costs.command, costs.begun, costs.ended, costs.prices)
    _insert(index, "commands", [(*told, *figures)])
    rows: list[tuple] = []
    for row in costs.rows:
        for address, seconds, usd, estimated in row.shares():
            if address:
                rows.append((command, row.stage, address, "", seconds, usd, estimated))
                continue
            runs = costs.runs or ("",)
            parts = (_part(value, len(runs)) for value in (seconds, usd, estimated))
            share = tuple(parts)
            rows += [(command, row.stage, "", run, *share) for run in runs]
    _insert(index, "spent", rows)
    return ""


def _part(value: float | None, parts: int) -> float | None:
    return None if value is None else value / parts


def _experiments(index: sqlite3.Connection, name: str, path: Path) -> str:
    """Fold the results of experiments in. Raises StoreError, NewerStore, UnreadableFile."""
    found = read_results(read_bytes(path))
    _insert(index, "experiments", [(name, found.made)])
    trials = []
    runs = []
    for place, trial in enumerate(found.trials):
        verdicts_of = [each.passed for each in trial.criteria]
        about = (trial.name, trial.makes, trial.origin, int(trial.is_dense))
        tokens = next((run.tokens for run in trial.done), "")
        losses = (trial.valid, trial.spread, trial.bits_per_byte, trial.gap)
        figures = [_real(each) for each in losses]
        criteria = [verdicts_of.count(verdict) for verdict in (True, False, None)]
        trials.append((name, place, *about, tokens, *figures, *criteria))
        for run in trial.runs:
            runs.append((name, trial.name, run.seed, run.state, run.address))
    _insert(index, "trials", trials)
    _insert(index, "trial_runs", runs)
    return ""


def _served(index: sqlite3.Connection, path: Path) -> str:
    """Fold in what is served; a note that says something else is told. Raises DamagedArtifact,
    UnreadableFile."""
    try:
        note = parse_object(read_bytes(path))
    except ValueError as error:
        return f"{path} does not say what is served: {error}"
    current = note.get("address")
    since = {current: ""}
    versions = note.get("versions")
    for version in versions if isinstance(versions, list) else ():
        if isinstance(version, dict):
            since[version.get("address")] = str(version.get("at", ""))
    rows = []
    for address, at in since.items():
        if isinstance(address, str):
            rows.append((address, at, int(address == current)))
    _insert(index, "served", rows)
    return ""
