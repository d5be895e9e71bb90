"""Histories for backfill_history.py as other programs left them, each read by the library that
wrote it: Hugging Face's Trainer, wandb offline, TensorBoard, stores of MoleForge; JSONL, CSV.

What cannot be read is told and never guessed at: a file that is torn gives what is whole.
"""

import csv
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.store.address import ADDRESS
from pipeline.store.artifacts import Store
from pipeline.store.history import read
from pipeline.store.imported import Origin, is_imported
from pipeline.store.mark import MARK
from pipeline.store.roots import readable_roots

TRAINER_STATE = "trainer_state.json"
EVENTS = "events.out.tfevents."
DELIMITERS = (",", ";", "\t", "|")
# What others call what a row has here, as they write it in lower case; the first that a row has
# counts. Their epochs are passes with a fraction, ours whole numbers of those that have ended.
NAMES = {
    "step": ("step", "global_step", "train/global_step", "iteration", "iter", "_step"),
    "train_nats": ("train_nats", "loss", "train/loss", "train_loss", "loss/train", "training_loss"),
    "valid_nats": (
        "valid_nats",
        "eval_loss",
        "eval/loss",
        "val_loss",
        "val/loss",
        "valid_loss",
        "valid/loss",
        "validation_loss",
        "validation/loss",
        "loss/eval",
        "loss/val",
        "loss/valid",
        "loss/validation",
    ),
    "lr": ("lr", "learning_rate", "train/learning_rate", "train/lr"),
    "grad_norm": ("grad_norm", "train/grad_norm"),
    "tokens": ("tokens", "num_input_tokens_seen", "train/num_input_tokens_seen"),
    "tokens_per_s": ("tokens_per_s", "tokens_per_second", "train/tokens_per_second"),
    "time": ("time", "_timestamp", "wall_time", "timestamp"),
    "passes": ("passes", "epoch", "train/epoch"),
}


