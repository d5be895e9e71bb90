"""Tables of a report on whole requests: which expert each goes to, and what its answer is worth.

They read the parts `routing`, `adapters` and `answers` of a report, and are empty where a report
has none of these.
"""

from .format import DASH, count, finite, fixed, interval, share, signed
from .table import Cell, Row, Table, at, part

WAYS = (
    ("stack", "stack"),
    ("choice", "first choice"),
    ("oracle", "right expert"),
    ("base", "base"),
)


def routes(report: dict) -> Table:
    """Return the accuracy of the run's router and of its baselines on every set of requests."""
    groups = _dicts(part(report, "routing").get("sets"))
    names = list(
        dict.fromkeys(
            str(line.get("row", DASH)) for group in groups for line in _dicts(group.get("rows"))
        )
    )
    rows = []
    for name in names:
        lines = [_named(group, name) for group in groups]
        cells = tuple(
            Cell(share(line.get("accuracy"), 1), _percent(line.get("interval"))) for line in lines
        )
        rows.append(Row(name, cells, main=any(line.get("is_router") is True for line in lines)))
    reading = (
        "Share of requests that go to their own expert; in brackets the 95 % interval over pictures, in per cent. "
        "Neutral prompts fit any expert, so only the picture tells; a router that sees none is at chance there. In "
        "test_held every wording is new. Frozen base: no adapter; asked for a label as the router is, or read off its "
        "mean hidden state."
    )
    heads = tuple(str(group.get("set", DASH)) for group in groups)
    return Table(
        "Routes", "Requests that reach their own expert", "router", heads, tuple(rows), reading
    )


def margins(report: dict) -> Table:
    """Return how far ahead of each baseline the router is, and what else there is to say of it, per
    set."""
    found, k = part(report, "routing"), part(report, "routing").get("top_k")
    groups = _dicts(found.get("sets"))
    lines = [line for group in groups for line in _dicts(group.get("rows"))]
    rivals = list(dict.fromkeys(str(line.get("row")) for line in lines if line.get("router_ahead")))
    rows = []
    for group in groups:
        own = next(
            (line for line in _dicts(group.get("rows")) if line.get("is_router") is True), {}
        )
        ahead = [part(_named(group, name), "router_ahead") for name in rivals]
        cells = [Cell(count(group.get("requests"))), Cell(share(own.get("top_k"), 1))]
        cells += [Cell(fixed(own.get("nats"))), Cell(fixed(own.get("ece")))]
        cells += [
            Cell(signed(each.get("difference")), interval(each.get("interval"))) for each in ahead
        ]
        rows.append(Row(str(group.get("set", DASH)), tuple(cells)))
    reading = (
        "Ahead: the router's accuracy less the baseline's, on the same requests, with its 95 % interval; above zero "
        "the router is better."
    )
    heads = ("requests", f"among first {k}" if k else "among first k", "nats", "calibration error")
    heads += tuple(f"ahead of {name}" for name in rivals)
    return Table("Routes", "The router on each set", "set", heads, tuple(rows), reading)


def confusions(report: dict) -> list[Table]:
    """Return per test split how many requests of each expert went where."""
    found = part(report, "routing")
    choices = tuple(map(str, found.get("choices") or ()))
    return [
        _confusion(str(name), lines, choices, part(found, "recall").get(name))
        for name, lines in part(found, "confusion").items()
        if isinstance(lines, list) and choices
    ]


def _confusion(name: str, lines: list, choices: tuple[str, ...], recall) -> Table:
    rows = []
    for i, own in enumerate(choices):
        values = [finite(at(at(lines, i), j)) for j in range(len(choices))]
        total = sum(v for v in values if v is not None)
        cells = [
            Cell(count(v), heat=v / total if v is not None and total else None, own=other == own)
            for v, other in zip(values, choices, strict=True)
        ]
        rows.append(Row(own, (*cells, Cell(share(at(recall, i))))))
    reading = "A row is what requests are, a column where the router sends them; recall is the share that reaches its own."
    colours = "Colour: share of the row; framed: the right choice."
    heads = (*choices, "recall")
    return Table(
        "Confusion",
        f"Who goes where, {name}",
        "belongs to",
        heads,
        tuple(rows),
        reading,
        colours,
        scale=("0 %", "100 %"),
    )


