"""What a command would do, before it does it."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..config.run import RunConfig
from ..config.stage import Stage
from ..errors import BudgetError, CannotStart, PipelineError, StoreError
from ..families import ExportWish, family, stage_function
from ..hardware import (
    cores,
    cpu_name,
    free_bytes,
    gpu_name,
    gpus,
    product_flops_per_s,
    summed_bytes_per_s,
)
from ..report.narrow import print_table
from ..store.artifacts import Reader, Store
from ..store.lineage import Lineage
from ..store.model_sources import on_this_machine
from ..store.removed import removed, told_removed
from ..train.flops import JobCost
from .former import former_checkpoint, saved
from .identity import FROZEN, lacking, since_made
from .speeds import Speed, alike, bundle_rates, of_this_machine, typical
from .stages import RUN, Addresses, label

# of a small model before this machine has trained one; afterwards its own jobs are the measure
ASSUMED_MFU = 0.3
# of a disk, of whose speed no finished bundle tells: what goes through the system's own memory
ASSUMED_WRITTEN_PER_S = 1e9
STUCK = "this run cannot start as it is"
UNSURE = "done?"  # made on what is not there: it shows when that is made again
DONE = ("done", UNSURE)  # such a job reads nothing any more
Cause = tuple[PipelineError, list[str]]  # an error, and the names of the jobs that it keeps


@dataclass(frozen=True)
class Entry:
    """One job of a plan."""

    address: str
    state: str  # done, done?, stale, at step n, to do
    why: str  # what makes it stale, or may; or what was done under other settings
    job: JobCost | None  # None: no training
    name: str  # of the stage and the item
    refused: PipelineError | None = None  # why it cannot run under the memory budget


def plan(cfg: RunConfig, store: Store, reader: Reader | None = None) -> list[Entry]:
    """Return every job of a run in order: what is there already, and what the rest will spend.

    reader: what has read manifests of the store already, since it was refreshed.
    """
    addresses = Addresses(cfg)
    cfg = addresses.cfg
    bf16 = cfg.dtype == "bf16"
    reader = reader or Reader(store)
    lineage = Lineage(store, reader.recorded)
    jobs = [job for stage in RUN for job in addresses.jobs(stage)]
    made = _made(addresses, reader)
    entries = []
    for stage, item, address in jobs:
        state = state_of(address, lineage)
        cost: JobCost | None = None
        refused: PipelineError | None = None
        if cfg.stages[stage].kind in ("training", "report"):
            try:
                cost = family(cfg.family).cost(cfg, stage, item, made, bf16)
            except BudgetError as error:
                # A job that is done needs no memory any more
                refused = None if state in DONE else error
        why = why_of(address, state, lineage)
        if cost is not None and not why:
            why = former_checkpoint(addresses, stage, item, store)
        changed = "" if store.has(address) else since_made(cfg, store, stage, item)
        if changed:
            why = (
                f"{changed}, so {label(stage, item)} is made again, and what stands on it; {FROZEN}"
            )
        entries.append(Entry(address, state, why, cost, label(stage, item), refused))
    return entries


def _made(addresses: Addresses, reader: Reader) -> dict[tuple[str, str | None], dict]:
    """Return what a family knows its costs from: the metrics of the run's finished jobs."""
    made = {}
    for stage in RUN:
        for _, item, address in addresses.jobs(stage):
            if reader.store.has(address):
                made[stage, item] = reader.recorded(address).metrics
    return made


def writings(
    cfg: RunConfig,
    store: Store,
    wishes: Sequence[ExportWish] = (),
    reader: Reader | None = None,
) -> list[Entry]:
    """Return what takes a run's stack out of its store: the bundle that `deploy` makes, and the
    exports that are wished for; `reader` as `plan` takes it. Raises ConfigError for one that the
    run has nothing for."""
    addresses = Addresses(cfg)
    cfg = addresses.cfg
    chosen = family(cfg.family)
    reader = reader or Reader(store)
    lineage = Lineage(store, reader.recorded)
    made = _made(addresses, reader)
    entries = []
    for row in cfg.stages.values():
        if row.kind != "bundle":
            continue
        for stage, item, address in addresses.jobs(row.name):
            state = state_of(address, lineage)
            cost = chosen.writing_cost(cfg, made, None)
            why = why_of(address, state, lineage)
            entries.append(Entry(address, state, why, cost, label(stage, item)))
    for wish in wishes:
        chosen.check_export(cfg, wish)
        cost = chosen.writing_cost(cfg, made, wish)
        entries.append(Entry(wish.words, "", "", cost, wish.words))
    return entries


