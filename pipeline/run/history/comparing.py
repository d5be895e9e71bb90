"""`history compare`: a few runs side by side with the settings they differ in, many ranked."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

from ...errors import ConfigError, StoreError
from ...report.experiments import flat
from ...report.format import DASH, count, figures, seconds
from ...report.scores import BITS, LESS_IS_BETTER
from ...store.artifacts import Store
from ...store.imported import STAGE, is_imported
from ...store.roots import read_root, root_path
from ..prune import said
from .lines import PastRun, PastTraining
from .listing import print_rows, scored

# More do not fit beside each other.
MOST_BESIDE = 6
LONG = 60  # characters of an override in a ranking
RANKING = ("run", "best valid", "at step", "tokens", "tokens/s", "score", "time", "overrides")
OTHER_TOKENS = "losses a token do not compare, as tokenizers are others"
_OF_TRAINING: tuple[tuple[str, Callable[[PastTraining], str]], ...] = (
    ("best valid, nats", lambda each: figures(each.valid_nats)),
    ("last train, nats", lambda each: figures(each.train_nats)),
    ("tokens", lambda each: count(each.tokens)),
    ("tokens/s", lambda each: count(each.tokens_per_s)),
    ("time", lambda each: seconds(each.seconds)),
)


def compare(
    runs: Sequence[PastRun], job: str | None, store: Store, console: Console
) -> Sequence[PastRun]:
    """Print runs beside each other: a few with all they came to, more as a ranking by the best
    validation of one job, by its name, else of the one that tells most of them apart; return those
    that may be drawn together, the best ones. Where tokens are others a loss a token ranks nothing,
    and bits per byte do. Raises ConfigError when none has that job."""
    if len(runs) > MOST_BESIDE or job:
        return _rank(runs, job or _telling(runs), console)[:MOST_BESIDE]
    _beside(runs, store, console)
    return runs


def _telling(runs: Sequence[PastRun]) -> str:
    """Return the job that most runs have and that is not one and the same in all of them, the last
    where there are several; "" where no run has trained."""
    addresses: dict[str, list[str]] = {}
    places = {}
    for run in runs:
        for training in run.trainings:
            addresses.setdefault(_job(training), []).append(training.address)
            places[_job(training)] = training.place[0]

    def tells(name: str) -> tuple[bool, int, int]:
        return len(set(addresses[name])) > 1, len(addresses[name]), places[name]

    return max(addresses, key=tells, default="")


def _job(training: PastTraining) -> str:
    """Return what trainings of other runs that compare with one are called too: of imported ones
    the names are of runs."""
    return STAGE if is_imported(training.address) else training.name


def _rank(runs: Sequence[PastRun], job: str, console: Console) -> list[PastRun]:
    """Print runs by the best validation of a job, or by what compares in its place; return them in
    that order. Raises ConfigError."""
    placed = []
    known: set[str] = set()
    for run in runs:
        known.update(_job(each) for each in run.trainings)
        training = next((each for each in run.trainings if _job(each) == job), None)
        nats = training.valid_nats if training else None
        # those that were not validated come last
        placed.append((nats is None, nats or 0.0, run.id, run, training))
    if job not in known and known:
        raise ConfigError(
            f"--job: none of these runs has trained {job}; they have {', '.join(sorted(known))}"
        )
    title = f"runs by the best validation of {job}" if job else "runs without a training"
    if not _other_tokens([run for *_, run, training in placed if training]):
        placed.sort(key=lambda each: each[:3])
    elif all(_bits(run) is not None for run in runs):
        placed.sort(key=lambda each: (_bits(each[3]) or 0.0, each[2]))
        title = f"runs by bits per byte of what they serve, as tokens of {job} are others"
    else:
        title = f"runs, not ranked: {OTHER_TOKENS}, and not all have bits per byte"
    rows = [_ranked(run, training) for *_, run, training in placed]
    print_rows(title, RANKING, rows, console)
    return [each[3] for each in placed]


def _other_tokens(runs: Iterable[PastRun]) -> bool:
    """Whether a loss a token of one of these runs is known to be of other tokens than another's."""
    return len({run.tokens for run in runs if run.tokens}) > 1


