"""What a person means who names something in a store: an address, the beginning of one, or a run
with what is wanted of it (`mine`, `mine train_experts medicine`, `mine/train_router`).

A name means the latest run that is called so; ids, as `runs` lists them, tell several apart.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from ..store.artifacts import Store
from ..store.imported import STAGE as IMPORTED
from ..store.roots import Root, readable_roots
from .stages import STAGES, label

# of a stage, an item where it has several jobs, and a digest
ADDRESS = re.compile(r"(?P<stage>[a-z]\w*)(-(?P<item>.+))?-(?P<digest>[0-9a-f]{12})")
_SHOWN = 8  # names that a message lists


@dataclass(frozen=True)
class Named:
    """Something in a store that has an address, and whose it is."""

    address: str
    stage: str
    item: str | None
    run: str = ""  # id of the run that it was found by; none: by its address alone

    @property
    def name(self) -> str:
        """The stage and the item, for people."""
        return label(self.stage, self.item)


def named(address: str, run: str = "") -> Named:
    """Return what an address is of. Raises ConfigError for what is none."""
    parts = ADDRESS.fullmatch(address)
    if parts is None:
        raise ConfigError(f"{address} is no address: stage-hash, or stage-item-hash")
    return Named(address, parts["stage"], parts["item"], run)


def found(store: Store, words: Sequence[str]) -> list[Named]:
    """Return what somebody means, in the order in which a run makes it: one thing for an address,
    all that is there for a run. `words` may have slashes between them; none: the latest run.

    Raises ConfigError for what nothing in the store is called, with what there is; StoreError where
    the store cannot be read.
    """
    names = [name for word in words for name in word.split("/") if name]
    # A path into the store ends in an address
    if names and ADDRESS.fullmatch(names[-1]) and is_there(store, names[-1]):
        return [named(names[-1])]
    root, wanted = _run(store, names)
    if root is None:
        return [named(_begun(store, names))]
    there = []
    for address in root.addresses:
        if ADDRESS.fullmatch(address) and is_there(store, address):
            there.append(named(address, root.id))
    there.sort(key=_place)
    chosen = [each for each in there if _is_wanted(each, wanted)]
    if not chosen:
        raise ConfigError(_nothing(root, there, wanted))
    return chosen


def is_there(store: Store, address: str) -> bool:
    """Whether anything can be told of an address: a result, a history, or a checkpoint."""
    places = (store.folder(address), store.history(address), store.resume(address))
    return any(place.exists() for place in places)


def latest(store: Store, name: str) -> Root | None:
    """Return the latest run of a name, or that of an id; None where there is none."""
    for root in readable_roots(store):
        if name in (root.name, root.id):
            return root
    return None


def _run(store: Store, names: Sequence[str]) -> tuple[Root | None, Sequence[str]]:
    """Return the run that is meant, and what of it; None where no run is called so."""
    roots = readable_roots(store)
    for root in roots:
        if not names or names[0] in (root.name, root.id):
            return root, names[1:]
    # A stage without a run is of the latest one
    if roots and names[0] in STAGES:
        return roots[0], names
    return None, names


def _begun(store: Store, names: Sequence[str]) -> str:
    """Return the one address that a name begins. Raises ConfigError where none does, or several."""
    wanted = "/".join(names)
    # An imported one is called by its name alone too
    starts = (wanted, f"{IMPORTED}-{wanted}")
    begun = set()
    histories = [path.stem for path in (store.root / "history").glob("*.jsonl")]
    for address in (*store.addresses(), *histories):
        if wanted and address.startswith(starts) and ADDRESS.fullmatch(address):
            begun.add(address)
    if len(begun) == 1:
        return begun.pop()
    if begun:
        raise ConfigError(
            f"{len(begun)} addresses begin with {wanted}: {_few(sorted(begun))}; type more of one"
        )
    roots = readable_roots(store)
    if not roots:
        raise ConfigError(
            f"no run has left a root in {store.root}; name an address, or another --store"
        )
    known = _few(list(dict.fromkeys(root.name for root in roots)))
    raise ConfigError(f"nothing in {store.root} is called {wanted}; the runs in it are {known}")


def _is_wanted(each: Named, wanted: Sequence[str]) -> bool:
    # an item's name may hold a slash itself
    stage, item = (*wanted, "")[0], "/".join(wanted[1:])
    return (not stage or each.stage == stage) and (not item or each.item == item)


def _nothing(root: Root, there: Sequence[Named], wanted: Sequence[str]) -> str:
    if not there:
        return f"nothing of {root.id} is in the store any more"
    known = _few([f"{each.stage}{'/' + each.item if each.item else ''}" for each in there])
    return f"{root.id} has no {'/'.join(wanted)}; it has {known}"


def _place(each: Named) -> tuple[int, str]:
    order = STAGES.index(each.stage) if each.stage in STAGES else len(STAGES)
    return order, each.item or ""


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    more = len(names) - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
