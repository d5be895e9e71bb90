"""The metrics of trainings on a terminal or as JSON: one of them whole, or a line for each of a
run."""

import json
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from ..errors import ConfigError
from ..metrics.training import (
    ALL_LAYERS,
    LayerExperts,
    LossPoint,
    TrainingMetrics,
)
from ..report.format import DASH, count, fixed, megabytes, seconds, share
from ..report.narrow import print_table
from ..store.artifacts import Store
from ..store.imported import STAGE as IMPORTED
from .find import found
from .stages import label
from .trainings import trainings

# Lines of a table: of a long training every so many are shown
SHOWN = 20


def show_metrics(
    words: Sequence[str], store: Store, console: Console, as_json: bool
) -> list[TrainingMetrics]:
    """Print the metrics of one training, or a line for each of a run; return what a person was
    shown, none as JSON.

    Raises ConfigError for what has no training, and what `metrics_of` does.
    """
    store.open(create=False)
    names = found(store, words)
    known = list(trainings(store, names))
    if not known:
        what = "/".join(words) or "the latest run"
        raise ConfigError(f"{what} has no training: {', '.join(each.name for each in names)}")
    if as_json:
        values = [each.as_json() for each in known]
        # Whoever names one gets one
        shown = values[0] if len(names) == 1 else values
        text = json.dumps(shown, indent=1, allow_nan=False)
        console.print(text, highlight=False, markup=False, soft_wrap=True)
        return []
    if len(known) > 1:
        _show_all(known, names[0].run, console)
    else:
        _show_one(known[0], console)
    return known


def _show_all(known: Sequence[TrainingMetrics], run: str, console: Console) -> None:
    table = Table(title=f"trainings of {run}", title_justify="left", title_style="bold")
    table.add_column("training", style="cyan", overflow="fold")
    for name in ("steps", "train nats", "best valid nats", "at step", "tokens/s", "time", "peak"):
        table.add_column(name, justify="right")
    table.add_column("how it ended")
    for each in known:
        table.add_row(
            label(each.stage, each.item),
            f"{each.steps:,}",
            fixed(each.train_nats, 4),
            fixed(each.best_nats, 4),
            _whole(each.best_step),
            count(each.tokens_per_s),
            seconds(each.seconds),
            megabytes(each.peak_mb),
            ended(each),
        )
    print_table(console, table)


def ended(training: TrainingMetrics) -> str:
    """Return in a few words how a training ended, or that it has not."""
    if not training.finished:
        return IMPORTED if training.stage == IMPORTED else "not finished"
    if training.stopped_early:
        patience = training.patience or 0
        why = f", {patience} validations without a better one" if patience else ""
        return f"early, of {training.planned_steps:,} steps{why}"
    return "all steps"


def _show_one(training: TrainingMetrics, console: Console) -> None:
    for line in _lines(training):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if training.losses:
        print_table(console, _losses(training.losses))
    for layer in training.experts:
        print_table(console, _experts(layer))
    if training.missing:
        text = f"of its history: {training.missing}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def _lines(training: TrainingMetrics) -> Iterator[str]:
    """Yield what stands above the tables."""
    yield f"{training.address}: {ended(training)}"
    epochs = "" if training.epochs is None else f", {training.epochs} epochs"
    yield f"steps {training.steps:,}{epochs}, {count(training.tokens)} tokens"
    if training.best_step is not None:
        epoch = "" if training.best_epoch is None else f", epoch {training.best_epoch}"
        patience = "" if training.patience is None else f", patience {training.patience}"
        yield (
            f"best validation {fixed(training.best_nats, 4)} nats at step "
            f"{training.best_step:,}{epoch}; validations since {training.since_best}{patience}"
        )
    phases = training.phases
    rate = count(training.tokens_per_s)
    yield (
        f"{rate} tokens/s; forward {seconds(phases.forward)}, backward {seconds(phases.backward)}, "
        f"optimizer {seconds(phases.optimizer)}, data {seconds(phases.data)}, "
        f"evaluating {seconds(phases.evaluate)}, saving {seconds(phases.save)}"
    )
    rates = [each.lr for each in training.logged if each.lr is not None]
    last = f"learning rate {rates[-1]:.3g} at the end, {max(rates):.3g} at most; " if rates else ""
    yield f"{last}peak memory {megabytes(training.peak_mb)}"


def _losses(points: Sequence[LossPoint]) -> Table:
    """Return the losses at each validation; columns that nothing was written for are left out."""
    columns = {
        "epoch": [_whole(point.epoch) for point in points],
        "step": [f"{point.step:,}" for point in points],
        "train total": [fixed(point.train.total, 4) for point in points],
        "train ce": [fixed(point.train.ce, 4) for point in points],
        "train aux": [fixed(point.train.aux, 4) for point in points],
        "valid total": [fixed(point.valid.total, 4) for point in points],
        "valid ce": [fixed(point.valid.ce, 4) for point in points],
        "valid aux": [fixed(point.valid.aux, 4) for point in points],
        "temperature": [fixed(point.temperature, 3) for point in points],
    }
    return _table("losses, nats per token", columns)


def _experts(layer: LayerExperts) -> Table:
    where = "layers, mean" if layer.layer == ALL_LAYERS else f"layer {layer.layer}"
    columns = {
        "epoch": [_whole(use.epoch) for use in layer.points],
        "step": [f"{use.step:,}" for use in layer.points],
        "entropy, nats": [fixed(use.entropy, 3) for use in layer.points],
        "least used": [_used(use.least) for use in layer.points],
        "most used": [_used(use.most) for use in layer.points],
        "over capacity": [share(use.dropped, 1) for use in layer.points],
    }
    return _table(f"experts of {where}", columns)


def _table(title: str, columns: dict[str, list[str]]) -> Table:
    """Return a table of the columns that have something, of a long one every so many lines."""
    lines = max(map(len, columns.values()))
    every = -(-lines // SHOWN)
    if every > 1:
        title += f" (every {every} of {lines})"
    table = Table(title=title, title_justify="left", title_style="bold")
    kept = {name: cells for name, cells in columns.items() if set(cells) != {DASH}}
    for name in kept:
        table.add_column(name, justify="right")
    # From the end, so that the last one is always there
    for line in range((lines - 1) % every, lines, every):
        table.add_row(*[cells[line] for cells in kept.values()])
    return table


def _whole(value: int | None) -> str:
    return DASH if value is None else f"{value:,}"


def _used(expert: tuple[int, float] | None) -> str:
    """Return an expert's number and its share of the choices."""
    return DASH if expert is None else f"{expert[0]} ({share(expert[1], 1)})"
