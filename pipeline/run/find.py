"""What a person means who names something in a store: an address, the beginning of one, or a run
with what is wanted of it (`mine`, `mine train_experts medicine`, `mine/train_router`).

A name means the latest run that is called so; ids, as `runs` lists them, tell several apart.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..store.artifacts import Store
from ..store.imported import STAGE as IMPORTED
from ..store.roots import Root, readable_roots
from .stages import STAGES, first_few, label

# of a stage, an item where it has several jobs, and a digest
ADDRESS = re.compile(r"(?P<stage>[a-z]\w*)(-(?P<item>.+))?-(?P<digest>[0-9a-f]{12})")
BUNDLE = "deploy"
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

    Of several runs of a name it is the latest that has it. Raises ConfigError for what nothing in
    the store is called, with what there is; StoreError where the store cannot be read.
    """
    names = [name for word in words for name in word.split("/") if name]
    # A path into the store ends in an address
    if names and ADDRESS.fullmatch(names[-1]) and is_there(store, names[-1]):
        return [named(names[-1])]
    roots, wanted = _runs(store, names)
    if not roots:
        return [named(_begun(store, names))]
    why = ""
    # The latest that has it: one that was only planned with other settings has nothing yet
    for root in roots:
        there = _there(store, root)
        chosen = [each for each in there if _is_wanted(each, wanted)]
        if chosen:
            return chosen
        why = why or _nothing(root, there, wanted)
    raise ConfigError(why)


def _there(store: Store, root: Root) -> list[Named]:
    """Return what of a run is in a store, in the order in which a run makes it."""
    there = []
    for address in root.addresses:
        if ADDRESS.fullmatch(address) and is_there(store, address):
            there.append(named(address, root.id))
    return sorted(there, key=_place)


def is_there(store: Store, address: str) -> bool:
    """Whether anything can be told of an address: a result, a history, or a checkpoint."""
    places = (store.folder(address), store.history(address), store.resume(address))
    return any(place.exists() for place in places)


def runs_called(store: Store, name: str) -> list[Root]:
    """Return the runs of a name, the latest first, or that of an id."""
    return [root for root in readable_roots(store) if name in (root.name, root.id)]


def bundle_of(store: Store, run: str) -> Path | None:
    """Return the bundle of the latest run of a name that has one, or of that with an id; None where
    there is none."""
    for root in runs_called(store, run):
        made = {}
        for address in root.addresses:
            if address.startswith(f"{BUNDLE}-") and store.has(address):
                made[store.manifest(address).made.get("at", "")] = store.folder(address)
        if made:
            return made[max(made)]
    return None


def _runs(store: Store, names: Sequence[str]) -> tuple[list[Root], Sequence[str]]:
    """Return the runs that may be meant, the latest first, and what of them; none where no run is
    called so."""
    if not names:
        return readable_roots(store), ()
    meant = runs_called(store, names[0])
    if meant:
        return meant, names[1:]
    # A stage without a run is of the latest one
    return (readable_roots(store), names) if names[0] in STAGES else ([], names)


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
        several = first_few(sorted(begun), _SHOWN)
        raise ConfigError(
            f"{len(begun)} addresses begin with {wanted}: {several}; type more of one"
        )
    roots = readable_roots(store)
    if not roots:
        raise ConfigError(
            f"no run has left a root in {store.root}; name an address, or another --store"
        )
    known = first_few(list(dict.fromkeys(root.name for root in roots)), _SHOWN)
    raise ConfigError(f"nothing in {store.root} is called {wanted}; the runs in it are {known}")


def _is_wanted(each: Named, wanted: Sequence[str]) -> bool:
    # an item's name may hold a slash itself
    stage, item = (*wanted, "")[0], "/".join(wanted[1:])
    return (not stage or each.stage == stage) and (not item or each.item == item)


def _nothing(root: Root, there: Sequence[Named], wanted: Sequence[str]) -> str:
    if not there:
        return f"nothing of {root.id} is in the store any more"
    names = [f"{each.stage}{'/' + each.item if each.item else ''}" for each in there]
    known = first_few(names, _SHOWN)
    return f"{root.id} has no {'/'.join(wanted)}; it has {known}"


def _place(each: Named) -> tuple[int, str]:
    order = STAGES.index(each.stage) if each.stage in STAGES else len(STAGES)
    return order, each.item or ""