def _bits(run: PastRun) -> float | None:
    """Return the bits per byte of what a run serves, by its newest report."""
    score = run.evaluation.score if run.evaluation else None
    return score.value if score and score.measure == BITS else None


def _ranked(run: PastRun, training: PastTraining | None) -> tuple[str, ...]:
    trained: tuple[str, ...] = (DASH,) * 4
    if training:
        step = DASH if training.valid_step is None else f"{training.valid_step:,}"
        size = (count(training.tokens), count(training.tokens_per_s))
        trained = (figures(training.valid_nats), step, *size)
    spent = seconds(run.seconds) if run.made else DASH
    overrides = " ".join(_clipped(each) for each in run.overrides)
    return (run.id, *trained, scored(run.evaluation), spent, overrides)


def _clipped(override: str) -> str:
    """Return an override, of a long one its beginning."""
    return override if len(override) <= LONG else f"{override[:LONG]}…"


def _beside(runs: Sequence[PastRun], store: Store, console: Console) -> None:
    columns = ("", *(run.id for run in runs))
    rows: list[tuple[str, ...]] = []
    trainings = [{_job(each): each for each in run.trainings} for run in runs]
    for name in _in_order(trainings):
        for what, told in _OF_TRAINING:
            cells = [told(of[name]) if name in of else DASH for of in trainings]
            rows.append((f"{name}: {what}", *cells))
    rows += _scores(runs)
    rows.append(("time of all jobs", *(seconds(run.seconds) for run in runs)))
    print_rows("side by side", columns, rows, console)
    if _other_tokens(runs):
        said(console)(f"{OTHER_TOKENS}; bits per byte compare")
    differing = list(_differing(runs, store, console))
    if differing:
        print_rows("settings that differ", columns, differing, console)


def _in_order(trainings: Iterable[Mapping[str, PastTraining]]) -> list[str]:
    """Return the names of all trainings as a run goes through them."""
    places: dict[str, int] = {}
    for of in trainings:
        for name, training in of.items():
            places.setdefault(name, training.place[0])
    return sorted(places, key=lambda name: (places[name], name))


def _scores(runs: Sequence[PastRun]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each figure of the reports, what the runs serve first."""
    of_runs = []
    for run in runs:
        found = run.evaluation.scores if run.evaluation else ()
        of_runs.append({(score.name, score.measure): score.value for score in found})
    names: dict[tuple[str, str], None] = {}
    for of in of_runs:
        names |= dict.fromkeys(of)
    for key in names:
        values = [of.get(key) for of in of_runs]
        best = _best(values, key[1])
        cells = []
        for value in values:
            mark = " ★" if value is not None and value == best else ""
            cells.append(f"{figures(value)}{mark}")
        yield f"{key[0]}: {key[1]}", *cells


def _best(values: Sequence[float | None], measure: str) -> float | None:
    """Return the best of several values; of a single one nothing is said."""
    found = [value for value in values if value is not None]
    if len(set(found)) < 2:
        return None
    return min(found) if measure in LESS_IS_BETTER else max(found)


def _differing(
    runs: Sequence[PastRun], store: Store, console: Console
) -> Iterator[tuple[str, ...]]:
    """Yield a row for each setting that is not the same in all runs."""
    settings: list[dict[str, Any]] = []
    for run in runs:
        if not run.has_root:
            settings.append({})
            continue
        try:
            settings.append(dict(flat(read_root(root_path(store, run.id)).settings)))
        except StoreError as error:
            said(console)(str(error))
            return
    names: dict[str, None] = {}
    for of in settings:
        names |= dict.fromkeys(of)
    for name in names:
        values = [str(of.get(name, DASH)) for of in settings]
        # the names tell the runs apart anyway
        if len(set(values)) > 1 and name != "name":
            yield name, *values
