"""The tables that every report has, whatever its kind: what was asked, and what it took."""

from .format import count, megabytes, seconds
from .schema import BaseReport
from .table import Cell, Row, Table


def criteria(report: BaseReport) -> Table:
    """The success criteria of the configuration, passed or failed."""
    rows = []
    for item in report.criteria:
        verdict = Cell("pass", tone="good") if item.passed else Cell("fail", tone="bad")
        rows.append(Row(item.name, (verdict, Cell(item.text), Cell(item.detail))))
    return Table(
        name="Criteria",
        title="Success criteria",
        corner="criterion",
        columns=("result", "asked", "found"),
        rows=tuple(rows),
        reading=(
            "What the run was asked to achieve; thresholds come from the evaluate section of the "
            "configuration."
        ),
        words=(0, 1, 2),
    )


def speed(report: BaseReport) -> Table:
    """Wall-clock, throughput and memory of every job."""
    rows = []
    for job in report.speed:
        cells = (
            Cell(seconds(job.seconds)),
            Cell(count(job.tokens)),
            Cell(count(job.tokens_per_s)),
            Cell(seconds(job.data_s)),
            Cell(seconds(job.forward_s)),
            Cell(seconds(job.backward_s)),
            Cell(seconds(job.optimizer_s)),
            Cell(megabytes(job.peak_mb)),
        )
        rows.append(Row(job.job, cells))
    heads = (
        "time",
        "tokens",
        "tokens per second",
        "data",
        "forward",
        "backward",
        "optimizer",
        "peak memory",
    )
    return Table(
        name="Speed",
        title="Time and memory",
        corner="job",
        columns=heads,
        rows=tuple(rows),
        reading=(
            "One process per job, on the machine named at the top; what is left of the time is "
            "evaluation and saving."
        ),
    )


def title(report: BaseReport) -> str:
    """Return run, family, seed and time in one line."""
    seed = "" if report.seed is None else f"seed {report.seed}"
    words = (report.run, report.family, seed, report.made)
    return "  ".join(word for word in words if word)
