"""The tables of a report on whole requests: who gets each, and what the answer is worth.

Every table is empty where the report has no part for it.
"""

from collections.abc import Sequence

from .format import (
    DASH,
    count,
    finite,
    fixed,
    interval,
    percent_interval,
    share,
    signed,
)
from .schema.base import Difference
from .schema.requests import AnswerRow, RequestReport, RequestRouting, RoutedSet, RouterRow
from .table import Cell, Row, Table, at, names_in_order

# the row of the router's rival that sees no picture
TEXT_ONLY = "text only"
# in the name of a set whose prompts fit any expert
NEUTRAL = "neutral"


def routes(report: RequestReport) -> Table:
    """Return the accuracy of the run's router and of its baselines on every set of requests."""
    sets = _sets(report)
    rows = []
    # sets are measured one by one; a router is a row here, so that it is compared along the line
    for name in _routers(sets):
        found = [each.row(name) for each in sets]
        cells = [_accuracy(row) for row in found]
        is_router = any(row.is_router for row in found if row)
        rows.append(Row(name, tuple(cells), main=is_router))
    return Table(
        name="Routes",
        title="Requests that reach their own expert",
        corner="router",
        columns=tuple(each.name for each in sets),
        rows=tuple(rows),
        reading=(
            "Share of requests that go to their own expert; in brackets the 95 % interval over "
            "pictures, in per cent. Neutral prompts fit any expert, so only the picture tells; a "
            "router that sees none is at chance there. In test_held every wording is new. Frozen "
            "base: no adapter; asked for a label as the router is, or read off its mean hidden "
            "state."
        ),
    )


def margins(report: RequestReport) -> Table:
    """Return how far ahead of each baseline the router is, and what else there is to say of it, per
    set."""
    sets = _sets(report)
    rivals = _rivals(sets)
    rows = []
    for each in sets:
        # accuracy stands in `routes` already
        router = each.router
        cells = [
            Cell(count(each.requests)),
            Cell(share(router.top_k_accuracy if router else None, 1)),
            Cell(fixed(router.nats if router else None)),
            Cell(fixed(router.ece if router else None)),
        ]
        for name in rivals:
            rival = each.row(name)
            cells.append(_difference(rival.router_ahead if rival else None))
        rows.append(Row(each.name, tuple(cells)))
    # how many experts answer where the router is unsure
    k = report.routing.top_k if report.routing else "k"
    heads = ["requests", f"among first {k}", "nats", "calibration error"]
    heads += [f"ahead of {name}" for name in rivals]
    return Table(
        name="Margins",
        title="The router on each set",
        corner="set",
        columns=tuple(heads),
        rows=tuple(rows),
        reading=(
            "Ahead: the router's accuracy less the baseline's, on the same requests, with its 95 % "
            "interval; above zero the router is better."
        ),
    )


def confusions(report: RequestReport) -> list[Table]:
    """Return per test split how many requests of each expert went where."""
    routing = report.routing
    if routing is None:
        return []
    return [_confusion(routing, name) for name in routing.confusion]


def _confusion(routing: RequestRouting, name: str) -> Table:
    recall = routing.recall.get(name, ())
    rows = []
    for i, (own, line) in enumerate(zip(routing.choices, routing.confusion[name], strict=True)):
        # each line has its own scale: sets hold as many requests of an expert as there were
        total = sum(line)
        cells = []
        for other, requests in zip(routing.choices, line, strict=True):
            heat = requests / total if total else None
            cells.append(Cell(count(requests), heat=heat, own=other == own))
        cells.append(Cell(share(at(recall, i))))
        rows.append(Row(own, tuple(cells)))
    return Table(
        name="Confusion",
        title=f"Who goes where, {name}",
        corner="belongs to",
        columns=(*routing.choices, "recall"),
        rows=tuple(rows),
        reading=(
            "A row is what requests are, a column where the router sends them; recall is the share "
            "that reaches its own."
        ),
        colours="Colour: share of the row; framed: the right choice.",
        scale=("0 %", "100 %"),
    )


