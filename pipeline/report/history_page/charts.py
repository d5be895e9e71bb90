"""Rows of trainings as lines and heat maps: thinned, rounded, and in a fixed order.

Of a training's rows those with a validation have an axis of their own beside the others', so that
a line has no gap where the other kind of row stands.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..format import finite
from ..schema.language import TokenRouting
from .drawn import CurveChart, DrawnAxis, DrawnCurve, HeatMap, StageSection

# More points of a line run together at the width of a chart.
POINTS = 240
# Columns of a heat map over time.
COLUMNS = 48
DIGITS = 5
VALIDATION = "valid_nats"
# Series with a chart, in this order: how it is called, and its unit.
KNOWN = {
    "valid_nats": ("validation loss", "nats per token"),
    "valid_total": ("validation loss with auxiliary terms", "nats per token"),
    "valid_aux": ("validation, auxiliary terms", "nats per token"),
    "train_nats": ("training loss", "nats per token"),
    "train_total": ("training loss with auxiliary terms, epoch", "nats per token"),
    "train_ce": ("training loss, epoch", "nats per token"),
    "train_aux": ("training, auxiliary terms, epoch", "nats per token"),
    "lr": ("learning rate", "per step"),
    "tokens_per_s": ("throughput", "tokens per second"),
    "rss_mb": ("memory", "resident, MB"),
    "grad_norm": ("gradient norm", "before clipping"),
    "temperature": ("gate temperature", ""),
    "balance": ("balance loss", ""),
    "z": ("z-loss", ""),
    "dropped": ("choices over capacity", "share"),
    "forward_s": ("forward passes", "seconds per row"),
    "backward_s": ("backward passes", "seconds per row"),
    "optimizer_s": ("optimizer", "seconds per row"),
    "data_s": ("loading batches", "seconds per row"),
}
ASIDE = ("forward_s", "backward_s", "optimizer_s", "data_s")
# A mean over neighbours would hide their peaks.
HIGHEST = ("rss_mb",)
PLACES = ("step", "tokens", "time", "epoch")
# Of routing, which is drawn by layer and not by series.
ROUTING = re.compile(r"load|experts|entropy")
Rows = Sequence[dict[str, Any]]
Merge = Callable[[list[float]], float]


@dataclass(frozen=True)
class TrainingRows:
    """A training to be drawn."""

    stage: str
    name: str
    runs: tuple[int, ...]
    rows: Rows
    experts: tuple[str, ...] = ()  # their names, as far as they are known


@dataclass
class Canvas:
    """Axes that were used so far, and the lines on them."""

    axes: list[DrawnAxis] = field(default_factory=list)

    def section(self, stage: str, drawings: Sequence[TrainingRows]) -> StageSection:
        """Return the charts and heat maps of a stage's trainings."""
        lines: dict[str, list[DrawnCurve]] = {}
        heats: list[HeatMap] = []
        dashes: dict[tuple[int, ...], int] = {}
        for drawing in drawings:
            dash = dashes.get(drawing.runs, -1) + 1
            dashes[drawing.runs] = dash
            for key, line in self._lines(drawing, dash):
                lines.setdefault(key, []).append(line)
            heats += _heats(drawing)
        charts = []
        for key in sorted(lines, key=_place):
            title, unit = KNOWN.get(key, (key.replace("_", " "), ""))
            charts.append(CurveChart(title, unit, lines[key], key in ASIDE))
        return StageSection(stage, "", charts, heats)

    def _lines(self, drawing: TrainingRows, dash: int) -> Iterator[tuple[str, DrawnCurve]]:
        """Yield the lines of a training with the chart that each belongs to."""
        rows = [row for row in drawing.rows if isinstance(row.get("step"), int)]
        begun = next((row["time"] for row in rows if finite(row.get("time"))), None)
        validated = [row for row in rows if VALIDATION in row]
        trained = [row for row in rows if VALIDATION not in row]
        for kind in (validated, trained):
            if not kind:
                continue
            groups = _groups(kind, POINTS)
            self.axes.append(_axis(groups, begun))
            number = len(self.axes) - 1
            for key, name, values, further in _series(drawing, kind, groups):
                if any(value is not None for value in values):
                    yield key, DrawnCurve(name, drawing.runs, number, values, dash + further)


def _place(key: str) -> tuple[int, str]:
    """Where a series' chart stands: known ones first, in their order."""
    known = list(KNOWN)
    return (known.index(key) if key in KNOWN else len(known), key)


def _groups(rows: Rows, most: int) -> list[Rows]:
    """Return neighbours that share a point; the last row has one of its own."""
    size = math.ceil(len(rows) / most)
    if size <= 1:
        return [[row] for row in rows]
    inner = rows[:-1]
    groups = [inner[start : start + size] for start in range(0, len(inner), size)]
    return [*groups, rows[-1:]]


def _axis(groups: Sequence[Rows], begun: float | None) -> DrawnAxis:
    hours: list[float | None] = []
    tokens: list[float | None] = []
    for group in groups:
        last = group[-1]
        tokens.append(finite(last.get("tokens")))
        at = finite(last.get("time"))
        hours.append(None if at is None or begun is None else rounded((at - begun) / 3600))
    return DrawnAxis([float(group[-1]["step"]) for group in groups], tokens, hours)