def refuse(
    cfg: RunConfig, store: Store, entries: list[Entry], unfit: PipelineError | None = None
) -> None:
    """Raise CannotStart when a job of a plan cannot start on this machine: it has no room in the
    memory budget, the store cannot be written, or what it reads outside the store is not there.
    `unfit` is what is wrong with a model that it names."""
    addresses = Addresses(cfg)
    jobs = [job for stage in RUN for job in addresses.jobs(stage)]
    found: list[tuple[PipelineError, str]] = []
    for entry, (stage, item, _) in zip(entries, jobs, strict=True):
        if entry.state in DONE:
            continue
        row = cfg.stages[stage]
        here = (
            *(_not_writable(store), _not_there(cfg, row, item), lacking(cfg, stage, item)),
            _not_heard(cfg, row),
        )
        for error in filter(None, (entry.refused, *here)):
            found.append((error, entry.name))
    whole: list[Cause] = [] if unfit is None else [(unfit, [])]
    if whole or found:
        raise CannotStart(STUCK, causes=whole + causes(found))


def refuse_lacking(cfg: RunConfig, store: Store, stages: Iterable[str]) -> None:
    """Raise CannotStart when a job of some stages that is to be done could do nothing with what was
    looked at: before those that could, and what is trained on them, take their time."""
    found = []
    for stage in stages:
        for _, item, address in Addresses(cfg).jobs(stage):
            error = None if store.has(address) else lacking(cfg, stage, item)
            if error:
                found.append((error, label(stage, item)))
    if found:
        raise CannotStart(STUCK, causes=causes(found))


def causes(found: Iterable[tuple[PipelineError, str]]) -> list[Cause]:
    """Return each error once, with the names of the jobs that it keeps from starting. Of budgets
    the largest of the least that work, as one setting is for all jobs."""
    kept: dict[str, Cause] = {}
    least: BudgetError | None = None
    for error, name in found:
        key = str(error)
        if isinstance(error, BudgetError):
            key = BudgetError.__name__
            if least is None or error.smallest_bytes > least.smallest_bytes:
                least = error
        kept.setdefault(key, (error, []))[1].append(name)
    if least is not None:
        kept[BudgetError.__name__] = (PipelineError(least.why), kept[BudgetError.__name__][1])
    return list(kept.values())


def _not_writable(store: Store) -> PipelineError | None:
    """Return the error for a store that nothing can be written to, or that cannot be made."""
    place = store.root.absolute()
    while not place.exists():
        place = place.parent
    if os.access(place, os.W_OK):
        return None
    return StoreError(f"{place} cannot be written to", root=store.root)


def _not_there(cfg: RunConfig, row: Stage, item: str | None) -> PipelineError | None:
    """Return the error for what a job reads outside the store and is not there."""
    if not row.check:
        return None
    look = stage_function(cfg.family, row.check)
    try:
        look(cfg, *(() if item is None else (item,)))
    except PipelineError as error:
        return error
    return None


def _not_heard(cfg: RunConfig, row: Stage) -> PipelineError | None:
    """Return the error for a training that is to be told online, and no key is here."""
    if row.kind != "training" or cfg.runtime.wandb != "online":
        return None
    # Only who asks for it pays for its import
    from ..store.history import check_key

    try:
        check_key(cfg.runtime.wandb)
    except PipelineError as error:
        return error
    return None


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


