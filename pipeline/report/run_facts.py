"""The tables that every report has, whatever its kind: what was asked, and what it took."""

from .format import DASH, count, fixed, megabytes, rate, seconds
from .schema.base import BaseReport
from .schema.reading import Report
from .table import Cell, Row, Table

RESULTS = {
    True: Cell("pass", tone="good"),
    False: Cell("fail", tone="bad"),
    None: Cell("open"),
}


def criteria(report: BaseReport) -> Table:
    """The success criteria of the configuration, passed or failed."""
    rows = []
    for item in report.criteria:
        rows.append(Row(item.name, (RESULTS[item.passed], Cell(item.text), Cell(item.detail))))
    return Table(
        name="Criteria",
        title="Success criteria",
        corner="criterion",
        columns=("result", "asked", "found"),
        rows=tuple(rows),
        reading=(
            "What the run was asked to achieve; thresholds come from the evaluate section of the "
            "configuration. Open: too little was measured to tell."
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


def facts(report: BaseReport) -> list[str]:
    """Return what a run's figures must be read with, in a few words each."""
    found = [report.family]
    if report.seed is not None:
        found.append(f"seed {report.seed}")
    found.append(report.made)
    machine = report.machine
    if machine:
        # beside a GPU the processor says little about the speed
        found.append(machine.gpu or machine.cpu)
        found.append(f"{machine.threads} of {machine.cores} cores")
        found.append(machine.dtype)
        found.append(f"torch {machine.torch}")
    return [fact for fact in found if fact]


def tiles(report: BaseReport) -> list[tuple[str, str, str]]:
    """Return the numbers at the top that every report has: name, value, what stands beside it."""
    if not report.criteria:
        return []
    passed = sum(item.passed is True for item in report.criteria)
    still_open = sum(item.passed is None for item in report.criteria)
    beside = f"{still_open} open" if still_open else ""
    return [("criteria passed", f"{passed} of {len(report.criteria)}", beside)]


def model_facts(report: Report) -> list[tuple[str, str]]:
    """Return the sizes of the model as pairs of name and value."""
    out = []
    # iterating over a model gives its fields in the order of the schema
    for name, value in report.model or ():
        if value is not None:
            # the only large counts among sizes, names and types
            text = count(value) if "parameters" in name else str(value)
            out.append((name.replace("_", " "), text))
    return out


def rates(report: Report) -> Table:
    """The learning rates that were searched: what each that was tried came to."""
    tried = {each.lr for found in report.rates for each in found.tried}
    ladder = sorted(tried)
    rows = []
    for found in report.rates:
        nats = {each.lr: each.nats for each in found.tried}
        cells = [Cell(rate(found.lr)), Cell(count(found.steps)), Cell(fixed(found.before_nats))]
        for lr in ladder:
            text = fixed(nats.get(lr))
            if lr in nats and nats[lr] is None:
                text = "diverged"
            cells.append(Cell(text if lr in nats else DASH, best=lr == found.lr))
        rows.append(Row(found.job, tuple(cells)))
    return Table(
        name="Rates",
        title="Learning rates that were searched",
        corner="job",
        columns=("taken", "steps", "before", *(f"at {rate(lr)}" for lr in ladder)),
        rows=tuple(rows),
        reading=(
            "Validation loss, nats per token, before and after a short training at each rate from "
            "the same weights on the same text. Taken is the lowest rate that gains about as much "
            "as the best: a few steps flatter high ones."
        ),
    )
