"""The report on a terminal, or in a log: tables by rich.

Where the console is no terminal the width is WIDTH and there are no colour codes. Columns that do
not fit go to a further table with the same rows, so nothing is cut off.
"""

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest

from rich import box
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from . import experiments, language, recipes, requests, routing, run_facts
from .changes import changes
from .labels import with_labels
from .schema.experiments import ExperimentResults
from .schema.language import LanguageReport
from .schema.reading import Report
from .schema.requests import RequestReport
from .table import Cell, Row, Table

# of a log, which has no width of its own
WIDTH = 120
# most characters of a row's name, of a cell of words, and of a heading's longest word; longer ones
# are wrapped
NAME = 26
WORDS = 40
HEAD = 12
# blanks between columns, and those that the frame adds left and right
GAP = 2
EDGES = 2
# for consoles whose encoding has no such characters
PLAINER = str.maketrans({"–": "-", "−": "-", "·": "-", "×": "x", "≥": ">="})
TONES = {"good": "green", "bad": "red"}


def show(report: Report, console: Console) -> None:
    """Print the report's tables and notes, without what needs a picture."""
    with _plain(console):
        _line(console, run_facts.title(report), "bold")
        if isinstance(report, LanguageReport):
            _show_language(with_labels(report), console)
        else:
            _show_requests(report, console)
        # last, so that a reader of a long log finds the verdict at its end
        _print(console, run_facts.criteria(report))
        for note in report.notes:
            _line(console, f"note: {note}")


def show_experiments(results: ExperimentResults, console: Console) -> None:
    """Print the tables of experiments and their notes, what was asked last."""
    with _plain(console):
        _line(console, f"experiments {results.experiments}", "bold")
        for table in (
            experiments.each_run,
            experiments.timing,
            experiments.experts,
            recipes.split,
            recipes.side_by_side,
            experiments.overview,
            experiments.criteria,
        ):
            _print(console, table(results))
        for note in results.notes:
            _line(console, f"note: {note}")


def show_changes(before: Report | None, after: Report, console: Console) -> None:
    """Print a stack's figures beside those of a former report of it."""
    with _plain(console):
        for table in changes(before, after):
            _print(console, table)


def _show_language(report: LanguageReport, console: Console) -> None:
    for table in (language.quality, language.cost, language.opt_out, routing.mean):
        _print(console, table(report))
    facts = [f"{name} {value}" for name, value in routing.facts(report)]
    if facts:
        _line(console, "; ".join(facts))
    size = language.sizes(report)
    if size:
        _line(console, size)
    for table in (
        routing.texts,
        routing.prompts,
        language.active,
        language.wins,
        language.continuations,
        run_facts.rates,
    ):
        _print(console, table(report))


def _show_requests(report: RequestReport, console: Console) -> None:
    _print(console, requests.routes(report))
    _print(console, requests.margins(report))
    for confusion in requests.confusions(report):
        _print(console, confusion)
    for table in (
        requests.calibration,
        requests.coverage,
        requests.none_detection,
        requests.consistency,
        requests.adapters,
        requests.metric_figures,
        requests.answers,
        run_facts.rates,
    ):
        _print(console, table(report))


@contextmanager
def _plain(console: Console) -> Iterator[None]:
    """Give a console that is no terminal the fixed width, for as long as the report is printed."""
    # a terminal is as wide as its window, and colours are welcome there
    if console.is_terminal:
        yield
        return
    width = console.width
    no_color = console.no_color
    console.width = WIDTH
    console.no_color = True
    try:
        yield
    finally:
        console.width = width
        console.no_color = no_color


def _print(console: Console, table: Table) -> None:
    if not table.rows:
        return
    for i, columns in enumerate(_chunks(table, console.width)):
        more = " (continued)" if i else ""
        title = f"{table.name}  {table.title}{more}"
        _line(console, "")
        _line(console, title, "bold")
        console.print(_grid(table, columns, console))
    _line(console, table.reading, "dim")


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(_text(text, console, style))


def _text(text: str, console: Console, style: str = "") -> Text:
    return Text(clean(text, console.encoding), style=style)


def clean(text: str, encoding: str) -> str:
    """Return text without control characters, in what the encoding can say: names can hold
    anything."""
    kept = []
    for character in text:
        if character in "\n\t":
            # Of a sentence that goes on, and no letter that could not be shown
            kept.append(" ")
            continue
        # control, invisible formatting (also what turns the writing direction), lone surrogates
        unsafe = unicodedata.category(character) in ("Cc", "Cf", "Cs")
        kept.append("?" if unsafe else character)
    text = "".join(kept)
    if encoding.lower().startswith("utf"):
        return text
    plainer = text.translate(PLAINER)
    return plainer.encode(encoding, "replace").decode(encoding)


def _chunks(table: Table, width: int) -> list[range]:
    """Split the columns into runs that fit beside the names; at least one column each."""
    left = width - _name_width(table) - GAP - EDGES
    out = []
    start = 0
    used = 0
    for i in range(len(table.columns)):
        needed = _column_width(table, i) + GAP
        # a column that is too wide by itself stays, and is folded
        if i > start and used + needed > left:
            out.append(range(start, i))
            start = i
            used = 0
        used += needed
    return [*out, range(start, len(table.columns))]


def _name_width(table: Table) -> int:
    names = max(len(_name(row)) for row in table.rows)
    word = max(len(word) for word in table.corner.split())
    return min(NAME, max(names, word))


def _column_width(table: Table, i: int) -> int:
    """Return the width of a column: its values on one line (words may be wrapped), its heading
    wrapped."""
    values = max(len(_value(row.cells[i])) for row in table.rows)
    word = max((len(word) for word in table.columns[i].split()), default=0)
    if i in table.words:
        values = min(values, WORDS)
    return max(values, min(HEAD, word))


def _grid(table: Table, columns: range, console: Console) -> Grid:
    grid = Grid(
        box=box.SIMPLE_HEAD,
        padding=(0, GAP - 1, 0, 0),
        pad_edge=False,
        header_style="bold",
        collapse_padding=True,
    )
    corner = _text(table.corner, console)
    # rich cuts what does not fit, unless it may fold it
    grid.add_column(corner, overflow="fold", width=_name_width(table), vertical="top")
    for i in columns:
        head = _text(table.columns[i], console)
        grid.add_column(
            head,
            justify="left" if i in table.words else "right",
            overflow="fold",
            width=_column_width(table, i),
            vertical="top",
        )
    for row, following in zip_longest(table.rows, table.rows[1:]):
        cells = [_cell(row.cells[i], console) for i in columns]
        grid.add_row(
            _text(_name(row), console),
            *cells,
            style="bold green" if row.main else "",
            end_section=following is not None and following.kind != row.kind,
        )
    return grid


def _name(row: Row) -> str:
    mark = "> " if row.main else ""
    note = f" ({row.note})" if row.note else ""
    return f"{mark}{row.name}{note}"


def _value(cell: Cell) -> str:
    mark = "*" if cell.best else ""
    small = f" {cell.small}" if cell.small else ""
    return f"{cell.text}{mark}{small}"


def _cell(cell: Cell, console: Console) -> Text:
    text = _text(_value(cell), console, TONES.get(cell.tone, ""))
    if cell.best:
        text.stylize("bold", 0, len(cell.text) + 1)
    if cell.small:
        text.stylize("dim", len(text) - len(cell.small))
    return text
