"""What a person means who names something in a store, by whichever command: a run by its name or
id, what is wanted of it (`mine train_experts medicine`, `mine/train_router`), an address, the path
of what lies there, or the beginning of an id, of an address, or of the hash in one.

A name means the latest run that is called so; ids, as `runs` lists them, tell several apart.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..errors import ConfigError
from ..store.address import ADDRESS, job_of
from ..store.artifacts import Store
from ..store.imported import STAGE as IMPORTED
from ..store.roots import Root, readable_roots
from .stages import STAGES, first_few, label

BUNDLE = "deploy"
_SHOWN = 8  # names that a message lists
# Fewer digits of a hash could be a word
_SHORT = re.compile(r"[0-9a-f]{4,12}")
_HISTORY = ".jsonl"


def taken_for_experiments(name: str, run: str) -> str:
    """Return what is said where experiments and a run are called so, and how the run is reached."""
    return f"{name} is taken for the experiments; {run} is the run of that name"


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


class NamedRun(Protocol):
    """What is asked of a run that may be meant."""

    @property
    def id(self) -> str:
        """What it is called and no other one."""

    @property
    def name(self) -> str:
        """What several may be called."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """What it could lead to."""


@dataclass(frozen=True)
class Names:
    """What can be named in a store, asked for as it is needed: there may be very many."""

    where: Path  # the store, for messages
    runs: Callable[[], Sequence[NamedRun]]  # the latest first
    is_there: Callable[[str], bool]  # whether anything can be told of an address
    addresses: Callable[[], Iterable[str]]  # of which that can be


@dataclass(frozen=True)
class Meant:
    """What somebody means who names something."""

    there: tuple[Named, ...]  # in the order in which a run makes it
    run: str = ""  # the id of the run, where that is named and nothing of it


def named(address: str, run: str = "") -> Named:
    """Return what an address is of."""
    return Named(address, *job_of(address), run)


def found(store: Store, words: Sequence[str]) -> list[Named]:
    """Return what somebody means, in the order in which a run makes it: one thing for an address,
    all that is there for a run. `words` may have slashes between them; none: the latest run.

    Of several runs of a name it is the latest that has it. Raises ConfigError for what nothing in
    the store is called, with what there is; StoreError where the store cannot be read.
    """
    meaning = meant(words, names_in(store))
    if not meaning.there:
        raise ConfigError(f"nothing of {meaning.run} is in the store any more")
    return list(meaning.there)


def names_in(store: Store) -> Names:
    """Return what can be named in a store, by its files."""

    def addresses() -> Iterator[str]:
        yield from store.addresses()
        for path in (store.root / "history").glob(f"*{_HISTORY}"):
            yield path.stem

    def known(address: str) -> bool:
        return ADDRESS.fullmatch(address) is not None and is_there(store, address)

    return Names(store.root, lambda: readable_roots(store), known, addresses)


def meant(words: Sequence[str], names: Names) -> Meant:
    """Return what somebody means of what can be named; a run of which nothing is there only where
    it is named alone. Raises ConfigError for what nothing is called, with what there is."""
    parts = [part for word in words for part in word.split("/") if part]
    # A path into the store has an address in it
    for part in reversed(parts):
        address = part.removesuffix(_HISTORY)
        if names.is_there(address):
            return Meant((named(address),))
    runs = names.runs()
    called, wanted = _runs(runs, parts)
    if not called:
        return _begun("/".join(parts), runs, names)
    why = ""
    # The latest that has it: one that was only planned with other settings has nothing yet
    for run in called:
        there = _there(run, names)
        chosen = tuple(each for each in there if _is_wanted(each, wanted))
        if chosen:
            return Meant(chosen, "" if wanted else run.id)
        why = why or _nothing(run, there, wanted)
    if not wanted:
        return Meant((), called[0].id)
    raise ConfigError(why)


def _there(run: NamedRun, names: Names) -> list[Named]:
    """Return what of a run is there, in the order in which a run makes it."""
    there = [named(each, run.id) for each in run.addresses if names.is_there(each)]
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


def _runs(
    runs: Sequence[NamedRun], parts: Sequence[str]
) -> tuple[Sequence[NamedRun], Sequence[str]]:
    """Return the runs that may be meant, the latest first, and what of them; none where no run is
    called so."""
    if not parts:
        return runs, ()
    called = [run for run in runs if parts[0] in (run.name, run.id)]
    if called:
        return called, parts[1:]
    # A stage without a run is of the latest one
    return (runs, parts) if parts[0] in STAGES else ([], parts)


def _begun(wanted: str, runs: Sequence[NamedRun], names: Names) -> Meant:
    """Return the one run or thing that a name begins. Raises ConfigError where none does, or
    several."""
    begun: dict[str, Meant] = {}
    for run in runs:
        # All of its name, as that of another run may begin so
        is_begun = len(wanted) > len(run.name) + 1 and run.id.startswith(wanted)
        if is_begun or _is_hash(wanted, run.id):
            begun[run.id] = Meant(tuple(_there(run, names)), run.id)
    # An imported one is called by its name alone too
    starts = (wanted, f"{IMPORTED}-{wanted}")
    for address in names.addresses() if wanted else ():
        if ADDRESS.fullmatch(address) and (address.startswith(starts) or _is_hash(wanted, address)):
            begun[address] = Meant((named(address),))
    if len(begun) == 1:
        return begun.popitem()[1]
    if begun:
        several = first_few(sorted(begun), _SHOWN)
        raise ConfigError(
            f"{len(begun)} addresses begin with {wanted}: {several}; type more of one"
        )
    if not runs:
        raise ConfigError(
            f"no run has left a root in {names.where}; name an address, or another --store"
        )
    known = first_few(list(dict.fromkeys(run.name for run in runs)), _SHOWN)
    raise ConfigError(f"nothing in {names.where} is called {wanted}; the runs in it are {known}")


def _is_hash(wanted: str, whole: str) -> bool:
    """Whether something is the beginning of the hash that an id or an address ends with."""
    return _SHORT.fullmatch(wanted) is not None and whole.rpartition("-")[2].startswith(wanted)


def _is_wanted(each: Named, wanted: Sequence[str]) -> bool:
    # an item's name may hold a slash itself
    stage, item = (*wanted, "")[0], "/".join(wanted[1:])
    return (not stage or each.stage == stage) and (not item or each.item == item)


def _nothing(run: NamedRun, there: Sequence[Named], wanted: Sequence[str]) -> str:
    if not there:
        return f"nothing of {run.id} is in the store any more"
    names = [f"{each.stage}{'/' + each.item if each.item else ''}" for each in there]
    known = first_few(names, _SHOWN)
    return f"{run.id} has no {'/'.join(wanted)}; it has {known}"


def _place(each: Named) -> tuple[int, str]:
    order = STAGES.index(each.stage) if each.stage in STAGES else len(STAGES)
    return order, each.item or ""
