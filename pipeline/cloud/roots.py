"""Roots on a volume that each container sees in its own way, and who may remove from it.

Containers share no locks. Whoever hands out jobs notes until when they may last at most, whoever
removes leaves a mark; both publish theirs first and look for the other's then, so that one of them
sees it. That a run was killed before that is told by its leases, which nobody renews.
"""

import argparse
import contextlib
import shlex
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ..config.run import RunConfig
from ..errors import PipelineError, StoreError
from ..run.predecessor import note_all_gone, predecessors, reported
from ..run.reach import root_of
from ..run.stages import is_report
from ..store import in_use
from ..store.artifacts import Store, now, write_text
from ..store.reading import sealed, unsealed
from ..store.removed import told_removed
from ..store.roots import Root, leave, read_root, root_path
from .containers import JobResult

# How long the containers that hand out jobs, and that remove, may live.
RUN_S = 86_400
REMOVAL_S = 3_600
LOOK_EVERY_S = 5.0
# Before what tells one remover's mark from others': at one path the last that is published stays,
# and two who remove would each see their own
MARK = "removing-"
# Whether anybody is at a run still, by what its attempts are called and its addresses
IsAlive = Callable[[str, Sequence[str]], bool]


@contextlib.contextmanager
def begun(
    cfg: RunConfig,
    store: Store,
    command: str,
    progress: Callable[[str], None] = print,
    wait: Callable[[float], None] = time.sleep,
    run: str = "",
    part: str = "",
    makes: Iterable[str] = (),
) -> Iterator[list[Root]]:
    """Leave the root of a run whose jobs are handed out meanwhile, and have its results left alone;
    `command` is what was typed, `run` what all attempts are called, `part` which of several runs
    that were begun as one it is: the last attempt takes away what those that were killed have
    noted. `makes` is what is made of one that is not made whole. Waits while somebody removes.
    Gives the roots of the same name and configuration before it, the last one first."""
    file, overrides = _named(command)
    root = root_of(cfg, file, overrides, makes)
    called = f"{run}/{part}" if part else run
    note = in_use.note_path(store, in_use.new_name(called))
    before: list[Root] = []
    # what is wrong with the store is for the first job to say
    with contextlib.suppress(PipelineError, OSError):
        store.open()
        before = predecessors(store, root.name, root.file, but=root.id)
        note.parent.mkdir(exist_ok=True)
        noted = {"addresses": list(root.addresses), "until": _in(RUN_S), "run": run}
        write_text(note, sealed(noted))
        leave(store, root)
        store.publish()
        store.refresh()
        while _marks(store):
            progress("something is being removed from the volume; waiting for that to end")
            wait(LOOK_EVERY_S)
            store.refresh()
    try:
        yield before
    finally:
        with contextlib.suppress(OSError):
            note.unlink()
            store.publish()


def clear_lapsed(store: Store, is_alive: IsAlive) -> None:
    """Take away the notes of runs that nobody is at any more, which say that they last a day."""
    gone = {note: unsealed(note.read_bytes()) for note in lapsed(store, is_alive)}
    if not gone:
        return
    for note in gone:
        note.unlink(missing_ok=True)
    store.publish()
    store.refresh()
    back = [note for note, noted in gone.items() if is_alive(noted["run"], noted["addresses"])]
    for note in back:
        # Another attempt has begun meanwhile, and its note went with the former one's
        write_text(note, sealed(gone[note] | {"until": _in(RUN_S)}))
    if back:
        store.publish()


def lapsed(store: Store, is_alive: IsAlive) -> Iterator[Path]:
    """Yield the notes of runs that nobody is at any more."""
    for note in (store.root / in_use.RUNS).glob(f"{in_use.PREFIX}*.json"):
        # One that is torn, or of another version, means what it says
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            noted = unsealed(note.read_bytes())
            if noted.get("run") and not is_alive(noted["run"], noted["addresses"]):
                yield note


def since(
    before: Sequence[Root],
    cfg: RunConfig,
    results: list[JobResult],
    store: Store,
    progress: Callable[[str], None] = print,
) -> list[JobResult]:
    """Return the results of a run that was handed out, a report that was made with the one before
    it, once the experts that the run has no more are noted; `before` is what `begun` gave."""
    if not before or any(result.error for result in results):
        return results
    try:
        # With what it was begun with, which `begun` has written down
        own = read_root(root_path(store, root_of(cfg).id))
        for gone in note_all_gone(own, before, cfg, store):
            progress(told_removed(gone, store))
        former = reported(list(before), store)
    except (PipelineError, OSError) as error:
        # What was made is whole, whatever is wrong with what others left
        progress(f"what this run was before is not told: {error}")
        return results
    told = []
    for result in results:
        is_new = is_report(result.stage) and result.state == "made"
        told.append(replace(result, former=former) if is_new else result)
    return told


def _named(command: str) -> tuple[str, tuple[str, ...]]:
    """Return the configuration that a command of `modal` names as typed, and its overrides."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default="")
    parser.add_argument("--override", default="")
    try:
        found, _ = parser.parse_known_args(shlex.split(command))
        return found.config, tuple(shlex.split(found.override))
    except ValueError:
        return "", ()


def _in(seconds: float) -> str:
    """Return the time that it will be, as `now` writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + seconds))


@contextlib.contextmanager
def alone(store: Store, removes: bool) -> Iterator[None]:
    """Have runs wait that begin, and others that remove refused. Raises StoreError."""
    if not removes:
        yield
        return
    _refuse_marks(store)
    mark = store.root / in_use.RUNS / f"{MARK}{uuid.uuid4().hex[:12]}.json"
    mark.parent.mkdir(exist_ok=True)
    write_text(mark, sealed({"since": now(), "until": _in(REMOVAL_S)}))
    store.publish()
    # what began before is seen from here on
    store.refresh()
    for lost in set(store.root.glob(f"{in_use.RUNS}/{MARK}*.json")) - set(_marks(store)):
        lost.unlink(missing_ok=True)
    try:
        # Of two who begin at once neither knows who is ahead, so both give way
        _refuse_marks(store, mark)
        yield
    finally:
        mark.unlink(missing_ok=True)
        store.publish()


def _refuse_marks(store: Store, own: Path | None = None) -> None:
    """Raise StoreError where somebody else removes."""
    if any(mark != own for mark in _marks(store)):
        raise StoreError("somebody else is removing from the volume: wait until that has ended")


def _marks(store: Store) -> list[Path]:
    """Return the marks of those who remove; one of whom nothing was heard for long holds nobody
    up."""
    found = (store.root / in_use.RUNS).glob(f"{MARK}*.json")
    return list(filter(in_use.lasts, found))
