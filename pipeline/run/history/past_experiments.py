"""Experiments as `history` tells of them, read from history.db."""

import sqlite3
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property

from ...config.experiments import run_name
from ...report.format import DASH


@dataclass(frozen=True)
class TrialSeed:
    """What came of a trial with one of its seeds, and where that is."""

    seed: int
    state: str
    address: str  # of its model, empty where its settings describe none


@dataclass(frozen=True)
class PastTrial:
    """A trial over its seeds."""

    name: str
    makes: str
    origin: str
    is_dense: bool
    tokens: str  # the same where losses a token compare
    valid: float | None
    spread: float | None
    bits_per_byte: float | None
    gap: float | None
    passed: int
    failed: int
    untold: int
    seeds: tuple[TrialSeed, ...] = ()

    @property
    def criteria(self) -> str:
        """How many criteria were met, in words."""
        all_of_them = self.passed + self.failed + self.untold
        return f"{self.passed} of {all_of_them}" if all_of_them else DASH

    @property
    def states(self) -> str:
        """How many seeds came to a model, and what became of the others."""
        states = [each.state for each in self.seeds]
        others = [state for state in dict.fromkeys(states) if state != "done"]
        told = [f"{states.count(state)} {state}" for state in others]
        return ", ".join([str(states.count("done")), *told])


@dataclass(frozen=True)
class PastExperiments:
    """An experiments file whose results are in the store."""

    name: str
    made: str
    trials: tuple[PastTrial, ...]

    @cached_property
    def addresses(self) -> frozenset[str]:
        """Where its models are."""
        return frozenset(each.address for trial in self.trials for each in trial.seeds)

    def has(self, run: str, addresses: tuple[str, ...]) -> bool:
        """Whether a run of a name, of which those addresses are there, is one of its trials."""
        # Runs that share an address with a trial are none of its
        return run.startswith(f"{self.name}.") and not self.addresses.isdisjoint(addresses)

    def seed_of(self, run: str, addresses: tuple[str, ...]) -> int | None:
        """Return with which seed a run is one of its trials, where that can be told."""
        found = set()
        for trial in self.trials:
            if run == run_name(self.name, trial.name):
                found |= {each.seed for each in trial.seeds if each.address in addresses}
        return found.pop() if len(found) == 1 else None


def past_experiments(index: sqlite3.Connection) -> tuple[PastExperiments, ...]:
    """Return all experiments of a store, those that were made last first."""
    seeds: dict[tuple[str, str], list[TrialSeed]] = defaultdict(list)
    for name, trial, *rest in index.execute("SELECT * FROM trial_runs ORDER BY seed"):
        seeds[name, trial].append(TrialSeed(*rest))
    trials: dict[str, list[PastTrial]] = defaultdict(list)
    for row in index.execute("SELECT * FROM trials ORDER BY experiments, place"):
        name, _, trial, makes, origin, is_dense, *rest = row
        about = (trial, makes, origin, bool(is_dense))
        found_trial = PastTrial(*about, *rest)
        trials[name].append(replace(found_trial, seeds=tuple(seeds[name, trial])))
    found = []
    for name, made in index.execute("SELECT name, made FROM experiments ORDER BY made DESC, name"):
        found.append(PastExperiments(name, made, tuple(trials[name])))
    return tuple(found)
