"""The one training loop. A Task says what to train; fit trains it and can be killed anywhere.

Batch k is a function of (seed, k), so a resumed run is bit-identical to an undisturbed one on the
same processor with the same thread count. On a GPU only as far as torch's kernels add up in a fixed
order.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ..config.fit import FitConfig
from ..errors import Interrupted, NotFiniteError, PipelineError
from ..hardware import product_flops_per_s
from ..store.artifacts import translate_disk_errors
from .checkpoint import TrainState, load_best, restore, save, save_best
from .memory_meter import Peak, set_malloc_thresholds, trim_heap
from .memory_plan import MemoryGuard, MemoryPlan, unbounded
from .optimizer import AdamW, gradients_in

TAIL_STEPS = 50  # training loss in the manifest is the mean over the last so many steps
# What a step's time is split into; evaluating and saving are counted, but are no part of a step
PHASES = ("data", "forward", "backward", "optimizer")
KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _nothing(_step: int) -> None: ...


def _no_penalty() -> float:
    return 0.0


def _no_numbers() -> dict:
    return {}


@dataclass(frozen=True)
class Task:
    """What one training run is."""

    options: FitConfig
    parameters: dict[str, nn.Parameter]  # only these move
    batch: Callable[[int, int], Any]  # (first row, rows) -> what loss takes
    loss: Callable[[Any], torch.Tensor]  # batch -> mean nats per target
    export: Callable[
        [int], dict[str, dict]
    ]  # kept step -> {file name: tensors (.safetensors) or values (.json)}
    steps: int
    tokens_per_row: int
    validate: Callable[[], float] | None = None  # mean nats on the shared validation set
    before_step: Callable[[int], None] = _nothing
    # balance and z-loss of the forward pass just made
    penalty: Callable[[], torch.Tensor | float] = _no_penalty
    after_step: Callable[[], dict] = _no_numbers  # numbers for the history row
    state: dict[str, torch.Tensor] = field(default_factory=dict)  # other tensors that must survive
    flops_per_token: float = 0.0
    bf16: bool = False
    bf16_params: tuple[
        str, ...
    ] = ()  # parameters that compute in bf16 while they train; fit leaves them fp32
    zero_first_gradient: tuple[
        str, ...
    ] = ()  # parameters without a gradient in the first step, as others are still zero
    memory_plan: MemoryPlan | None = None  # None: what the options say, nothing chosen
    notes: tuple[str, ...] = ()  # what a person should know before it starts


@dataclass(frozen=True)
class NoTraining:
    """A part that needs no training: what is written instead."""

    write: Callable[[Path], dict]  # folder -> metrics, its files written


class HistoryWriter(Protocol):
    """Where fit reports to; history.Recorder is one."""

    def start(self, step: int) -> None: ...

    def row(self, row: dict) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class TrainIO:
    """Where one run keeps its checkpoints and reports, and how often."""

    slots: Path
    recorder: HistoryWriter
    publish: Callable[[], None]
    name: str  # for messages: the stage and the item
    settings: str  # for messages: the configuration section
    save_every_s: float = 60.0
    log_every_steps: int = 10
    peak: Peak = field(default_factory=Peak)  # made before the network was loaded, to count it


def lr_at(step: int, steps: int, opts) -> float:
    """Return the learning rate of a step: linear warm-up, then cosine to min_lr_share, or constant."""
    if step < opts.warmup_steps:
        return opts.lr * (step + 1) / opts.warmup_steps
    if opts.schedule == "constant":
        return opts.lr
    share = (step - opts.warmup_steps) / max(1, steps - opts.warmup_steps)
    return opts.lr * (
        opts.min_lr_share + (1 - opts.min_lr_share) * 0.5 * (1 + math.cos(math.pi * share))
    )


def fit(task: Task, io: TrainIO) -> dict:
    """Train task for its steps from the last good checkpoint; leave the kept state in its
    parameters, in fp32.

    Returns metrics: steps, tokens, train_nats, valid_nats, best_step, seconds and their breakdown,
    tokens_per_s, peak_mb. Raises NotFiniteError, Interrupted after saving, DiskFull, and
    PipelineError when nothing was trained.
    """
    if not task.parameters or not all(p.requires_grad for p in task.parameters.values()):
        raise PipelineError(
            f"{io.name} has no parameters to train: this is a fault of the family, please report it"
        )
    opts = task.options
    memory_plan = task.memory_plan or unbounded(opts, task.tokens_per_row, False, False)
    peak, clock = io.peak, _StepClock(next(iter(task.parameters.values())).device)
    optimizer = AdamW(task.parameters, opts, task.bf16_params, memory_plan.moments)
    run = restore(io.slots, task, optimizer, io.recorder.note) or TrainState(
        start=_fingerprint(task, optimizer)
    )
    guard = MemoryGuard(memory_plan, peak, run, io.recorder.note)
    io.recorder.start(run.step)
    for note in task.notes:
        io.recorder.note(note)
    saved_at, logged_step = time.monotonic(), run.step
    buffers = gradients_in(
        task.parameters.values(), KINDS[memory_plan.gradients], memory_plan.fuse_optimizer
    )
    stepping = closing(_Fused(optimizer)) if memory_plan.fuse_optimizer else nullcontext()
    with _asked_to_stop() as stop, buffers, stepping as fused:
        set_malloc_thresholds(memory_plan.mmap_threshold_bytes, memory_plan.trim_threshold_bytes)
        while True:
            if (
                _due(run.step, task.steps, opts.eval_every_steps)
                and run.evaluated_step < run.step
                and task.validate
            ):
                valid_nats = task.validate()
                if not math.isfinite(valid_nats):
                    what = f"the validation loss at step {run.step} is {valid_nats}"
                    raise NotFiniteError(_not_finite(io, run, what))
                if run.evaluated(valid_nats) and opts.keep == "best":
                    save_best(io.slots, task, optimizer, run)
                clock.lap("evaluate")
                tokens = run.step * opts.batch_sequences * task.tokens_per_row
                io.recorder.row(
                    {
                        "step": run.step,
                        "tokens": tokens,
                        "valid_nats": run.valid_nats,
                        "time": time.time(),
                    }
                )
            done = run.step >= task.steps or (opts.patience and run.waits >= opts.patience)
            if done or stop.is_set() or time.monotonic() - saved_at >= io.save_every_s:
                with translate_disk_errors(io.slots):
                    save(io.slots, task, optimizer, run)
                io.publish()
                saved_at = time.monotonic()
                clock.lap("save")
            if stop.is_set() and not done:
                raise Interrupted(
                    f"{io.name}: stopped and saved at step {run.step} of {task.steps}"
                )
            if done:
                break

            task.before_step(run.step)
            lr = lr_at(run.step, task.steps, opts)
            optimizer.lr = lr
            nats, first = 0.0, run.step * opts.batch_sequences
            for size in guard.sizes(opts.batch_sequences):
                batch = task.batch(first, size)
                first += size
                clock.lap("data")
                loss = task.loss(batch)
                total = (loss + task.penalty()) * (size / opts.batch_sequences)
                if memory_plan.trim_each_pass:
                    trim_heap()
                clock.lap("forward")
                total.backward()
                nats += loss.item() * size / opts.batch_sequences
                if memory_plan.trim_each_pass:
                    trim_heap()
                clock.lap("backward")
            norm = fused.norm() if fused else optimizer.norm()
            if not math.isfinite(nats + norm):
                what = f"the loss at step {run.step} is {nats} (gradient norm {norm}, learning rate {lr:.2g})"
                raise NotFiniteError(_not_finite(io, run, what))
            if not fused:
                optimizer.step(min(1.0, opts.clip_norm / (norm + 1e-6)) if opts.clip_norm else 1.0)
            numbers = task.after_step()
            clock.lap("optimizer")
            run.step += 1
            run.tail = [*run.tail, nats][-TAIL_STEPS:]

            if run.step % io.log_every_steps == 0 or run.step == task.steps:
                tokens = (run.step - logged_step) * opts.batch_sequences * task.tokens_per_row
                logged_step = run.step
                io.recorder.row(
                    _row(run, task, opts, lr, norm, numbers, clock.since(run), tokens, peak)
                )
    _check_moved(task, optimizer, run, io)
    optimizer.restore_fp32()
    if opts.keep == "best":
        load_best(io.slots, task, run)
    clock.since(run)
    return _metrics(run, task, memory_plan, peak)


class _Fused:
    """Steps each parameter as soon as its gradient is there, and adds up the norm on the way."""

    def __init__(self, optimizer: AdamW):
        self.optimizer, self.square = optimizer, 0.0
        self.hooks = [
            parameter.register_post_accumulate_grad_hook(lambda _p, name=name: self._move(name))
            for name, parameter in optimizer.parameters.items()
        ]

    def close(self) -> None:
        """Let the parameters be as they were."""
        for hook in self.hooks:
            hook.remove()

    def _move(self, name: str) -> None:
        self.square += self.optimizer.norm([name]) ** 2
        self.optimizer.move(name)
        self.optimizer.parameters[name].grad = None

    def norm(self) -> float:
        """Return the gradient norm of the step just taken, and count it."""
        square, self.square = self.square, 0.0
        self.optimizer.steps += 1
        return math.sqrt(square)


def _row(run, task, opts, lr, norm, numbers, laps, tokens, peak) -> dict:
    seconds = sum(laps[k] for k in PHASES)
    return {
        "step": run.step,
        "tokens": run.step * opts.batch_sequences * task.tokens_per_row,
        "train_nats": run.tail[-1],
        "lr": lr,
        "grad_norm": norm,
        "tokens_per_s": tokens / max(seconds, 1e-9),
        "rss_mb": peak.bytes() / 1e6,
        **{f"{k}_s": v for k, v in laps.items()},
        **numbers,
        "time": time.time(),
    }


def _metrics(run: TrainState, task: Task, memory_plan: MemoryPlan, peak: Peak) -> dict:
    opts = task.options
    tokens = run.step * opts.batch_sequences * task.tokens_per_row
    training_s = sum(run.seconds.get(k, 0.0) for k in PHASES)
    rate = tokens / training_s if training_s else 0.0
    rate_flops = product_flops_per_s(task.bf16)
    return {
        "steps": run.step,
        "planned_steps": task.steps,
        "tokens": tokens,
        "train_nats": sum(run.tail) / len(run.tail) if run.tail else None,
        "valid_nats": run.best_nats if opts.keep == "best" else run.valid_nats,
        "kept_step": run.best_step if opts.keep == "best" and task.validate else run.step,
        "seconds": sum(run.seconds.values()),
        "training_s": training_s,
        **{f"{k}_s": v for k, v in sorted(run.seconds.items())},
        "tokens_per_s": rate,
        "flops_per_token": task.flops_per_token,
        "mfu": rate * task.flops_per_token / rate_flops,
        "parameters": sum(p.numel() for p in task.parameters.values()),
        "memory_plan": asdict(memory_plan) | {"micro_batch_sequences": run.micro},
        **peak.report(),
    }


def _due(step: int, steps: int, every: int) -> bool:
    return step == steps or bool(every and step and step % every == 0)


def _fingerprint(task: Task, optimizer: AdamW) -> dict[str, int]:
    """Return a checksum per parameter that training changes; how _check_moved knows."""
    return {name: optimizer.checksum(name) for name in task.parameters}


def _check_moved(task: Task, optimizer: AdamW, run: TrainState, io: TrainIO) -> None:
    """Raise PipelineError when a parameter never changed: a run that trains nothing must not pass
    for one that did."""
    excused = task.zero_first_gradient if run.step == 1 else ()
    same = [name for name, now in _fingerprint(task, optimizer).items() if now == run.start[name]]
    still = [name for name in same if run.step and name not in excused]
    if still:
        raise PipelineError(
            f"{io.name}: {len(still)} of {len(task.parameters)} tensors did not change in {run.step} steps, "
            f"first {still[0]}; raise {io.settings}.lr, or report this if the rate is sensible"
        )


def _not_finite(io: TrainIO, run: TrainState, what: str) -> str:
    kept = f"the last good checkpoint is step {run.saved_step} in {io.slots}"
    last = kept if run.saved_step else "no checkpoint was saved yet"
    return (
        f"{io.name}: {what}; {last}. "
        f"Try a lower {io.settings}.lr, a longer {io.settings}.warmup_steps, a smaller "
        f"{io.settings}.clip_norm, or dtype: fp32"
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


class _StepClock:
    """Seconds per phase; waits for a GPU at each lap so that the phases are true."""

    def __init__(self, device: torch.device):
        self.device, self.laps, self.last = device, {}, time.perf_counter()

    def lap(self, phase: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        here = time.perf_counter()
        self.laps[phase] = self.laps.get(phase, 0.0) + here - self.last
        self.last = here

    def since(self, run: TrainState) -> dict[str, float]:
        """Return the laps since the last call and add them to the run's totals."""
        laps, self.laps = (
            {k: self.laps.get(k, 0.0) for k in PHASES},
            self.laps,
        )
        for phase, seconds in self.laps.items():
            run.seconds[phase] = run.seconds.get(phase, 0.0) + seconds
        self.laps = {}
        return laps
