"""The report as one HTML file: no script, no network, nothing beside it.

All text from the report is escaped by markup; the same report and histories always give the same
bytes.
"""

from . import common, language, requests, routing
from .curves import curves, shares
from .format import DASH, count
from .markup import Markup, join, small, tag
from .pictures import bars, forest, points_of_active, points_of_quality
from .schema import LanguageReport, Report, RequestReport
from .style import style
from .table import Cell, Table

LONG = 24  # characters from which a column of words is a column of sentences


def page(report: Report, histories: dict[str, list[dict]]) -> str:
    """Return the whole file as text, to be written as UTF-8."""
    if isinstance(report, LanguageReport):
        sections = _language_sections(report, histories)
        lead, tiles = language.lead(report), language.tiles(report)
    else:
        sections = _request_sections(report)
        lead, tiles = requests.lead(report), requests.tiles(report)
    sections += [
        ("curves", "Training curves", _curves(curves(histories))),
        ("speed", "Time and memory", join(bars(report), _table(common.speed(report)))),
        ("data", "Data and model", _model(report)),
        ("notes", "Notes", _notes(report)),
    ]
    sections = [section for section in sections if section[2]]
    title = f"{report.run or 'run'}: MoleForge report"
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
        *(tag("a", heading, href=f"#{key}") for key, heading, _ in sections),
        aria_label="sections",
    )
    body = [tag("section", tag("h2", heading), text, id=key) for key, heading, text in sections]
    main = tag("main", _header(report, lead), _tiles(report, tiles), links, *body, _footer())
    return f"<!doctype html>\n{tag('html', head, tag('body', main), lang='en')}\n"


def _language_sections(report: LanguageReport, histories) -> list[tuple[str, str, Markup]]:
    charts = shares(histories, list(report.experts))
    verdict = join(_table(common.criteria(report)), _table(language.wins(report)))
    return [
        ("verdict", "Verdict", verdict),
        ("quality", "The stack and everything it should beat", _quality(report)),
        ("map", "Who is good at what", _heat(language.matrix(report), "turn")),
        ("routing", "Where tokens go", _routing(report, charts)),
        ("opt_out", "When one expert leaves", _heat(language.opt_out(report), "turn")),
        ("active", "Active experts", _active(report)),
    ]


def _request_sections(report: RequestReport) -> list[tuple[str, str, Markup]]:
    return [
        ("verdict", "Verdict", _table(common.criteria(report))),
        ("routes", "Where requests go", _routes(report)),
        ("adapters", "Who can do what", _adapters(report)),
        ("answers", "What the answers are worth", _table(requests.answers(report))),
    ]


def _header(report: Report, lead: str) -> Markup:
    machine = report.machine
    facts = [report.family, f"seed {report.seed}" if report.seed is not None else "", report.made]
    if machine:
        facts += [machine.gpu or machine.cpu, f"{machine.threads} of {machine.cores} cores"]
        facts += [machine.dtype, f"torch {machine.torch}"]
    line = tag("p", " · ".join(fact for fact in facts if fact), class_="meta")
    kicker = tag("p", "MoleForge report", class_="kicker")
    said = tag("p", lead, class_="lead") if lead else ""
    return tag("header", kicker, tag("h1", report.run or "run"), line, said)


def _tiles(report: Report, tiles: list[tuple[str, str, str]]) -> Markup:
    if report.criteria:
        passed = sum(each.passed for each in report.criteria)
        tiles = [*tiles, ("criteria passed", f"{passed} of {len(report.criteria)}", "")]
    boxes = [
        tag("div", tag("dt", n), tag("dd", v, tag("small", m) if m else ""), class_="tile")
        for n, v, m in tiles
        if v != DASH
    ]
    return tag("dl", *boxes, class_="tiles") if boxes else Markup("")


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


def _quality(report: LanguageReport) -> Markup:
    table = language.quality(report)
    if not table.rows:
        return Markup("")
    picture = forest(points_of_quality(report))
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


def _routing(report: LanguageReport, charts: Markup) -> Markup:
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


def _routes(report: RequestReport) -> Markup:
    maps = [
        tag("div", tag("h3", table.title), _heat(table, "up"))
        for table in requests.confusions(report)
    ]
    others = (
        requests.calibration,
        requests.coverage,
        requests.none_detection,
        requests.consistency,
    )
    tables_of = [table for table in (make(report) for make in others) if table.rows]
    return join(
        _table(requests.routes(report)),
        _table(requests.margins(report)),
        tag("div", *maps, class_="layers") if maps else "",
        *(join(tag("h3", table.title), _table(table)) for table in tables_of),
    )


def _adapters(report: RequestReport) -> Markup:
    return join(_heat(requests.adapters(report), "up"), _table(requests.metric_figures(report)))


def _active(report: LanguageReport) -> Markup:
    return join(forest(points_of_active(report)), _table(language.active(report)))


def _curves(charts: Markup) -> Markup:
    reading = (
        "Horizontal: tokens the job has trained on. The first steps of a loss may run out of the top; the number "
        "behind a name is the last value; a gap is a value that was not finite. Long histories are drawn as means over "
        "neighbours (memory: the greatest)."
    )
    return join(charts, tag("p", reading, class_="read")) if charts else Markup("")


def _model(report: Report) -> Markup:
    facts = []
    for key, value in report.model or ():
        if value is not None:
            text = count(value) if "parameters" in key else str(value)
            facts.append(tag("div", tag("dt", key.replace("_", " ")), tag("dd", text)))
    table = _table(language.data(report)) if isinstance(report, LanguageReport) else ""
    return join(tag("dl", *facts, class_="facts") if facts else "", table)


def _notes(report: Report) -> Markup:
    if not report.notes:
        return Markup("")
    return tag("ul", *(tag("li", note) for note in report.notes), class_="notes")


def _footer() -> Markup:
    return tag(
        "footer",
        "Made by MoleForge. This file is complete in itself; the numbers behind it are in report.json.",
    )
