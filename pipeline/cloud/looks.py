"""Which data a run on Modal goes by: looked at by the container that hands out the jobs, before any
other begins; the laptop, which does not see them, plans by what was looked at last.

Invariant: containers look at nothing that decides an address, so no two of them can disagree.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..config.run import JobKey, RunConfig, source_key
from ..errors import DataError
from ..report.narrow import plain_console
from ..run.backend import printed_progress
from ..run.experiments.trials import Trial
from ..run.identity import begin, changed, recipes, with_prints
from ..run.stages import Addresses, label
from ..store.artifacts import Store
from ..store.looking import FOLDER
from ..store.sources import SEEN, When, print_in
from .far import Names, Read
from .leases import SharedTable


def as_recorded(
    cfg: RunConfig,
    names: Names,
    read: Read,
    *,
    frozen: bool = False,
) -> tuple[RunConfig, list[str]]:
    """Return a run that goes by what the far store has of the data it reads, and what to tell of
    what is not known there; `names` lists a folder of it, `read` returns a file's bytes."""
    # What was looked at last may be newer than what anything was made of
    kinds: tuple[When, ...] = ("made",) if frozen else ("looked", "made")
    there: set[str] = set()
    for kind in kinds:
        there.update(f"{FOLDER}/{kind}/{name}" for name in names(f"{FOLDER}/{kind}"))
    prints: dict[JobKey, str] = {}
    unknown = []
    for name, job in recipes(cfg).items():
        places = [f"{FOLDER}/{kind}/{name}.json" for kind in kinds]
        known = [place for place in places if place in there]
        prints_there = (print_in(read(place) or b"", cfg.name) for place in known)
        found = next(filter(None, prints_there), "")
        if found:
            prints[job] = found
        elif any(cfg.read_outside(*job)):
            unknown.append(label(*job))
    notes = []
    if unknown:
        notes.append(
            f"what {', '.join(unknown)} reads has not been looked at yet: its address, and what "
            "stands on it, are known once a container has"
        )
    return with_prints(cfg, prints), notes


def changed_looks(
    cfg: RunConfig,
    names: Names,
    read: Read,
) -> Iterator[str]:
    """Yield the files of the far store that tell what has changed of the data of a run, between
    what its results were made of and what it goes by."""
    there = set(names(f"{FOLDER}/made"))
    for name, job in recipes(cfg).items():
        now = (cfg.identity or {}).get(source_key(*job))
        if now is None or f"{name}.json" not in there:
            continue
        record = f"{FOLDER}/made/{name}.json"
        was = print_in(read(record) or b"", cfg.name)
        if was and was != now:
            yield record
            yield f"{FOLDER}/{SEEN}/{was}.json"
            yield f"{FOLDER}/{SEEN}/{now}.json"


def looked_at(cfg: RunConfig, store: Store, frozen: bool) -> RunConfig:
    """Look, in the container that hands out jobs, at what a run reads, and write it down for them;
    return the run that all containers go by.

    Raises DataError when it is not what the laptop planned with, under a limit on the cost, and
    what opening a store raises.
    """
    store.refresh()
    store.open()
    planned = cfg.identity or {}
    progress = printed_progress(plain_console())
    bare = cfg.model_copy(update={"identity": None})
    found, notes = begin(bare, store, progress, frozen=frozen, makes=True)
    store.publish()
    for note in (*notes, *changed(found, store, Addresses(found).of)):
        print(note)
    now = found.identity or {}
    other = [job for job, was in planned.items() if now.get(job) != was]
    if other and cfg.modal.max_cost_usd is not None:
        jobs = ", ".join(name.strip("/").replace("/", " ") for name in other)
        raise DataError(
            f"what {jobs} reads has changed since it was looked at last, and so may the cost, "
            "which is limited: nothing was started, and the same command estimates it anew"
        )
    return found


def looked_at_once(
    cfg: RunConfig, store: Store, frozen: bool, table: SharedTable, run: str
) -> RunConfig:
    """Return the run that all containers go by, which is the one that its first attempt has looked
    at, whatever has changed since: half of it may be made. Raises what `looked_at` does."""
    key = f"{run}/looked"
    known = table.get(key)
    if known is not None:
        store.refresh()
        store.open()
        return cfg.model_copy(update={"identity": json.loads(known)})
    found = looked_at(cfg, store, frozen)
    table.put(key, json.dumps(found.identity))
    return found


@dataclass(frozen=True)
class SharedLooks:
    """What the first attempt at a sweep has seen of what its trials read, which all go by."""

    store: Store
    table: SharedTable
    run: str  # what all attempts are called

    def former(self, trials: Sequence[Trial]) -> Mapping[str, dict[str, str]]:
        """Return what was seen for each of the trials, by their labels."""
        text = self.table.get(self._key(trials)) if trials else None
        return {} if text is None else dict(json.loads(text))

    def keep(self, trials: Sequence[Trial]) -> None:
        """Keep what was seen for trials that begin together."""
        # Before anybody goes by it: containers find on the volume what documents there are
        self.store.publish()
        seen = {trial.label: trial.cfg.identity or {} for trial in trials}
        if seen:
            self.table.put(self._key(trials), json.dumps(seen))

    def _key(self, trials: Sequence[Trial]) -> str:
        return f"{self.run}/looked/{trials[0].label}"
