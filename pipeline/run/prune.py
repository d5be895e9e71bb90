"""Listing what of a store may go, and removing it when asked to: what was left half done, what runs
left that are being removed, and orphans.

Nothing is removed that a run in progress makes or may read, nor what the root of a run or a
configuration reaches.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console

from ..config.run import RunConfig
from ..errors import ConfigError, StoreError
from ..store import in_use
from ..store.artifacts import Store
from ..store.history_db import forget_removed
from ..store.roots import root_states
from .leftovers import ORPHANS, Leftover, Say, leftovers, remove, size_of
from .reach import Reach


def said(console: Console) -> Say:
    """Return what prints a line as it is."""
    return partial(console.print, highlight=False, markup=False, soft_wrap=True)


def opened(store: Store) -> Store:
    """Return a store that is there. Raises StoreError where none is, and what opening raises."""
    if not (store.root / "store.json").exists():
        raise StoreError(
            f"there is no store in {store.root}: it has no store.json", root=store.root
        )
    return store.open()


def read_configs(
    paths: Iterable[Path], load: Callable[[Path], RunConfig], store: Store
) -> dict[Path, RunConfig]:
    """Return the configurations whose results are kept. Raises ConfigError, also where there is
    none and no run has left a root either: everything would seem to be of no use."""
    configs = {path: load(path) for path in paths}
    if not configs and not root_states(store):
        raise ConfigError(
            f"there is no configuration in {Path('config').absolute()}, and no run has left a root "
            f"in {store.root}, so nothing would be kept: name those whose results you want to keep "
            "with --config"
        )
    return configs


@dataclass
class Sweep:
    """What becomes of leftovers, told one by one."""

    store: Store
    reach: Reach
    say: Say
    wanted: Callable[[Leftover], bool]  # whether one is to be removed, else it is only listed
    listed: int = 0
    removed: int = 0
    failed: int = 0
    bytes: int = 0  # of what was listed or removed
    _used: set[str] = field(default_factory=set)  # addresses that runs in progress need
    _left: set[str] = field(default_factory=set)  # groups of which something stays
    _counted: set[tuple[int, int]] = field(default_factory=set)

    def over(self, found: Sequence[Leftover]) -> None:
        """Tell of leftovers group by group, and remove those that are wanted. Raises StoreError
        when something could not be removed."""
        self._used = in_use.addresses(self.store)
        groups: dict[str, list[Leftover]] = {}
        for leftover in found:
            groups.setdefault(leftover.group, []).append(leftover)
        # the group that wants a second look is read last
        for group in sorted(groups, key=lambda name: name == ORPHANS):
            self.say(f"{group}:")
            for leftover in groups[group]:
                self._one(leftover)
        if self.removed:
            # it must not go on telling of what is gone
            forget_removed(self.store)
        if self.failed:
            raise StoreError(
                f"{self.failed} of {len(found)} could not be removed from {self.store.root}; give "
                "this user the right to write to it, or leave it as it is"
            )

    def _one(self, leftover: Leftover) -> None:
        size = size_of(leftover.path, self._counted)
        shown = f"{size / 1e6:10.1f} MB  {leftover.path}"
        if leftover.lock in self._used or in_use.is_held(self.store, leftover.lock):
            self._stays(leftover, f"{shown}  in use by a run in progress, left alone")
        elif not self.wanted(leftover):
            self.say(f"{shown}  {leftover.why}")
            self.listed += 1
            self.bytes += size
        elif leftover.is_root and leftover.group in self._left:
            self._stays(leftover, f"{shown}  {leftover.why}, kept until the rest is gone")
        else:
            self._remove(leftover, shown, size)

    def _remove(self, leftover: Leftover, shown: str, size: int) -> None:
        try:
            remove(self.store, self.reach, leftover, self.say)
        except (in_use.InUse, FileNotFoundError):
            text = f"{shown}  a run has just begun to use it, or made it anew: left alone"
            self._stays(leftover, text)
        except OSError as error:
            self.failed += 1
            self._stays(leftover, f"{shown}  cannot be removed: {error.strerror or error}")
        else:
            self.say(f"{shown}  {leftover.why}, removed")
            self.removed += 1
            self.bytes += size

    def _stays(self, leftover: Leftover, text: str) -> None:
        self._left.add(leftover.group)
        self.say(text)


def prune(
    configs: Mapping[Path, RunConfig],
    store: Store,
    console: Console,
    *,
    remove: bool,
    damaged: bool = False,
    orphans: bool = False,
    others: Mapping[str, Collection[str]] | None = None,
) -> bool:
    """List what may go, and remove it when asked to, orphans only when asked for them too; return
    whether something is left that --yes removes.

    `damaged`: also what was found damaged and renamed aside. `others`: addresses by who else needs
    them.

    Raises ConfigError, UnreadableFile, or StoreError when there is no store or something could not
    be removed.
    """
    say = said(console)
    reach = Reach(opened(store), configs, others=others)
    say(f"runs that have left a root in {store.root}, {len(reach.roots)}, keep their results")
    if configs:
        say(f"configurations read, {len(configs)}, whose results are kept:")
    for path in configs:
        say(f"  {path.absolute()}")
    for why in reach.unknown.values():
        say(f"{why}; it may need anything, so what every run has made is kept")
    found = list(leftovers(store, reach, damaged, say))

    def wanted(leftover: Leftover) -> bool:
        return remove and (orphans or leftover.group != ORPHANS)

    sweep = Sweep(store, reach, say, wanted)
    sweep.over(found)
    if not found:
        say(f"nothing to prune in {store.root}")
        return False
    if remove:
        say(f"{sweep.removed} removed from {store.root}")
    else:
        say(f"{sweep.listed} may go, none was removed; add --yes to remove")
    if any(leftover.group == ORPHANS for leftover in found) and not orphans:
        say(
            "orphans are what was made before runs left roots, or by a program that leaves none: "
            "they may be somebody's work, and only --orphans --yes removes them"
        )
    return not remove and any(orphans or leftover.group != ORPHANS for leftover in found)
