"""The model card of a bundle, in Markdown: what it is, how good by which comparison, how to load
it.

Every number comes from the report through the same tables as page and terminal, so no two of them
disagree.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from . import language, requests, routing, run_facts
from .card_templates import CARDS
from .format import count
from .labels import with_labels
from .schema.language import LanguageReport
from .schema.reading import Report
from .schema.requests import RequestReport
from .table import Row, Table

About = Mapping[str, Any]


def card(report: Report, about: About) -> str:
    """Return README.md of a bundle; about is its experts.json."""
    if isinstance(report, LanguageReport):
        return _language_card(with_labels(report), about)
    return _request_card(report, about)


def export_card(report: LanguageReport | None, about: About) -> str:
    """Return README.md of what was exported in one format; about says what, `report` how good its
    run is, where that was measured."""
    front = ModelCardData(
        library_name=about["library"],
        pipeline_tag="text-generation",
        tags=["moleforge", *about["tags"]],
    )
    tables = [language.quality(with_labels(report))] if report else []
    # What the example fills in beside that
    use = about.get("use")
    made = Markup(front.to_yaml())
    return _render("export_card.md", about=about, front=made, tables=tables, use=use)


def stock_base(name: str, revision: str | None, adapter: str, architecture: str) -> dict[str, Any]:
    """Return what the example of an adapter fills in: its base in a folder, or on the Hub at a
    revision, whose tokenizer then stands in the folder `processor`."""
    pretrained = f'"{name}", revision="{revision}"' if revision else f'"{name}"'
    return {
        "architecture": architecture,
        "pretrained": Markup(pretrained),
        "tokenizer": "processor" if revision else name,
        "adapter": adapter,
    }


def _language_card(report: LanguageReport, about: About) -> str:
    adapts = about.get("form") == "adapter"
    front = ModelCardData(
        library_name="peft" if adapts else "transformers",
        pipeline_tag="text-generation",
        tags=["mixture-of-experts", *(["lora"] if adapts else []), "moleforge"],
    )
    model = report.model
    use = None
    tables = [language.wins(report), language.quality(report)]
    if adapts:
        first = about["experts"][0]["folder"]
        use = stock_base(".", None, f"{first}/adapter", about["architecture"])
        tables += [routing.texts(report), routing.prompts(report)]
    return _render(
        "text_adapters_card.md" if adapts else "language_card.md",
        use=use,
        report=report,
        about=about,
        front=Markup(front.to_yaml()),
        total=count(model.total_parameters if model else None),
        active=count(model.active_parameters if model else None),
        size=language.sizes(report),
        names=", ".join(expert.get("label", expert["name"]) for expert in about["experts"]),
        tables=[*tables, run_facts.criteria(report)],
    )


def _request_card(report: RequestReport, about: About) -> str:
    base = about["base"]
    sees = "image" in base
    front = ModelCardData(
        library_name="peft",
        pipeline_tag="image-text-to-text" if sees else "text-generation",
        tags=["mixture-of-experts", "lora", "moleforge"],
    )
    # without a revision nobody could get the same base again, so the bundle holds it
    origin = code(base["revision"] or "base")
    name = base["model"] if base["revision"] else "base"
    adapter = f"{about['experts'][0]['folder']}/adapter"
    return _render(
        "request_card.md",
        report=report,
        about=about,
        front=Markup(front.to_yaml()),
        kind="vision-language model" if sees else "model",
        origin=("revision " if base["revision"] else "in the folder ") + origin,
        use=stock_base(name, base["revision"], adapter, about["architecture"]),
        tables=[
            requests.routes(report),
            requests.answers(report),
            requests.adapters(report),
            requests.calibration(report),
            run_facts.criteria(report),
        ],
    )


def plain(value: object) -> Markup:
    """Return a value as Markdown without what would end a cell or start markup, in one line; what
    is Markdown already stays."""
    if isinstance(value, Markup):
        return value
    # "&" is left: Markdown shows it as it stands unless an entity follows
    text = str(value).replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")
    return Markup(" ".join(text.split()))


def code(value: object) -> Markup:
    """Return a value as it is written, in Markdown."""
    return Markup(f"`{value}`")


def line(cells: Sequence[object]) -> Markup:
    """Return one line of a table."""
    return Markup(f"| {' | '.join(plain(cell) for cell in cells)} |")


def table_head(table: Table) -> Markup:
    """Return a table's headings and the line below them: words to the left, numbers to the
    right."""
    # the column of names has words in every table
    marks = ["---"]
    for i in range(len(table.columns)):
        marks.append("---" if i in table.words else "---:")
    heads = line([table.corner, *table.columns])
    return Markup(f"{heads}\n{line(marks)}")


def table_line(row: Row) -> Markup:
    """Return a row of a report's table."""
    name = _bold(row.name, row.main)
    if row.note:
        name = Markup(f"{name} ({plain(row.note)})")
    cells = [name]
    for cell in row.cells:
        text = _bold(cell.text, cell.best)
        cells.append(Markup(f"{text} {plain(cell.small)}") if cell.small else text)
    return line(cells)


def _bold(text: str, on: bool) -> Markup:
    return Markup(f"**{plain(text)}**") if on else plain(text)


# Nothing is HTML here: finalize escapes for Markdown and marks the result, which autoescape then
# leaves alone; without autoescape what a macro returns would be escaped again
_ENVIRONMENT = Environment(
    loader=DictLoader(CARDS),
    autoescape=True,
    finalize=plain,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.globals |= {
    "line": line,
    "code": code,
    "table_head": table_head,
    "table_line": table_line,
}


def _render(name: str, **values: Any) -> str:
    return _ENVIRONMENT.get_template(name).render(**values)
