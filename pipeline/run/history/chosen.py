"""Which runs and trainings somebody means who names them."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from ...errors import ConfigError
from ..stages import first_few
from .lines import Known, PastRun, PastTraining

WILD = set("*?[")


def one_of(name: str, known: Known) -> PastRun | PastTraining:
    """Return the run of an id or a name, of several the one that was begun last, or the training
    at an address. Raises ConfigError."""
    for run in known.runs:
        # one that is a training by itself is shown as such
        if name == run.id and run.has_root:
            return run
    for run in known.runs:
        if name == run.name:
            return run
    for training in every_training(known):
        if name == training.address:
            return training
    names = first_few([run.id for run in known.runs]) or "none"
    raise ConfigError(
        f"there is no run and no training {name}; the runs are {names}: `history list` has them all"
    )


def runs_of(names: Sequence[str], known: Known) -> list[PastRun]:
    """Return the runs that names, ids and patterns mean, each once; all of them where nothing is
    named. Raises ConfigError for one that means none."""
    if not names:
        return list(known.runs)
    found: dict[str, PastRun] = {}
    for name in names:
        if WILD.isdisjoint(name):
            run = next((each for each in known.runs if each.id == name), one_of(name, known))
            if isinstance(run, PastTraining):
                raise ConfigError(
                    f"{name} is a training, not a run: `history show {name}` shows it alone"
                )
            found[run.id] = run
            continue
        like = [run for run in known.runs if _is_like(run, name)]
        if not like:
            raise ConfigError(f"no run is called like {name}; `history list` has all names")
        found |= {run.id: run for run in like}
    return list(found.values())


def _is_like(run: PastRun, pattern: str) -> bool:
    return fnmatchcase(run.id, pattern) or fnmatchcase(run.name, pattern)


def trainings_of(names: Sequence[str], known: Known) -> list[PastTraining]:
    """Return the trainings at addresses and of runs, each once; all of them where nothing is
    named. Raises ConfigError."""
    if not names:
        return list(every_training(known))
    found: dict[str, PastTraining] = {}
    for name in names:
        means: list[PastRun | PastTraining] = []
        if WILD.isdisjoint(name):
            means.append(one_of(name, known))
        else:
            means += runs_of([name], known)
        for meant in means:
            trainings = meant.trainings if isinstance(meant, PastRun) else (meant,)
            found |= {each.address: each for each in trainings}
    return list(found.values())


def every_training(known: Known) -> list[PastTraining]:
    """Return every training once."""
    found: dict[str, PastTraining] = {}
    for run in known.runs:
        found |= {each.address: each for each in run.trainings}
    return list(found.values())
