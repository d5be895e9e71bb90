"""Two reports of one stack side by side: before a domain came, went or was replaced, and after."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .format import DASH, finite, fixed, interval, percent_interval, share, signed
from .labels import with_labels
from .schema.base import Interval
from .schema.language import LanguageReport
from .schema.reading import Report
from .schema.requests import RequestReport
from .table import Cell, Row, Table, less, names_in_order

MEAN = "mean"
STACK = "stack's answers"
BOTH = "mean of both"  # of what both reports have
Figure = tuple[float | None, Interval | None]
Figures = dict[str, Figure]
COLUMNS = ("before", "after", "difference")
BRACKETS = "In brackets the 95 % interval of a figure, where its report has one."


@dataclass(frozen=True)
class _Unit:
    """How figures of one kind are written."""

    text: Callable[[object], str]
    bounds: Callable[[Interval | None], str]
    change: Callable[[object], str]


def _percent(value: object) -> str:
    return share(value, 1)


def _points(value: object) -> str:
    number = finite(value)
    return DASH if number is None else f"{signed(100 * number, 1)} points"


_PLAIN = _Unit(fixed, interval, signed)
_SHARE = _Unit(_percent, percent_interval, _points)


def changes(before: Report | None, after: Report) -> list[Table]:
    """Return what a stack scores and how well its router chooses, of either report; None where
    there is no former one."""
    if isinstance(after, LanguageReport):
        former = with_labels(before) if isinstance(before, LanguageReport) else None
        now = with_labels(after)
        routes = "Share of tokens, of adapters of texts, that reach their own domain's expert."
        return [
            _table("Bits per byte of the stack", _bits(former), _bits(now), _PLAIN, BRACKETS),
            _table("Router's accuracy", _agreement(former), _agreement(now), _SHARE, routes),
        ]
    asked = before if isinstance(before, RequestReport) else None
    routes = f"Share of requests that reach their own expert. {BRACKETS}"
    return [
        _table("Score of each expert", _scores(asked), _scores(after), _PLAIN, BRACKETS),
        _table("Router's accuracy", _accuracy(asked), _accuracy(after), _SHARE, routes),
    ]


def _table(title: str, before: Figures, after: Figures, unit: _Unit, reading: str) -> Table:
    def cell(figure: Figure | None) -> Cell:
        return Cell(DASH) if figure is None else Cell(unit.text(figure[0]), unit.bounds(figure[1]))

    names = names_in_order([*after, *before])
    both = [name for name in names if name in before and name in after and not _is_whole(name)]
    others = [name for name in names if name not in both and not _is_whole(name)]
    if before and others and both:
        # A mean over other domains says nothing of these
        before, after = (known | {BOTH: _mean(known, both)} for known in (before, after))
        names = (*names, BOTH)
    rows = []
    # What stands for all of them comes last
    for name in sorted(names, key=_is_whole):
        old, new = before.get(name), after.get(name)
        is_same = old and new and (name == BOTH or not (_is_whole(name) and others))
        moved = less(new[0], old[0]) if old and new and is_same else None
        cells = (cell(old), cell(new), Cell(unit.change(moved)))
        rows.append(Row(name, cells, kind="all" if _is_whole(name) else ""))
    return Table("Change", title, "of", COLUMNS, tuple(rows), reading)


def _mean(figures: Figures, names: list[str]) -> Figure:
    values = [finite(figures[name][0]) for name in names]
    known = [value for value in values if value is not None]
    return (sum(known) / len(known) if len(known) == len(values) else None), None


def _is_whole(name: str) -> bool:
    return name in (MEAN, STACK, BOTH)


def _bits(report: LanguageReport | None) -> Figures:
    stack = report.stack if report else None
    if stack is None:
        return {}
    found: Figures = {}
    for name, bits in stack.bits_per_byte.items():
        found[name] = (bits, stack.intervals.get(name))
    return found | {MEAN: (stack.mean, stack.interval)}


def _agreement(report: LanguageReport | None) -> Figures:
    """Return the share of tokens, of adapters of texts, that reach their own domain's expert."""
    if report is None:
        return {}
    routed: Mapping[str, float] = {}
    if report.text_routing:
        routed = report.text_routing.agreement_by_domain
    elif report.routing:
        routed = report.routing.agreement_by_domain
    found: Figures = {name: (value, None) for name, value in routed.items()}
    if found:
        found[MEAN] = (sum(routed.values()) / len(routed), None)
    return found


def _scores(report: RequestReport | None) -> Figures:
    found: Figures = {}
    if report and report.adapters:
        for task in report.adapters.tasks:
            found[task.task] = (task.scores.get(task.task), task.intervals.get(task.task))
    if report and report.answers:
        stack = report.answers[0].all.stack
        found[STACK] = (stack.score, stack.interval)
    return found


def _accuracy(report: RequestReport | None) -> Figures:
    found: Figures = {}
    for routed in report.routing.sets if report and report.routing else ():
        if routed.router:
            found[routed.name] = (routed.router.accuracy, routed.router.interval)
    return found
