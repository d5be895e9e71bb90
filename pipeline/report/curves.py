"""Curves of a run's history: one chart per quantity, jobs of one stage side by side.

What is computed here is where everything lies; the template draws it as inline SVG. Colours are CSS
classes, so a chart follows the page into the dark; the same rows always give the same bytes.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from .format import count, figures, finite, fixed, ticks
from .table import at

# a row without them has no place in a chart
AXES = ("step", "tokens")
# in place of a row: from its step to this one rows were written and are gone
LOST = "lost"
# in a validation's row, which stands beside the training's of the same step
VALIDATION = "valid_nats"
# most points of a drawn line, and of one whose points are marked one by one: more run together at
# the width that a chart has on a page
POINTS = 200
DOTS = 40
# classes c0..c7 of the style sheet; further lines repeat them dashed
COLOURS = 8
# share of a job whose losses may run out of the top: the first would flatten all that follow
UNSETTLED = 0.05

Rows = list[dict]
# a run's rows by job, named `stage` or `stage item`
Histories = Mapping[str, Rows]
# a value that is missing makes a gap
Points = list[tuple[float, float | None]]
Merge = Callable[[list[float]], float]


@dataclass(frozen=True)
class Frame:
    """A chart's size and its plot's edges inside it, units of the SVG's view box."""

    # room for half of the last tick's text beyond the plot's edge
    width: int = 430
    height: int = 210
    left: int = 50
    right: int = 408
    top: int = 10
    bottom: int = 176


FRAME = Frame()


@dataclass(frozen=True)
class Scale:
    """Where values from low to high lie between start and end."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Return the place of a value."""
        # a job of one row has no length
        span = (self.high - self.low) or 1.0
        part = (value - self.low) / span
        return self.start + part * (self.end - self.start)


@dataclass(frozen=True)
class Plot:
    """The two axes of a chart."""

    x: Scale
    y: Scale


@dataclass(frozen=True)
class Line:
    """A named line; colour is an index into the palette, faint and dots change how it is drawn."""

    name: str
    points: Points
    colour: int = 0
    faint: bool = False
    dots: bool = False

    @property
    def look(self) -> str:
        """The CSS classes."""
        classes = [f"c{self.colour % COLOURS}"]
        if self.faint:
            classes.append("faint")
        if self.colour >= COLOURS:
            classes.append("dashed")
        return " ".join(classes)

    @property
    def present(self) -> list[tuple[float, float]]:
        """The points whose value is there."""
        return [(x, value) for x, value in self.points if value is not None]

    @property
    def values(self) -> list[float]:
        """What was measured at the present points, in order."""
        return [value for _, value in self.present]


