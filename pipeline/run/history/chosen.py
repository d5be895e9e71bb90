"""Which runs and trainings somebody means who names them, or writes a pattern of names."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from ...errors import ConfigError
from ..find import Meant, meant
from ..stages import first_few
from .lines import Known, PastRun, PastTraining

WILD = set("*?[")


def one_of(name: str, known: Known) -> PastRun | PastTraining:
    """Return the run or the training that a name means. Raises ConfigError, also where it means
    several trainings."""
    meaning = meant([name], known.names)
    if meaning.run:
        return _run(meaning.run, known)
    found = _trainings(name, meaning, known)
    if len(found) > 1:
        names = first_few([each.address for each in found])
        raise ConfigError(f"{name} is several trainings: {names}; name one of them")
    return found[0]


def _run(id_: str, known: Known) -> PastRun:
    return next(run for run in known.runs if run.id == id_)


def _trainings(name: str, meaning: Meant, known: Known) -> list[PastTraining]:
    found = [known.trainings.get(each.address) for each in meaning.there]
    there = [each for each in found if each is not None]
    if not there and not meaning.run:
        what = first_few([each.name for each in meaning.there])
        raise ConfigError(f"{name} is {what}, which has no history; `open` shows a report")
    return there


def runs_of(names: Sequence[str], known: Known) -> list[PastRun]:
    """Return the runs that names, ids and patterns mean, each once; all of them where nothing is
    named. Raises ConfigError for one that means none."""
    if not names:
        return list(known.runs)
    found: dict[str, PastRun] = {}
    for name in names:
        for run in _runs_like(name, known):
            found[run.id] = run
    return list(found.values())


def _runs_like(name: str, known: Known) -> list[PastRun]:
    """Return the runs that a name or a pattern means, of experiments their trials. Raises
    ConfigError."""
    experiments = known.experiments_called(name)
    if experiments is not None:
        return known.trials_of(experiments)
    if not WILD.isdisjoint(name):
        like = [run for run in known.runs if _is_like(run, name)]
        if not like:
            raise ConfigError(f"no run is called like {name}; `history list` has all names")
        return like
    found = one_of(name, known)
    if isinstance(found, PastRun):
        return [found]
    # One that no run reaches stands for itself
    alone = [run for run in known.runs if run.id == found.address]
    if not alone:
        raise ConfigError(f"{name} is a training, not a run: `history show {name}` shows it alone")
    return alone


def _is_like(run: PastRun, pattern: str) -> bool:
    return fnmatchcase(run.id, pattern) or fnmatchcase(run.name, pattern)


def trainings_of(names: Sequence[str], known: Known) -> list[PastTraining]:
    """Return the trainings at addresses and of runs, each once; all of them where nothing is
    named. Raises ConfigError."""
    if not names:
        return list(known.trainings.values())
    found: dict[str, PastTraining] = {}
    for name in names:
        if WILD.isdisjoint(name) and known.experiments_called(name) is None:
            of = _trainings(name, meant([name], known.names), known)
        else:
            of = [each for run in _runs_like(name, known) for each in run.trainings]
        found |= {each.address: each for each in of}
    return list(found.values())
