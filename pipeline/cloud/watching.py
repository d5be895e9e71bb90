"""Runs on Modal while they go on: what a look at one needs is copied from the volume, look by look.

What a container has not published yet is not there: a position is as old as its last checkpoint.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from ..report.format import seconds
from ..run.history.positions import QUIET, RUNNING, Look, Position, in_progress, look
from ..run.history.watched_trials import looks_at, trials_of
from ..run.history.watching import chosen, follow, overall
from ..run.prune import said
from ..store.artifacts import Store
from ..store.in_use import PREFIX, RUNS
from ..store.manifest import NAME
from ..store.room import writing
from ..store.roots import FOLDER, SUFFIX, Root, readable_roots, root_path
from .far import Names, Read
from .roots import IsAlive, lapsed

# The volume is asked for each file of jobs that go on.
WATCH_EVERY_S = 15.0


def _unknown(_run: str, _addresses: Sequence[str]) -> bool:
    return True


def watch(
    run: str,
    once: bool,
    root: Path,
    names: Names,
    read: Read,
    console: Console,
    wait: Callable[[float], None] = time.sleep,
    is_alive: IsAlive = _unknown,
) -> tuple[Look, Root]:
    """Follow a run of the volume, by its name or id, else the one in progress, or all trials of
    experiments, until it ends; return the last look, and the run or one of the trials. `root`: an
    empty folder for the copy. Raises ConfigError, StoreError."""
    followed = Following(run, root, names, read, is_alive)
    return follow(followed.look, console, WATCH_EVERY_S, once, wait), followed.found


class Following:
    """A run of the volume, or all trials of experiments, looked at now and then; what is done is
    copied once."""

    def __init__(
        self, run: str, root: Path, names: Names, read: Read, is_alive: IsAlive = _unknown
    ) -> None:
        self.store = Store(root)
        self._run = run
        self._names = names
        self._read = read
        self._is_alive = is_alive
        self._root: Root | None = None
        self._trials: Callable[[], Look] | None = None  # looks at all of them
        self._addresses: list[str] = []
        self._settled: set[str] = set()
        self._told = ""

    @property
    def found(self) -> Root:
        """The run that is meant, of trials one. Raises ConfigError where there is none of that name
        (yet)."""
        if self._root is None:
            _copy_runs(self.store, self._names, self._read, self._is_alive)
            trials = trials_of(self.store, self._run or None)
            self._root = trials[0] if trials else chosen(self.store, self._run or None)
            self._trials = looks_at(self.store, trials, {}, time.time) if trials else None
            self._addresses = sorted({each for trial in trials for each in trial.makes})
        return self._root

    def look(self) -> Look:
        """Look at it. Raises ConfigError, StoreError."""
        found = self.found
        # notes tell whether it still goes on, and the root which addresses are its own
        _copy_notes(self.store, self._names, self._read, self._is_alive)
        _copy(self.store, f"{FOLDER}/{root_path(self.store, found.id).name}", self._read)
        addresses = self._addresses or found.makes or found.addresses
        _copy_jobs(self.store, addresses, self._settled, self._names, self._read)
        return self._trials() if self._trials else look(self.store, found, {}, time.time())

    def tell(self, console: Console) -> None:
        """Print in a line how far it is, where that is another than before. Raises as `look`
        does."""
        seen = self.look()
        line = overall(seen)
        if not seen.in_progress:
            # An earlier one of that name, as long as this one has left nothing
            self._root = None
        elif line != self._told:
            self._told = line
            said(console)(line)


def follow_all(
    root: Path, names: Names, read: Read, console: Console, is_alive: IsAlive = _unknown
) -> bool:
    """Print how far each run is that goes on; return whether any does. Raises StoreError."""
    store = Store(root)
    _copy_runs(store, names, read, is_alive)
    going = [each for each in readable_roots(store) if in_progress(store, each)]
    say = said(console)
    for each in sorted(going, key=lambda each: each.at):
        _copy_jobs(store, each.makes or each.addresses, set(), names, read)
        seen = look(store, each, {}, time.time())
        say(f"{each.id}, begun {each.at}: {overall(seen)}")
        for position in seen.positions:
            if position.state in (RUNNING, QUIET):
                say(f"  {_at_work(position)}")
    if not going:
        say("no run is in progress")
    return bool(going)


def _at_work(position: Position) -> str:
    words = [f"{position.name}:"]
    if position.steps:
        words.append(f"step {position.step:,} of {position.steps:,},")
    left = "time left not known" if position.left_s is None else f"{seconds(position.left_s)} left"
    words.append(left)
    if position.state == QUIET:
        words.append(f"({QUIET})")
    return " ".join(words)


def _copy_runs(store: Store, names: Names, read: Read, is_alive: IsAlive) -> None:
    _copy_notes(store, names, read, is_alive)
    for name in names(FOLDER):
        if name.endswith(SUFFIX):
            _copy(store, f"{FOLDER}/{name}", read)


def _copy_notes(store: Store, names: Names, read: Read, is_alive: IsAlive) -> None:
    """Copy the notes of runs in progress; those that are gone, or that nobody is at, go here."""
    there = [name for name in names(RUNS) if name.startswith(PREFIX)]
    for path in (store.root / RUNS).glob(f"{PREFIX}*"):
        if path.name not in there:
            path.unlink()
    for name in there:
        _copy(store, f"{RUNS}/{name}", read)
    for note in list(lapsed(store, is_alive)):
        note.unlink()


def _copy_jobs(
    store: Store, addresses: Sequence[str], settled: set[str], names: Names, read: Read
) -> None:
    """Copy what tells how far the jobs at some addresses are; of one that is done only once."""
    artifacts = set(names("artifacts"))
    histories = set(names("history"))
    for address in addresses:
        if address in settled:
            continue
        history = f"history/{address}.jsonl"
        if f"{address}.jsonl" in histories:
            _copy(store, history, read)
        if address in artifacts:
            store.folder(address).mkdir(parents=True, exist_ok=True)
            if _copy(store, f"artifacts/{address}/{NAME}", read):
                settled.add(address)


def _copy(store: Store, path: str, read: Read) -> bool:
    """Copy a file; return whether it is there."""
    content = read(path)
    if content is None:
        return False
    copy = store.root / path
    with writing(copy):
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(content)
    return True
