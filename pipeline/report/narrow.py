"""Tables where a line has too little room for them, and output whose lines nothing cuts."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDE = 10_000  # columns: more than any table wants


def output() -> Console:
    """Return a console over standard output whose lines are whole where that is no terminal: they
    are searched for addresses and paths, which rich would break after 80 columns."""
    console = plain_console()
    return console if console.is_terminal else plain_console(width=_WIDE)


def plain_console(**options: Any) -> Console:
    """Return a console with rich's options that shows texts as they are: brackets are lists and
    paths, no styles, and what stands between colons is no name of a picture."""
    return Console(markup=False, emoji=False, **options)


def print_table(console: Console, table: Table) -> None:
    """Print a table, or where its rows do not fit on a line each, their cells one after another
    with what each column is called."""
    # What stands in brackets is a list, a path or a name, and no style
    options = console.options.update(max_width=_WIDE, markup=False)
    wanted = table.__rich_measure__(console, options).maximum
    if not console.is_terminal or wanted <= console.width:
        if isinstance(table.title, str):
            table.title = Text(table.title, style="bold")
        console.print(table, markup=False)
        return
    if table.title:
        console.print(Text(str(table.title), style="bold"), soft_wrap=True)
    names = [str(column.header) for column in table.columns]
    for row in zip(*[list(column.cells) for column in table.columns], strict=True):
        first, *others = [str(cell) for cell in row]
        # The first is an address, which is searched for and typed as it stands
        console.print(Text(first, style=table.columns[0].style), soft_wrap=True)
        said = []
        for name, cell in zip(names[1:], others, strict=True):
            if cell:
                said.append(f"{name} {cell}")
        if said:
            console.print(Text(f"  {', '.join(said)}"))