def calibration(report: dict) -> Table:
    """Return how much the router's confidence is worth, before and after its temperature was
    fitted."""
    found, rows = part(report, "routing"), []
    for line in _dicts(found.get("calibration")):
        cells = (
            fixed(line.get(key)) for key in ("ece_before", "ece_after", "nats_before", "nats_after")
        )
        rows.append(Row(str(line.get("set", DASH)), tuple(map(Cell, cells))))
    reading = (
        f"Expected calibration error over 15 bins, and nats per request; the temperature "
        f"({fixed(found.get('temperature'), 2)}) was fitted on validation requests."
    )
    heads = ("error before", "error after", "nats before", "nats after")
    return Table(
        "Calibration", "How sure, and how sure rightly", "set", heads, tuple(rows), reading
    )


def coverage(report: dict) -> Table:
    """Return the share of requests above each confidence, and the accuracy on those."""
    lines = _dicts(part(report, "routing").get("coverage"))
    marks = list(
        dict.fromkeys(p.get("threshold") for line in lines for p in _dicts(line.get("points")))
    )
    rows = []
    for line in lines:
        points = {p.get("threshold"): p for p in _dicts(line.get("points"))}
        found = [points.get(mark, {}) for mark in marks]
        cells = tuple(Cell(share(p.get("accuracy"), 1), share(p.get("coverage"))) for p in found)
        rows.append(Row(str(line.get("set", DASH)), cells))
    reading = "Accuracy on the requests that are at least so sure, and beside it the share of requests that are."
    heads = tuple(f"from {fixed(mark, 2)}" for mark in marks)
    return Table("Coverage", "When only sure routes count", "set", heads, tuple(rows), reading)


def strangers(report: dict) -> Table:
    """Return how well requests that are nobody's are told from the experts'."""
    rows = [
        Row(
            str(line.get("set", DASH)),
            (
                Cell(count(line.get("requests"))),
                Cell(fixed(line.get("auroc"))),
                Cell(fixed(line.get("auroc_of_confidence"))),
            ),
        )
        for line in _dicts(part(report, "routing").get("none"))
    ]
    reading = (
        "How often a request that is nobody's ranks above one that is an expert's (AUROC; 0.5 is chance): by the "
        "probability of none, and by low confidence in any expert."
    )
    heads = ("requests", "by none", "by low confidence")
    return Table("None", "Requests that are nobody's", "set", heads, tuple(rows), reading)


def consistency(report: dict) -> Table:
    """Return how often a changed request goes to the same expert."""
    rows = [
        Row(
            str(line.get("change", DASH)),
            (Cell(share(line.get("same"), 1)), Cell(count(line.get("requests")))),
        )
        for line in _dicts(part(report, "routing").get("consistency"))
        if line.get("requests")
    ]
    reading = "Share of test requests that go where they went before, right or wrong, after a change that should not matter."
    return Table(
        "Consistency",
        "The same request, a little different",
        "change",
        ("same", "requests"),
        tuple(rows),
        reading,
    )


def adapters(report: dict) -> Table:
    """Return what every adapter and the base score on every task."""
    found = part(report, "adapters")
    names = tuple(map(str, found.get("adapters") or ()))
    rows = []
    for line in _dicts(found.get("tasks")):
        own = str(line.get("task", DASH))
        scores = {name: finite(part(line, "scores").get(name)) for name in names}
        cells = tuple(
            Cell(fixed(v), interval(part(line, "intervals").get(name)), heat=v, own=name == own)
            for name, v in scores.items()
        )
        rows.append(
            Row(own, cells, f"{line.get('metric', '')}, {count(line.get('requests'))} rows")
        )
    reading = (
        "A row is a task's test rows, a column who answers them; scores lie between 0 and 1. A strong diagonal means "
        "that experts specialised. exact: same text; cer: 1 less the character error rate; iou: F1 of boxes at IoU "
        "0.5; count: right number; caption: F1 of the longest common word sequence (ROUGE-L)."
    )
    colours = "Colour: the score; framed: an expert on its own task."
    return Table(
        "Adapters",
        "Who can do what",
        "task",
        names,
        tuple(rows),
        reading,
        colours,
        scale=("0", "1"),
    )


