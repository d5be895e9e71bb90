"""What a command will do elsewhere before it does it: jobs, machines, time, US dollars.

Estimates of training alone come from jobs that have finished on the same kind of machine, else from
the price table's rates; a limit on the cost is held against them, and what cannot be estimated is
refused under a limit.
"""

import math
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from ..config.machines import MachineConfig
from ..config.run import RunConfig
from ..errors import BudgetError, ConfigError, MissingArtifact
from ..run.dry_run import ASSUMED_MFU, duration, plan
from ..run.job import done
from ..run.stages import Addresses, label
from ..store.artifacts import Manifest, Store
from .prices import Prices, most_gpus, split

STARTUP_S = 60.0  # until a container trains: start, imports, volume


@dataclass(frozen=True)
class JobEstimate:
    """One job of a command."""

    stage: str
    address: str
    state: str  # done, at step n, to do
    machine: MachineConfig
    tokens: int | None
    seconds: (
        float | None
    )  # None: not training, or not known before preprocess has counted the tokens
    usd: float | None
    trains: bool
    peak_bytes: int | None = None  # predicted, above the level after imports


def estimate(
    cfg: RunConfig, wanted: tuple[str, ...], store: Store, prices: Prices
) -> list[JobEstimate]:
    """Return the jobs of the wanted stages in order; store may be a mirror.

    Raises BudgetError when a job cannot run within runtime.memory_budget.
    """
    planned = {entry.address: entry for entry in plan(cfg, store)}
    addresses = Addresses(cfg)
    lines = []
    for stage in wanted:
        for _, item, address in addresses.jobs(stage):
            machine = cfg.machine(stage)
            entry, finished = planned.get(address), done(addresses, stage, item, store)
            if (
                entry and entry.refused and not machine.gpu
            ):  # a prediction of main memory says nothing about a GPU
                raise BudgetError(entry.refused)
            job, state = (
                (entry.job, entry.state) if entry else (None, "done" if finished else "to do")
            )
            seconds = None
            if job and job.flops is not None:
                seconds = (
                    0.0
                    if finished
                    else STARTUP_S + job.flops / _flops_per_s(machine, store, prices)
                )
            usd = None if seconds is None else seconds * prices.usd_per_s(machine)
            tokens, peak = (job.tokens, job.peak_bytes) if job else (None, None)
            lines.append(
                JobEstimate(
                    stage, address, state, machine, tokens, seconds, usd, job is not None, peak
                )
            )
    return lines


