"""The report on a terminal, or in a log: tables by rich.

Where the console is no terminal the width is WIDTH and there are no colour codes. Columns that do
not fit go to a further table with the same rows, so nothing is cut off.
"""

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from . import language, requests, routing
from .table import Cell, Row, Table

WIDTH = 120
NAME, WORDS, HEAD, GAP = (
    26,
    40,
    12,
    2,
)  # most characters of a name, of a cell of words, of a heading; blanks between
EDGES = 2  # blanks that the frame adds left and right
ROUTES = (requests.routes, requests.margins)
ASKED = (
    requests.calibration,
    requests.coverage,
    requests.strangers,
    requests.consistency,
    requests.adapters,
    requests.figures,
    requests.answers,
)
SWAPS = str.maketrans({"–": "-", "−": "-", "·": "-", "×": "x"})


def show(report: dict, console: Console) -> None:
    """Print what there is of T1, T3, T5 in short, the tables of whole requests, T6, wins and
    criteria."""
    with _plain(console):
        _line(console, _title(report), "bold")
        for table in (language.quality, language.cost, language.opt_out, routing.mean, *ROUTES):
            _print(console, table(report))
        for table in requests.confusions(report):
            _print(console, table)
        facts = routing.facts(report)
        if facts:
            _line(console, "; ".join(f"{name} {value}" for name, value in facts))
        for table in (*ASKED, language.active, language.wins, language.criteria):
            _print(console, table(report))
        for note in report.get("notes") or ():
            _line(console, f"note: {note}")


def _title(report: dict) -> str:
    seed = f"seed {report['seed']}" if report.get("seed") is not None else ""
    return "  ".join(
        str(word)
        for word in (report.get("run"), report.get("family"), seed, report.get("made"))
        if word
    )


@contextmanager
def _plain(console: Console) -> Iterator[None]:
    """Give a console that is no terminal the fixed width, for as long as the report is printed."""
    if console.is_terminal:
        yield
        return
    before = console.width, console.no_color
    console.width, console.no_color = WIDTH, True
    try:
        yield
    finally:
        console.width, console.no_color = before


def _print(console: Console, table: Table) -> None:
    if not table.rows:
        return
    for i, columns in enumerate(_chunks(table, console.width)):
        title = f"{table.name}  {table.title}" + (" (continued)" if i else "")
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
    text = "".join("?" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in str(text))
    if not encoding.lower().startswith("utf"):
        text = text.translate(SWAPS).encode(encoding, "replace").decode(encoding)
    return text


def _chunks(table: Table, width: int) -> list[range]:
    """Split the columns into runs that fit beside the names; at least one column each."""
    left = width - _name_wide(table) - GAP - EDGES
    out, start, used = [], 0, 0
    for i in range(len(table.columns)):
        wide = _wide(table, i) + GAP
        if i > start and used + wide > left:
            out.append(range(start, i))
            start, used = i, 0
        used += wide
    return [*out, range(start, len(table.columns))]


def _name_wide(table: Table) -> int:
    return min(NAME, max(len(_name(row)) for row in table.rows))


def _wide(table: Table, i: int) -> int:
    """Return the width of a column: its values on one line (words may be wrapped), its heading
    wrapped."""
    values = max(len(_value(row.cells[i])) for row in table.rows)
    word = max((len(word) for word in table.columns[i].split()), default=0)
    return max(min(values, WORDS) if i in table.words else values, min(HEAD, word))


def _grid(table: Table, columns: range, console: Console) -> Grid:
    grid = Grid(
        box=box.SIMPLE_HEAD,
        padding=(0, GAP - 1, 0, 0),
        pad_edge=False,
        header_style="bold",
        collapse_padding=True,
    )
    grid.add_column(
        _text(table.corner, console), overflow="fold", width=_name_wide(table), vertical="top"
    )
    for i in columns:
        side = "left" if i in table.words else "right"
        head = _text(table.columns[i], console)
        grid.add_column(head, justify=side, overflow="fold", width=_wide(table, i), vertical="top")
    kinds = [row.kind for row in table.rows[1:]] + [None]
    for row, following in zip(table.rows, kinds, strict=True):
        style = "bold green" if row.main else ""
        cells = [_cell(row.cells[i], console) for i in columns]
        grid.add_row(
            _text(_name(row), console),
            *cells,
            style=style,
            end_section=following not in (row.kind, None),
        )
    return grid


def _name(row: Row) -> str:
    return f"{'> ' if row.main else ''}{row.name}{f' ({row.note})' if row.note else ''}"


def _value(cell: Cell) -> str:
    return f"{cell.text}{'*' if cell.best else ''}{f' {cell.small}' if cell.small else ''}"


def _cell(cell: Cell, console: Console) -> Text:
    text = _text(_value(cell), console, {"good": "green", "bad": "red"}.get(cell.tone, ""))
    if cell.best:
        text.stylize("bold", 0, len(cell.text) + 1)
    if cell.small:
        text.stylize("dim", len(text) - len(cell.small))
    return text
