"""What a command would do before it does it, and what no configuration needs any more."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..config.run import RunConfig
from ..errors import BudgetError
from ..families import family
from ..hardware import cores, cpu_name, free_bytes, gpu_name, product_flops_per_s, uses_bf16
from ..store.artifacts import Store
from ..train.flops import JobCost
from . import stages

# of a small model before this machine has trained one; afterwards its own jobs are the measure
ASSUMED_MFU = 0.3


@dataclass(frozen=True)
class Entry:
    """One job of a plan."""

    address: str
    state: str  # done, at step n, to do
    job: JobCost | None  # None: no training
    seconds: float | None
    refused: str = ""  # why it cannot run under the memory budget


def plan(cfg: RunConfig, store: Store) -> list[Entry]:
    """Return every job of a run in order, with what is there already and an estimate of the rest."""
    bf16 = uses_bf16(cfg.dtype)
    made, rate = _made(cfg, store), _flops_per_s(store, bf16)
    return [
        _entry(cfg, store, stage, item, address, made, rate, bf16)
        for stage in stages.RUN
        for _, item, address in stages.jobs(cfg, stage)
    ]


def _entry(cfg, store, stage, item, address, made, rate, bf16) -> Entry:
    state = _state(store, address)
    try:
        job = (
            family(cfg.family).cost(cfg, stage, item, made, bf16)
            if stage in stages.TRAINING
            else None
        )
    except BudgetError as error:
        return Entry(address, state, None, None, "" if state == "done" else str(error))
    if job is None:
        return Entry(address, state, None, None)
    left = 0.0 if state == "done" else 1.0
    return Entry(address, state, job, None if job.flops is None else left * job.flops / rate)


def _state(store: Store, address: str) -> str:
    if store.has(address):
        return "done"
    steps = [_saved_step(path) for path in store.resume(address).glob("*/state.json")]
    return f"at step {max(steps)}" if steps else "to do"


def _saved_step(path: Path) -> int:
    try:
        return int(json.loads(path.read_text("utf-8"))["run"]["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _made(cfg: RunConfig, store: Store) -> dict[tuple[str, str | None], dict]:
    """Return the metrics of every finished job of the run by stage and item: what a family knows
    its costs from."""
    found = [job for stage in stages.RUN for job in stages.jobs(cfg, stage)]
    return {
        (stage, item): store.manifest(here).metrics
        for stage, item, here in found
        if store.has(here)
    }


def _flops_per_s(store: Store, bf16: bool) -> float:
    """Return the rate this machine's finished jobs reached, else a share of its matrix-product
    rate."""
    rates, here = [], (cpu_name(), gpu_name())
    for address in store.addresses():
        manifest = store.manifest(address) if store.has(address) else None
        machine = manifest.made.get("machine", {}) if manifest else {}
        if (
            manifest
            and (machine.get("cpu"), machine.get("gpu")) == here
            and manifest.metrics.get("tokens_per_s")
        ):
            rates.append(manifest.metrics["tokens_per_s"] * manifest.metrics["flops_per_token"])
    if rates:
        return sorted(rates)[len(rates) // 2]
    return ASSUMED_MFU * product_flops_per_s(bf16)


def show_plan(
    cfg: RunConfig, store: Store, console: Console, total_bytes: int | None = None
) -> None:
    """Print a plan as a table, and how many experts fit into total_bytes side by side (none: what
    is free here)."""
    entries = plan(cfg, store)
    table = Table(
        title=f"plan of {cfg.name} in {store.root}", title_justify="left", title_style="bold"
    )
    table.add_column("job", style="cyan", overflow="fold")
    table.add_column("state")
    for name in ("tokens", "parameters", "time", "peak memory"):
        table.add_column(name, justify="right")
    table.add_column("how it runs")
    for e in entries:
        table.add_row(e.address, e.state, *(_cells(e) if e.job else ("",) * 5))
    console.print(table)
    known = [e.seconds for e in entries if e.seconds is not None]
    unknown = any(e.job and e.seconds is None for e in entries)
    least = "at least " if unknown else ""
    where = gpu_name() or f"{cpu_name()}, {cores()} cores"
    console.print(f"to train: {least}{duration(sum(known))} on {where}, one job after another")
    console.print(
        "Time is an estimate from jobs this machine has finished, or from a short probe; memory is predicted,"
    )
    console.print(
        "above the level after imports. Both are measured while a job runs (its manifest.json tells)."
    )
    console.print(_beside(entries, total_bytes))
    for refused in dict.fromkeys(e.refused for e in entries if e.refused):
        console.print(f"[bold red]refused:[/] {escape(refused)}")
    if unknown:
        console.print("Durations in epochs are known after preprocess has counted the tokens.")


def _beside(entries: list[Entry], total_bytes: int | None) -> str:
    """Return how many experts fit side by side; what they import is shared, as they are forked with
    it."""
    needed = max(
        (e.job.peak_bytes for e in entries if e.job and e.job.stage == "train_experts"), default=0
    )
    if not needed:
        return "how many experts fit side by side cannot be told: none is planned, or the model is not here yet"
    total = total_bytes or free_bytes()
    where = "" if total_bytes else " that are free here"
    return (
        f"side by side: {total // needed} experts of {needed / 1e6:,.0f} MB fit into the {total / 1e9:,.1f} GB{where} "
        "(--parallel N; a runtime.memory_budget makes each smaller)"
    )


def _cells(e: Entry) -> tuple[str, str, str, str, str]:
    tokens = "after preprocess" if e.job.tokens is None else f"{e.job.tokens:,}"
    time = "?" if e.seconds is None else duration(e.seconds)
    return (
        tokens,
        f"{e.job.parameters:,}",
        "" if e.state == "done" else time,
        f"{e.job.peak_bytes / 1e6:,.0f} MB",
        e.job.summary,
    )


def duration(seconds: float) -> str:
    """Return a length of time as people say it: 42 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def figures(metrics: dict) -> str:
    """Return what came out of a job in a line: a training's losses, else its numbers by name."""
    if "valid_nats" not in metrics:
        return "; ".join(filter(None, (_named(key, value) for key, value in metrics.items())))
    steps, planned = metrics["steps"], metrics.get("planned_steps", metrics["steps"])
    if not steps:
        return f"no training, valid {metrics['valid_nats']:.3f} nats"
    out = [f"{steps} steps" + (f" (stopped early of {planned})" if steps < planned else "")]
    out += [f"train {metrics['train_nats']:.3f}"] if "train_nats" in metrics else []
    out += [f"valid {metrics['valid_nats']:.3f} nats", f"{metrics['tokens_per_s']:,.0f} tokens/s"]
    return ", ".join(out + ([f"peak {metrics['peak_mb']:.0f} MB"] if "peak_mb" in metrics else []))


