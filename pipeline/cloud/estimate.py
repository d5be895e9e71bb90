"""What a command will do elsewhere before it does it: jobs, machines, time, US dollars.

Estimates of training alone come from jobs that have finished on the same kind of machine, else from
the price table's rates; a limit on the cost is held against them, and what cannot be estimated is
refused under a limit.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from ..config.machines import MachineConfig
from ..config.run import JobKey, RunConfig
from ..errors import CannotStart, ConfigError, MissingArtifact, PipelineError
from ..report.narrow import print_table
from ..run.dry_run import (
    ASSUMED_MFU,
    DONE,
    STUCK,
    causes,
    duration,
    plan,
    state_of,
    trained,
    why_of,
)
from ..run.job import done
from ..run.stages import Addresses, label
from ..store.artifacts import Manifest, Store
from ..store.lineage import Lineage
from .inputs import not_on_volume
from .prices import Prices, most_gpus, split

STARTUP_S = 60.0  # until a container trains: start, imports, volume


@dataclass(frozen=True)
class JobEstimate:
    """One job of a command."""

    stage: str
    address: str
    state: str  # done, done?, stale, at step n, to do
    machine: MachineConfig
    tokens: int | None
    # None: not training, or not known: before preprocess has counted the tokens, or of a model
    # whose sizes are not known here
    seconds: float | None
    usd: float | None
    trains: bool
    peak_bytes: int | None = None  # predicted, above the level after imports
    why: str = ""  # what makes it stale, or may
    refused: PipelineError | None = None  # why it cannot run within runtime.memory_budget

    @property
    def unknown(self) -> bool:
        """Whether it will cost something that nobody knows yet."""
        return self.trains and self.usd is None and self.state not in DONE


def estimate(
    cfg: RunConfig, wanted: tuple[str, ...], store: Store, prices: Prices
) -> list[JobEstimate]:
    """Return the jobs of the wanted stages in order; store may be a mirror."""
    planned = {entry.address: entry for entry in plan(cfg, store)}
    addresses = Addresses(cfg)
    lineage = Lineage(store)
    finished_jobs = list(trained(store))
    estimates = []
    for stage in wanted:
        for _, item, address in addresses.jobs(stage):
            machine = cfg.machine(stage)
            entry = planned.get(address)
            finished = done(addresses, stage, item, lineage)
            # A stage outside the run, such as deploy, is in no plan, and trains nothing.
            if entry is None:
                state = state_of(address, lineage)
                if state == "done" and not finished:
                    # There, and to be copied once more
                    state = "to do"
                none = JobEstimate(stage, address, state, machine, None, None, None, False)
                estimates.append(replace(none, why=why_of(address, state, lineage)))
                continue
            job = entry.job
            seconds = None
            if job is not None and job.flops is not None:
                rate = _flops_per_s(machine, finished_jobs, prices)
                # What may turn out to be stale is counted: a limit on the cost has to hold
                seconds = 0.0 if entry.state == "done" else STARTUP_S + job.flops / rate
            estimates.append(
                JobEstimate(
                    stage,
                    address,
                    entry.state,
                    machine,
                    tokens=job.tokens if job else None,
                    seconds=seconds,
                    usd=None if seconds is None else seconds * prices.usd_per_s(machine),
                    trains=cfg.stages[stage].kind == "training",
                    peak_bytes=job.peak_bytes if job else None,
                    why=entry.why,
                    # The prediction is of main memory and says nothing about a GPU's.
                    refused=None if machine.gpu else entry.refused,
                )
            )
    return estimates


def _flops_per_s(
    machine: MachineConfig, finished_jobs: Iterable[tuple[Manifest, float]], prices: Prices
) -> float:
    """Return the median rate of finished jobs on such a machine, else a share of its peak."""
    rates = []
    for manifest, rate in finished_jobs:
        rate_there = _rate_on(machine, manifest, rate)
        if rate_there:
            rates.append(rate_there)
    if not rates:
        return ASSUMED_MFU * prices.flops_per_s(machine)
    # The median: a job that was preempted, or shared its machine, is not the measure.
    rates.sort()
    return rates[len(rates) // 2]


def _rate_on(machine: MachineConfig, manifest: Manifest, rate: float) -> float | None:
    """Return the operations per second that a job's rate is on such a machine, None when it was
    done on something else."""
    found = manifest.made.get("machine") or {}
    gpu = found.get("gpu") or ""
    if machine.gpu:
        # A100-80GB! as asked for is NVIDIA A100-SXM4-80GB as found: the first part is in both.
        asked, _ = split(machine.gpu[0])
        kind = asked.rstrip("!").partition("-")[0]
        return rate if kind in gpu.upper() else None
    if gpu:
        return None
    # Processors differ in cores more than in what a core does.
    return rate / found.get("threads", 1) * machine.cpu


def refuse_what_cannot_start(
    cfg: RunConfig,
    estimates: list[JobEstimate],
    mount: str,
    names: Callable[[str], Iterable[str]],
) -> None:
    """Raise CannotStart when a job to do has no room in its memory budget, or reads what is not on
    the volume, which is at `mount` there and of which `names` lists a folder."""
    items = {}
    for stage in cfg.stages:
        for _, item, address in Addresses(cfg).jobs(stage):
            items[address] = item
    found: list[tuple[PipelineError, str]] = []
    for each in estimates:
        if each.state in DONE:
            continue
        item = items[each.address]
        absent = not_on_volume(cfg, each.stage, item, mount, names)
        for error in filter(None, (each.refused, absent)):
            found.append((error, label(each.stage, item)))
    if found:
        raise CannotStart(STUCK, causes=causes(found))


def refuse_above(cfg: RunConfig, estimates: list[JobEstimate]) -> None:
    """Raise ConfigError when the estimate is above modal.max_cost_usd, or unknown while there is
    such a limit."""
    limit_usd = cfg.modal.max_cost_usd
    if limit_usd is None:
        return
    unknown = [each for each in estimates if each.unknown]
    if any(each.peak_bytes is None for each in unknown):
        raise ConfigError(
            f"modal.max_cost_usd is {limit_usd:.2f}, and the sizes of the model that trunk.init "
            "names are not known on this machine, so no cost is: name it as on the Hub, or set "
            "modal.max_cost_usd to null to run without a limit"
        )
    if unknown:
        raise ConfigError(
            f"modal.max_cost_usd is {limit_usd:.2f}, and a duration in epochs cannot be priced "
            "before the tokens are counted: run preprocess first, then this command again, or "
            "give tokens or steps"
        )
    total_usd = _total_usd(estimates)
    if total_usd > limit_usd:
        raise ConfigError(
            f"this command is estimated at ${total_usd:.2f}, above modal.max_cost_usd "
            f"{limit_usd:.2f}: train less, choose cheaper GPUs (modal.<stage>.gpu), or raise the "
            "limit; nothing was started"
        )


def _total_usd(estimates: list[JobEstimate]) -> float:
    """Return the cost of what is known."""
    return sum(each.usd or 0.0 for each in estimates)


def refuse_without_inputs(cfg: RunConfig, wanted: tuple[str, ...], store: Store) -> None:
    """Raise MissingArtifact when a job reads what is not there, or StaleArtifact what is stale, and
    this command does not make it; no cost so far."""
    addresses = Addresses(cfg)
    lineage = Lineage(store)
    for stage in wanted:
        # In a dict, as experts need the same trunk; its order is that of the stages.
        needs: dict[JobKey, None] = {}
        for item in cfg.items(stage):
            if not done(addresses, stage, item, lineage):
                needs |= dict.fromkeys(cfg.needs(stage, item))
        absent = []
        there = []
        for need in needs:
            if need[0] in wanted:
                continue
            if store.has(addresses.of(*need)):
                there.append(addresses.of(*need))
            else:
                absent.append(need)
        if absent:
            names = ", ".join(label(*need) for need in absent)
            commands = [f"`modal run modal_app.py::{each}`" for each in dict(absent)]
            raise MissingArtifact(
                f"{stage} needs {names} of this configuration, not on the volume yet: "
                f"do {' and '.join(commands)} first, or all with "
                "`modal run modal_app.py::run_all`; nothing was started"
            )
        lineage.check(*there)


def show_estimate(
    cfg: RunConfig,
    estimates: list[JobEstimate],
    prices: Prices,
    sequential: bool,
    console: Console,
) -> None:
    """Print the jobs as a table, then time and cost together."""
    table = Table(title=f"plan of {cfg.name} on Modal", title_justify="left", title_style="bold")
    for name in ("job", "state", "where"):
        table.add_column(name, justify="left", overflow="fold")
    for name in ("tokens", "memory", "time", "US$"):
        table.add_column(name, justify="right", overflow="fold")
    for each in estimates:
        table.add_row(each.address, each.state, _where(each), *_cells(each))
    print_table(console, table)
    for why in dict.fromkeys(each.why for each in estimates if each.why):
        console.print(why, highlight=False, markup=False, soft_wrap=True)
    training = [each for each in estimates if each.trains]
    if not training:
        console.print("nothing to train, so no estimate of time and cost", highlight=False)
        return
    unknown = any(each.unknown for each in training)
    least = "at least " if unknown else ""
    wall_s = 0.0
    # Stages wait for each other, the jobs of one do not.
    for stage in dict.fromkeys(each.stage for each in estimates):
        wall_s += _wall_s(cfg, stage, estimates, sequential)
    total_usd = _total_usd(estimates)
    console.print(
        f"to train: {least}{duration(wall_s)}, {least}${total_usd:.2f} (estimates, with prices of "
        f"{prices.checked}; what does not train comes on top)",
        highlight=False,
    )


def _wall_s(cfg: RunConfig, stage: str, estimates: list[JobEstimate], sequential: bool) -> float:
    """Return how long a stage takes: side by side as far as modal.max_gpus allows, or one job after
    another."""
    seconds = [each.seconds for each in estimates if each.stage == stage and each.seconds]
    if not seconds:
        return 0.0
    at_once = 1
    if not sequential:
        gpus = most_gpus(cfg.machine(stage))
        at_once = max(1, cfg.modal.max_gpus // gpus)
    # No shorter than its longest job, however many containers there are.
    return max(max(seconds), math.fsum(seconds) / at_once)


def _where(job: JobEstimate) -> str:
    """Return what a job's container has, and of how many containers it may be."""
    return " or ".join(job.machine.gpu) or f"{job.machine.cpu:g} cores"


def _cells(job: JobEstimate) -> tuple[str, str, str, str]:
    """Return tokens, memory, time and price of a job that trains."""
    measures = job.peak_bytes is not None  # the report, where its cost is known
    if not (job.trains or measures) or job.state == "done":
        return "", "", "", ""
    if job.peak_bytes is None:
        return "?", "?", "?", "?"
    memory = f"{job.peak_bytes / 1e6:,.0f} MB"
    if job.seconds is None:
        return "after preprocess", memory, "?", "?"
    return f"{job.tokens:,}", memory, duration(job.seconds), f"{job.usd:.2f}"
