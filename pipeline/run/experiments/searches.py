"""Searches of a sweep: trials that are chosen by what those before came to, and ended early where
they do worse."""

from collections.abc import Sequence
from dataclasses import dataclass

from ...config.experiments import SearchConfig
from ...errors import ConfigError, PipelineError
from ...protocols import Progress
from ...report.schema.experiments import TrialRun
from ...store.artifacts import Store
from ...store.history import read
from .reading import Experiments
from .results import run_of
from .search import Study, TriedTrial, groups, trial_name
from .sweep import TrialSweep, looked_at
from .trials import Trial, made_trial


@dataclass(frozen=True)
class Searched:
    """A trial of a search that has ended; none where its settings describe no run."""

    name: str
    makes: str
    changes: dict
    trial: Trial | None
    run: TrialRun


def searched(
    experiments: Experiments, name: str, sweep: TrialSweep, progress: Progress, frozen: bool = False
) -> list[Searched]:
    """Make the trials of a search, group after group; return what came of each. Raises
    ConfigError where Optuna is missing, Interrupted."""
    search = experiments.settings.searches[name]
    found: list[Searched] = []
    tried: list[TriedTrial] = []
    for numbers in groups(search):
        study = Study(name, search, tried)
        chosen = study.choose(len(numbers))
        group = []
        for number, values in zip(numbers, chosen, strict=True):
            group.append(_begun(experiments, trial_name(name, number), search, values))
        trials = [each for each in group if isinstance(each, Trial)]
        trials, _ = looked_at(trials, sweep.store, progress, frozen, sweep.looks)
        _make(sweep, trials, study, str(experiments.file))
        looked = {trial.name: trial for trial in trials}
        for each, values in zip(group, chosen, strict=True):
            if isinstance(each, Searched):
                found.append(each)
                tried.append(TriedTrial(values))
                continue
            trial = looked[each.name]
            ended = _ended(sweep, trial, study)
            run = _run(sweep, trial, ended)
            found.append(Searched(trial.name, trial.makes, dict(trial.changes), trial, run))
            tried.append(_tried(sweep.store, trial, values, run, ended))
            sweep.tell(f"{trial.label}: {_told(run)}")
    return found


def _begun(
    experiments: Experiments, name: str, search: SearchConfig, values: dict
) -> Trial | Searched:
    """Return a trial, or what failed of it: a value may not go together with another."""
    seed = (search.seeds or experiments.settings.seeds)[0]
    try:
        return made_trial(experiments, name, search, values, seed)
    except ConfigError as error:
        run = TrialRun(seed=seed, state="failed", error=str(error))
        return Searched(name, search.makes, {**search.change, **values}, None, run)


def _make(sweep: TrialSweep, trials: Sequence[Trial], study: Study, file: str) -> None:
    # One that was ended before lies where it stopped, and must not go on
    to_make = [trial for trial in trials if _ended(sweep, trial, study) is None]
    by_address = {trial.jobs[trial.model]: trial for trial in to_make}

    def gives_up(address: str) -> bool:
        # What a model is made of is others' too, so that only its last training is ended
        trial = by_address.get(address)
        return trial is not None and _ended(sweep, trial, study) is not None

    with sweep.known(sweep.store, trials, file):
        sweep.make(to_make, gives_up)
        sweep.measure([trial for trial in trials if _ended(sweep, trial, study) is None])


def _ended(sweep: TrialSweep, trial: Trial, study: Study) -> int | None:
    """Return after how many validations a training is ended; None where it goes on."""
    return study.ended_at(_losses(sweep.store, trial))


def _losses(store: Store, trial: Trial) -> list[float]:
    """Return the validation losses of a trial's model so far."""
    try:
        rows = read(store.history(trial.jobs[trial.model])).rows
    except PipelineError:
        # It can be read when the training has ended, or what is wrong is told then
        return []
    return [row["valid_nats"] for row in rows if row.get("valid_nats") is not None]


def _run(sweep: TrialSweep, trial: Trial, ended: int | None) -> TrialRun:
    if ended is not None:
        why = f"after {ended} validations its loss was above the median of those before"
        return run_of(trial, sweep.store, why, "pruned")
    return outcome(trial, sweep)


def outcome(trial: Trial, sweep: TrialSweep) -> TrialRun:
    """Return what came of a trial that was made and measured."""
    return run_of(trial, sweep.store, sweep.error_of(trial), unmeasured=sweep.unmeasured(trial))


def _tried(
    store: Store, trial: Trial, values: dict, run: TrialRun, ended: int | None
) -> TriedTrial:
    losses = _losses(store, trial)
    if ended is not None:
        # How far it came beyond that depends on who looked when
        return TriedTrial(values, losses[:ended], pruned=True)
    valid = run.losses.valid if run.losses else None
    return TriedTrial(values, losses if valid is not None else (), valid)


def _told(run: TrialRun) -> str:
    if run.losses is not None and run.losses.valid is not None:
        return f"valid {run.losses.valid:.4f} nats"
    return f"{run.state}: {run.error}"
