"""`history show`: one run and all its trainings, or one training and all its series."""

import sqlite3

from rich.console import Console

from ...report.format import DASH, count, figures, finite, seconds
from ...store.artifacts import Store
from ...store.history import VALIDATION, read
from ..prune import said
from .lines import SPENT, Known, PastRun, PastTraining, priced_when
from .listing import USD, in_usd, print_rows, scored
from .sparks import spark

TRAININGS = ("training", "step", "tokens", "train", "best valid", "at step", "tokens/s", "peak MB")
COSTS = ("on Modal", "time", "estimated", USD)
SERIES = ("series", "rows", "first", "last", "lowest", "at step", "highest", "at step", "curve")


def show_run(
    run: PastRun, known: Known, index: sqlite3.Connection, store: Store, console: Console
) -> None:
    """Print what a store has of a run. Raises UnreadableFile."""
    say = said(console)
    typed = " ".join([run.file, *(f"--override {each}" for each in run.overrides)])
    say(f"{run.id}, {run.family}, begun {run.begun}, from {typed}")
    say(f"{run.made:,} jobs done in {seconds(run.seconds)}, {run.bytes / 1e6:,.1f} MB")
    same = [each.id for each in known.runs if each.name == run.name and each.id != run.id]
    if same:
        say(f"{len(same):,} other runs have its name: `history list` has them")
    rows = []
    for training in run.trainings:
        cells = _training_cells(training)
        rows.append((*cells, curve(store, training.address, VALIDATION)))
    if rows:
        print_rows("trainings", (*TRAININGS, "valid"), rows, console)
    for evaluation in run.evaluations:
        say(
            f"{evaluation.address}, made {evaluation.made}: "
            f"{', '.join(filter(None, (scored(evaluation), evaluation.criteria)))}"
        )
        for score in evaluation.scores:
            say(f"  {score.name}: {figures(score.value)} {score.measure}")
    for deploy in run.deploys:
        where = ", served" if deploy.served else ""
        say(f"{deploy.address}, made {deploy.made}: {deploy.bytes / 1e6:,.1f} MB{where}")
    if run.usd is not None:
        title = f"costs {priced_when([run.id], index)}".rstrip()
        print_rows(title, COSTS, _costs(run, index), console)
    for text in run.wrong:
        say(text)


def _costs(run: PastRun, index: sqlite3.Connection) -> list[tuple[str, ...]]:
    """Return what the containers of each stage were paid for, beside what was estimated."""
    rows: list[tuple[str, ...]] = []
    for of, stage, taken, usd, estimated in index.execute(SPENT):
        if of == run.id:
            rows.append((stage, seconds(taken), in_usd(estimated), in_usd(usd)))
    rows.append(("all", "", "", in_usd(run.usd)))
    return rows


def _training_cells(training: PastTraining) -> tuple[str, ...]:
    valid_step = training.valid_step
    return (
        training.address,
        training.position + ("" if training.is_done else ", not done"),
        count(training.tokens),
        figures(training.train_nats),
        figures(training.valid_nats),
        DASH if valid_step is None else f"{valid_step:,}",
        count(training.tokens_per_s),
        count(training.peak_mb),
    )


def show_training(
    training: PastTraining, index: sqlite3.Connection, store: Store, console: Console
) -> None:
    """Print every series of a training. Raises UnreadableFile."""
    say = said(console)
    say(f"{training.address}: step {training.position}, {training.rows:,} rows")
    rows = []
    found = index.execute(
        "SELECT key, rows, first, last, low, low_step, high, high_step FROM series"
        " WHERE address = ? AND key <> 'time' ORDER BY key",
        (training.address,),
    ).fetchall()
    drawn = curves(store, training.address)
    for key, number, first, last, low, low_step, high, high_step in found:
        lowest = (figure(low), f"{low_step:,}")
        highest = (figure(high), f"{high_step:,}")
        ends = (figure(first), figure(last))
        rows.append((key, f"{number:,}", *ends, *lowest, *highest, drawn.get(key, "")))
    if rows:
        print_rows("series", SERIES, rows, console)
    if training.wrong:
        say(training.wrong)


def figure(value: float) -> str:
    """Write a number of unknown size: a learning rate, a number of tokens, a loss."""
    size = abs(value)
    if size >= 10_000:
        return count(value)
    return f"{value:.3g}" if 0 < size < 1e-3 else figures(value)


def curve(store: Store, address: str, key: str) -> str:
    """Return a series as a line of blocks; empty without a row. Raises UnreadableFile."""
    return curves(store, address).get(key, "")


def curves(store: Store, address: str) -> dict[str, str]:
    """Return the plain series of a training as lines of blocks. Raises UnreadableFile."""
    values: dict[str, list[float]] = {}
    for row in read(store.history(address)).rows:
        for key, each in row.items():
            value = finite(each)
            if value is not None:
                values.setdefault(key, []).append(value)
    return {key: spark(found) for key, found in values.items()}
