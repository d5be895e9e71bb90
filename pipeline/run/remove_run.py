"""A whole run out of a store: its root, and what no other root and no configuration reaches.

Invariant: however it is stopped, what is left is known for what it is. The root says that it is
being removed before anything goes, and is what goes last; the same command, or prune, goes on.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ..config.run import RunConfig
from ..errors import ConfigError, DiskFull, StoreError
from ..store import in_use
from ..store.artifacts import Store
from ..store.roots import Root, root_path, write_root
from .leftovers import anything_at, leftovers, removed
from .prune import Sweep, opened, said
from .reach import Reach
from .stages import first_few


def remove_runs(
    names: Sequence[str],
    configs: Mapping[Path, RunConfig],
    store: Store,
    console: Console,
    *,
    remove: bool,
    others: Mapping[str, Collection[str]] | None = None,
) -> bool:
    """List what goes with some runs, named by their names or ids, and remove it when asked to;
    return whether something is left that --yes removes. `others`: addresses by who else needs them.

    Raises ConfigError for a name that is not that of one run, StoreError while something of them is
    in use or another root cannot be understood.
    """
    say = said(console)
    everybody = Reach(opened(store), {})
    runs = [_run(name, everybody, store) for name in names]
    reach = Reach(store, configs, removing=runs, others=others)
    _refuse(runs, reach)
    if remove:
        _mark(runs, reach)
    groups = {removed(run) for run in runs}
    # what else may go is for prune to say
    every = leftovers(store, reach, damaged=False, say=lambda _text: None)
    found = [leftover for leftover in every if leftover.group in groups]
    sweep = Sweep(store, reach, say, wanted=lambda _leftover: remove)
    sweep.over(found)
    for run in runs:
        _say_kept(run, everybody.roots[run], reach, say)
    if remove:
        say(f"{sweep.removed} removed from {store.root}, {sweep.bytes / 1e6:.1f} MB")
    else:
        say(
            f"{sweep.listed} would go, {sweep.bytes / 1e6:.1f} MB, none was removed; add --yes to "
            "remove"
        )
    return not remove and bool(found)


def _run(name: str, reach: Reach, store: Store) -> str:
    """Return the id of the run that somebody means. Raises ConfigError, StoreError."""
    if name in reach.roots:
        return name
    path = root_path(store, name)
    if path in reach.unknown:
        raise StoreError(reach.unknown[path])
    found = [run for run, root in reach.roots.items() if root.name == name]
    if len(found) == 1:
        return found[0]
    if not found:
        known = first_few(list(reach.roots)) or "none"
        raise ConfigError(f"there is no run {name} in {store.root}; the runs in it are {known}")
    several = []
    for run in found:
        root = reach.roots[run]
        several.append(f"{run} ({described(root)}, {root.at})")
    raise ConfigError(
        f"{len(found)} runs in {store.root} are called {name}, so name one by its id: "
        + ", ".join(several)
    )


def described(root: Root) -> str:
    """Return which configuration a run has, as it was typed."""
    words = [root.file]
    for override in root.overrides:
        words += ["--override", override]
    return " ".join(filter(None, words))


def _refuse(runs: Sequence[str], reach: Reach) -> None:
    """Raise StoreError where it cannot be told what only these runs reach, or somebody is at it."""
    for why in reach.unknown.values():
        raise StoreError(
            f"{why}; it may need anything, so nobody can tell what only {', '.join(runs)} needs: "
            "move that file away if its run is of no use"
        )
    used = in_use.addresses(reach.store)
    for run in runs:
        if run not in reach.roots:
            raise StoreError(f"{run} is gone: somebody else has just removed it")
        for address in sorted(reach.own(run) & used):
            raise StoreError(
                f"{run} is in use: a run in progress needs {address}, so nothing was removed; wait "
                "until that has ended"
            )


def _mark(runs: Sequence[str], reach: Reach) -> None:
    """Write down that runs are being removed, while none can begin. Raises StoreError."""
    store = reach.store
    try:
        with store.lock(in_use.RUNS):
            # what has begun since is looked at again
            reach.refresh()
            _refuse(runs, reach)
            for run in runs:
                # on a full disk this is how room is made, so it goes on without
                with suppress(DiskFull):
                    write_root(root_path(store, run), replace(reach.roots[run], removed=True))
            reach.refresh()
        store.publish()
    except OSError as error:
        raise StoreError(
            f"nothing can be removed from {store.root}: {error.strerror or error}; give this user "
            "the right to write to it"
        ) from None


def _say_kept(run: str, root: Root, reach: Reach, say) -> None:
    """Tell what of a run stays, and for whom."""
    kept = []
    keepers: dict[str, None] = {}
    for address in root.addresses:
        if reach.keepers(address) and anything_at(reach.store, address):
            kept.append(address)
            keepers |= dict.fromkeys(reach.keepers(address))
    if kept:
        say(f"{len(kept)} of {run} are kept, as others reach them: {first_few(list(keepers))}")
