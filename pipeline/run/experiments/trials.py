"""Trials: each the run that its settings describe, with the job in which its model ends."""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...config.experiments import GridConfig, TrialConfig
from ...config.files import overlay, resolve_paths
from ...config.run import JobKey, RunConfig
from ...errors import ConfigError
from ...families.load import PATHS, checked, trial_models
from ..stages import STAGES, Addresses
from .reading import Experiments, nested

LONGEST = 64  # characters of a name
# What a name may not have, as values of settings do
STRANGE = re.compile(r"[^A-Za-z0-9_.+-]+")


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: a trial of the file with one seed."""

    name: str
    seed: int
    makes: str
    changes: Mapping[str, Any]
    cfg: RunConfig

    @property
    def label(self) -> str:
        """What it is called for people."""
        return f"{self.name} seed {self.seed}"

    @cached_property
    def model(self) -> JobKey:
        """The job in which its model ends."""
        return trial_models(self.cfg).model_job(self.cfg, self.makes)

    @cached_property
    def addresses(self) -> Addresses:
        """Where its results live."""
        return Addresses(self.cfg)

    @cached_property
    def score(self) -> JobKey:
        """The job that measures its model."""
        return trial_models(self.cfg).score_job(self.cfg, self.makes)

    @cached_property
    def jobs(self) -> dict[JobKey, str]:
        """The jobs that its model needs, with their addresses, in the order of a run."""
        return self._needed_for(self.model)

    @cached_property
    def measured(self) -> dict[JobKey, str]:
        """The jobs that its model needs and then is measured by, likewise."""
        return self._needed_for(self.score)

    @property
    def tokens(self) -> str:
        """What is the same where a token is the same."""
        return self.addresses.of(*trial_models(self.cfg).token_job(self.cfg))

    def _needed_for(self, last: JobKey) -> dict[JobKey, str]:
        wanted: dict[JobKey, None] = {}
        waiting = [last]
        while waiting:
            job = waiting.pop()
            if job not in wanted:
                wanted[job] = None
                waiting += self.cfg.needs(*job)
        ordered = {}
        for stage in STAGES:
            for item in self.cfg.items(stage):
                if (stage, item) in wanted:
                    ordered[stage, item] = self.addresses.of(stage, item)
        return ordered

    @property
    def trainings(self) -> dict[JobKey, str]:
        """Those of its jobs that train."""
        found = {}
        for job, address in self.jobs.items():
            if self.cfg.stages[job[0]].kind == "training":
                found[job] = address
        return found


def listed_trials(experiments: Experiments) -> list[Trial]:
    """Return the trials that are listed and those of grids, each with each of its seeds; what
    searches choose is known later. Raises ConfigError."""
    settings = experiments.settings
    wanted: dict[str, tuple[TrialConfig, dict[str, Any]]] = {}
    for name, trial in settings.trials.items():
        wanted[name] = trial, trial.change
    for grid_name, grid in settings.grids.items():
        for name, over in expanded(grid_name, grid):
            if name in wanted:
                raise ConfigError(f"grids.{grid_name}: two trials are called {name}; rename one")
            wanted[name] = grid, {**grid.change, **over}
    found = []
    for name, (trial, changes) in wanted.items():
        for seed in trial.seeds or settings.seeds:
            found.append(made_trial(experiments, name, trial, changes, seed))
    known = {trial.name for trial in found}
    judged = settings.criteria
    for field, wished in (("dense", judged.dense), ("gap_of", judged.gap_of)):
        # Without being named it may be missing, and what is held against it stays open
        if field in judged.model_fields_set and wished is not None and wished not in known:
            names = ", ".join(sorted(known)) or "none"
            raise ConfigError(
                f"criteria.{field}: there is no trial {wished}; the trials are {names}"
            )
    return found


def made_trial(
    experiments: Experiments, name: str, trial: TrialConfig, changes: dict[str, Any], seed: int
) -> Trial:
    """Return the run of a trial with a seed. Raises ConfigError that names the trial."""
    own = nested(changes)
    placed = resolve_paths(own, experiments.file.parent, PATHS)
    raw = overlay(experiments.settings.base, own, placed)
    raw |= {"seed": seed, "name": f"{_begins(experiments.name)}{name}"[:LONGEST]}
    runtime = raw.get("runtime", {})
    if isinstance(runtime, dict):
        raw["runtime"] = {"wandb_group": experiments.name} | runtime
    try:
        cfg = checked(raw, experiments.file)
        found = Trial(name, seed, trial.makes, changes, cfg)
        # Asked for here, so that what no run of these settings makes is told before anything starts
        _ = found.model
    except ConfigError as error:
        raise ConfigError(f"trial {name}: {error}") from None
    return found


def _begins(experiments: str) -> str:
    """Return how the names of the runs of all its trials begin."""
    return f"{experiments}."


def trial_label(experiments: str, run: str, seed: int) -> str:
    """Return what the trial that a run of such a name is of is called for people."""
    return f"{run.removeprefix(_begins(experiments))} seed {seed}"


def expanded(name: str, grid: GridConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of each trial of a grid and what it sets, the last setting changing fastest.

    Raises ConfigError for settings that go together and have values of another number.
    """
    axes = [list(_axis(name, together, values)) for together, values in grid.over.items()]
    for chosen in itertools.product(*axes):
        words = [name]
        changes: dict[str, Any] = {}
        for word, change in chosen:
            words.append(word)
            changes |= change
        yield "-".join(words)[:LONGEST], changes


def _axis(name: str, together: str, values: list[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    settings = [setting.strip() for setting in together.split(",")]
    last = settings[0].rpartition(".")[2]
    for value in values:
        several = [value] if len(settings) == 1 else value
        if not isinstance(several, list) or len(several) != len(settings):
            raise ConfigError(
                f"grids.{name}.over: {together} are {len(settings)} settings, so each value is a "
                f"list of as many, not {value!r}"
            )
        yield f"{last}_{_worded(several)}", dict(zip(settings, several, strict=True))


def _worded(values: list[Any]) -> str:
    texts = []
    for value in values:
        shown = "+".join(map(str, value)) if isinstance(value, list) else str(value)
        texts.append(STRANGE.sub("_", shown))
    return "_".join(texts)