def _series(
    drawing: TrainingRows, rows: Rows, groups: Sequence[Rows]
) -> Iterator[tuple[str, str, list[float | None], int]]:
    """Yield (chart, line, values, number of the line among those of its training) of every number
    in rows."""
    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys(row)
    for key in names:
        if key in PLACES or ROUTING.fullmatch(key):
            continue
        merge: Merge = max if key in HIGHEST else _mean
        yield key, drawing.name, _merged(groups, key, merge), 0
    used = [_used(row) for row in rows]
    layers = dict.fromkeys(layer for found in used for layer in found)
    for further, layer in enumerate(layers):
        name = f"{drawing.name}, {layer}" if layer else drawing.name
        for chart, told in ROUTED.items():
            values = []
            for group in groups:
                found = [_used(row).get(layer) for row in group]
                numbers = [told(each) for each in found if each]
                values.append(rounded(_mean(numbers)) if numbers else None)
            yield chart, name, values, further
        dropped = []
        for group in groups:
            numbers = [each for each in (_dropped(row, layer) for row in group) if each is not None]
            dropped.append(rounded(_mean(numbers)) if numbers else None)
        yield "dropped", name, dropped, further


def _merged(groups: Sequence[Rows], key: str, merge: Merge) -> list[float | None]:
    values: list[float | None] = []
    for group in groups:
        numbers = [value for value in (finite(row.get(key)) for row in group) if value is not None]
        values.append(rounded(merge(numbers)) if numbers else None)
    return values


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def rounded(value: float) -> float:
    """Return a number with as many digits as a chart can show."""
    return float(f"{value:.{DIGITS}g}")


def _used(row: dict[str, Any]) -> dict[str, list[float]]:
    """Return the share of tokens that each expert took, by layer; "" for the mean over layers."""
    found: dict[str, list[float]] = {}
    mean = _shares(row.get("load"))
    if mean:
        found[""] = mean
    experts = row.get("experts")
    layers = experts.get("layer") if isinstance(experts, dict) else None
    for layer, told in (layers if isinstance(layers, dict) else {}).items():
        shares = _shares(told.get("shares")) if isinstance(told, dict) else []
        if shares:
            found[f"layer {layer}"] = shares
    return found


def _dropped(row: dict[str, Any], layer: str) -> float | None:
    """Return the share of choices over capacity in a layer; None where a row does not say."""
    experts = row.get("experts")
    layers = experts.get("layer") if isinstance(experts, dict) else None
    told = layers.get(layer.removeprefix("layer ")) if isinstance(layers, dict) else None
    return finite(told.get("dropped")) if isinstance(told, dict) else None


def _shares(value: Any) -> list[float]:
    """Return a list of numbers, empty for what is none."""
    if not isinstance(value, list):
        return []
    numbers = [each for each in map(finite, value) if each is not None]
    return numbers if len(numbers) == len(value) else []


def _entropy(shares: list[float]) -> float:
    total = sum(shares) or 1.0
    parts = [share / total for share in shares if share > 0]
    return -sum(part * math.log(part) for part in parts)


# Charts of routing over time, each worked out of the experts' shares.
ROUTED: dict[str, Callable[[list[float]], float]] = {
    "entropy of the experts' use": _entropy,
    "share of the least used expert": min,
    "share of the most used expert": max,
}


def _heats(drawing: TrainingRows) -> Iterator[HeatMap]:
    """Yield what experts took over time, layer by layer, and at the end in all layers."""
    told = [(row["step"], _used(row)) for row in drawing.rows if _used(row)]
    layers = dict.fromkeys(layer for _, found in told for layer in found)
    ends: dict[str, list[float]] = {}
    for layer in layers:
        points = [(step, found[layer]) for step, found in told if layer in found]
        if layer:
            ends[layer] = points[-1][1]
        if len(points) > 1:
            every = math.ceil(len(points) / COLUMNS)
            # the last one is what came out
            shown = [*points[:-1:every], points[-1]]
            columns = [f"{step:,}" for step, _ in shown]
            shares = [found for _, found in shown]
            title = f"{drawing.name}: use of experts, {layer or 'mean over layers'}"
            # the mean is of a run's own experts, layers have numbered ones
            yield _heat(title, drawing, columns, shares, "step", named=not layer)
    if len(ends) > 1:
        names = [layer.removeprefix("layer ") for layer in ends]
        title = f"{drawing.name}: use of experts by layer, at the end"
        yield _heat(title, drawing, names, list(ends.values()), "layer", named=False)


def _heat(
    title: str,
    drawing: TrainingRows,
    columns: list[str],
    shares: list[list[float]],
    across: str,
    *,
    named: bool,
) -> HeatMap:
    width = max(map(len, shares))
    names = []
    for i in range(width):
        known = named and i < len(drawing.experts)
        names.append(drawing.experts[i] if known else f"expert {i}")
    values: list[list[float | None]] = []
    for i in range(width):
        values.append([round(each[i], 4) if i < len(each) else None for each in shares])
    return HeatMap(title, drawing.runs, names, columns, values, across)


def evaluated(routing: TokenRouting, experts: Sequence[str], run: int) -> HeatMap:
    """Return who takes held-out tokens in which layer, mean over domains."""
    columns = []
    shares = []
    for layer in routing.layers:
        by_domain = list(layer.share.values())
        means = [_mean(list(each)) for each in zip(*by_domain, strict=True)]
        columns.append(str(layer.layer))
        shares.append(means)
    drawing = TrainingRows("evaluate", "evaluate", (run,), (), tuple(experts))
    return _heat("use of experts by layer", drawing, columns, shares, "layer", named=True)