def calibration(report: RequestReport) -> Table:
    """Return how much the router's confidence is worth, before and after its temperature was
    fitted."""
    rows = []
    for line in report.routing.calibration if report.routing else ():
        cells = (
            Cell(fixed(line.ece_before)),
            Cell(fixed(line.ece_after)),
            Cell(fixed(line.nats_before)),
            Cell(fixed(line.nats_after)),
        )
        rows.append(Row(line.set, cells))
    temperature = fixed(report.routing.temperature, 2) if report.routing else DASH
    return Table(
        name="Calibration",
        title="How sure, and how sure rightly",
        corner="set",
        columns=("error before", "error after", "nats before", "nats after"),
        rows=tuple(rows),
        reading=(
            "Expected calibration error over 15 bins, and nats per request; the temperature "
            f"({temperature}) was fitted on validation requests."
        ),
    )


def coverage(report: RequestReport) -> Table:
    """Return the share of requests above each confidence, and the accuracy on those."""
    curves = report.routing.coverage if report.routing else ()
    # in the order of the configuration, which need not be sorted
    thresholds: list[float] = []
    for curve in curves:
        for point in curve.points:
            if point.threshold not in thresholds:
                thresholds.append(point.threshold)
    rows = []
    for curve in curves:
        points = {point.threshold: point for point in curve.points}
        cells = []
        for threshold in thresholds:
            found = points.get(threshold)
            if found:
                cells.append(Cell(share(found.accuracy, 1), share(found.coverage)))
            else:
                cells.append(Cell(DASH))
        rows.append(Row(curve.set, tuple(cells)))
    return Table(
        name="Coverage",
        title="When only sure routes count",
        corner="set",
        columns=tuple(f"from {fixed(threshold, 2)}" for threshold in thresholds),
        rows=tuple(rows),
        reading=(
            "Accuracy on the requests that are at least so sure, and beside it the share of "
            "requests that are."
        ),
    )


def none_detection(report: RequestReport) -> Table:
    """Return how well requests that are nobody's are told from the experts'."""
    rows = []
    for line in report.routing.none if report.routing else ():
        cells = (
            Cell(count(line.requests)),
            Cell(fixed(line.auroc)),
            Cell(fixed(line.auroc_of_confidence)),
        )
        rows.append(Row(line.set, cells))
    return Table(
        name="None",
        title="Requests that are nobody's",
        corner="set",
        columns=("requests", "by none", "by low confidence"),
        rows=tuple(rows),
        reading=(
            "How often a request that is nobody's ranks above one that is an expert's (AUROC; 0.5 "
            "is chance): by the probability of none, and by low confidence in any expert."
        ),
    )


def consistency(report: RequestReport) -> Table:
    """Return how often a changed request goes to the same expert."""
    rows = []
    for line in report.routing.consistency if report.routing else ():
        # a change that could not be tried says nothing; the notes tell why it could not
        if line.requests:
            cells = (Cell(share(line.same, 1)), Cell(count(line.requests)))
            rows.append(Row(line.change, cells))
    return Table(
        name="Consistency",
        title="The same request, a little different",
        corner="change",
        columns=("same", "requests"),
        rows=tuple(rows),
        reading=(
            "Share of test requests that go where they went before, right or wrong, after a change "
            "that should not matter."
        ),
    )


def adapters(report: RequestReport) -> Table:
    """Return what every adapter and the base score on every task."""
    names = report.adapters.adapters if report.adapters else ()
    rows = []
    for line in report.adapters.tasks if report.adapters else ():
        cells = []
        for name in names:
            score = line.scores.get(name)
            spread = line.intervals.get(name)
            # an expert is named after its task
            own = name == line.task
            # without one there were too few rows for a colour
            heat = finite(score) if spread else None
            cells.append(Cell(fixed(score), interval(spread), heat=heat, own=own))
        note = f"{line.metric}, {count(line.requests)} rows"
        rows.append(Row(line.task, tuple(cells), note))
    return Table(
        name="Adapters",
        title="Who can do what",
        corner="task",
        columns=names,
        rows=tuple(rows),
        reading=(
            "A row is a task's test rows, a column who answers them; scores lie between 0 and 1. A "
            "strong diagonal means that experts specialised. exact: same text; cer: 1 less the "
            "character error rate; iou: F1 of boxes at IoU 0.5; count: right number; caption: F1 "
            "of the longest common word sequence (ROUGE-L)."
        ),
        colours="Colour: the score; framed: an expert on its own task.",
        scale=("0", "1"),
    )


