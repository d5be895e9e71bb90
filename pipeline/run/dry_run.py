"""What a command would do, before it does it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..config.run import RunConfig
from ..errors import BudgetError, StoreError
from ..families import family
from ..hardware import cores, cpu_name, free_bytes, gpu_name, product_flops_per_s
from ..store.artifacts import Store
from ..store.lineage import Lineage
from ..store.model_files import on_this_machine
from ..train.flops import JobCost
from .former import former_checkpoint, saved
from .stages import RUN, Addresses

# of a small model before this machine has trained one; afterwards its own jobs are the measure
ASSUMED_MFU = 0.3
UNSURE = "done?"  # made on what is not there: it shows when that is made again


@dataclass(frozen=True)
class Entry:
    """One job of a plan."""

    address: str
    state: str  # done, done?, stale, at step n, to do
    why: str  # what makes it stale, or may; or what was done under other settings
    job: JobCost | None  # None: no training
    seconds: float | None
    refused: str = ""  # why it cannot run under the memory budget


def plan(cfg: RunConfig, store: Store) -> list[Entry]:
    """Return every job of a run in order: what is there already, an estimate of the rest."""
    addresses = Addresses(cfg)
    cfg = addresses.cfg
    bf16 = cfg.dtype == "bf16"
    rate = _flops_per_s(store, bf16)
    lineage = Lineage(store)
    jobs = [job for stage in RUN for job in addresses.jobs(stage)]
    # What a family knows its costs from: the metrics of the run's finished jobs
    made = {
        (stage, item): store.manifest(address).metrics
        for stage, item, address in jobs
        if store.has(address)
    }
    entries = []
    for stage, item, address in jobs:
        state = state_of(address, lineage)
        cost: JobCost | None = None
        refused = ""
        if cfg.stages[stage].kind == "training":
            try:
                cost = family(cfg.family).cost(cfg, stage, item, made, bf16)
            except BudgetError as error:
                # A job that is done needs no memory any more
                refused = "" if state in ("done", UNSURE) else str(error)
        seconds = None
        if cost is not None and cost.flops is not None:
            seconds = 0.0 if state == "done" else cost.flops / rate
        why = why_of(address, state, lineage)
        if cost is not None and not why:
            why = former_checkpoint(addresses, stage, item, store)
        entries.append(Entry(address, state, why, cost, seconds, refused))
    return entries


def state_of(address: str, lineage: Lineage) -> str:
    """Return how far an artifact is, by manifests and checkpoints. Raises DamagedArtifact."""
    if lineage.store.has(address):
        if lineage.change(address):
            return "stale"
        return UNSURE if lineage.absent(address) else "done"
    steps = []
    for step, inputs in saved(lineage.store, address):
        # Of other inputs it is set aside when the job begins
        if not lineage.differing(address, inputs):
            steps.append(step)
    return f"at step {max(steps)}" if steps else "to do"


def why_of(address: str, state: str, lineage: Lineage) -> str:
    """Return what a person should know of a state; the same of all that have it for one reason."""
    change = lineage.change(address)
    if change:
        return f"stale: {change.told_of()}"
    if state == UNSURE:
        absent = lineage.absent(address)
        return f"{UNSURE}: stale if {absent}, which is not there, comes out otherwise than before"
    return ""


def _flops_per_s(store: Store, bf16: bool) -> float:
    """Return the rate this machine's finished jobs reached, else a share of its matrix-product
    rate."""
    here = (cpu_name(), gpu_name())
    rates = []
    for address in store.addresses():
        try:
            if not store.has(address):
                continue
            manifest = store.manifest(address)
        except StoreError:
            # No part of this run, or its own job says so
            continue
        machine = manifest.made.get("machine", {})
        speed = manifest.metrics.get("tokens_per_s")
        if speed and (machine.get("cpu"), machine.get("gpu")) == here:
            rates.append(speed * manifest.metrics["flops_per_token"])
    # The median: a job that shared the machine, or a tiny one, says little of the next
    if rates:
        return sorted(rates)[len(rates) // 2]
    return ASSUMED_MFU * product_flops_per_s(bf16)


def show_plan(
    cfg: RunConfig, store: Store, console: Console, total_bytes: int | None = None
) -> None:
    """Print a plan as a table, and how many experts fit into total_bytes side by side (none: what
    is free here)."""
    notes = family(cfg.family).preflight(cfg, on_this_machine)
    entries = plan(cfg, store)
    table = Table(
        title=f"plan of {cfg.name} in {store.root}", title_justify="left", title_style="bold"
    )
    table.add_column("job", style="cyan", overflow="fold")
    table.add_column("state")
    for name in ("tokens", "parameters", "time", "peak memory"):
        table.add_column(name, justify="right")
    table.add_column("how it runs")
    for entry in entries:
        table.add_row(entry.address, entry.state, *_cells(entry))
    console.print(table)
    for note in notes:
        console.print(f"[bold]note:[/] {escape(note)}", highlight=False, soft_wrap=True)
    for why in dict.fromkeys(entry.why for entry in entries if entry.why):
        console.print(why, highlight=False, markup=False, soft_wrap=True)
    known = [entry.seconds for entry in entries if entry.seconds is not None]
    unknown = any(entry.job and entry.seconds is None for entry in entries)
    least = "at least " if unknown else ""
    where = gpu_name() or f"{cpu_name()}, {cores()} cores"
    dtype = Addresses(cfg).cfg.dtype
    console.print(
        f"to train: {least}{duration(sum(known))} in {dtype} on {where}, one job after another"
    )
    console.print(
        "Time is an estimate from jobs this machine has finished, or from a short probe; memory is "
        "predicted,"
    )
    console.print(
        "above the level after imports. Both are measured while a job runs (its manifest.json "
        "tells)."
    )
    console.print(_beside(entries, total_bytes))
    for refused in dict.fromkeys(entry.refused for entry in entries if entry.refused):
        console.print(f"[bold red]refused:[/] {escape(refused)}")
    if unknown:
        console.print("Durations in epochs are known after preprocess has counted the tokens.")


def _beside(entries: list[Entry], total_bytes: int | None) -> str:
    """Return how many experts fit side by side; what they import is shared, as they are forked with
    it."""
    needed = 0
    for entry in entries:
        if entry.job and entry.job.stage == "train_experts":
            needed = max(needed, entry.job.peak_bytes)
    if not needed:
        return (
            "how many experts fit side by side cannot be told: none is planned, or the model is "
            "not here yet"
        )
    total = total_bytes or free_bytes()
    where = "" if total_bytes else " that are free here"
    return (
        f"side by side: {total // needed} experts of {needed / 1e6:,.0f} MB fit into the "
        f"{total / 1e9:,.1f} GB{where} (--parallel N; a runtime.memory_budget makes each smaller)"
    )


def _cells(entry: Entry) -> tuple[str, str, str, str, str]:
    """Return tokens, parameters, time, memory and plan of a job that trains."""
    job = entry.job
    if job is None:
        return "", "", "", "", ""
    tokens = "after preprocess" if job.tokens is None else f"{job.tokens:,}"
    time = "?" if entry.seconds is None else duration(entry.seconds)
    if entry.state == "done":
        time = ""
    return tokens, f"{job.parameters:,}", time, f"{job.peak_bytes / 1e6:,.0f} MB", job.summary


def duration(seconds: float) -> str:
    """Return a length of time as people say it: 42 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def figures(metrics: dict) -> str:
    """Return what came out of a job in a line: a training's losses, else its numbers by name."""
    if "valid_nats" not in metrics:
        return "; ".join(_named(metrics))
    steps = metrics["steps"]
    planned = metrics.get("planned_steps", steps)
    if not steps:
        return f"no training, valid {metrics['valid_nats']:.3f} nats"
    early = f" (stopped early of {planned})" if steps < planned else ""
    out = [f"{steps} steps{early}"]
    if "train_nats" in metrics:
        out.append(f"train {metrics['train_nats']:.3f}")
    out.append(f"valid {metrics['valid_nats']:.3f} nats")
    out.append(f"{metrics['tokens_per_s']:,.0f} tokens/s")
    if "peak_mb" in metrics:
        out.append(f"peak {metrics['peak_mb']:.0f} MB")
    return ", ".join(out)


def _named(metrics: Mapping[str, object]) -> Iterator[str]:
    """Yield the numbers and texts of a job by name, groups of them with what is in them."""
    for key, value in metrics.items():
        name = key.replace("_", " ")
        if isinstance(value, dict):
            inner = ", ".join(_named(value))
            if inner:
                yield f"{name}: {inner}"
        # What is only true or false says nothing without its name's context; bool is also an int
        elif isinstance(value, bool):
            continue
        elif isinstance(value, int):
            yield f"{name} {value:,}"
        elif isinstance(value, float):
            yield f"{name} {value:.4g}"
        elif isinstance(value, str):
            yield f"{name} {value}"