@dataclass(frozen=True)
class DrawnLine:
    """A line in the frame: paths of an SVG, one for each run of values without a gap."""

    name: str
    look: str
    last: str  # the last value
    legend: str  # the same, shorter where it is large or small
    paths: list[str]
    dots: list[tuple[float, float]]


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: its place in the frame and its text."""

    at: float
    text: str


@dataclass(frozen=True)
class Chart:
    """Everything that is drawn into one figure."""

    title: str
    unit: str
    lines: list[DrawnLine]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


@dataclass(frozen=True)
class StageCharts:
    """The charts of all jobs of one stage."""

    stage: str
    jobs: int
    charts: list[Chart]


def curves(histories: Histories) -> list[StageCharts]:
    """Return the charts of every stage, in the order of histories; a job without rows is left
    out."""
    stages: dict[str, dict[str, Rows]] = {}
    for key, rows in histories.items():
        stage, _, item = key.partition(" ")
        rows = _ordered(rows)
        if rows:
            jobs = stages.setdefault(stage, {})
            jobs[item or stage] = rows
    out = []
    for stage, jobs in stages.items():
        charts = _stage(stage, jobs)
        out.append(StageCharts(stage, len(jobs), charts))
    return out


def load_curves(histories: Histories, experts: Sequence[str]) -> list[Chart]:
    """Return how load and entropy moved while routers trained; empty where no row tells the
    load."""
    charts = []
    for job, rows in histories.items():
        rows = _ordered(rows)
        # only a router's training tells it, and two points make a line
        if sum(bool(_load(row)) for row in rows) > 1:
            charts.append(_loads(job, rows, experts))
            charts.append(_single(job, rows, "entropy", "nats"))
            charts.append(_single(job, rows, "temperature"))
            charts.append(_single(job, rows, "balance"))
            charts.append(_single(job, rows, "z"))
    return [chart for chart in charts if chart]


def _loads(job: str, rows: Rows, experts: Sequence[str]) -> Chart | None:
    lines = []
    width = max(len(_load(row)) for row in rows)
    for i in range(width):
        name = f"expert {i}"
        if i < len(experts):
            name = experts[i]
        shares = []
        for row in rows:
            if LOST in row:
                shares.append(row)
            elif _load(row):
                shares.append(row | {"share": at(_load(row), i)})
        points = _thin(_points(shares, "share"))
        lines.append(Line(name, points, colour=i))
    title = f"{job}: load of each expert"
    return _chart(title, "share of tokens", lines, bottom=0.0)


def _single(job: str, rows: Rows, field: str, unit: str = "") -> Chart | None:
    points = _thin(_points(rows, field))
    return _chart(f"{job}: {field}", unit, [Line(field, points)])


def _stage(name: str, jobs: Mapping[str, Rows]) -> list[Chart]:
    charts = []
    for job, rows in jobs.items():
        # losses of several jobs would cover each other, so each has its own chart
        title = job if len(jobs) > 1 else name
        charts.append(_loss(title, rows))
    charts += [
        _overlay("learning rate", "per step", jobs, "lr"),
        _overlay("throughput", "tokens per second", jobs, "tokens_per_s"),
        # a mean over neighbours would hide the peak
        _overlay("memory", "resident, MB", jobs, "rss_mb", merge=max),
        _overlay("gradient norm", "before clipping", jobs, "grad_norm"),
    ]
    return [chart for chart in charts if chart]


def _loss(title: str, rows: Rows) -> Chart | None:
    trained = _thin(_points(rows, "train_nats"))
    train = Line("train", trained, faint=True)
    # rows lost between two validations that follow each other as usual took none along
    usual = _usual_steps(rows, VALIDATION)
    points = _points(rows, VALIDATION, apart=1.5 * usual)
    valid = Line("validation", points, colour=1, dots=True)
    settled: list[float] = []
    for line in (train, valid):
        first = int(len(line.points) * UNSETTLED)
        for _, value in line.points[first:]:
            if value is not None:
                settled.append(value)
    top = max(settled, default=None)
    return _chart(f"{title}: loss", "nats per token", [train, valid], top=top)


def _overlay(
    title: str,
    unit: str,
    jobs: Mapping[str, Rows],
    field: str,
    merge: Merge | None = None,
) -> Chart | None:
    """Return one chart with a line for each job, from zero."""
    lines = []
    for i, (job, rows) in enumerate(jobs.items()):
        points = _thin(_points(rows, field), merge)
        lines.append(Line(job, points, colour=i))
    return _chart(title, unit, lines, bottom=0.0)


def _ordered(rows: Iterable[dict]) -> Rows:
    """Sort rows and marks of lost ones by step, without those that have no place in a chart; empty
    without any row."""
    last: dict[float, dict] = {}
    marks = []
    for row in rows:
        places = [finite(row.get(axis)) for axis in AXES]
        if LOST in row:
            marks.append(row)
        elif None not in places:
            # a job that was resumed wrote some steps twice, of which the later row counts; that of
            # a validation stands beside the training's
            last[row["step"]] = last.get(row["step"], {}) | row
    placed = [*last.values(), *marks] if last else []
    # a validation's row may be left of a step whose training row is lost: the mark comes first
    return sorted(placed, key=lambda row: (row["step"], LOST not in row))


def _tokens(row: dict) -> float:
    return float(row["tokens"])


def _load(row: dict) -> list:
    load = row.get("load")
    return load if isinstance(load, list) else []


def _points(rows: Rows, field: str, apart: float = 0.0) -> Points:
    """Return the values of a field; a gap where rows are lost between two that are more than
    `apart` steps from each other."""
    points: Points = []
    before: dict | None = None
    lost_until = 0
    for row in rows:
        if LOST in row:
            lost_until = row[LOST]
        # a row without the field is of something else, and no gap in this line
        elif field in row:
            if before and lost_until > before["step"] and row["step"] - before["step"] > apart:
                points.append((_tokens(before), None))
            value = finite(row[field])
            points.append((_tokens(row), value))
            before = row
    return points


def _usual_steps(rows: Rows, field: str) -> float:
    """Return how many steps usually lie between two rows with a field; 0 for fewer than two."""
    steps = [row["step"] for row in rows if field in row]
    distances = [later - earlier for earlier, later in pairwise(steps)]
    return float(median(distances)) if distances else 0.0


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _thin(points: Points, merge: Merge | None = None) -> Points:
    """Merge neighbours (their mean, unless merge is given) until at most POINTS are left."""
    size = math.ceil(len(points) / POINTS)
    if size <= 1:
        return points
    merge = merge or _mean
    # the last point stays as it is: the legend names its value
    inner = points[:-1]
    out: Points = []
    for start in range(0, len(inner), size):
        part = inner[start : start + size]
        found = [value for _, value in part if value is not None]
        x, _ = part[len(part) // 2]
        merged = merge(found) if found else None
        out.append((x, merged))
        # a gap of a few rows must not vanish among those that it is merged with
        if found and len(found) < len(part):
            out.append((x, None))
    return [*out, points[-1]]


def _chart(
    title: str,
    unit: str,
    lines: list[Line],
    bottom: float | None = None,
    top: float | None = None,
) -> Chart | None:
    """Return where lines and axes lie in the frame; None without any value.

    The values' own range is used where bottom (at most) or top (exactly) are None.
    """
    lines = [line for line in lines if line.values]
    if not lines:
        return None
    xs: list[float] = []
    ys: list[float] = []
    for line in lines:
        xs += [x for x, _ in line.points]
        ys += line.values
    # from zero tokens on, so that jobs can be compared
    left = min(0.0, *xs)
    right = max(xs)
    low = min(ys)
    if bottom is not None:
        low = min(low, bottom)
    high = max(ys) if top is None else top
    y_values = ticks(low, high)
    plot = Plot(
        x=Scale(left, right, FRAME.left, FRAME.right),
        # an SVG counts downwards
        y=Scale(y_values[0], y_values[-1], FRAME.bottom, FRAME.top),
    )
    x_ticks = []
    for x in ticks(left, right):
        # the last tick may lie beyond the data, and there beyond the frame
        if x <= right:
            x_ticks.append(Tick(plot.x.at(x), count(x)))
    y_ticks = []
    for y in y_values:
        y_ticks.append(Tick(plot.y.at(y), _tick(y, y_values)))
    drawn = [_drawn(line, plot) for line in lines]
    return Chart(title, unit, drawn, x_ticks, y_ticks)


def _tick(value: float, values: list[float]) -> str:
    """Write a tick with as many decimal places as its axis' step has."""
    largest = max(abs(other) for other in values)
    if largest >= 1000:
        return count(value)
    step = values[1] - values[0]
    if step < 1e-4:
        return f"{value:.2g}"
    # steps are round numbers, so their digits end
    digits = f"{step:.12f}".rstrip("0")
    _, _, decimals = digits.partition(".")
    return fixed(value, len(decimals))


