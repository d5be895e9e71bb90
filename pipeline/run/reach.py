"""Which results of a store are whose, by the roots that runs have left in it and by configurations.

Invariant: what cannot be understood takes nothing away. A root that this program cannot read, or
whose family it does not know, may reach anything, so beside it everything is kept.
"""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from pydantic import ValidationError

from ..config.run import RunConfig
from ..errors import PipelineError, StoreError
from ..families.load import RUN_CONFIGS, parse
from ..store.artifacts import Store, now
from ..store.in_use import using
from ..store.roots import Root, leave, read_root, root_states
from .identity import recipes
from .stages import Addresses


def root_of(
    cfg: RunConfig,
    file: Path | str = "",
    overrides: tuple[str, ...] = (),
    makes: Iterable[str] = (),
) -> Root:
    """Return the root that a run leaves; `file` is its configuration as it was given, `makes` the
    addresses that are made of it, where that is not a whole run."""
    addresses = Addresses(cfg)
    # what its addresses go by, but for the machine's part of it: all of its machines are one run
    settings = addresses.cfg.model_copy(update={"dtype": cfg.dtype})
    return Root(
        name=cfg.name,
        family=cfg.family,
        at=now(),
        file=as_given(file),
        overrides=overrides,
        addresses=tuple(sorted(set(addresses.reachable()))),
        # Where a bundle goes is in no address, what it holds is
        settings=settings.model_dump(mode="json", exclude={"deploy": {"upload", "keep"}}),
        makes=tuple(sorted(set(makes))),
    )


def as_given(file: Path | str) -> str:
    """Return a path as it was given, from here on where it is below: a store is moved and shared
    more often than the folder in which people work is renamed."""
    path = Path(file)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return str(file)


@contextlib.contextmanager
def working(
    store: Store,
    cfg: RunConfig,
    file: Path | str = "",
    overrides: tuple[str, ...] = (),
    makes: Iterable[str] = (),
) -> Iterator[None]:
    """Have what a command makes or may read left alone while it lasts, and known to be its run's
    ever after; `makes` as `root_of` has it."""
    root = root_of(cfg, file, overrides, makes)
    with using(store, root.addresses, lambda: leave(store, root)):
        yield


class Reach:
    """Who keeps what. `removing` are ids of runs that keep nothing any more, and neither do those
    that somebody has begun to remove, nor a configuration that says the same as one of them."""

    def __init__(
        self,
        store: Store,
        configs: Mapping[Path, RunConfig],
        removing: Collection[str] = (),
        others: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        """`others`: addresses by whoever needs them and is neither."""
        self.store = store
        self._others = others or {}
        self.unknown: dict[Path, str] = {}  # roots that were not understood, and why
        self._configs: dict[str, Root] = {}
        for path, cfg in configs.items():
            self._configs[str(path)] = root_of(cfg, path)
        self._removing = set(removing)
        self._states: dict[Path, tuple[int, int, int]] = {}
        self._roots: dict[str, Root] = {}
        self._addresses: dict[str, set[str]] = {}
        self._keepers: dict[str, list[str]] = {}
        self._removed: dict[str, str] = {}
        # also where there is no root at all
        self._index()
        self.refresh()

    @property
    def roots(self) -> dict[str, Root]:
        """The roots that were understood, by the ids of their runs."""
        return self._roots

    def refresh(self) -> None:
        """Look again at the roots that have changed. Raises UnreadableFile."""
        states = root_states(self.store)
        if states == self._states:
            return
        for path in self._states.keys() - states.keys():
            self._forget(path)
        for path in sorted(states):
            if states[path] != self._states.get(path):
                self._read(path)
        self._states = states
        self._index()

    def _forget(self, path: Path) -> None:
        self._roots.pop(path.stem, None)
        self.unknown.pop(path, None)

    def _read(self, path: Path) -> None:
        seen = path in self._states
        self._forget(path)
        try:
            root = read_root(path)
        except StoreError as error:
            # one that has gone since is none, and the next look says so
            self.unknown[path] = str(error)
            return
        if root.family not in RUN_CONFIGS:
            self.unknown[path] = f"{path} is of the family {root.family}, which is not known here"
            return
        if seen and not root.removed:
            # its run has begun anew since somebody asked for it to go
            self._removing.discard(path.stem)
        self._roots[path.stem] = root
        self._addresses[path.stem] = _addresses(root)

    def _index(self) -> None:
        self._keepers = {}
        self._removed = {}
        gone = set(self._removing)
        gone.update(run for run, root in self._roots.items() if root.removed)
        for run, root in self._roots.items():
            if run in gone:
                # what it says and no more: the rest may be another's, who left no root
                self._removed |= dict.fromkeys(root.addresses, run)
                continue
            for address in self._addresses[run]:
                self._keepers.setdefault(address, []).append(run)
        said = {self._roots[run].id for run in gone & self._roots.keys()}
        for path, root in self._configs.items():
            if root.id in said:
                continue
            for address in root.addresses:
                self._keepers.setdefault(address, []).append(path)
        for who, addresses in self._others.items():
            for address in addresses:
                self._keepers.setdefault(address, []).append(who)

    def keepers(self, address: str) -> tuple[str, ...]:
        """Return who reaches an address: ids of runs, then paths of configurations, then others."""
        return tuple(self._keepers.get(address, ()))

    def keeps(self, address: str) -> bool:
        """Whether an address has to stay: somebody reaches it, or might."""
        return address in self._keepers or bool(self.unknown)

    def removed(self, address: str) -> str:
        """Return the run that an address belonged to and that is being removed; "" where there is
        none, or others keep it."""
        return "" if self.keeps(address) else self._removed.get(address, "")

    def own(self, run: str) -> set[str]:
        """Return what a run that is being removed reaches and nobody keeps."""
        return {address for address in self._roots[run].addresses if not self.keeps(address)}

    def removing(self) -> list[str]:
        """Return the ids of the runs that are being removed."""
        gone = []
        for run, root in self._roots.items():
            if root.removed or run in self._removing:
                gone.append(run)
        return gone

    def readers(self) -> dict[str, str] | None:
        """Return, by the names under which a store notes what jobs read, the run that is being
        removed and alone has such a job, "" where one that is kept has; None where settings are not
        understood, so that any may be one."""
        gone = self.removing()
        found: dict[str, str] = {}
        try:
            for run in gone:
                root = self._roots[run]
                addresses = Addresses(parse(root.settings))
                for name, job in recipes(addresses.cfg).items():
                    # of what else its settings come to now another may be the maker
                    if addresses.of(*job) in root.addresses:
                        found[name] = run
            kept = [root for run, root in self._roots.items() if run not in gone]
            for root in (*kept, *self._configs.values()):
                found |= dict.fromkeys(recipes(parse(root.settings)), "")
        except (PipelineError, ValidationError, KeyError, TypeError, AttributeError):
            return None
        return None if self.unknown else found


def _addresses(root: Root) -> set[str]:
    """Return what a root reaches: what it says, and what its settings come to in this version."""
    found = set(root.addresses)
    # settings of another version may be none here; what was made by that one is in the list
    with contextlib.suppress(PipelineError, ValidationError, KeyError, TypeError, AttributeError):
        found.update(Addresses(parse(root.settings)).reachable())
    return found
