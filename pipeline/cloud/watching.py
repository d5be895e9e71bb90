"""`watch` on Modal: what a look at a run needs is copied from the volume, look by look.

What a container has not published yet is not there: a position is as old as its last checkpoint.
"""

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from ..run.history.positions import Look, look
from ..run.history.watching import chosen, follow
from ..store.artifacts import Store
from ..store.in_use import PREFIX, RUNS
from ..store.manifest import NAME
from ..store.room import writing
from ..store.roots import FOLDER, SUFFIX, Root, root_path
from .inputs import Names

Read = Callable[[str], bytes | None]
# The volume is asked for each file of jobs that go on.
WATCH_EVERY_S = 15.0


def watch(
    run: str,
    once: bool,
    root: Path,
    names: Names,
    read: Read,
    console: Console,
    wait: Callable[[float], None] = time.sleep,
) -> Look:
    """Follow a run of the volume, by its name or id, else the one in progress, until it ends.
    `root`: an empty folder for the copy. Raises ConfigError, StoreError."""
    store = Store(root)
    _copy_runs(store, names, read)
    found = chosen(store, run or None)
    settled: set[str] = set()

    def looked() -> Look:
        # notes tell whether it still goes on, and the root which addresses are its own
        _copy_notes(store, names, read)
        _copy(store, f"{FOLDER}/{root_path(store, found.id).name}", read)
        _copy_jobs(store, found, settled, names, read)
        return look(store, found, {}, time.time())

    return follow(looked, console, WATCH_EVERY_S, once, wait)


def _copy_runs(store: Store, names: Names, read: Read) -> None:
    _copy_notes(store, names, read)
    for name in names(FOLDER):
        if name.endswith(SUFFIX):
            _copy(store, f"{FOLDER}/{name}", read)


def _copy_notes(store: Store, names: Names, read: Read) -> None:
    """Copy the notes of runs in progress; those that are gone go here too."""
    there = [name for name in names(RUNS) if name.startswith(PREFIX)]
    for path in (store.root / RUNS).glob(f"{PREFIX}*"):
        if path.name not in there:
            path.unlink()
    for name in there:
        _copy(store, f"{RUNS}/{name}", read)


def _copy_jobs(store: Store, root: Root, settled: set[str], names: Names, read: Read) -> None:
    """Copy what tells how far the jobs of a run are; of one that is done only once."""
    artifacts = set(names("artifacts"))
    histories = set(names("history"))
    for address in root.addresses:
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
