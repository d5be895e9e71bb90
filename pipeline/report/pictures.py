"""Pictures made of boxes: means on a ruler with their intervals, and time cut into its parts.

They are grids of text and coloured boxes, not drawings: names stay readable on a phone.
"""

from dataclasses import dataclass

from .format import ends, finite, fixed, seconds, ticks
from .markup import Markup, join, small, tag
from .schema import BaseReport, Interval, JobSpeed, LanguageReport

# What a job's time goes to, and its colour's class in the style sheet; the last is what remains
PHASES = (("data", 5), ("forward", 0), ("backward", 4), ("optimizer", 1), ("other", 7))
FAR = 3.0  # the picture ends at this many times the distance between the best row and the trunk


@dataclass(frozen=True)
class Point:
    """A mean on the ruler, with its interval."""

    name: str
    mean: float
    interval: Interval
    note: str = ""
    is_stack: bool = False
    is_trunk: bool = False
    is_oracle: bool = False


def points_of_quality(report: LanguageReport) -> list[Point]:
    """Return the mean bits per byte of every model."""
    points = []
    for row in report.quality:
        points.append(
            Point(
                name=row.name,
                mean=row.mean,
                interval=row.interval,
                note=row.axis,
                is_stack=row.is_stack,
                is_trunk=row.kind == "part",
                is_oracle=row.kind == "oracle",
            )
        )
    return points


def points_of_active(report: LanguageReport) -> list[Point]:
    """Return the mean bits per byte by the number of active experts."""
    served = report.model.top_k if report.model else None
    points = []
    for row in report.active:
        is_served = row.top_k == served
        points.append(Point(f"k = {row.top_k}", row.mean, row.interval, is_stack=is_served))
    return points


def forest(points: list[Point]) -> Markup:
    """Return every mean as a dot on one common ruler, its interval as a bar; far ones become an
    arrow. Empty for fewer than two finite means."""
    points = [point for point in points if finite(point.mean) is not None]
    if len(points) < 2:
        return Markup("")
    left = min(min(point.mean, _low(point)) for point in points)
    marks = ticks(left, _far(points, left), 5)
    stack = next((point.mean for point in points if point.is_stack), None)
    ruler = [tag("i", f"{mark:g}", style=f"left:{_percent(mark, marks)}") for mark in marks]
    top = tag(
        "div",
        tag("span", "bits per byte, mean"),
        tag("span", tag("div", *ruler, class_="plot"), class_="track"),
        tag("span"),
        class_="ruler",
    )
    lines = [_forest_row(point, marks, stack) for point in points]
    reading = (
        "Further left is better. Dot: mean over domains; bar: its 95 % interval; "
        "dashed: the stack; hollow: the oracle; arrow: off the scale."
    )
    return join(tag("div", top, *lines, class_="forest"), tag("p", reading, class_="read"))


def _forest_row(point: Point, marks: list[float], stack: float | None) -> Markup:
    parts = []
    if stack is not None:
        parts.append(tag("i", class_="at", style=f"left:{_percent(stack, marks)}"))
    if point.mean > marks[-1]:
        parts.append(tag("i", "→", class_="out"))
    else:
        low, high = ends(point.interval)
        if low is not None and high is not None:
            left = _inside(low, marks)
            right = _inside(high, marks)
            width = f"{100 * (right - left) / (marks[-1] - marks[0]):.2f}%"
            place = f"left:{_percent(left, marks)};width:{width}"
            parts.append(tag("i", class_="span", style=place))
        parts.append(tag("i", class_="dot", style=f"left:{_percent(point.mean, marks)}"))
    look = []
    if point.is_stack:
        look.append("main")
    if point.is_oracle:
        look.append("oracle")
    name = tag("span", point.name, small(point.note), class_="name")
    track = tag("span", tag("div", *parts, class_="plot"), class_="track")
    value = tag("span", fixed(point.mean), class_="value")
    return tag("div", name, track, value, class_=" ".join(look))


def _far(points: list[Point], left: float) -> float:
    """Return the right end of the ruler: rows much worse than the trunk would squeeze all others
    together."""
    worst = max(point.mean for point in points)
    trunk = next((point.mean for point in points if point.is_trunk), worst)
    # the trunk may be the best row; a ruler needs some length all the same
    limit = left + FAR * max(trunk - left, 1e-3)
    near = [point for point in points if point.mean <= limit]
    return max(max(point.mean, _high(point)) for point in near)


def _low(point: Point) -> float:
    low, _ = ends(point.interval)
    return point.mean if low is None else low


def _high(point: Point) -> float:
    _, high = ends(point.interval)
    return point.mean if high is None else high


def _inside(value: float, marks: list[float]) -> float:
    return min(max(value, marks[0]), marks[-1])


def _percent(value: float, marks: list[float]) -> str:
    return f"{100 * (value - marks[0]) / (marks[-1] - marks[0]):.2f}%"


def bars(report: BaseReport) -> Markup:
    """Return one bar per job, as long as its time, cut into what the time went to."""
    jobs = [job for job in report.speed if finite(job.seconds)]
    if not jobs:
        return Markup("")
    longest = max(finite(job.seconds) or 0.0 for job in jobs)
    lines = []
    for job in jobs:
        pieces = []
        for (_, colour), span in zip(PHASES, _spans(job), strict=True):
            if span:
                width = f"width:{100 * span / longest:.2f}%"
                pieces.append(tag("i", class_=f"c{colour}", style=width))
        lines.append(tag("span", job.job))
        lines.append(tag("div", *pieces, class_="bar"))
        lines.append(tag("span", seconds(job.seconds)))
    keys = [tag("span", tag("i", class_=f"key block c{i}"), name) for name, i in PHASES]
    return join(tag("div", *lines, class_="bars"), tag("div", *keys, class_="legend"))


def _spans(job: JobSpeed) -> list[float]:
    """Return the seconds of each of PHASES."""
    measured = (job.data_s, job.forward_s, job.backward_s, job.optimizer_s)
    spans = [finite(value) or 0.0 for value in measured]
    rest = (finite(job.seconds) or 0.0) - sum(spans)
    return [*spans, max(0.0, rest)]
