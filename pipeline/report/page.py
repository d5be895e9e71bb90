"""The report as one HTML file: no script, no network, nothing beside it.

All text from the report is escaped by Jinja2; the same report and histories always give the same
bytes.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from . import experiments, language, recipes, requests, routing, run_facts, shown_requests, spoken
from .curves import FRAME, Histories, curves, load_curves
from .format import DASH
from .labels import with_labels
from .pictures import PHASES, active_forest, bars, quality_forest
from .schema.experiments import ExperimentResults
from .schema.language import LanguageReport
from .schema.reading import Report
from .schema.requests import RequestReport
from .style import style
from .table import Cell, Table
from .templates import TEMPLATES

# characters from which a column of words is a column of sentences, which are wrapped
LONG = 24
# What no HTML file may hold: control characters, lone surrogates, two that are no characters
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class PageSection:
    """A part of the page with its heading and the name that links lead to."""

    id: str
    heading: str
    body: Markup


def page(report: Report, histories: Histories, missing: Mapping[str, str] | None = None) -> str:
    """Return the whole file as text, to be written as UTF-8.

    `missing`: in a few words, what each job's history lacks.
    """
    if isinstance(report, LanguageReport):
        report = with_labels(report)
        sections = _language_sections(report, histories)
        lead = language.lead(report)
        tiles = language.tiles(report)
    else:
        sections = _request_sections(report)
        lead = requests.lead(report)
        tiles = requests.tiles(report)
    sections += _common_sections(report, histories, missing or {})
    tiles += run_facts.tiles(report)
    return _document("report", report.run, run_facts.facts(report), lead, tiles, sections)


def experiments_page(results: ExperimentResults, histories: Histories) -> str:
    """Return the page of experiments as text, to be written as UTF-8."""
    charts = _render("curves.html", stages=curves(histories), missing={}) if histories else ""
    sections = [
        PageSection("trials", "Trials", _table(experiments.overview(results))),
        PageSection("kinds", "Side by side", _table(recipes.side_by_side(results))),
        PageSection("criteria", "What was asked", _table(experiments.criteria(results))),
        PageSection("split", "Trunk and experts", _table(recipes.split(results))),
        PageSection("experts", "Where tokens go", _table(experiments.experts(results))),
        PageSection("timing", "Where the time went", _table(experiments.timing(results))),
        PageSection("curves", "Training curves", Markup(charts)),
        PageSection("settings", "What each trial changes", _table(experiments.changes(results))),
        PageSection("runs", "Every seed", _table(experiments.each_run(results))),
        PageSection("notes", "Notes", _notes(results.notes)),
    ]
    return _document(
        "experiments",
        results.experiments,
        experiments.facts(results),
        "",
        experiments.tiles(results),
        sections,
        numbers="experiment_results.json",
    )


def _document(
    kind: str,
    name: str,
    facts: Sequence[str],
    lead: str,
    tiles: Sequence[tuple[str, str, str]],
    sections: Sequence[PageSection],
    numbers: str = "report.json",
) -> str:
    # a tile or a section without content is left out, and with it the link that leads there
    text = _render(
        "page.html",
        kind=kind,
        title=name,
        numbers=numbers,
        style=Markup(style()),
        facts=facts,
        lead=lead,
        tiles=[tile for tile in tiles if tile[1] != DASH],
        sections=[section for section in sections if section.body.strip()],
    )
    # names may hold anything; what escaping leaves must still be writable as UTF-8
    return FORBIDDEN.sub("\ufffd", text)


def _notes(notes: Sequence[str]) -> Markup:
    return _render("notes.html", notes=notes) if notes else Markup("")


def _language_sections(report: LanguageReport, histories: Histories) -> list[PageSection]:
    verdict = _table(run_facts.criteria(report)) + _table(language.wins(report))
    active = _block("forest", active_forest(report)) + _table(language.active(report))
    # the sources of rows and two headings would stand there without a row
    quality = Markup("")
    if report.quality:
        quality = _render(
            "quality.html",
            forest=quality_forest(report),
            quality=language.quality(report),
            origins=language.origins(report),
            cost=language.cost(report),
        )
    where_tokens_go = _render(
        "routing.html",
        facts=routing.facts(report),
        mean=routing.mean(report),
        layers=routing.layers(report),
        by_layer=routing.by_layer(report),
        charts=load_curves(histories, report.experts),
    )
    where_texts_go = _heat(routing.texts(report), "up") + _table(routing.prompts(report))
    return [
        PageSection("verdict", "Verdict", verdict),
        PageSection("quality", "The stack and everything it should beat", quality),
        PageSection("map", "Who is good at what", _heat(language.matrix(report), "turn")),
        PageSection("routing", "Where tokens go", where_tokens_go),
        PageSection("texts", "Where texts go", where_texts_go),
        PageSection("opt_out", "When one expert leaves", _heat(language.opt_out(report), "turn")),
        PageSection("active", "Active experts", active),
        PageSection("samples", "Who speaks", _samples(report)),
        PageSection("continuations", "How texts go on", _continuations(report)),
    ]


def _samples(report: LanguageReport) -> Markup:
    passages = spoken.samples(report)
    if not passages:
        return Markup("")
    return _render("samples.html", passages=passages, speakers=spoken.speakers(report))


def _continuations(report: LanguageReport) -> Markup:
    if not report.continuations:
        return Markup("")
    return _render(
        "continuations.html",
        beginnings=spoken.beginnings(report),
        speakers=spoken.speakers(report),
        reading=spoken.continuations_reading(report),
    )


def _request_sections(report: RequestReport) -> list[PageSection]:
    where_requests_go = _render(
        "requests.html",
        routes=requests.routes(report),
        margins=requests.margins(report),
        confusions=requests.confusions(report),
        others=[
            requests.calibration(report),
            requests.coverage(report),
            requests.none_detection(report),
            requests.consistency(report),
        ],
    )
    where_requests_go += _block("cards", shown_requests.misrouted(report))
    adapters = _heat(requests.adapters(report), "up") + _table(requests.metric_figures(report))
    answers = _table(requests.answers(report))
    answers += _block("cards", shown_requests.examples(report))
    return [
        PageSection("verdict", "Verdict", _table(run_facts.criteria(report))),
        PageSection("routes", "Where requests go", where_requests_go),
        PageSection("adapters", "Who can do what", adapters),
        PageSection("answers", "What the answers are worth", answers),
    ]


def _common_sections(
    report: Report, histories: Histories, missing: Mapping[str, str]
) -> list[PageSection]:
    stages = curves(histories)
    charts = Markup("")
    if stages or missing:
        charts = _render("curves.html", stages=stages, missing=missing)
    speed = _block("bars", bars(report)) + _table(run_facts.speed(report))
    model = _block("fact_list", run_facts.model_facts(report))
    charts += _table(run_facts.rates(report))
    if isinstance(report, LanguageReport):
        model += _table(language.data(report))
    return [
        PageSection("curves", "Training curves", charts),
        PageSection("speed", "Time and memory", speed),
        PageSection("data", "Data and model", model),
        PageSection("notes", "Notes", _notes(report.notes)),
    ]


def column_class(table: Table, i: int) -> str:
    """Return the CSS classes of column i."""
    if i not in table.words:
        return ""
    longest = max(len(row.cells[i].text) for row in table.rows)
    return "text long" if longest > LONG else "text"


def row_class(table: Table, i: int) -> str:
    """Return the CSS classes of row i; a row of another kind than the one before has a line above
    it."""
    row = table.rows[i]
    classes = []
    if row.main:
        classes.append("main")
    if i > 0 and row.kind != table.rows[i - 1].kind:
        classes.append("break")
    return " ".join(classes)


def cell_attributes(cell: Cell, column: str, ramp: str) -> dict[str, str | None]:
    """Return a cell's class and style; ramp is how its table is coloured: turn, up or not at
    all."""
    classes = [column, cell.tone]
    if cell.own:
        classes.append("own")
    # the style sheet mixes the colour from this share of it and paper
    strength = None
    if ramp and cell.heat is not None:
        classes.append("hot")
        if ramp == "up":
            classes.append("share")
        else:
            classes.append("gain" if cell.heat >= 0 else "loss")
        strength = f"--heat:{min(1.0, abs(cell.heat)):.3f}"
    return {"class": " ".join(name for name in classes if name) or None, "style": strength}


# StrictUndefined: a name that is misspelt in a template is an error, not an empty place. The blocks
# are trimmed so that {% %} on a line of its own leaves none.
_ENVIRONMENT = Environment(
    loader=DictLoader(TEMPLATES),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.globals |= {
    "column_class": column_class,
    "row_class": row_class,
    "cell_attributes": cell_attributes,
    "frame": FRAME,
    "phases": PHASES,
}
_ENVIRONMENT.filters |= {
    "place": lambda value: f"{value:.1f}",
    "percent": lambda value: f"{value:.2f}%",
}


def _render(name: str, **values: Any) -> Markup:
    return Markup(_ENVIRONMENT.get_template(name).render(**values))


def _block(name: str, *values: Any) -> Markup:
    """Return what a macro of blocks.html makes of values."""
    macro = getattr(_ENVIRONMENT.get_template("blocks.html").module, name)
    block: Markup = macro(*values)
    return block


def _table(table: Table) -> Markup:
    return _block("table", table)


def _heat(table: Table, ramp: str) -> Markup:
    return _block("heat", table, ramp)
