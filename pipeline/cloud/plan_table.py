"""The plan of a command as a table, and what it comes to: time, costs, what stays on the volume."""

from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.table import Table

from ..config.machines import MachineConfig
from ..config.run import RunConfig
from ..report.narrow import print_table
from ..run.dry_run import duration
from .estimate import ASSUMED_S, JobEstimate, total
from .prices import Prices
from .running_costs import endpoint_told, storage_told


def show_estimate(
    cfg: RunConfig,
    estimates: list[JobEstimate],
    prices: Prices,
    sequential: bool,
    console: Console,
    planning_s: float = 0.0,
) -> None:
    """Print the jobs as a table, then time and cost together, and what is paid for afterwards;
    `planning_s` is how long a container has made the plan, if one did."""
    table = Table(title=f"plan of {cfg.name} on Modal", title_justify="left", title_style="bold")
    for name in ("job", "state", "where"):
        table.add_column(name, justify="left", overflow="fold")
    for name in ("tokens", "memory", "time", "US$"):
        table.add_column(name, justify="right", overflow="fold")
    for each in estimates:
        table.add_row(each.address, each.state, _where(each), *_cells(each))
    print_table(console, table)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    for why in dict.fromkeys(each.why for each in estimates if each.why):
        say(why)
    assumed = dict.fromkeys(each.stage for each in estimates if each.assumed)
    if assumed:
        say(
            f"nobody has timed a job of {', '.join(assumed)} yet: {duration(ASSUMED_S)} are "
            "assumed for each"
        )
    for note in _memory_notes(cfg, estimates, prices):
        say(note)
    least = "at least " if any(each.unknown for each in estimates) else ""
    found = total(cfg, estimates, prices, sequential, planning_s)
    planning = ""
    if planning_s:
        planning = f" and ${found.planning_usd:.4f} for the container that made this plan"
    say(
        f"in all: {least}{duration(found.seconds)}, {least}${found.usd:.2f}, "
        f"${found.conducting_usd:.2f} of it for what hands out the jobs{planning} (estimates, with "
        f"{prices.told(each.machine for each in estimates)})"
    )
    say(f"on the volume: at least {storage_told(sum(each.bytes for each in estimates), prices)}")
    if any(each.stage == "deploy" for each in estimates):
        say(endpoint_told(cfg.modal, prices))


def _memory_notes(cfg: RunConfig, estimates: list[JobEstimate], prices: Prices) -> Iterator[str]:
    """Yield which stages have a job that is predicted to take more memory than a GPU has that it
    may get."""
    highest: dict[tuple[str, str], int] = {}
    for each in estimates:
        short = ""
        if each.state != "done" and each.peak_bytes is not None:
            short = prices.short_of(each.machine, each.peak_bytes)
        if short:
            peak_bytes = highest.get((each.stage, short), 0)
            highest[each.stage, short] = max(peak_bytes, each.peak_bytes or 0)
    for (stage, short), peak_bytes in highest.items():
        setting = f"modal.{cfg.stages[stage].machine or stage}.gpu"
        yield (
            f"{stage}: up to {peak_bytes / 1e6:,.0f} MB are predicted, more than {short} has: "
            "smaller pieces run at once there, which may not be enough; name larger ones in "
            f"{setting}"
        )


def show_cuda(
    cfg: RunConfig, stages: Iterable[str], prices: Prices, locked: str, console: Console
) -> None:
    """Print which GPUs that stages of a run ask for want another CUDA than the locked torch
    brings."""
    machines: dict[str, MachineConfig] = {}
    for stage in stages:
        if cfg.items(stage):
            machines[f"modal.{cfg.stages[stage].machine or stage}.gpu"] = cfg.machine(stage)
        if stage == "deploy":
            machines["modal.endpoint.gpu"] = cfg.modal.endpoint
    for note in prices.cuda_notes(machines, locked):
        console.print(note, highlight=False, markup=False, soft_wrap=True)


def _where(job: JobEstimate) -> str:
    """Return what a job's container has, and of how many containers it may be."""
    return " or ".join(job.machine.gpu) or f"{job.machine.cpu:g} cores"


def _cells(job: JobEstimate) -> tuple[str, str, str, str]:
    """Return tokens, memory, time and price of a job that is not done."""
    if job.state == "done":
        return "", "", "", ""
    tokens = "" if job.tokens is None else f"{job.tokens:,}"
    memory = "" if job.peak_bytes is None else f"{job.peak_bytes / 1e6:,.0f} MB"
    if job.seconds is None or job.usd is None:
        return "after preprocess" if memory else "?", memory or "?", "?", "?"
    return tokens, memory, duration(job.seconds), f"{job.usd:.2f}"
