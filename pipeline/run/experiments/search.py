"""What a search tries next, by Optuna: what follows from the trials before, and from nothing else.

Trial k is a function of (the search, what trials before its group came to), and so is the step at
which one is ended. No study is kept: a search that was killed comes to the same trials from the
results that are in the store.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from ...config.experiments import RangeConfig, SearchConfig
from ...errors import ConfigError

DIGITS = 3  # of a trial's number in its name


@dataclass(frozen=True)
class TriedTrial:
    """A trial of a search that has ended: what it set, and what it came to."""

    values: Mapping[str, Any]
    losses: Sequence[float] = field(default=())  # of its validations, in order
    valid: float | None = None  # None: pruned or failed
    pruned: bool = False


def groups(search: SearchConfig) -> Iterator[range]:
    """Yield the numbers of trials that are chosen together."""
    for first in range(0, search.trials, search.at_once):
        yield range(first, min(search.trials, first + search.at_once))


def trial_name(search: str, number: int) -> str:
    """Return what a trial of a search is called."""
    return f"{search}-{number:0{DIGITS}}"


class Study:
    """A search as far as it has come. Raises ConfigError where Optuna cannot be imported."""

    def __init__(self, name: str, search: SearchConfig, tried: Sequence[TriedTrial]) -> None:
        self._optuna = _import_optuna()
        self._search = search
        # A seed of its own for each point of the search, whatever was drawn before it
        seed = zlib.crc32(f"{name}/{len(tried)}".encode())
        random = search.sampler == "random" or len(tried) < search.random_trials
        samplers = self._optuna.samplers
        sampler = samplers.RandomSampler(seed=seed)
        if not random:
            sampler = samplers.TPESampler(seed=seed, n_startup_trials=0)
        self._study = self._optuna.create_study(
            sampler=sampler, pruner=self._pruner(), direction="minimize"
        )
        self._space = {dotted: self._distribution(each) for dotted, each in search.space.items()}
        for each in tried:
            self._study.add_trial(self._frozen(each))

    def choose(self, count: int) -> list[dict[str, Any]]:
        """Return what the next trials set, by dotted name."""
        found = []
        for _ in range(count):
            asked = self._study.ask(self._space)
            found.append({name: self._value(name, asked.params[name]) for name in self._space})
        return found

    def ended_at(self, losses: Sequence[float]) -> int | None:
        """Return how many validations of a training there are to be, as its loss is then above the
        median of those before it; None where it goes on."""
        if not self._search.prune:
            return None
        trial = self._study.ask()
        for number, loss in enumerate(losses, start=1):
            trial.report(loss, number)
            if trial.should_prune():
                return number
        return None

    def _pruner(self) -> Any:
        pruners = self._optuna.pruners
        if not self._search.prune:
            return pruners.NopPruner()
        return pruners.MedianPruner(
            n_startup_trials=max(1, self._search.random_trials),
            n_warmup_steps=self._search.prune_after,
        )

    def _distribution(self, wanted: RangeConfig) -> Any:
        kinds = self._optuna.distributions
        if wanted.choices is not None:
            # Optuna takes plain values alone, so what is chosen is the place in the list
            return kinds.CategoricalDistribution(range(len(wanted.choices)))
        if wanted.whole:
            return kinds.IntDistribution(int(_low(wanted)), int(_high(wanted)), log=wanted.log)
        return kinds.FloatDistribution(_low(wanted), _high(wanted), log=wanted.log)

    def _value(self, name: str, chosen: Any) -> Any:
        choices = self._search.space[name].choices
        return chosen if choices is None else choices[chosen]

    def _frozen(self, each: TriedTrial) -> Any:
        states = self._optuna.trial.TrialState
        state = states.COMPLETE
        if each.valid is None:
            state = states.PRUNED if each.pruned else states.FAIL
        params = {}
        for name, value in each.values.items():
            choices = self._search.space[name].choices
            params[name] = value if choices is None else choices.index(value)
        return self._optuna.trial.create_trial(
            state=state,
            value=each.valid,
            params=params,
            distributions=self._space,
            intermediate_values=dict(enumerate(each.losses, start=1)),
        )


def _low(wanted: RangeConfig) -> float:
    return wanted.low or 0.0


def _high(wanted: RangeConfig) -> float:
    return wanted.high or 0.0


def _import_optuna() -> ModuleType:
    """Import Optuna, which takes a second and is asked for by few. Raises ConfigError."""
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            f"searches need the package optuna, which cannot be imported ({error}): install "
            "requirements.txt, or list trials or grids in their place"
        ) from None
    # It tells of every trial on the error stream, as this program does itself
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