def figures(report: dict) -> Table:
    """Return what else the tasks' metrics tell about each expert on its own task."""
    lines = [
        line for line in _dicts(part(report, "adapters").get("tasks")) if part(line, "figures")
    ]
    names = tuple(dict.fromkeys(str(name) for line in lines for name in part(line, "figures")))
    rows = [
        Row(
            str(line.get("task", DASH)),
            tuple(Cell(fixed(part(line, "figures").get(name))) for name in names),
        )
        for line in lines
    ]
    reading = "Means over the task's test rows, each expert on its own task; readable: share that could be read at all."
    return Table(
        "Figures", "The same answers in their own units", "task", names, tuple(rows), reading
    )


def answers(report: dict) -> Table:
    """Return what routed requests' answers score: by the stack, the first choice, the right expert
    and the base."""
    rows = []
    for group in _dicts(report.get("answers")):
        name = str(group.get("set", DASH))
        lines = [(str(line.get("task", DASH)), line) for line in _dicts(group.get("tasks"))]
        for task, line in [*lines, ("all", part(group, "all"))]:
            ways = [part(line, way) for way, _ in WAYS]
            behind = part(line, "behind_oracle")
            cells = [Cell(fixed(way.get("score")), interval(way.get("interval"))) for way in ways]
            cells.append(Cell(signed(behind.get("difference")), interval(behind.get("interval"))))
            rows.append(
                Row(
                    task,
                    tuple(cells),
                    f"{name}, {count(line.get('requests'))}",
                    name,
                    task == "all",
                )
            )
    reading = (
        "Requests of the routing set with the answers of their task rows. Stack: as served, with several answers "
        "ranked where the router is unsure; right expert: as if the router never erred; behind it: that score less the "
        "stack's, on the same requests."
    )
    heads = (*(head for _, head in WAYS), "behind it")
    return Table("Answers", "What the answers are worth", "task", heads, tuple(rows), reading)


def lead(report: dict) -> str:
    """Return the result in two sentences; empty where the report has no routes."""
    router, text = _row(report, 0, "router"), _row(report, 0, "text only")
    if not router:
        return ""
    out = (
        f"The router sends {share(router.get('accuracy'), 1)} of test requests to their own expert"
    )
    out += f" (without pictures {share(text.get('accuracy'), 1)})." if text else "."
    whole = part(_first(report.get("answers")), "all")
    if not whole:
        return out
    stack, oracle = (part(whole, way).get("score") for way in ("stack", "oracle"))
    return f"{out} The stack's answers score {fixed(stack)}, those of the right experts {fixed(oracle)}."


def tiles(report: dict) -> list[tuple[str, str, str]]:
    """Return the numbers at the top as name, value and what stands beside it."""
    router = _row(report, 0, "router")
    if not router:
        return []
    whole = part(_first(report.get("answers")), "all")
    neutral = next(
        (g for g in _dicts(part(report, "routing").get("sets")) if "neutral" in str(g.get("set"))),
        {},
    )
    seen, blind = (_named(neutral, name) for name in ("router", "text only"))
    stack = part(whole, "stack")
    return [
        ("router's accuracy", share(router.get("accuracy"), 1), _percent(router.get("interval"))),
        (
            "on neutral prompts",
            share(seen.get("accuracy"), 1),
            f"without pictures {share(blind.get('accuracy'), 1)}",
        ),
        ("stack's answers", fixed(stack.get("score")), interval(stack.get("interval"))),
        (
            "right experts' answers",
            fixed(part(whole, "oracle").get("score")),
            "as if the router never erred",
        ),
    ]


def _row(report: dict, group: int, name: str) -> dict:
    groups = _dicts(part(report, "routing").get("sets"))
    return _named(groups[group], name) if len(groups) > group else {}


def _named(group: dict, name: str) -> dict:
    return next((line for line in _dicts(group.get("rows")) if line.get("row") == name), {})


def _first(lines) -> dict:
    return next(iter(_dicts(lines)), {})


def _dicts(lines) -> list[dict]:
    return (
        [line for line in lines if isinstance(line, dict)]
        if isinstance(lines, list | tuple)
        else []
    )


def _percent(pair) -> str:
    """Return an interval of shares in per cent."""
    low, high = (at(pair, 0), at(pair, 1)) if isinstance(pair, list | tuple) else (None, None)
    if finite(low) is None or finite(high) is None:
        return ""
    return f"[{share(low).removesuffix(' %')}, {share(high).removesuffix(' %')}]"
