"""A training stage, whatever is trained: the family says what a Task is, this fits it."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from ..hardware import fastest_threads, machine, order_sums, uses_bf16
from ..store.artifacts import save_tensors, write_text
from ..store.history import Recorder
from ..store.reading import reading, sealed, unsealed
from ..train.loop import HistoryWriter, NoTraining, Task, TrainIO, fit
from ..train.lr_search import FOUND, Search, search
from ..train.memory_meter import Peak, lower_mmap_threshold
from ..train.optimizer_state import import_int8
from ..train.thread_watch import ThreadWatch
from .context import JobContext
from .former import former_checkpoint, note_settings


def train(job: JobContext) -> dict:
    """Make the family's task for this stage and fit it, or write what needs no training; return
    metrics."""
    make_task = job.function()
    order_sums()
    if job.cfg.may_keep_int8:
        import_int8()
    # A job's memory is counted from here: everything is imported, 8-bit kernels too, and nothing
    # is loaded yet
    peak = Peak()
    lower_mmap_threshold()
    watch = set_threads(job)
    task = make_task(job.cfg, job.parts)
    if isinstance(task, NoTraining):
        return task.write(job.folder) | peak.report()
    if isinstance(task, Search):
        return search_rate(job, task, peak, watch)
    former = former_checkpoint(job.parts.addresses, job.stage, job.item, job.store)
    if former:
        job.progress(former, None)
    note_settings(job.store, job.address, job.cfg)
    return fit_task(job, task, peak, watch)


def set_threads(job: JobContext) -> ThreadWatch | None:
    """Choose the threads of a job when they are to be measured; a job that goes on keeps those it
    had last. Returns who lowers them when the machine gets busy."""
    if job.cfg.runtime.threads != "auto":
        return None
    note = job.store.resume(job.address) / "threads.json"

    def keep(had: tuple[int, ...], first_s: float) -> None:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_text(note, sealed({"threads": had, "first_s": first_s}))

    noted = _noted_threads(note)
    if noted is None:
        noted = (fastest_threads(torch.get_num_threads()),), 0.0
        keep(*noted)
    watch = ThreadWatch(*noted, keep)
    torch.set_num_threads(watch.threads)
    return watch


def _noted_threads(note: Path) -> tuple[tuple[int, ...], float] | None:
    """Return the threads that a job had, one after another, and the seconds of its first steps.

    None when it begins, or the note is damaged, which costs no more than measuring again. Raises
    UnreadableFile.
    """
    try:
        with reading(note):
            raw = unsealed(note.read_bytes())
        had, first_s = tuple(raw["threads"]), float(raw["first_s"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # true is an int too
    if not had or not all(type(threads) is int and threads > 0 for threads in had):
        return None
    return (had, first_s) if 0 <= first_s < float("inf") else None


class _Told(HistoryWriter):
    """Tells a search's steps to a person; nothing of them is kept."""

    def __init__(self, job: JobContext, rate: float, before: int, rates: int, steps: int):
        self.progress = job.progress
        self.text = f"{job.name}: rate {rate:g}, {before + 1} of {rates}"
        self.before_steps = before * steps
        self.all_steps = rates * steps

    def start(self, step: int) -> None:
        """Begin a rate."""
        self.progress(self.text, self.before_steps / self.all_steps)

    def row(self, row: dict) -> None:
        """Tell how far the search is."""
        self.progress(self.text, (self.before_steps + row["step"]) / self.all_steps)

    def step_taken(self, step: int) -> None:
        """Tell how far the search is."""
        self.progress(self.text, (self.before_steps + step) / self.all_steps)

    def note(self, text: str) -> None:
        """Tell something on the way."""
        self.progress(text, None)


def search_rate(job: JobContext, wanted: Search, peak: Peak, watch: ThreadWatch | None) -> dict:
    """Find a rate and write it with all that were tried; return metrics."""

    def tell(rate: float, before: int, rates: int) -> HistoryWriter:
        return _Told(job, rate, before, rates, wanted.steps)

    io = _io(job, tell(wanted.middle, 0, 1), peak, watch)
    found, metrics = search(wanted, io, tell)
    write_text(job.folder / FOUND, json.dumps(asdict(found), indent=1))
    return {
        "lr": found.lr,
        "losses": {f"{each.lr:g}": each.valid_nats for each in found.tried},
        **metrics,
        **peak.report(),
        "made": {"machine": machine(torch.get_num_threads(), uses_bf16(job.cfg.dtype))},
    }


def _io(job: JobContext, recorder: HistoryWriter, peak: Peak, watch: ThreadWatch | None) -> TrainIO:
    """Return where a training of this job keeps its checkpoints and reports."""
    runtime = job.cfg.runtime
    return TrainIO(
        job.store.resume(job.address),
        recorder,
        partial(job.store.publish_checkpoint, job.address),
        job.name,
        job.row.setting_name(job.item),
        runtime.save_every_s,
        runtime.log_every_steps,
        inputs=job.inputs,
        address=job.address,
        peak=peak,
        watch=watch,
        rate=job.cfg.rate_setting(job.stage, job.item),
    )


def fit_task(job: JobContext, task: Task, peak: Peak, watch: ThreadWatch | None = None) -> dict:
    """Fit a task and write what it exports; return metrics."""
    recorder = _recorder(job, task.steps)
    io = _io(job, recorder, peak, watch)
    try:
        metrics = fit(task, io)
    except BaseException:
        recorder.close(ok=False)
        raise
    recorder.close()
    for name, content in task.export(metrics["kept_step"]).items():
        _write(job.folder / name, content)
    # Once more, as the export needs memory too
    metrics |= peak.report()
    return metrics | {"made": {"machine": machine(torch.get_num_threads(), task.bf16)}}


def _recorder(job: JobContext, steps: int) -> Recorder:
    return Recorder(
        job.store.history(job.address),
        job=job.name,
        total_steps=steps,
        every=job.cfg.runtime.log_every_steps,
        wandb_mode=job.cfg.runtime.wandb,
        project=job.cfg.runtime.wandb_project,
        group=job.cfg.runtime.wandb_group,
        run_id=job.address,
        folder=job.store.root / "wandb",
        settings=job.cfg.model_dump(mode="json"),
        console=job.console,
    )


def _write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_tensors(path, content)
    else:
        write_text(path, json.dumps(content, indent=1, sort_keys=True))