def show_plan(
    cfg: RunConfig,
    store: Store,
    console: Console,
    total_bytes: int | None = None,
    wishes: Sequence[ExportWish] = (),
) -> None:
    """Print a plan as a table, with the exports that are wished for, and how many experts fit into
    total_bytes side by side (none: what is free here). Raises CannotStart after that."""
    # Of all that is told each manifest is read once
    reader = Reader(store)
    # First, as it refuses what the run has nothing for
    written = writings(cfg, store, wishes, reader)
    notes, unfit = _models(cfg)
    entries = plan(cfg, store, reader)
    told = times(cfg, store, [*entries, *written], reader)
    table = Table(
        title=f"plan of {cfg.name} in {store.root}", title_justify="left", title_style="bold"
    )
    table.add_column("job", style="cyan", overflow="fold")
    table.add_column("state")
    for name in ("tokens", "parameters", "time", "peak memory"):
        table.add_column(name, justify="right")
    table.add_column("how it runs")
    for entry in (*entries, *written):
        table.add_row(entry.address, entry.state, *_cells(entry, told.get(entry.address)))
    print_table(console, table)
    for note in notes:
        console.print(Text.assemble(("note:", "bold"), f" {note}"), soft_wrap=True)
    for why in dict.fromkeys(entry.why for entry in (*entries, *written) if entry.why):
        console.print(why, highlight=False, markup=False, soft_wrap=True)
    seconds = [told[entry.address] for entry in entries if entry.address in told]
    unknown = any(entry.job and entry.address not in told for entry in entries)
    least = "at least " if unknown else ""
    where = gpu_name() or f"{cpu_name()}, {cores()} cores"
    dtype = Addresses(cfg).cfg.dtype
    if seconds:
        console.print(
            f"to train: {least}{duration(sum(seconds))} in {dtype} on {where}, one job "
            "after another"
        )
    else:
        console.print("to train: cannot be told before the model is on this machine")
    console.print(
        "deploy and exports come when they are asked for (plan --export FORMAT shows one): their "
        "time is none of it.",
        highlight=False,
    )
    console.print(
        "Time is an estimate from jobs this machine has finished, or from a short probe; memory is "
        "predicted,"
    )
    console.print(
        "above the level after imports. Both are measured while a job runs (its manifest.json "
        "tells)."
    )
    console.print(
        "Mapped is the part of it that is pages of files: jobs share them, and the kernel drops "
        "them when memory is short."
    )
    console.print(_beside(entries, total_bytes))
    if unknown:
        console.print("Durations in epochs are known after preprocess has counted the tokens.")
    taken_out, wrong = removed(store)
    for text in wrong:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    for gone in taken_out:
        if gone.run == cfg.name and gone.domain not in cfg.experts:
            console.print(told_removed(gone, store), highlight=False, markup=False, soft_wrap=True)
    refuse(cfg, store, entries, unfit)


def _models(cfg: RunConfig) -> tuple[list[str], PipelineError | None]:
    """Return what a person should know of the models of a run, and why one cannot be had."""
    try:
        return family(cfg.family).preflight(cfg, on_this_machine), None
    except PipelineError as error:
        return [], error


def times(
    cfg: RunConfig, store: Store, entries: Sequence[Entry], reader: Reader | None = None
) -> dict[str, float]:
    """Return how long jobs will take here, by address; those that nobody can tell are left out.
    `reader` as `plan` takes it."""
    reader = reader or Reader(store)
    seconds = {}
    known: list[Speed] | None = None
    probed = 0.0
    threads = cfg.runtime.most_threads(cores())
    dtype = Addresses(cfg).cfg.dtype
    for entry in entries:
        job = entry.job
        if job is None or job.flops is None:
            continue
        seconds[entry.address] = 0.0
        if entry.state == "done":
            continue
        if job.written_bytes:
            made = typical(bundle_rates(store, reader)) if job.stage == "deploy" else None
            if made is not None:
                # Such bundles were summed on the way and computed in that time
                seconds[entry.address] = _summing_seconds(job.written_bytes)
                seconds[entry.address] += job.written_bytes / made
                continue
            seconds[entry.address] = _summing_seconds(job.summed_bytes)
            seconds[entry.address] += job.written_bytes / ASSUMED_WRITTEN_PER_S
        if not job.flops:
            continue
        # Only what is still to do needs a rate, and measuring one takes a moment
        if known is None:
            known = of_this_machine(store, reader)
        told = alike(known, job.flops_per_token, threads, dtype)
        rate = (
            typical([each.flops_per_s * each.scale(job.flops_per_token) for each in told]) or probed
        )
        if not rate:
            probed = ASSUMED_MFU * product_flops_per_s(dtype == "bf16")
            rate = probed
        seconds[entry.address] += job.flops / rate
    return seconds


