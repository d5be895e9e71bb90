"""The one training loop. A Task says what to train; fit trains it and can be killed anywhere.

Batch k is a function of (seed, k), so a resumed run is bit-identical to an undisturbed one on the same
hardware with the same thread count.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from .budget import Peak, product_flops_per_s
from .checkpoint import Progress, restore, save
from .config import Fit
from .errors import Interrupted, NotFiniteError, PipelineError
from .store import room

TAIL_STEPS = 50  # training loss in the manifest is the mean over the last so many steps


def _nothing(_step: int) -> None: ...


def _no_penalty() -> float:
    return 0.0


def _no_numbers() -> dict:
    return {}


@dataclass(frozen=True)
class Task:
    """What one training run is."""

    options: Fit
    parameters: dict[str, nn.Parameter]  # only these move
    batch: Callable[[int, int], Any]  # (first row, rows) -> what loss takes
    loss: Callable[[Any], torch.Tensor]  # batch -> mean nats per target
    export: Callable[[int], dict[str, dict]]  # kept step -> {file name: tensors (.safetensors) or values (.json)}
    steps: int
    tokens_per_row: int
    validate: Callable[[], float] | None = None  # mean nats on the shared validation set
    before_step: Callable[[int], None] = _nothing
    penalty: Callable[[], torch.Tensor | float] = _no_penalty  # balance and z-loss of the forward pass just made
    after_step: Callable[[], dict] = _no_numbers  # numbers for the history row
    state: dict[str, torch.Tensor] = field(default_factory=dict)  # other tensors that must survive
    flops_per_token: float = 0.0
    bf16: bool = False


class Recorder(Protocol):
    """Where fit reports to; history.Recorder is one."""

    def start(self, step: int) -> None: ...

    def row(self, row: dict) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class Place:
    """Where one run keeps its checkpoints and reports, and how often."""

    slots: Path
    recorder: Recorder
    publish: Callable[[], None]
    name: str  # for messages: the stage and the item
    settings: str  # for messages: the configuration section
    save_every_s: float = 60.0
    log_every_steps: int = 10


def lr_at(step: int, steps: int, opts) -> float:
    """Return the learning rate of a step: linear warm-up, then cosine to min_lr_share, or constant."""
    if step < opts.warmup_steps:
        return opts.lr * (step + 1) / opts.warmup_steps
    if opts.schedule == "constant":
        return opts.lr
    share = (step - opts.warmup_steps) / max(1, steps - opts.warmup_steps)
    return opts.lr * (opts.min_lr_share + (1 - opts.min_lr_share) * 0.5 * (1 + math.cos(math.pi * share)))


def fit(task: Task, place: Place) -> dict:
    """Train task for its steps from the last good checkpoint; leave the kept state in its parameters.

    Returns metrics: steps, tokens, train_nats, valid_nats, best_step, seconds and their breakdown,
    tokens_per_s, peak_mb. Raises NotFiniteError, Interrupted after saving, DiskFull, and PipelineError
    when nothing was trained.
    """
    if not task.parameters or not all(p.requires_grad for p in task.parameters.values()):
        raise PipelineError(f"{place.name} has no parameters to train: this is a fault of the family, please report it")
    opts = task.options
    peak, clock = Peak(), _Clock(next(iter(task.parameters.values())).device)
    optimizer = _optimizer(task, opts)
    run = restore(place.slots, task, optimizer, place.recorder.note) or Progress(start=_fingerprint(task))
    place.recorder.start(run.step)
    saved_at, logged_step = time.monotonic(), run.step
    with _asked_to_stop() as stop:
        while True:
            if _due(run.step, task.steps, opts.eval_every_steps) and run.evaluated_step < run.step and task.validate:
                valid_nats = task.validate()
                if not math.isfinite(valid_nats):
                    what = f"the validation loss at step {run.step} is {valid_nats}"
                    raise NotFiniteError(_not_finite(place, run, what))
                run.evaluated(valid_nats, {n: p.detach() for n, p in task.parameters.items()}, opts.keep)
                clock.lap("evaluate")
                tokens = run.step * opts.batch_sequences * task.tokens_per_row
                place.recorder.row(
                    {"step": run.step, "tokens": tokens, "valid_nats": run.valid_nats, "time": time.time()}
                )
            done = run.step >= task.steps or (opts.patience and run.waits >= opts.patience)
            if done or stop.is_set() or time.monotonic() - saved_at >= place.save_every_s:
                with room(place.slots):
                    save(place.slots, task, optimizer, run)
                place.publish()
                saved_at = time.monotonic()
                clock.lap("save")
            if stop.is_set() and not done:
                raise Interrupted(f"{place.name}: stopped and saved at step {run.step} of {task.steps}")
            if done:
                break

            task.before_step(run.step)
            lr = lr_at(run.step, task.steps, opts)
            for group in optimizer.param_groups:
                group["lr"] = lr
            micro = opts.micro_batch_sequences or opts.batch_sequences
            first = run.step * opts.batch_sequences
            sizes = [min(micro, opts.batch_sequences - at) for at in range(0, opts.batch_sequences, micro)]
            batches = [task.batch(first + i * micro, size) for i, size in enumerate(sizes)]
            clock.lap("data")
            nats = 0.0
            for size, batch in zip(sizes, batches, strict=True):
                share = size / opts.batch_sequences
                loss = task.loss(batch)
                total = (loss + task.penalty()) * share
                clock.lap("forward")
                total.backward()
                nats += loss.item() * share
                clock.lap("backward")
            norm = nn.utils.clip_grad_norm_(task.parameters.values(), opts.clip_norm or math.inf).item()
            if not math.isfinite(nats + norm):
                what = f"the loss at step {run.step} is {nats} (gradient norm {norm}, learning rate {lr:.2g})"
                raise NotFiniteError(_not_finite(place, run, what))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            numbers = task.after_step()
            clock.lap("optimizer")
            run.step += 1
            run.tail = [*run.tail, nats][-TAIL_STEPS:]

            if run.step % place.log_every_steps == 0 or run.step == task.steps:
                tokens = (run.step - logged_step) * opts.batch_sequences * task.tokens_per_row
                logged_step = run.step
                place.recorder.row(_row(run, task, opts, lr, norm, numbers, clock.since(run), tokens, peak))
    _check_moved(task, run, place)
    if opts.keep == "best":
        run.restore_best(task)
    clock.since(run)
    return _metrics(run, task, opts, peak)


def _row(run, task, opts, lr, norm, numbers, laps, tokens, peak) -> dict:
    seconds = sum(laps[k] for k in ("data", "forward", "backward", "optimizer"))
    return {
        "step": run.step, "tokens": run.step * opts.batch_sequences * task.tokens_per_row,
        "train_nats": run.tail[-1], "lr": lr, "grad_norm": norm, "tokens_per_s": tokens / max(seconds, 1e-9),
        "rss_mb": peak.bytes() / 1e6, **{f"{k}_s": v for k, v in laps.items()}, **numbers, "time": time.time(),
    }  # fmt: skip


def _metrics(run: Progress, task: Task, opts, peak: Peak) -> dict:
    tokens = run.step * opts.batch_sequences * task.tokens_per_row
    training_s = sum(run.seconds.get(k, 0.0) for k in ("data", "forward", "backward", "optimizer"))
    rate = tokens / training_s if training_s else 0.0
    rate_flops = product_flops_per_s(task.bf16)
    return {
        "steps": run.step, "planned_steps": task.steps, "tokens": tokens,
        "train_nats": sum(run.tail) / len(run.tail) if run.tail else None,
        "valid_nats": run.best_nats if opts.keep == "best" else run.valid_nats,
        "kept_step": run.best_step if opts.keep == "best" and task.validate else run.step,
        "seconds": sum(run.seconds.values()), "training_s": training_s,
        **{f"{k}_s": v for k, v in sorted(run.seconds.items())}, "tokens_per_s": rate,
        "flops_per_token": task.flops_per_token, "mfu": rate * task.flops_per_token / rate_flops,
        "peak_mb": peak.bytes() / 1e6, "parameters": sum(p.numel() for p in task.parameters.values()),
    }  # fmt: skip


def _due(step: int, steps: int, every: int) -> bool:
    return step == steps or bool(every and step and step % every == 0)


def _optimizer(task: Task, opts) -> torch.optim.AdamW:
    """Fused AdamW; only matrices decay, as usual for transformers."""
    matrices = [p for p in task.parameters.values() if p.ndim >= 2]
    vectors = [p for p in task.parameters.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": opts.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=opts.lr, betas=(0.9, opts.beta2), fused=True)


def _fingerprint(task: Task) -> dict[str, float]:
    """Return a sum per parameter that training changes; how _check_moved knows."""
    weigh = {n: torch.linspace(1, 2, p.numel(), dtype=torch.float64) for n, p in task.parameters.items()}
    return {n: float(p.detach().cpu().double().flatten() @ weigh[n]) for n, p in task.parameters.items()}


def _check_moved(task: Task, run: Progress, place: Place) -> None:
    """Raise PipelineError when a parameter never changed: a run that trains nothing must not pass for one that did."""
    still = [n for n, now in _fingerprint(task).items() if run.step and now == run.start[n]]
    if still:
        raise PipelineError(
            f"{place.name}: {len(still)} of {len(task.parameters)} tensors did not change in {run.step} steps, "
            f"first {still[0]}; raise {place.settings}.lr, or report this if the rate is sensible"
        )


def _not_finite(place: Place, run: Progress, what: str) -> str:
    kept = f"the last good checkpoint is step {run.saved_step} in {place.slots}"
    last = kept if run.saved_step else "no checkpoint was saved yet"
    return (
        f"{place.name}: {what}; {last}. "
        f"Try a lower {place.settings}.lr, a longer {place.settings}.warmup_steps, a smaller "
        f"{place.settings}.clip_norm, or dtype: fp32"
    )


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """Turn SIGINT and SIGTERM into an event while training; the main thread alone may set handlers."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Clock:
    """Seconds per phase; waits for a GPU at each lap so that the phases are true."""

    def __init__(self, device: torch.device):
        self.device, self.laps, self.last = device, {}, time.perf_counter()

    def lap(self, phase: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        here = time.perf_counter()
        self.laps[phase] = self.laps.get(phase, 0.0) + here - self.last
        self.last = here

    def since(self, run: Progress) -> dict[str, float]:
        """Return the laps since the last call and add them to the run's totals."""
        laps, self.laps = {k: self.laps.get(k, 0.0) for k in ("data", "forward", "backward", "optimizer")}, self.laps
        for phase, seconds in self.laps.items():
            run.seconds[phase] = run.seconds.get(phase, 0.0) + seconds
        self.laps = {}
        return laps
