"""What a job did, step by step: rows on disk, a bar on the screen, Weights & Biases when asked.

One writer per file, and the file only grows: a job that was killed and goes on appends where it
stopped and says from which step, and `read` leaves out what it went back over. Nothing but curves
hangs on it, so damage to it stops nobody: what can be read is, and what is missing is told. No file
stays open between two rows, because a volume that is refreshed on Modal may hold none.
"""

import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console

from ..errors import ConfigError, StoreError
from .display import LOSSES, Lines, ProgressLine, Row
from .reading import reading
from .room import no_room

# What a validation adds, in a row of its own beside the training's of the same step.
VALIDATION = "valid_nats"
# What stands around a line without meaning anything; a lost block of the disk is zeros.
BLANK = b"\0 \t\r"
# Stretches of lost steps that are named one by one; a history with more is not readable for them.
NAMED = 4


@dataclass(frozen=True)
class History:
    """The rows that count, in step order, and a few words on what is missing; none when all is
    there.

    `lost`: first and last step of each stretch whose rows are gone; `steps`: of the training as it
    was begun last, 0 where an older history does not say; `torn`: the last line is not whole, as
    its writer was killed or is just writing it.
    """

    rows: list[Row]
    missing: str = ""
    lost: tuple[tuple[int, int], ...] = ()
    steps: int = 0
    torn: bool = False


class Recorder:
    """The history of one job while it runs.

    `every`: steps between two rows, by which a reader knows what is missing; 0: they come as they
    like. Raises ConfigError when wandb is asked for and cannot start, StoreError or DiskFull when a
    row cannot be written.
    """

    def __init__(
        self,
        path: Path,
        *,
        job: str,
        total_steps: int,
        every: int = 0,
        wandb_mode: str = "off",
        project: str = "moleforge",
        group: str | None = None,
        run_id: str = "",
        folder: Path | None = None,
        settings: dict | None = None,
        console: Console | None = None,
    ) -> None:
        self.path = Path(path)
        self._every = every
        self._steps = total_steps
        self._started = False
        _repair(self.path)
        self._mirror = None
        if wandb_mode != "off":
            beside = Path(folder or self.path.parent)
            self._mirror = _Mirror(wandb_mode, project, group, run_id, job, beside, settings or {})
        # rich would take the variable FORCE_COLOR for a terminal: ask the stream itself
        console = console or Console(stderr=True, force_terminal=sys.stderr.isatty())
        live = console.is_terminal and not console.is_dumb_terminal
        shown = ProgressLine if live else Lines
        self._display = shown(console, job, total_steps)

    def start(self, step: int) -> None:
        """Begin at step: 0, or where a killed attempt goes on; rows of that attempt after step no
        longer count."""
        missing = ""
        if self._every:
            missing = read(self.path, step).missing if step else ""
            begun = {"start": step, "every": self._every, "steps": self._steps}
            _append(self.path, begun)
        # the first attempt's rows need no mark then: everything in the file is theirs
        elif self.path.exists() and self.path.stat().st_size:
            _append(self.path, {"start": step, "steps": self._steps})
        self._display.start(step)
        if missing:
            self._display.note(f"this job's history: {missing}; its curves will lack that")
        self._started = True

    def row(self, row: Row) -> None:
        """Append one row, which has a `step`; show it; pass its numbers on to wandb."""
        if not self._started:
            self.start(row["step"])
        row = _plain(row)
        _append(self.path, row)
        self._display.row(row)
        if self._mirror:
            self._mirror.row(row)

    def step_taken(self, step: int) -> None:
        """Show how far the job is; nothing is kept."""
        self._display.step_taken(step)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._display.note(text)

    def close(self, ok: bool = True) -> None:
        """Leave the last figures on the screen and finish the wandb run; a second call does
        nothing."""
        self._display.close(ok)
        if self._mirror:
            self._mirror.close(ok)
            self._mirror = None