@dataclass(frozen=True)
class Found:
    """A history, with what of it was left out, in words."""

    origin: Origin
    rows: list[dict[str, Any]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """Something that is not taken, and why."""

    path: Path
    why: str


Read = Found | Skipped


def histories(path: Path, names: Mapping[str, str]) -> Iterator[Read]:
    """Yield what lies at a path, a folder with all below it. `names`: by what a source calls a
    column, what it is here, before NAMES."""
    if path.is_dir():
        yield from _below(path, names)
        return
    if not path.is_file():
        yield Skipped(path, "is not there")
        return
    if path.name == TRAINER_STATE:
        yield from _trainers([path], names)
    elif path.suffix == ".wandb":
        yield _wandb(path, names)
    elif path.name.startswith(EVENTS):
        yield _tensorboard(path.parent, [path], names)
    elif path.suffix in (".jsonl", ".ndjson"):
        yield _columns("jsonl", path, _json_rows(path), names)
    elif path.suffix in (".csv", ".tsv"):
        yield _columns("csv", path, _csv_rows(path), names)
    else:
        yield Skipped(path, "its name ends in none of .jsonl .csv .tsv .wandb, and is none else")


def _below(folder: Path, names: Mapping[str, str]) -> Iterator[Read]:
    """Yield what lies below a folder. Plain JSONL and CSV, which may be anything, are read where
    they are named themselves."""
    states: list[Path] = []
    events: dict[Path, list[Path]] = {}
    for above, folders, files in os.walk(folder):
        folders.sort()
        here = Path(above)
        if MARK in files:
            folders.clear()
            yield from _store(here)
            continue
        for name in sorted(files):
            if name == TRAINER_STATE:
                states.append(here / name)
            elif name.endswith(".wandb"):
                yield _wandb(here / name, names)
            elif name.startswith(EVENTS):
                events.setdefault(here, []).append(here / name)
    yield from _trainers(states, names)
    for here, paths in events.items():
        yield _tensorboard(here, paths, names)


def _store(root: Path) -> Iterator[Read]:
    """Yield the histories of another store of MoleForge."""
    store = Store(root)
    try:
        store.open(create=False)
    except PipelineError as error:
        yield Skipped(root, str(error))
        return
    runs = {}
    # of several that have it the latest
    for each in reversed(readable_roots(store)):
        runs |= dict.fromkeys(each.addresses, each.name)
    for path in sorted((root / "history").glob("*.jsonl")):
        parts = ADDRESS.fullmatch(path.stem)
        if parts is None or is_imported(path.stem):
            yield Skipped(path, "was imported there" if parts else "its name is no address")
            continue
        try:
            made = store.manifest(path.stem) if store.has(path.stem) else None
            past = read(path, made.metrics.get("steps") if made else None)
        except PipelineError as error:
            yield Skipped(path, str(error))
            continue
        if not past.rows:
            yield Skipped(path, past.missing or "has no row")
            continue
        name = path.stem[: -len(parts["digest"]) - 1]
        origin = Origin(
            kind="moleforge",
            path=str(path.resolve()),
            name="-".join(filter(None, (runs.get(path.stem), name))),
            # wherever the store lies: two trainings of one recipe differ in when they began
            id=f"{path.stem} {past.rows[0].get('time')}",
            made=made.made.get("at", "") if made else "",
            metrics=_clean(made.metrics) if made else {},
            settings=_clean(_object(store.folder(path.stem) / "run.json")),
        )
        yield Found(origin, past.rows, (past.missing,) if past.missing else ())


def _object(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds, an empty one where it is none."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _trainers(paths: list[Path], names: Mapping[str, str]) -> Iterator[Read]:
    """Yield the trainings of Hugging Face's Trainer, of several checkpoints of one the last."""
    trainings: dict[Path, list[tuple[int, Path, dict[str, Any]]]] = {}
    for path in paths:
        state = _object(path)
        log, step = state.get("log_history"), state.get("global_step")
        if not isinstance(log, list) or not isinstance(step, int):
            yield Skipped(path, "is torn, or no state of a Trainer: it has no log_history")
            continue
        folder = path.parent
        if re.fullmatch(r"checkpoint-\d+", folder.name):
            folder = folder.parent
        trainings.setdefault(folder, []).append((step, path, state))
    for folder, found in trainings.items():
        found.sort(key=lambda each: each[0], reverse=True)
        _, last, state = found[0]
        yield _trainer(folder, last, state, names)
        for _, path, earlier in found[1:]:
            log = earlier["log_history"]
            if log == state["log_history"][: len(log)]:
                yield Skipped(path, f"is an earlier part of {last}")
            else:
                yield _trainer(path.parent, path, earlier, names)


def _trainer(
    folder: Path, path: Path, state: dict[str, Any], names: Mapping[str, str]
) -> Found | Skipped:
    kept = []
    for row in state["log_history"]:
        # The last one has means over the whole training under the names of a step's
        if isinstance(row, dict) and "train_runtime" not in row:
            kept.append(row)
    rows, notes = _rows(kept, names)
    if not rows:
        return Skipped(path, "its log_history has no row with a step and a number")
    metrics = {}
    # Of one that has not come to its end nobody knows whether it goes on
    if state["global_step"] == state.get("max_steps"):
        metrics = {"steps": state["global_step"], "planned_steps": state["max_steps"]}
    settings = {}
    for name in ("num_train_epochs", "train_batch_size", "logging_steps", "eval_steps"):
        settings[name] = state.get(name)
    origin = Origin(
        "transformers",
        str(path.resolve()),
        folder.resolve().name,
        str(folder.resolve()),
        metrics=metrics,
        settings=_clean(settings),
    )
    return Found(origin, rows, notes)


def _wandb(path: Path, names: Mapping[str, str]) -> Found | Skipped:
    """Read a run of wandb by wandb's own command, which prints a record a line."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", str(path), "--json"]
    quiet = os.environ | {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
    done = subprocess.run(command, capture_output=True, env=quiet, check=False)
    said = done.stderr.decode("utf-8", "replace").strip()
    # Of a torn or damaged file it prints what is whole, and says so
    notes = tuple(line for line in said.splitlines() if line)
    if done.returncode:
        return Skipped(path, said.removeprefix("Error: ") or "wandb cannot read it")
    run: dict[str, Any] = {}
    logged = []
    for line in done.stdout.splitlines():
        record = json.loads(line)
        if record["type"] == "run":
            run = record["run"]
        elif record["type"] == "history":
            history = record["history"]
            step = history.get("step", {}).get("num")
            logged.append({"_step": step, **history.get("item", {})})
    rows, left_out = _rows(logged, names)
    if not rows:
        return Skipped(path, "; ".join([*notes, "it has no row with a step and a number"]))
    run_id = str(run.get("run_id") or path.stem.removeprefix("run-"))
    started = str(run.get("start_time", ""))
    settings = dict(run.get("config", {}).get("update", {}))
    settings.pop("_wandb", None)
    origin = Origin(
        "wandb",
        str(path.resolve()),
        str(run.get("display_name") or run_id),
        # a run that was resumed has a folder for each attempt
        "/".join([run.get("entity", ""), run.get("project", ""), run_id, started]),
        made=started,
        settings=_clean(settings),
    )
    return Found(origin, rows, notes + left_out)


def _tensorboard(folder: Path, paths: list[Path], names: Mapping[str, str]) -> Found | Skipped:
    """Read the event files of one run, which a folder is to TensorBoard."""
    # Only who has such files pays for the import
    from google.protobuf.message import DecodeError
    from tensorboard import data_compat
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto import event_pb2
    from tensorboard.util import tensor_util

    by_step: dict[int, dict[str, Any]] = {}
    notes = []
    others: Counter[str] = Counter()
    for path in paths:
        whole = 0
        try:
            for record in RawEventFileLoader(str(path)).Load():
                event = data_compat.migrate_event(event_pb2.Event.FromString(record))
                # its length, and a checksum of that and of the record
                whole += len(record) + 16
                for value in event.summary.value:
                    if value.metadata.plugin_data.plugin_name != "scalars":
                        others[value.tag] += 1
                        continue
                    row = by_step.setdefault(event.step, {"step": event.step})
                    row["time"] = event.wall_time
                    row[value.tag] = tensor_util.make_ndarray(value.tensor).item()
        except (DecodeError, ValueError, TypeError) as error:
            notes.append(f"{path.name} has a record that is none: {error}")
        if whole != path.stat().st_size:
            notes.append(f"{path.name} is whole up to byte {whole} of {path.stat().st_size}")
    # What hyperparameters and layouts of the page are kept as
    for tag in others:
        if not tag.startswith("_hparams_"):
            notes.append(f"{tag} is no scalar")
    rows, left_out = _rows(by_step.values(), names)
    if not rows:
        return Skipped(folder, "; ".join([*notes, "it has no scalar"]))
    place = folder.resolve()
    origin = Origin("tensorboard", str(place), place.name, str(place))
    return Found(origin, rows, (*notes, *left_out))


def _columns(
    kind: str, path: Path, lines: Iterable[dict[str, Any] | None], names: Mapping[str, str]
) -> Found | Skipped:
    """Return rows of a plain file; a line that is none of them is None."""
    kept = []
    bad = 0
    try:
        for line in lines:
            bad += line is None
            if line is not None:
                kept.append(line)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        return Skipped(path, f"cannot be read: {error}")
    rows, notes = _rows(kept, names)
    if bad:
        notes = (*notes, f"{bad} line{'s' * (bad > 1)} cannot be read")
    if not rows:
        known = ", ".join(kept[0]) if kept else "none"
        why = f"no row has a step and a number (its columns: {known}); name them with --map"
        return Skipped(path, why)
    place = path.resolve()
    return Found(Origin(kind, str(place), place.stem, str(place)), rows, notes)


def _json_rows(path: Path) -> Iterator[dict[str, Any] | None]:
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                yield None
                continue
            yield row if isinstance(row, dict) else None


def _csv_rows(path: Path) -> Iterator[dict[str, Any] | None]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        file.seek(0)
        for row in csv.DictReader(file, delimiter=_delimiter(header, path.suffix)):
            # More cells than columns, or fewer: a line that was torn
            if None in row or None in row.values():
                yield None
            else:
                yield {key: _cell(value) for key, value in row.items()}


def _delimiter(header: str, ending: str) -> str:
    """Return what parts the columns of a header into most; what the file's ending says, of those
    that part it alike."""
    likely = "\t" if ending == ".tsv" else ","

    def columns(delimiter: str) -> int:
        return len(next(csv.reader([header], delimiter=delimiter), ()))

    return max((likely, *DELIMITERS), key=columns)


def _cell(text: str) -> int | float | None:
    """Return the number in a cell, None for anything else."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


def _rows(
    logged: Iterable[Mapping[str, Any]], names: Mapping[str, str]
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Return rows under the names they have here, those of one step as one row, and what was left
    out, in words."""
    by_step: dict[int, dict[str, Any]] = {}
    without = 0
    texts: set[str] = set()
    for row in logged:
        named = _clean(_named(row, names))
        texts |= {key for key, value in named.items() if isinstance(value, str)}
        named = {key: value for key, value in named.items() if key not in texts}
        step = named.pop("step", None)
        if isinstance(step, float) and step.is_integer():
            step = int(step)
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            without += 1
            continue
        if any(value is not None for value in named.values()):
            # what was written later of the same step, as after a restart, counts
            by_step.setdefault(step, {"step": step}).update(named)
    notes = []
    if without:
        notes.append(f"{without} row{'s' * (without > 1)} without a step")
    if texts:
        notes.append(f"texts are left out: {', '.join(sorted(texts))}")
    return [by_step[step] for step in sorted(by_step)], tuple(notes)


def _named(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return a row with what it has under other names under those that it has here."""
    said = {str(key).lower(): str(key) for key in row}
    taken: dict[str, str] = {}
    for here, theirs in NAMES.items():
        found = next((said[name] for name in theirs if name in said), None)
        if found is not None and here not in names.values():
            taken[found] = here
    # What somebody typed counts before what is guessed
    taken |= {theirs: here for theirs, here in names.items() if theirs in row}
    named = {}
    for key, value in row.items():
        here = taken.get(str(key), str(key))
        # In a history that would be where an attempt begins, which takes back the rows after it
        named["start_" if here == "start" else here] = value
    return named


def _clean(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of values is numbers, texts and groups of them; NaN and infinity are null."""
    kept = {}
    for key, value in values.items():
        kept[str(key)] = _plain(value)
    return kept


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _clean(value)
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    # wandb's reader has no other way of writing them
    if value in ("NaN", "Infinity", "-Infinity"):
        return None
    return value if isinstance(value, int | str | None) else str(value)
