"""Trials: each the run that its settings describe, with the job in which its model ends."""

import itertools
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...config.base import merge
from ...config.experiments import GridConfig, TrialConfig, cut, run_name
from ...config.files import overlay, resolve_paths
from ...config.run import JobKey, RunConfig
from ...errors import ConfigError
from ...families.load import PATHS, checked, trial_models
from ..stages import STAGES, Addresses
from .reading import Experiments, nested
from .search import trial_name

# What a name may not have, as values of settings do
STRANGE = re.compile(r"[^A-Za-z0-9_.-]+")
# What is the sweep's to say of a run, and where a file says it
OF_THE_SWEEP = {
    "name": "a trial's run is called by the names of the file and the trial",
    "seed": "seeds are listed by `seeds`, of the file or the trial",
}
SEPARATOR = ","  # of settings that go together
TRIED = 16  # combinations of the ends of a space, of which one has to describe a run


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
        wanted[name] = trial, {}
    for grid_name, grid in settings.grids.items():
        for name, over in expanded(grid_name, grid):
            if name in wanted:
                raise ConfigError(f"grids.{grid_name}: two trials are called {name}; rename one")
            wanted[name] = grid, over
    found = []
    for name, (trial, over) in wanted.items():
        for seed in trial.seeds or settings.seeds:
            found.append(made_trial(experiments, name, trial, over, seed))
    for name in settings.searches:
        _check_search(experiments, name, wanted)
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


def _check_search(experiments: Experiments, name: str, listed: Collection[str]) -> None:
    """Raise ConfigError for a search none of whose trials could be made, or that calls one as
    another trial is called; values that do not go together fail by themselves."""
    search = experiments.settings.searches[name]
    for number in range(search.trials):
        if trial_name(name, number) in listed:
            raise ConfigError(
                f"searches.{name}: two trials are called {trial_name(name, number)}; rename one"
            )
    seed = (search.seeds or experiments.settings.seeds)[0]
    first: ConfigError | None = None
    ends = itertools.product(*((each.ends[0], each.ends[-1]) for each in search.space.values()))
    for values in itertools.islice(ends, TRIED):
        over = dict(zip(search.space, values, strict=True))
        try:
            made_trial(experiments, name, search, over, seed)
        except ConfigError as error:
            first = first or error
        else:
            return
    raise ConfigError(f"searches.{name}: no end of its space describes a run: {first}")


def made_trial(
    experiments: Experiments, name: str, trial: TrialConfig, over: Mapping[str, Any], seed: int
) -> Trial:
    """Return the run of a trial with a seed, `over` laid on what the trial changes. Raises
    ConfigError that names the trial."""
    runtime = {"wandb_group": experiments.name}
    try:
        own = merge(nested(trial.change), nested(over))
        for setting, why in OF_THE_SWEEP.items():
            if setting in own:
                raise ConfigError(f"{setting}: {why}, so take it out of what is changed")
        placed = resolve_paths(own, experiments.file.parent, PATHS)
        raw = overlay(experiments.settings.base, own, placed)
        raw |= {"seed": seed, "name": run_name(experiments.name, name)}
        if isinstance(raw.get("runtime", {}), dict):
            raw["runtime"] = runtime | raw.get("runtime", {})
        cfg = checked(raw, experiments.file)
        found = Trial(name, seed, trial.makes, {**trial.change, **over}, cfg)
        # Asked for here, so that what no run of these settings makes is told before anything starts
        _ = found.model
    except ConfigError as error:
        raise ConfigError(f"trial {name}: {error}") from None
    return found


def trial_label(experiments: str, run: str, seed: int) -> str:
    """Return what the trial that a run of such a name is of is called for people."""
    return f"{run.removeprefix(f'{experiments}.')} seed {seed}"


def expanded(name: str, grid: GridConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of each trial of a grid and what it sets, the last setting changing fastest.

    Raises ConfigError for settings that go together and have values of another number, and for what
    is there twice.
    """
    named = [setting.strip() for together in grid.over for setting in together.split(SEPARATOR)]
    for setting in named:
        if named.count(setting) > 1:
            raise ConfigError(f"grids.{name}.over: {setting} is there twice; take one out")
    axes = [list(_axis(name, together, values)) for together, values in grid.over.items()]
    for chosen in itertools.product(*axes):
        words = [name]
        changes: dict[str, Any] = {}
        for word, change in chosen:
            words.append(word)
            changes |= change
        yield cut("-".join(words)), changes


def _axis(name: str, together: str, values: list[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    settings = [setting.strip() for setting in together.split(SEPARATOR)]
    last = settings[0].rpartition(".")[2]
    words: list[str] = []
    for value in values:
        several = [value] if len(settings) == 1 else value
        if not isinstance(several, list) or len(several) != len(settings):
            raise ConfigError(
                f"grids.{name}.over: {together} are {len(settings)} settings, so each value is a "
                f"list of as many, not {value!r}"
            )
        word = f"{last}_{_worded(several)}"
        if value in values[: len(words)]:
            raise ConfigError(f"grids.{name}.over.{together}: {value!r} is there twice")
        if word in words:
            # Letters that no name has are all it differs by
            word += f"_{len(words) + 1}"
        words.append(word)
        yield word, dict(zip(settings, several, strict=True))


def _worded(values: list[Any]) -> str:
    texts = []
    for value in values:
        shown = "_".join(map(str, value)) if isinstance(value, list) else str(value)
        texts.append(STRANGE.sub("_", shown))
    return "_".join(texts)
