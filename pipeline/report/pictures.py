"""Pictures made of boxes: means on a ruler with their intervals, and time cut into its parts.

They are grids of text and coloured boxes, not drawings: names stay readable on a phone. What is
computed here is where everything lies, in per cent; the templates draw it.
"""

from dataclasses import dataclass

from .format import ends, finite, fixed, seconds, ticks
from .schema.base import BaseReport, Interval, JobSpeed
from .schema.language import LanguageReport

# What a job's time goes to, and its colour's class in the style sheet; the last is what remains
PHASES = (
    ("data", "c5"),
    ("forward", "c0"),
    ("backward", "c4"),
    ("optimizer", "c1"),
    ("other", "c7"),
)
FAR = 3.0  # the ruler ends at this many times the distance between the best row and the trunk


@dataclass(frozen=True)
class Mean:
    """A mean with its interval, bits per byte."""

    name: str
    mean: float
    interval: Interval | None
    note: str = ""
    is_stack: bool = False
    is_trunk: bool = False
    is_oracle: bool = False


@dataclass(frozen=True)
class Ruler:
    """Round numbers, the first at the left end and the last at the right."""

    marks: list[float]

    @property
    def left(self) -> float:
        """The value at the left end."""
        return self.marks[0]

    @property
    def right(self) -> float:
        """The value at the right end."""
        return self.marks[-1]

    def percent(self, value: float) -> float:
        """Return where a value lies, in per cent of the length."""
        return 100 * (value - self.left) / (self.right - self.left)

    def inside(self, value: float) -> float:
        """Return a value, or the end that it lies beyond."""
        return min(max(value, self.left), self.right)


@dataclass(frozen=True)
class ForestRow:
    """A mean on the ruler, in per cent of it; dot is None where it lies beyond the right end."""

    name: str
    note: str
    value: str
    look: str
    dot: float | None
    bar: tuple[float, float] | None  # left end and width


@dataclass(frozen=True)
class Forest:
    """All means on one ruler; stack is the place of the stack's."""

    marks: list[tuple[str, float]]
    stack: float | None
    rows: list[ForestRow]


@dataclass(frozen=True)
class Bar:
    """A job's time, its pieces as class and width in per cent of the longest job."""

    job: str
    time: str
    pieces: list[tuple[str, float]]


def quality_forest(report: LanguageReport) -> Forest | None:
    """Return the mean bits per byte of every model on one ruler."""
    means = []
    for row in report.quality:
        means.append(
            Mean(
                name=row.name,
                mean=row.mean,
                interval=row.interval,
                note=row.axis,
                is_stack=row.is_stack,
                is_trunk=row.kind == "part",
                is_oracle=row.kind == "oracle",
            )
        )
    return forest(means)


def active_forest(report: LanguageReport) -> Forest | None:
    """Return the mean bits per byte by the number of active experts on one ruler."""
    served = report.model.top_k if report.model else None
    means = []
    for row in report.active:
        is_served = row.top_k == served
        means.append(Mean(f"k = {row.top_k}", row.mean, row.interval, is_stack=is_served))
    return forest(means)


def forest(means: list[Mean]) -> Forest | None:
    """Return every mean as a dot on one common ruler, its interval as a bar; far ones become an
    arrow. None for fewer than two finite means."""
    means = [each for each in means if finite(each.mean) is not None]
    if len(means) < 2:
        return None
    best = min(_low(each) for each in means)
    ruler = Ruler(ticks(best, _far(means, best), wanted=5))
    marks = [(f"{mark:g}", ruler.percent(mark)) for mark in ruler.marks]
    rows = [_forest_row(each, ruler) for each in means]
    stack = None
    for each in means:
        if each.is_stack:
            stack = ruler.percent(each.mean)
    return Forest(marks, stack, rows)


def _forest_row(each: Mean, ruler: Ruler) -> ForestRow:
    dot = None
    bar = None
    if each.mean <= ruler.right:
        dot = ruler.percent(each.mean)
        low, high = ends(each.interval)
        if low is not None and high is not None:
            # an interval of a row near the end may reach beyond it
            left = ruler.percent(ruler.inside(low))
            right = ruler.percent(ruler.inside(high))
            bar = (left, right - left)
    look = ""
    if each.is_stack:
        look = "main"
    elif each.is_oracle:
        look = "oracle"
    return ForestRow(
        name=each.name,
        note=each.note,
        value=fixed(each.mean),
        look=look,
        dot=dot,
        bar=bar,
    )


def _far(means: list[Mean], best: float) -> float:
    """Return the right end of the ruler."""
    trunk = max(each.mean for each in means)
    for each in means:
        if each.is_trunk:
            trunk = each.mean
    # rows much worse than the trunk would squeeze all others together; where the trunk is the best
    # row, a ruler needs some length all the same
    limit = best + FAR * max(trunk - best, 1e-3)
    near = [_high(each) for each in means if each.mean <= limit]
    return max(near)


def _low(each: Mean) -> float:
    """Return the left end of a row, its mean where it has no interval."""
    low, _ = ends(each.interval)
    return each.mean if low is None else min(low, each.mean)


def _high(each: Mean) -> float:
    """Return the right end of a row, its mean where it has no interval."""
    _, high = ends(each.interval)
    return each.mean if high is None else max(high, each.mean)


def bars(report: BaseReport) -> list[Bar]:
    """Return one bar per job, as long as its time, cut into what the time went to."""
    jobs = [job for job in report.speed if finite(job.seconds)]
    longest = max((_seconds(job) for job in jobs), default=0.0)
    out = []
    for job in jobs:
        pieces = []
        for (_, look), span in zip(PHASES, _spans(job), strict=True):
            if span:
                pieces.append((look, 100 * span / longest))
        bar = Bar(job.job, seconds(job.seconds), pieces)
        out.append(bar)
    return out


def _spans(job: JobSpeed) -> list[float]:
    """Return the seconds of each of PHASES."""
    spans = []
    for measured in (job.data_s, job.forward_s, job.backward_s, job.optimizer_s):
        spans.append(finite(measured) or 0.0)
    # phases are clocked apart from the whole, so that their sum may exceed it by a little
    rest = max(0.0, _seconds(job) - sum(spans))
    return [*spans, rest]


def _seconds(job: JobSpeed) -> float:
    return finite(job.seconds) or 0.0