def metric_figures(report: RequestReport) -> Table:
    """Return what else the tasks' metrics tell about each expert on its own task."""
    tasks = [task for task in report.adapters.tasks if task.figures] if report.adapters else []
    # metrics differ in their figures: a column for each, a dash where a task has none
    found: list[str] = []
    for task in tasks:
        found += task.figures
    names = names_in_order(found)
    rows = []
    for task in tasks:
        cells = [Cell(fixed(task.figures.get(name))) for name in names]
        rows.append(Row(task.task, tuple(cells)))
    return Table(
        name="Figures",
        title="The same answers in their own units",
        corner="task",
        columns=names,
        rows=tuple(rows),
        reading=(
            "Means over the task's test rows, each expert on its own task; readable: share that "
            "could be read at all."
        ),
    )


def answers(report: RequestReport) -> Table:
    """Return what routed requests' answers score: by the stack, the first choice, the right expert
    and the base."""
    rows = []
    for group in report.answers:
        for task in group.tasks:
            rows.append(_answered(group.set, task.task, task))
        rows.append(_answered(group.set, "all", group.all, main=True))
    return Table(
        name="Answers",
        title="What the answers are worth",
        corner="task",
        columns=("stack", "first choice", "right expert", "base", "behind it"),
        rows=tuple(rows),
        reading=(
            "Requests of the routing set with the answers of their task rows. Stack: as served, "
            "with several answers ranked where the router is unsure; right expert: as if the "
            "router never erred; behind it: that score less the stack's, on the same requests."
        ),
    )


def _answered(split: str, name: str, row: AnswerRow, main: bool = False) -> Row:
    cells = []
    for each in (row.stack, row.choice, row.oracle, row.base):
        cells.append(Cell(fixed(each.score), interval(each.interval)))
    cells.append(_difference(row.behind_oracle))
    note = f"{split}, {count(row.requests)}"
    return Row(name, tuple(cells), note, kind=split, main=main)


def lead(report: RequestReport) -> str:
    """Return the result in two sentences; empty where the report has no routes."""
    # the first set is the whole test split
    sets = _sets(report)
    router = sets[0].router if sets else None
    if router is None:
        return ""
    out = f"The router sends {share(router.accuracy, 1)} of test requests to their own expert"
    blind = sets[0].row(TEXT_ONLY)
    out += f" (without pictures {share(blind.accuracy, 1)})." if blind else "."
    if not report.answers:
        return out
    whole = report.answers[0].all
    own = fixed(whole.stack.score)
    right = fixed(whole.oracle.score)
    return f"{out} The stack's answers score {own}, those of the right experts {right}."


def tiles(report: RequestReport) -> list[tuple[str, str, str]]:
    """Return the numbers at the top as name, value and what stands beside it."""
    sets = _sets(report)
    router = sets[0].router if sets else None
    if router is None:
        return []
    accuracy = share(router.accuracy, 1)
    out = [("router's accuracy", accuracy, percent_interval(router.interval))]
    # where only the picture tells: the figure that shows whether the router looks at it
    neutral = next((each for each in sets if NEUTRAL in each.name), None)
    if neutral:
        seen = neutral.router
        blind = neutral.row(TEXT_ONLY)
        without = f"without pictures {share(blind.accuracy if blind else None, 1)}"
        out.append(("on neutral prompts", share(seen.accuracy if seen else None, 1), without))
    # as for routes, those of the test split
    if report.answers:
        whole = report.answers[0].all
        own = whole.stack
        out.append(("stack's answers", fixed(own.score), interval(own.interval)))
        right = fixed(whole.oracle.score)
        out.append(("right experts' answers", right, "as if the router never erred"))
    return out


def _sets(report: RequestReport) -> tuple[RoutedSet, ...]:
    return report.routing.sets if report.routing else ()


def _routers(sets: Sequence[RoutedSet]) -> tuple[str, ...]:
    found: list[str] = []
    for each in sets:
        found += [row.name for row in each.rows]
    return names_in_order(found)


def _rivals(sets: Sequence[RoutedSet]) -> tuple[str, ...]:
    # the router is not ahead of itself
    found: list[str] = []
    for each in sets:
        found += [row.name for row in each.rows if row.router_ahead]
    return names_in_order(found)


def _accuracy(row: RouterRow | None) -> Cell:
    if row is None:
        return Cell(DASH)
    return Cell(share(row.accuracy, 1), percent_interval(row.interval))


def _difference(found: Difference | None) -> Cell:
    if found is None:
        return Cell(DASH)
    return Cell(signed(found.difference), interval(found.interval))
