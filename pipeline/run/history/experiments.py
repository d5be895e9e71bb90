"""Experiments in `history`: listed, shown whole, side by side, and as tables of the page."""

from collections.abc import Iterator, Sequence

from rich.console import Console

from ... import report
from ...report.format import DASH, fixed
from ...report.history_page.drawn import Listed
from ...report.schema.experiments import FOLDER, RESULTS
from ...report.schema.reading import read_results
from ...store.artifacts import Store
from ...store.reading import read_bytes
from ..open_report import PAGE
from ..prune import said
from .lines import Known, PastRun
from .listing import print_rows
from .past_experiments import PastExperiments, PastTrial

COLUMNS = (
    *("experiments", "made", "trials", "models"),
    *("dense nats", "lowest nats", "lowest bits per byte", "criteria"),
)
TRIALS = ("trial", "makes", "seeds", "valid nats", "gap", "bits per byte", "criteria")


def list_experiments(known: Known, last: int, console: Console) -> None:
    """Print the experiments that were made last, as many as asked for (0: all); nothing where there
    are none."""
    shown = known.experiments[:last] if last else known.experiments
    if shown:
        rows = [_cells(each) for each in shown]
        print_rows("experiments, the latest first", COLUMNS, rows, console)


def _cells(each: PastExperiments) -> tuple[str, ...]:
    dense = next((trial for trial in each.trials if trial.is_dense), None)
    states = [seed.state for trial in each.trials for seed in trial.seeds]
    passed = sum(trial.passed for trial in each.trials)
    asked = sum(trial.passed + trial.failed + trial.untold for trial in each.trials)
    return (
        each.name,
        each.made,
        f"{len(each.trials):,}",
        f"{states.count('done'):,} of {len(states):,}",
        fixed(dense and dense.valid, 4),
        _named(_lowest(_comparable(each.trials), "valid"), "valid"),
        _named(_lowest(each.trials, "bits_per_byte"), "bits_per_byte"),
        f"{passed} of {asked}" if asked else DASH,
    )


def _comparable(trials: Sequence[PastTrial]) -> list[PastTrial]:
    """Return the trials whose losses a token compare: those of the dense one's tokens, else of the
    first that has a model."""
    made = [trial for trial in trials if trial.valid is not None]
    against = next((trial for trial in made if trial.is_dense), made[0] if made else None)
    return [trial for trial in made if against and trial.tokens == against.tokens]


def _lowest(trials: Sequence[PastTrial], key: str) -> PastTrial | None:
    found = [trial for trial in trials if getattr(trial, key) is not None]
    return min(found, key=lambda trial: getattr(trial, key), default=None)


def _named(trial: PastTrial | None, key: str) -> str:
    return DASH if trial is None else f"{fixed(getattr(trial, key), 4)} {trial.name}"


def show_experiments(each: PastExperiments, store: Store, console: Console) -> None:
    """Print all tables of experiments, as they were printed when they were made. Raises StoreError,
    NewerStore, UnreadableFile."""
    folder = store.root / FOLDER / each.name
    report.show_experiments(read_results(read_bytes(folder / RESULTS)), console)
    say = said(console)
    say(f"made {each.made}: {folder / RESULTS}")
    if (folder / PAGE).is_file():
        say(f"report: {folder / PAGE}")


def compare_experiments(chosen: Sequence[PastExperiments], console: Console) -> None:
    """Print trials side by side, a row for each name: of each experiments file loss and bits per
    byte, the best of them marked."""
    columns = ["trial"]
    for each in chosen:
        columns += [f"{each.name}: valid nats", "bits per byte", "criteria"]
    names = dict.fromkeys(trial.name for each in chosen for trial in each.trials)
    rows = []
    for name in names:
        row = [name]
        for each in chosen:
            row += _beside(name, each)
        rows.append(tuple(row))
    print_rows("trials side by side", columns, rows, console)
    if len({trial.tokens for each in chosen for trial in each.trials if trial.tokens}) > 1:
        said(console)("losses a token compare where tokens are the same, bits per byte in any case")


def _beside(name: str, each: PastExperiments) -> Iterator[str]:
    trial = next((trial for trial in each.trials if trial.name == name), None)
    if trial is None:
        yield from (DASH,) * 3
        return
    for key, trials in (("valid", _comparable(each.trials)), ("bits_per_byte", each.trials)):
        mark = " ★" if trial is _lowest(trials, key) else ""
        yield f"{fixed(getattr(trial, key), 4)}{mark}"
    yield trial.criteria


def tables(runs: Sequence[PastRun], known: Known) -> Iterator[Listed]:
    """Yield a table of the trials of all experiments that some of the runs are of."""
    for each in known.experiments:
        if not any(each.has(run.name, run.addresses) for run in runs):
            continue
        rows = []
        for trial in each.trials:
            spread = "" if trial.spread is None else f" ± {fixed(trial.spread, 4)}"
            rows.append(
                (
                    trial.name + (" (dense)" if trial.is_dense else ""),
                    trial.makes,
                    trial.states,
                    f"{fixed(trial.valid, 4)}{spread}",
                    fixed(trial.gap, 4),
                    fixed(trial.bits_per_byte, 4),
                    trial.criteria,
                )
            )
        note = (
            f"Made {each.made}; means over seeds, ± their standard deviation. `history show "
            f"{each.name}` has all of it."
        )
        yield Listed(f"Trials of {each.name}", TRIALS, rows, note)
