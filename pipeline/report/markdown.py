"""Tables as Markdown, for a file that is read as it is or committed."""

from collections.abc import Callable

from . import experiments, recipes
from .schema.experiments import ExperimentResults
from .table import Cell, Row, Table

# What would end a cell or a table, or begin markup in the middle of words
ESCAPED = str.maketrans({"|": "\\|", "\n": " ", "<": "&lt;", "*": "\\*", "_": "\\_", "`": "\\`"})


def experiments_text(results: ExperimentResults) -> str:
    """Return all tables of experiments as a Markdown file, the answer first."""
    tables = [markdown(each(results)) for each in experiments_tables()]
    notes = "".join(f"- {escaped(note)}\n" for note in results.notes)
    told = [*experiments.facts(results), *experiments.conditions(results)]
    facts = escaped("; ".join(told))
    parts = [f"# Experiments {escaped(results.experiments)}\n", f"{facts}.\n", *tables]
    if notes:
        parts.append(f"## Notes\n\n{notes}")
    return "\n".join(part for part in parts if part)


def experiments_tables() -> tuple[Callable[[ExperimentResults], Table], ...]:
    """Return what makes each table of experiments, in the order of a file."""
    return (
        experiments.overview,
        recipes.side_by_side,
        experiments.criteria,
        recipes.split,
        experiments.experts,
        experiments.timing,
        experiments.changes,
        experiments.each_run,
    )


def markdown(table: Table) -> str:
    """Return a table under its title, with how to read it; nothing of one without rows."""
    if not table.rows:
        return ""
    ends = ["---"]
    for at in range(len(table.columns)):
        ends.append("---" if at in table.words else "---:")
    lines = [_line([escaped(each) for each in (table.corner, *table.columns)]), _line(ends)]
    for row in table.rows:
        lines.append(_line([_name(row), *(_cell(cell) for cell in row.cells)]))
    return "\n".join([f"## {table.title}", "", *lines, "", escaped(table.reading), ""])


def escaped(text: str) -> str:
    """Return text that Markdown shows as it stands."""
    return text.translate(ESCAPED)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _name(row: Row) -> str:
    note = f" ({row.note})" if row.note else ""
    name = escaped(f"{row.name}{note}")
    return f"**{name}**" if row.main else name


def _cell(cell: Cell) -> str:
    text = escaped(cell.text)
    if cell.best and text:
        text = f"**{text}**"
    return " ".join(filter(None, (text, escaped(cell.small))))
