"""Curves of a run's history as inline SVG: one chart per quantity, jobs of one stage side by side.

Colours are CSS classes, so a chart follows the page into the dark; the same rows always give the
same bytes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from .format import count, figures, finite, fixed, ticks
from .markup import Markup, join, tag

WIDE, HIGH = 420, 210
LEFT, RIGHT, TOP, BOTTOM = 50, 408, 10, 176  # the plot's frame inside WIDE x HIGH
AXES = ("step", "tokens")  # a row without them has no place in a chart
POINTS = 200  # most points of a drawn line
COLOURS = 8  # classes c0..c7 of the style sheet; further lines are dashed
UNSETTLED = 0.05  # share of a job whose first losses may run out of the top

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Line:
    """A named line; colour is an index into the palette, faint and dots change how it is drawn."""

    name: str
    points: list[Point]
    colour: int = 0
    faint: bool = False
    dots: bool = False


def curves(histories: dict[str, list[dict]]) -> Markup:
    """Return the charts of every stage, in the order of histories; a job without rows is left out."""
    stages: dict[str, dict[str, list[dict]]] = {}
    for key, rows in histories.items():
        stage, _, job = str(key).partition(" ")
        if rows := _ordered(rows):
            stages.setdefault(stage, {})[job or stage] = rows
    return join(*(_stage(name, jobs) for name, jobs in stages.items()))


def shares(histories: dict[str, list[dict]], experts: list[str]) -> Markup:
    """Return how load and entropy moved while routers trained; empty where no row tells the load."""
    out = []
    for key, rows in histories.items():
        rows = [row for row in _ordered(rows) if isinstance(row.get("load"), list) and row["load"]]
        if len(rows) < 2:
            continue
        width = max(len(row["load"]) for row in rows)
        names = [*experts[:width], *(f"expert {i}" for i in range(len(experts), width))]
        loads = [_thin([(_x(row), _entry(row["load"], i)) for row in rows]) for i in range(width)]
        lines = [
            Line(name, points, i) for i, (name, points) in enumerate(zip(names, loads, strict=True))
        ]
        out.append(_chart(f"{key}: load of each expert", "share of tokens", lines, bottom=0.0))
        for field, unit in (("entropy", "nats"), ("temperature", ""), ("balance", ""), ("z", "")):
            out.append(_single(f"{key}: {field}", unit, rows, field))
    return tag("div", *out, class_="charts") if any(out) else Markup("")


def _stage(name: str, jobs: dict[str, list[dict]]) -> Markup:
    losses = [_loss(job if len(jobs) > 1 else name, rows) for job, rows in jobs.items()]
    others = [
        _overlay("learning rate", "per step", jobs, "lr", bottom=0.0),
        _overlay("throughput", "tokens per second", jobs, "tokens_per_s", bottom=0.0),
        _overlay("memory", "resident, MB", jobs, "rss_mb", merge=max, bottom=0.0),
        _overlay("gradient norm", "before clipping", jobs, "grad_norm", bottom=0.0),
    ]
    heading = tag("h3", name, tag("small", f" {len(jobs)} job{'s' * (len(jobs) > 1)}"))
    return join(heading, tag("div", *losses, *others, class_="charts"))


def _loss(title: str, rows: list[dict]) -> Markup:
    train = Line("train", _thin(_points(rows, "train_nats")), 0, faint=True)
    valid = Line(
        "validation", [p for p in _points(rows, "valid_nats") if p[1] is not None], 1, dots=True
    )
    late = [p for line in (train, valid) for p in line.points[int(len(line.points) * UNSETTLED) :]]
    top = max((value for _, value in late if value is not None), default=None)
    return _chart(f"{title}: loss", "nats per token", [train, valid], top=top)


def _overlay(
    title: str, unit: str, jobs: dict, field: str, merge: Callable | None = None, bottom=None
) -> Markup:
    lines = [
        Line(job, _thin(_points(rows, field), merge), i)
        for i, (job, rows) in enumerate(jobs.items())
    ]
    return _chart(title, unit, lines, bottom=bottom)


def _single(title: str, unit: str, rows: list[dict], field: str) -> Markup:
    return _chart(title, unit, [Line(field, _thin(_points(rows, field)), 0)])


def _ordered(rows: list[dict]) -> list[dict]:
    """Sort rows by step; a job that was resumed wrote some steps twice, of which the later row
    counts."""
    known = [
        row
        for row in rows or ()
        if isinstance(row, dict) and None not in map(finite, map(row.get, AXES))
    ]
    last = {row["step"]: row for row in known}
    return [last[step] for step in sorted(last)]


def _x(row: dict) -> float:
    return float(row["tokens"])


def _points(rows: list[dict], field: str) -> list[Point]:
    return [(_x(row), finite(row.get(field))) for row in rows]


def _entry(line: list, i: int) -> float | None:
    return finite(line[i]) if i < len(line) else None


def _thin(points: list[Point], merge: Callable | None = None) -> list[Point]:
    """Merge neighbours (their mean, unless merge is given) until at most POINTS are left; the last
    point stays."""
    size = math.ceil(len(points) / POINTS)
    if size <= 1:
        return points
    out = []
    for start in range(0, len(points) - 1, size):
        part = points[start : min(start + size, len(points) - 1)]
        found = [v for _, v in part if v is not None]
        value = (merge(found) if merge else sum(found) / len(found)) if found else None
        out.append((part[len(part) // 2][0], value))
    return [*out, points[-1]]


def _chart(
    title: str, unit: str, lines: list[Line], bottom: float | None = None, top: float | None = None
) -> Markup:
    """Return a figure with axes, lines and a legend that ends in the last values; empty without any
    value."""
    lines = [line for line in lines if any(v is not None for _, v in line.points)]
    if not lines:
        return Markup("")
    xs = [x for line in lines for x, _ in line.points]
    ys = [v for line in lines for _, v in line.points if v is not None]
    low = min(ys) if bottom is None else min(bottom, *ys)
    x_ticks, y_ticks = ticks(min(0.0, *xs), max(xs)), ticks(low, max(ys) if top is None else top)
    x_at = _scale(min(0.0, *xs), max(xs), LEFT, RIGHT)
    y_at = _scale(y_ticks[0], y_ticks[-1], BOTTOM, TOP)
    drawn = [_drawn(line, x_at, y_at) for line in lines]
    svg = tag(
        "svg",
        *_axes(x_ticks, y_ticks, x_at, y_at, max(xs)),
        *drawn,
        viewBox=f"0 0 {WIDE} {HIGH}",
        role="img",
        aria_label=f"{title}, {unit}" if unit else title,
    )
    caption = tag("figcaption", tag("b", title), tag("small", f" {unit}") if unit else "")
    return tag("figure", caption, svg, _legend(lines), class_="chart")


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _axes(x_ticks, y_ticks, x_at, y_at, x_most: float) -> list[Markup]:
    out = []
    for y in y_ticks:
        at = f"{y_at(y):.1f}"
        out.append(tag("line", x1=LEFT, x2=RIGHT, y1=at, y2=at, class_="grid"))
        out.append(
            tag("text", _tick(y, y_ticks), x=LEFT - 6, y=f"{y_at(y) + 3.5:.1f}", class_="end")
        )
    for x in x_ticks:
        if x <= x_most:
            out.append(tag("text", count(x), x=f"{x_at(x):.1f}", y=BOTTOM + 15, class_="middle"))
    out.append(tag("line", x1=LEFT, x2=RIGHT, y1=BOTTOM, y2=BOTTOM, class_="axis"))
    out.append(tag("text", "tokens", x=RIGHT, y=BOTTOM + 29, class_="end"))
    return out


def _tick(value: float, values: list[float]) -> str:
    step = values[1] - values[0]
    if max(map(abs, values)) >= 1000:
        return count(value)
    return (
        fixed(value, len(f"{step:.12f}".rstrip("0").partition(".")[2]))
        if step >= 1e-4
        else f"{value:.2g}"
    )


def _drawn(line: Line, x_at: Callable, y_at: Callable) -> Markup:
    look = f"c{line.colour % COLOURS}{' faint' * line.faint}{' dashed' * (line.colour >= COLOURS)}"
    parts = [tag("path", d=run, class_=look) for run in _runs(line.points, x_at, y_at)]
    found = [(x, v) for x, v in line.points if v is not None]
    if (line.dots and len(found) <= 40) or len(found) == 1:
        shown = [(x_at(x), y_at(v)) for x, v in found]
        parts += [
            tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.4, class_=look)
            for x, y in shown
            if y >= TOP
        ]
    return tag("g", tag("title", f"{line.name}: {figures(found[-1][1])} at the end"), *parts)


def _runs(points: list[Point], x_at: Callable, y_at: Callable) -> list[str]:
    """Return one path per run of present values; values out of the top stay at the frame."""
    out, current = [], []
    for x, value in [*points, (0.0, None)]:
        if value is not None:
            current.append(f"{x_at(x):.1f} {max(TOP - 2, y_at(value)):.1f}")
        elif current:
            out.append("M" + "L".join(current))
            current = []
    return [path for path in out if "L" in path]


def _legend(lines: list[Line]) -> Markup:
    entries = []
    for line in lines:
        last = [v for _, v in line.points if v is not None][-1]
        look = f"key c{line.colour % COLOURS}{' faint' * line.faint}{' dashed' * (line.colour >= COLOURS)}"
        value = count(last) if abs(last) >= 10_000 else _last(last)
        entries.append(tag("span", tag("i", class_=look), line.name, " ", tag("b", value)))
    return tag("div", *entries, class_="legend")


def _last(value: float) -> str:
    return f"{value:.2g}" if 0 < abs(value) < 1e-3 else figures(value)
