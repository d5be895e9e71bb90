"""Roots on a volume that each container sees in its own way, and removing from it.

Containers share no locks. Whoever hands out jobs notes until when they may last, whoever removes
leaves a mark; both publish theirs first and look for the other's then, so that one of them sees it.
"""

import argparse
import contextlib
import io
import shlex
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ..config.run import RunConfig
from ..errors import PipelineError, StoreError
from ..run.advice import sentence
from ..run.predecessor import note_all_gone, predecessors, reported
from ..run.prune import opened, prune
from ..run.reach import root_of
from ..run.remove_run import remove_runs
from ..run.show_runs import show_runs
from ..run.stages import is_report
from ..run.versions import show_versions
from ..store import in_use
from ..store.artifacts import Store, now, write_text
from ..store.reading import sealed
from ..store.removed import told_removed
from ..store.roots import Root, leave, root_states
from .containers import JobResult, ModalEdge
from .endpoint import roll_back, served_addresses, shown_versions

# How long the containers that hand out jobs, and that remove, may live.
RUN_S = 86_400
REMOVAL_S = 3_600
LOOK_EVERY_S = 5.0
# Before what tells one remover's mark from others': at one path the last that is published stays,
# and two who remove would each see their own
MARK = "removing-"
_WIDE = 10_000  # columns: lines are for another terminal to break


@contextlib.contextmanager
def begun(
    cfg: RunConfig,
    store: Store,
    command: str,
    progress: Callable[[str], None] = print,
    wait: Callable[[float], None] = time.sleep,
    run: str = "",
) -> Iterator[list[Root]]:
    """Leave the root of a run whose jobs are handed out meanwhile, and have its results left alone;
    `command` is what was typed, `run` what all attempts are called: the last one takes away what
    those that were killed have noted. Waits while somebody removes. Gives the roots of the same
    name and configuration before it, the last one first."""
    file, overrides = _named(command)
    root = root_of(cfg, file, overrides)
    note = in_use.note_path(store, in_use.new_name(run))
    before: list[Root] = []
    # what is wrong with the store is for the first job to say
    with contextlib.suppress(PipelineError, OSError):
        store.open()
        before = predecessors(store, root.name, root.file, but=root.id)
        note.parent.mkdir(exist_ok=True)
        write_text(note, sealed({"addresses": list(root.addresses), "until": _in(RUN_S)}))
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
        for gone in note_all_gone(before[0], cfg, store):
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


def tend(
    command: str,
    names: Sequence[str],
    flags: Mapping[str, bool],
    edge: ModalEdge,
    publish: Callable[[], None],
    refresh: Callable[[], None],
) -> tuple[str, str]:
    """Do `runs`, `prune`, `rm`, `versions` or `rollback` on a volume; return what it printed, and
    what is wrong."""
    root = edge.root
    refresh()
    store = Store(root, publish=publish, refresh=refresh)
    printed = io.StringIO()
    console = Console(file=printed, width=_WIDE)
    try:
        if command == "runs":
            show_runs(store, console)
        elif command in ("versions", "rollback"):
            if command == "rollback":
                roll_back(root, names[0] if names else None, publish)
            known, current = shown_versions(root)
            show_versions(known, current, "the volume", console)
        else:
            with _alone(opened(store), flags["yes"]):
                _remove(command, names, flags, store, console)
    except PipelineError as error:
        return printed.getvalue(), sentence(error, edge)
    return printed.getvalue(), ""


def _remove(
    command: str, names: Sequence[str], flags: Mapping[str, bool], store: Store, console: Console
) -> None:
    # configurations lie where commands are typed, and what they reach there is told by roots
    if not root_states(store):
        raise StoreError(
            "no run has left a root on the volume, so nothing would be kept: do a command of each "
            "run whose results you want to keep, which makes nothing again that is there"
        )
    # it holds all that it needs, and has no lock here
    others = {"the endpoint": served_addresses(store.root)}
    if command == "rm":
        remove_runs(names, {}, store, console, remove=flags["yes"], others=others)
        return
    prune(
        {},
        store,
        console,
        remove=flags["yes"],
        damaged=flags["damaged"],
        orphans=flags["orphans"],
        others=others,
    )


@contextlib.contextmanager
def _alone(store: Store, removes: bool) -> Iterator[None]:
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
