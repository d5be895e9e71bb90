"""The report as one HTML file: no script, no network, nothing beside it.

All text from the report is escaped by markup; the same report and histories always give the same
bytes.
"""

from . import language, requests, routing
from .curves import curves, shares
from .format import DASH, count, fixed, interval, share
from .markup import Markup, join, small, tag
from .pictures import bars, forest
from .style import style
from .table import Cell, Table, less

LONG = 24  # characters from which a column of words is a column of sentences


def page(report: dict, histories: dict[str, list[dict]]) -> str:
    """Return the whole file as text, to be written as UTF-8."""
    experts = [str(name) for name in report.get("experts") or ()]
    sections = [
        (
            "verdict",
            "",
            "Verdict",
            join(_table(language.criteria(report)), _table(language.wins(report))),
        ),
        ("quality", "T1", "The stack and everything it should beat", _quality(report)),
        ("map", "", "Who is good at what", _heat(language.matrix(report), "turn")),
        ("routing", "T5", "Where tokens go", _routing(report, shares(histories, experts))),
        ("routes", "", "Where requests go", _routes(report)),
        ("adapters", "", "Who can do what", _adapters(report)),
        ("answers", "", "What the answers are worth", _table(requests.answers(report))),
        ("leaving", "T3", "When one expert leaves", _heat(language.opt_out(report), "turn")),
        ("active", "T6", "Active experts", _active(report)),
        ("curves", "", "Training curves", _curves(curves(histories))),
        ("speed", "", "Time and memory", join(bars(report), _table(language.speed(report)))),
        ("data", "", "Data and model", join(_model(report), _table(language.data(report)))),
        ("notes", "", "Notes", _notes(report)),
    ]
    sections = [section for section in sections if section[3]]
    title = f"{report.get('run') or 'run'}: MoleForge report"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(style())),
    )
    links = tag(
        "nav",
        *(tag("a", heading, href=f"#{key}") for key, _, heading, _ in sections),
        aria_label="sections",
    )
    body = [_section(*section) for section in sections]
    main = tag("main", _header(report), _tiles(report), links, *body, _footer())
    return f"<!doctype html>\n{tag('html', head, tag('body', main), lang='en')}\n"


def _section(key: str, label: str, heading: str, body: Markup) -> Markup:
    mark = tag("span", label, class_="label") if label else ""
    return tag("section", tag("h2", mark, heading), body, id=key)


def _header(report: dict) -> Markup:
    machine = report.get("machine") or {}
    place = machine.get("gpu") or machine.get("cpu")
    facts = [
        str(report.get("family") or ""),
        f"seed {report.get('seed')}" if report.get("seed") is not None else "",
        str(report.get("made") or ""),
        str(place or ""),
        f"{machine.get('threads')} of {machine.get('cores')} cores" if machine.get("cores") else "",
        str(machine.get("dtype") or ""),
        f"torch {machine['torch']}" if machine.get("torch") else "",
    ]
    line = tag("p", " · ".join(fact for fact in facts if fact), class_="meta")
    kicker = tag("p", "MoleForge report", class_="kicker")
    return tag("header", kicker, tag("h1", report.get("run") or "run"), line, _lead(report))


def _lead(report: dict) -> Markup:
    """Return the result in two sentences: what the stack reached, and how it compares on each axis."""
    stack = _stack(report)
    if stack is None:
        return (
            tag("p", requests.lead(report), class_="lead") if requests.lead(report) else Markup("")
        )
    text = f"The stack reaches {fixed(stack.get('mean'))} bits per byte {interval(stack.get('interval'))}".rstrip()
    verdicts = [
        win for win in report.get("wins") or () if win.get("verdict") in ("better", "worse", "tie")
    ]
    groups = []
    for verdict, word in (
        ("better", "better than"),
        ("tie", "level with"),
        ("worse", "worse than"),
    ):
        names = [
            f"{win.get('against')} ({win.get('axis') or 'axis not stated'})"
            for win in verdicts
            if win["verdict"] == verdict
        ]
        groups += [f"{word} {', '.join(names)}"] if names else []
    return tag("p", text + ". ", f"It is {'; '.join(groups)}." if groups else "", class_="lead")


def _tiles(report: dict) -> Markup:
    stack, trunk, found = _stack(report) or {}, _first(report, "part") or {}, report.get("T5") or {}
    model = report.get("model") or {}
    gain = less(trunk.get("mean"), stack.get("mean"))
    passed = [item.get("passed") for item in report.get("criteria") or ()]
    tiles = [
        ("bits per byte", fixed(stack.get("mean")), interval(stack.get("interval"))),
        ("gained over the trunk", fixed(gain), f"trunk {fixed(trunk.get('mean'))}"),
        ("of the oracle's gain", share(stack.get("oracle_gain")), "reached by the stack"),
        (
            "parameters per token",
            count(model.get("active_parameters")),
            f"of {count(model.get('total_parameters'))}",
        ),
        (
            "routing agreement",
            share(found.get("agreement")),
            f"{len(report.get('experts') or ())} experts",
        ),
        *requests.tiles(report),
        (
            "criteria passed",
            f"{sum(p is True for p in passed)} of {len(passed)}" if passed else DASH,
            "",
        ),
    ]
    shown = [(name, value, more) for name, value, more in tiles if value != DASH]
    boxes = [
        tag("div", tag("dt", n), tag("dd", v, tag("small", m) if m else ""), class_="tile")
        for n, v, m in shown
    ]
    return tag("dl", *boxes, class_="tiles") if boxes else Markup("")


def _stack(report: dict) -> dict | None:
    return next((row for row in report.get("T1") or () if row.get("is_stack") is True), None)


def _first(report: dict, kind: str) -> dict | None:
    return next((row for row in report.get("T1") or () if row.get("kind") == kind), None)