def read(path: Path, steps: int | None = None) -> History:
    """Return what can be read of a history; a last line torn by a kill is left out.

    `steps`: how far the job is, so that what is missing at the end is known too. Raises
    UnreadableFile.
    """
    try:
        with reading(path, "history"):
            *lines, tail = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return History([], "the file is gone")
    kept: list[Row] = []  # of earlier attempts, as far as they count
    fresh: list[Row] = []  # of the attempt that is read just now
    starts: list[Row] = []  # of the attempts that count
    damaged = 0
    steps_wanted = 0
    # a job that goes on has mended its last line: only one that is being written may be torn
    for line in [*lines, tail]:
        entry = _parse(line)
        torn = line is tail and steps is None
        lost = b"\0" in line or (entry is None and line.strip(BLANK))
        if lost and not torn:
            damaged += 1
        if entry is None:
            continue
        if "step" in entry:
            fresh.append(entry)
            continue
        # an attempt starts: what went before counts up to the step where this one goes on
        kept = [row for row in _overlay(kept, fresh) if row["step"] <= entry["start"]]
        fresh = []
        starts = [each for each in starts if each["start"] < entry["start"]]
        starts.append(entry)
        told = entry.get("steps")
        steps_wanted = told if isinstance(told, int) else 0
    rows = sorted(_overlay(kept, fresh), key=lambda row: row["step"])
    last = steps
    if last is None:
        last = max((row["step"] for row in rows), default=0)
    stretches = _lost(rows, starts, last)
    words = []
    if damaged:
        words.append(f"{damaged} line{'s' * (damaged > 1)} cannot be read")
    if stretches:
        words.append(_lost_steps(stretches))
    elif steps and not rows:
        words.append("no row is left")
    is_torn = bool(tail.strip(BLANK)) and _parse(tail) is None
    return History(rows, " and ".join(words), tuple(stretches), steps_wanted, is_torn)


def _lost(rows: list[Row], starts: list[Row], last: int) -> list[tuple[int, int]]:
    """Return the stretches of steps up to last whose rows attempts must have written."""
    found = set()
    for row in rows:
        # a validation's row says nothing of the training's beside it
        if VALIDATION not in row or any(name in row for name in LOSSES):
            found.add(row["step"])
    lost: list[tuple[int, int]] = []
    goes_on = False
    for start, end in pairwise([*starts, {"start": last}]):
        every = start.get("every")
        if isinstance(every, int) and every > 0:
            first = (start["start"] // every + 1) * every
            for step in range(first, end["start"] + 1, every):
                if step in found:
                    goes_on = False
                    continue
                begins = lost.pop()[0] if goes_on else step
                lost.append((begins, step))
                goes_on = True
    return lost


def _lost_steps(lost: list[tuple[int, int]]) -> str:
    """Return stretches of steps in words."""
    named = []
    for first, last in lost[:NAMED]:
        named.append(str(first) if first == last else f"{first} to {last}")
    if len(lost) > NAMED:
        named.append(f"{len(lost) - NAMED} further stretches up to {lost[-1][1]}")
    text = ", ".join(named[:-1]) + " and " + named[-1] if len(named) > 1 else named[0]
    if text.isdecimal():
        return f"step {text} is not in it"
    return f"steps {text} are not in it"


def _overlay(kept: list[Row], fresh: list[Row]) -> list[Row]:
    """Return kept rows but those that were made again, then the fresh ones."""
    # a step's training and its validation are two rows, and one of them may be made again alone
    again = {(row["step"], VALIDATION in row) for row in fresh}
    return [row for row in kept if (row["step"], VALIDATION in row) not in again] + fresh


def _parse(line: bytes) -> Row | None:
    """Return a line's entry: a row with its step, or where an attempt started; None for anything
    else."""
    try:
        entry = json.loads(line.strip(BLANK))
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict):
        return None
    step = entry.get("step", entry.get("start"))
    return entry if isinstance(step, int) else None


