"""`history list`: a line for each run, the latest first."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from ...report.format import DASH, figures, seconds
from ...report.narrow import print_table
from ..prune import said
from .lines import Evaluation, Known, PastRun

COLUMNS = ("run", "begun", "family", "jobs", "last training", "best valid", "score", "time", "more")
USD = "US$"  # where anything was paid for
# Columns that hold numbers.
NUMBERS = ("jobs", "best valid", "time", USD)
# A library's table takes seconds for thousands of rows.
MOST_IN_TABLE = 200


def list_runs(known: Known, last: int, console: Console) -> None:
    """Print the runs that were begun last, as many as asked for (0: all), then what is wrong; say
    so where there is none."""
    say = said(console)
    shown = known.runs[:last] if last else known.runs
    if shown:
        columns: tuple[str, ...] = COLUMNS
        rows = [_cells(run, known) for run in shown]
        if any(run.usd is not None for run in shown):
            columns = (*COLUMNS, USD)
            rows = [(*_cells(run, known), in_usd(run.usd)) for run in shown]
        print_rows("runs, the latest first", columns, rows, console)
    wrong = [text for run in shown for text in run.wrong]
    if wrong or known.wrong:
        # at once: there may be thousands
        say("\n".join([*wrong, *known.wrong]))
    if len(shown) < len(known.runs):
        say(f"{len(shown):,} of {len(known.runs):,} runs; --last 0 lists all")
    if known.commands:
        paid = f"${known.usd:,.2f} {known.priced}".rstrip()
        say(f"{known.commands:,} commands on Modal have cost {paid}")
    if not shown:
        say("no run has left anything here yet")


def _cells(run: PastRun, known: Known) -> tuple[str, ...]:
    last = run.last
    named = f"{last.name}, step {last.position}" if last else DASH
    return (
        run.id,
        run.begun,
        run.family or DASH,
        f"{run.made:,}",
        named,
        figures(last.valid_nats) if last else DASH,
        scored(run.evaluation),
        seconds(run.seconds) if run.made else DASH,
        "; ".join(_more(run, known)),
    )


def _more(run: PastRun, known: Known) -> Iterator[str]:
    for each in known.experiments:
        if each.has(run.name, run.addresses):
            seed = each.seed_of(run.name, run.addresses)
            yield f"trial of {each.name}" + ("" if seed is None else f", seed {seed}")
    if run.removed:
        yield "being removed"
    if not run.has_root:
        yield "of no run"
    if run.evaluation and run.evaluation.criteria:
        yield run.evaluation.criteria
    if any(each.served for each in run.deploys):
        yield "served"
    elif run.deploys:
        yield "deployed"


def in_usd(usd: float | None) -> str:
    """Write US dollars that were paid."""
    return DASH if usd is None else f"{usd:,.2f}"


def scored(evaluation: Evaluation | None) -> str:
    """Return what a report says of what the run serves, in a few words."""
    score = evaluation.score if evaluation else None
    return f"{figures(score.value)} {score.measure}" if score else DASH


def print_rows(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], console: Console
) -> None:
    """Print a table; one of very many rows as lines whose columns are aligned."""
    if len(rows) > MOST_IN_TABLE:
        _print_lines(title, columns, rows, console)
        return
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in columns:
        table.add_column(name, justify="right" if name in NUMBERS else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    print_table(console, table)


def _print_lines(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], console: Console
) -> None:
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = [title]
    for row in (columns, *rows):
        cells = []
        for name, cell, width in zip(columns, row, widths, strict=True):
            cells.append(cell.rjust(width) if name in NUMBERS else cell.ljust(width))
        lines.append("  ".join(cells).rstrip())
    # not through rich, which looks at every character
    console.file.write("\n".join(lines) + "\n")