def _table(table: Table, heat: str = "") -> Markup:
    """Return a table with its reading; empty without rows."""
    if not table.rows:
        return Markup("")
    kinds = [_kind(table, i) for i in range(len(table.columns))]
    heads = [
        tag("th", name, scope="col", class_=kind)
        for name, kind in zip(table.columns, kinds, strict=True)
    ]
    lines, before = [], table.rows[0].kind
    for row in table.rows:
        look = " ".join(
            word for word, on in (("main", row.main), ("break", row.kind != before)) if on
        )
        cells = [_cell(cell, kind, heat) for cell, kind in zip(row.cells, kinds, strict=True)]
        lines.append(
            tag("tr", tag("th", row.name, small(row.note), scope="row"), *cells, class_=look)
        )
        before = row.kind
    head = tag("thead", tag("tr", tag("th", table.corner, scope="col"), *heads))
    grid = tag(
        "table", head, tag("tbody", *lines), class_="heat" if heat else "", aria_label=table.title
    )
    box = tag("div", grid, class_="wide", tabindex=0, role="region", aria_label=table.title)
    return join(
        box,
        tag("p", f"{table.reading} {table.colours}".strip(), class_="read")
        if table.reading
        else "",
    )


def _kind(table: Table, i: int) -> str:
    if i not in table.words:
        return ""
    return "text long" if any(len(row.cells[i].text) > LONG for row in table.rows) else "text"


def _cell(cell: Cell, kind: str, heat: str) -> Markup:
    look = [kind, cell.tone, "own" * cell.own]
    strength = None
    if heat and cell.heat is not None:
        look += ["hot", "share" if heat == "up" else "gain" if cell.heat >= 0 else "loss"]
        strength = f"--heat:{min(1.0, abs(cell.heat)):.3f}"
    value = tag("span", cell.text, class_="best") if cell.best else cell.text
    return tag(
        "td",
        value,
        small(cell.small),
        class_=" ".join(word for word in look if word),
        style=strength,
    )


def _heat(table: Table, ramp: str) -> Markup:
    """Return a table with coloured cells and the scale of its colours: turn (loss to gain) or up
    (share)."""
    if not table.rows:
        return Markup("")
    left, right = table.scale
    scale = tag("div", left, tag("span", class_=f"ramp {ramp}"), right, class_="scale")
    return join(_table(table, ramp), scale)


def _quality(report: dict) -> Markup:
    table = language.quality(report)
    if not table.rows:
        return Markup("")
    picture = forest(report.get("T1") or [])
    second = language.cost(report)
    rows = [join(tag("dt", name), tag("dd", text)) for name, text in language.origins(report)]
    sources = tag(
        "details",
        tag("summary", "Where the rows come from"),
        tag("dl", *rows, class_="origins"),
        open="open",
    )
    return join(
        picture,
        tag("h3", table.title),
        _table(table),
        sources,
        tag("h3", second.title),
        _table(second),
    )


def _routing(report: dict, charts: Markup) -> Markup:
    facts = [tag("div", tag("dt", name), tag("dd", value)) for name, value in routing.facts(report)]
    layers = [
        tag("div", tag("h3", t.title), _table(t, "up")) for t in routing.layers(report) if t.rows
    ]
    return join(
        tag("dl", *facts, class_="facts") if facts else "",
        _heat(routing.mean(report), "up"),
        tag("h3", "Layer by layer", tag("small", " per cent of a domain's tokens"))
        if layers
        else "",
        tag("div", *layers, class_="layers") if layers else "",
        _table(routing.by_layer(report)),
        join(tag("h3", "While the router trained"), charts) if charts else "",
    )


def _routes(report: dict) -> Markup:
    maps = [
        tag("div", tag("h3", table.title), _heat(table, "up"))
        for table in requests.confusions(report)
    ]
    others = (requests.calibration, requests.coverage, requests.strangers, requests.consistency)
    tables_of = [table for table in (make(report) for make in others) if table.rows]
    return join(
        _table(requests.routes(report)),
        _table(requests.margins(report)),
        tag("div", *maps, class_="layers") if maps else "",
        *(join(tag("h3", table.title), _table(table)) for table in tables_of),
    )


def _adapters(report: dict) -> Markup:
    return join(_heat(requests.adapters(report), "up"), _table(requests.figures(report)))


def _active(report: dict) -> Markup:
    rows = report.get("T6") or []
    points = [
        {
            **row,
            "row": f"k = {row.get('top_k')}",
            "is_stack": row.get("top_k") == (report.get("model") or {}).get("top_k"),
        }
        for row in rows
    ]
    return join(forest(points), _table(language.active(report)))


def _curves(charts: Markup) -> Markup:
    reading = (
        "Horizontal: tokens the job has trained on. The first steps of a loss may run out of the top; the number "
        "behind a name is the last value; a gap is a value that was not finite. Long histories are drawn as means over "
        "neighbours (memory: the greatest)."
    )
    return join(charts, tag("p", reading, class_="read")) if charts else Markup("")


def _model(report: dict) -> Markup:
    found = report.get("model") or {}
    facts = [
        tag(
            "div",
            tag("dt", str(key).replace("_", " ")),
            tag("dd", count(v) if "parameters" in str(key) else str(v)),
        )
        for key, v in found.items()
    ]
    return tag("dl", *facts, class_="facts") if facts else Markup("")


def _notes(report: dict) -> Markup:
    notes = report.get("notes") or []
    return (
        tag("ul", *(tag("li", str(note)) for note in notes), class_="notes")
        if notes
        else Markup("")
    )


def _footer() -> Markup:
    return tag(
        "footer",
        "Made by MoleForge. This file is complete in itself; the numbers behind it are in report.json.",
    )