def _summing_seconds(summed_bytes: int) -> float:
    return summed_bytes / summed_bytes_per_s()


def foretold(cfg: RunConfig, store: Store, wish: ExportWish) -> str:
    """Return what an export will take, in a sentence; "" where nobody can tell."""
    *_, entry = writings(cfg, store, [wish])
    job = entry.job
    if job is None:
        return ""
    seconds = times(cfg, store, [entry])[entry.address]
    own = (job.peak_bytes - job.mapped_bytes) / 1e6
    return (
        f"writes {job.written_bytes / 1e6:,.0f} MB in about {duration(seconds)}, with "
        f"{own:,.0f} MB of memory beside imports and mapped files"
    )


def _beside(entries: list[Entry], total_bytes: int | None) -> str:
    """Return how many experts fit side by side; what they import is shared, as they are forked with
    it."""
    needed = 0
    mapped = 0
    for entry in entries:
        if entry.job and entry.job.stage == "train_experts":
            needed = max(needed, entry.job.peak_bytes)
            mapped = entry.job.mapped_bytes
    if not needed:
        return (
            "how many experts fit side by side cannot be told: none is planned, or the model is "
            "not here yet"
        )
    total = total_bytes or free_bytes()
    where = "" if total_bytes else " that are free here"
    count = len(gpus())
    if not total_bytes and count > 1:
        where += f" on each of {count} GPUs"
    # What they map is in memory once
    fit = max(0, total - mapped) // (needed - mapped)
    return (
        f"side by side: {fit} experts of {needed / 1e6:,.0f} MB fit into the "
        f"{total / 1e9:,.1f} GB{where} (--parallel N; a runtime.memory_budget makes each smaller)"
    )


def _cells(entry: Entry, seconds: float | None) -> tuple[str, str, str, str, str]:
    """Return tokens, parameters, time, memory and plan of a job that trains, or writes files."""
    job = entry.job
    if job is None:
        return "", "", "", "", ""
    tokens = "after preprocess" if job.tokens is None else f"{job.tokens:,}"
    parameters = f"{job.parameters:,}"
    how = job.summary
    if job.written_bytes:
        tokens, parameters = "", ""
        how = f"writes {job.written_bytes / 1e6:,.0f} MB"
    time = "?" if seconds is None else duration(seconds)
    if entry.state == "done":
        time = ""
    memory = f"{job.peak_bytes / 1e6:,.0f} MB"
    if job.mapped_bytes:
        memory += f", {job.mapped_bytes / 1e6:,.0f} mapped"
    return tokens, parameters, time, memory, how


def duration(seconds: float) -> str:
    """Return a length of time as people say it: 42 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def figures(metrics: dict) -> str:
    """Return what came out of a job in a line: a training's losses, the rates of a search, else its
    numbers by name; then its notes, a line each."""
    if "losses" in metrics:
        return _searched(metrics)
    if "valid_nats" not in metrics:
        return "\n".join(["; ".join(_named(metrics)), *metrics.get("notes", ())])
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


def _searched(metrics: dict) -> str:
    """Return the rate that a search took, and what each that it tried came to."""
    tried = []
    for rate, nats in metrics["losses"].items():
        tried.append(f"{rate} diverged" if nats is None else f"{rate} {nats:.3f}")
    return f"lr {metrics['lr']:g}; valid nats by rate: {', '.join(tried)}"


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