def _flops_per_s(machine: MachineConfig, store: Store, prices: Prices) -> float:
    """Return the median rate of finished jobs on such a machine, else a share of its peak."""
    made = (store.manifest(address) for address in store.addresses() if store.has(address))
    rates = sorted(rate for rate in (_rate(manifest, machine) for manifest in made) if rate)
    return rates[len(rates) // 2] if rates else ASSUMED_MFU * prices.flops_per_s(machine)


def _rate(manifest: Manifest, machine: MachineConfig) -> float | None:
    """Return the operations per second a job reached, None when it trained nothing or on something
    else."""
    found = manifest.made.get("machine") or {}
    speed = (manifest.metrics.get("tokens_per_s") or 0) * manifest.metrics.get("flops_per_token", 0)
    if machine.gpu:
        kind = split(machine.gpu[0])[0].rstrip("!").split("-")[0]
        return speed if kind in (found.get("gpu") or "").upper() else None
    return None if found.get("gpu") else speed / found.get("threads", 1) * machine.cpu


def refuse_above(cfg: RunConfig, lines: list[JobEstimate]) -> None:
    """Raise ConfigError when the estimate is above modal.max_cost_usd, or unknown while there is
    such a limit."""
    limit_usd = cfg.modal.max_cost_usd
    if limit_usd is None:
        return
    if any(line.trains and line.usd is None for line in lines):
        raise ConfigError(
            f"modal.max_cost_usd is {limit_usd:.2f}, and a duration in epochs cannot be priced before the tokens are "
            "counted: run preprocess first, then this command again, or give tokens or steps"
        )
    total_usd = sum(line.usd or 0.0 for line in lines)
    if total_usd > limit_usd:
        raise ConfigError(
            f"this command is estimated at ${total_usd:.2f}, above modal.max_cost_usd {limit_usd:.2f}: train less, "
            "choose cheaper GPUs (modal.<stage>.gpu), or raise the limit; nothing was started"
        )


def refuse_without_inputs(cfg: RunConfig, wanted: tuple[str, ...], store: Store) -> None:
    """Raise MissingArtifact when a job reads what is not there and what this command does not make;
    no cost so far."""
    addresses = Addresses(cfg)
    for stage in wanted:
        missing = [item for item in cfg.items(stage) if not done(addresses, stage, item, store)]
        needs = dict.fromkeys(
            need for item in missing for need in cfg.needs(stage, item) if need[0] not in wanted
        )
        absent = [need for need in needs if not store.has(addresses.of(*need))]
        if absent:
            first = " and ".join(f"`modal run modal_app.py::{each}`" for each in dict(absent))
            raise MissingArtifact(
                f"{stage} needs {', '.join(label(*need) for need in absent)} of this configuration, not on the "
                f"volume yet: do {first} first, or all with `modal run modal_app.py::run_all`; nothing was started"
            )


def show_estimate(
    cfg: RunConfig, lines: list[JobEstimate], prices: Prices, sequential: bool, console: Console
) -> None:
    """Print the jobs as a table, then time and cost together."""
    table = Table(title=f"plan of {cfg.name} on Modal", title_justify="left", title_style="bold")
    for name in ("job", "state", "where", "tokens", "memory", "time", "US$"):
        table.add_column(
            name, justify="left" if name in ("job", "state", "where") else "right", overflow="fold"
        )
    for line in lines:
        table.add_row(line.address, line.state, _where(cfg, line), *_cells(line))
    console.print(table)
    if not any(line.trains for line in lines):
        console.print("nothing to train, so no estimate of time and cost", highlight=False)
        return
    least = "at least " if any(line.trains and line.seconds is None for line in lines) else ""
    wall_s = sum(
        _wall_s(cfg, stage, lines, sequential)
        for stage in dict.fromkeys(line.stage for line in lines)
    )
    total_usd = sum(line.usd or 0.0 for line in lines)
    console.print(
        f"to train: {least}{duration(wall_s)}, {least}${total_usd:.2f} (estimates, with prices of {prices.checked}; "
        "what does not train comes on top)",
        highlight=False,
    )


def _wall_s(cfg: RunConfig, stage: str, lines: list[JobEstimate], sequential: bool) -> float:
    """Return how long a stage takes: side by side as far as modal.max_gpus allows, or one job after
    another."""
    seconds = [line.seconds for line in lines if line.stage == stage and line.seconds]
    if not seconds:
        return 0.0
    at_once = 1 if sequential else max(1, cfg.modal.max_gpus // most_gpus(cfg.machine(stage)))
    return max(max(seconds), math.fsum(seconds) / at_once)


def _where(cfg: RunConfig, line: JobEstimate) -> str:
    divided = any(row.step_of == line.stage for row in cfg.stages.values())
    jobs = cfg.modal.preprocess_jobs
    shared = f"up to {jobs} x " if divided and jobs > 1 else ""
    return shared + (" or ".join(line.machine.gpu) or f"{line.machine.cpu:g} cores")


def _cells(line: JobEstimate) -> tuple[str, str, str, str]:
    """Return tokens, memory, time and price of a job that trains."""
    if not line.trains or line.state == "done":
        return "", "", "", ""
    memory = f"{line.peak_bytes / 1e6:,.0f} MB"
    if line.seconds is None:
        return "after preprocess", memory, "?", "?"
    return f"{line.tokens:,}", memory, duration(line.seconds), f"{line.usd:.2f}"