def _drawn(line: Line, plot: Plot) -> DrawnLine:
    is_sparse = line.dots and len(line.present) <= DOTS
    dots = []
    paths = []
    for run in _runs(line.points):
        # a single value makes no line, only a dot shows it
        if is_sparse or len(run) == 1:
            for x, value in run:
                y = plot.y.at(value)
                if y >= FRAME.top:
                    dots.append((plot.x.at(x), y))
        if len(run) > 1:
            paths.append(_path(run, plot))
    last = line.values[-1]
    return DrawnLine(
        name=line.name,
        look=line.look,
        last=figures(last),
        legend=_legend(last),
        paths=paths,
        dots=dots,
    )


def _runs(points: Points) -> list[list[tuple[float, float]]]:
    """Return present values in runs without a gap."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, value in points:
        if value is None:
            runs.append([])
        else:
            runs[-1].append((x, value))
    return [run for run in runs if run]


def _path(run: Sequence[tuple[float, float]], plot: Plot) -> str:
    """Return the path through a run; values out of the top stay at the frame."""
    places = []
    for x, value in run:
        y = max(FRAME.top - 2, plot.y.at(value))
        places.append(f"{plot.x.at(x):.1f} {y:.1f}")
    return "M" + "L".join(places)


def _legend(value: float) -> str:
    if abs(value) >= 10_000:
        return count(value)
    # figures would write a learning rate of 3e-5 as 0.000030
    if 0 < abs(value) < 1e-3:
        return f"{value:.2g}"
    return figures(value)
