"""A training stage, whatever is trained: the family says what a Task is, this fits it."""

import json
from pathlib import Path

import torch

from ..hardware import fastest_threads, machine
from ..store.artifacts import save_tensors, write_text
from ..store.history import Recorder
from ..store.reading import reading, sealed, unsealed
from ..train.loop import NoTraining, Task, TrainIO, fit
from ..train.memory_meter import Peak, lower_mmap_threshold
from ..train.optimizer_state import import_int8
from ..train.thread_watch import ThreadWatch
from .context import JobContext
from .former import former_checkpoint, note_settings


def train(job: JobContext) -> dict:
    """Make the family's task for this stage and fit it, or write what needs no training; return
    metrics."""
    make_task = job.function()
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


def fit_task(job: JobContext, task: Task, peak: Peak, watch: ThreadWatch | None = None) -> dict:
    """Fit a task and write what it exports; return metrics."""
    runtime = job.cfg.runtime
    recorder = _recorder(job, task.steps)
    io = TrainIO(
        job.store.resume(job.address),
        recorder,
        job.store.publish,
        job.name,
        job.row.setting_name(job.item),
        runtime.save_every_s,
        runtime.log_every_steps,
        inputs=job.inputs,
        address=job.address,
        peak=peak,
        watch=watch,
    )
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