def _named(name: str, value) -> str:
    if isinstance(value, bool) or value is None or value == {}:
        return ""
    if isinstance(value, dict):
        inner = ", ".join(filter(None, (_named(key, each) for key, each in value.items())))
        return f"{name.replace('_', ' ')}: {inner}" if inner else ""
    shown = (
        f"{value:,}"
        if isinstance(value, int)
        else f"{value:.4g}"
        if isinstance(value, float)
        else None
    )
    return f"{name.replace('_', ' ')} {shown or value}" if shown or isinstance(value, str) else ""


def prune(configs: list[RunConfig], store: Store, remove: bool, console: Console) -> None:
    """List artifacts and checkpoints that none of the configurations reaches; remove them when
    asked to."""
    kept = {address for cfg in configs for address in stages.reachable(cfg)}
    folders = [
        p
        for kind in ("artifacts", "resume", "jobs")
        for p in _below(store.root / kind)
        if p.name not in kept
    ]
    if not folders:
        console.print(
            f"nothing to prune in {store.root}: every artifact belongs to one of {len(configs)} configurations"
        )
        return
    for folder in folders:
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        console.print(f"{size / 1e6:10.1f} MB  {folder}", highlight=False, soft_wrap=True)
        if remove:
            with store.lock(folder.name):
                (folder / "manifest.json").unlink(
                    missing_ok=True
                )  # first: without it the rest is no artifact
                shutil.rmtree(folder)
    done = (
        "removed"
        if remove
        else "not removed: runs made with --override are listed too; add --yes to remove"
    )
    console.print(f"{len(folders)} folders that no configuration reaches, {done}")


def _below(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir()) if folder.exists() else []