def _repair(path: Path) -> None:
    """Make the file end with a whole line, so that the next row starts one of its own."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        end = data.rfind(b"\n") + 1
        if end == len(data):
            return
        with path.open("r+b") as file:
            if _parse(data[end:]):
                # only the newline is missing
                file.seek(0, os.SEEK_END)
                file.write(b"\n")
            else:
                file.truncate(end)
    except OSError as error:
        raise _unwritable(path, error) from None


def _append(path: Path, entry: Row) -> None:
    line = json.dumps(entry, separators=(",", ":"), allow_nan=False) + "\n"
    try:
        # one write of the whole line, so that a kill leaves it out or tears it at one place
        with path.open("ab", buffering=0) as file:
            data = line.encode()
            written = file.write(data)
            # a disk that fills up takes what it has room for, and says so at the next write
            while written < len(data):
                written += file.write(data[written:])
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> StoreError:
    full = no_room(error, path)
    if full:
        return full
    return StoreError(
        f"history {path} cannot be written: {error.strerror}; check path and permissions"
    )


def _plain(value: Any) -> Any:
    """Return value as JSON knows it: arrays and tensors as lists, NaN and infinity as null."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    # numpy and torch, neither of which this module imports
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return value


def check_key(mode: str) -> None:
    """Raise ConfigError when wandb is to be told online, and cannot be imported or has no key; its
    servers are not asked."""
    if mode == "online":
        _log_in(_import_wandb())


def _log_in(wandb: ModuleType) -> None:
    # without a key wandb.init would ask for one, and a job has nobody to answer
    if not wandb.login(prompt=False, verify=False):
        raise ConfigError(
            "runtime.wandb is online, but no Weights & Biases key was found: set "
            "WANDB_API_KEY, or set runtime.wandb to offline and send the run later with "
            "`wandb sync`"
        )


class _Mirror:
    """The same rows as a Weights & Biases run, one per address however often the job is resumed."""

    def __init__(
        self,
        mode: str,
        project: str,
        group: str | None,
        run_id: str,
        job: str,
        folder: Path,
        settings: dict[str, Any],
    ) -> None:
        wandb = _import_wandb()
        quiet = wandb.Settings(silent=True, console="off")
        try:
            wandb.setup(quiet)
            if mode == "online":
                _log_in(wandb)
            folder.mkdir(parents=True, exist_ok=True)
            self._run = wandb.init(
                mode=mode,
                project=project,
                group=group,
                id=run_id or None,
                resume="allow",
                name=job,
                dir=folder,
                config=settings,
                reinit="create_new",
                settings=quiet,
            )
        except (wandb.errors.Error, OSError) as error:
            raise ConfigError(
                f"runtime.wandb is {mode}, but Weights & Biases could not start a run below "
                f"{folder}: {error}; check WANDB_API_KEY and the network, or set runtime.wandb to "
                "offline or off"
            ) from None
        self._next = self._run.step

    def row(self, row: Row) -> None:
        # sent before the job was killed, and computed again to the same bits
        if row["step"] < self._next:
            return
        self._next = row["step"]
        self._run.log(dict(numbers(row, "/")), step=row["step"])

    def close(self, ok: bool) -> None:
        self._run.finish(exit_code=0 if ok else 1)


def _import_wandb() -> ModuleType:
    """Import wandb, which takes seconds and is asked for by few. Raises ConfigError."""
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"runtime.wandb needs the package wandb, which cannot be imported ({error}): "
            "install requirements.txt, or set runtime.wandb to off"
        ) from None
    return wandb


def numbers(value: Any, joint: str, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number in a row with a path for its name, whose parts `joint` joins: wandb's
    charts want a slash."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for key, each in value.items():
            yield from numbers(each, joint, f"{name}{joint}{key}" if name else str(key))
    elif isinstance(value, int | float):
        yield name, value
