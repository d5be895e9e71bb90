"""The one training loop. A Task says what to train; fit trains it and can be killed anywhere.

Batch k is a function of (seed, k), so a resumed run is bit-identical to an undisturbed one on the
same processor with the same thread count. On a GPU only as far as torch's kernels add up in a fixed
order.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..config.fit import FitConfig
from ..errors import Interrupted, NotFiniteError, PipelineError
from ..hardware import product_flops_per_s
from ..store.room import translate_disk_errors
from .checkpoint import TrainState, load_best, restore, save, save_best
from .memory_meter import Peak, set_malloc_thresholds, trim_heap
from .memory_plan import MemoryGuard, MemoryPlan, unbounded
from .optimizer import AdamW, FusedStep, gradients_in
from .rounding import go_on, rounding
from .step_clock import PHASES, StepClock
from .thread_watch import ThreadWatch

# Training loss in the manifest is the mean over the last so many steps.
TAIL_STEPS = 50
GRADIENT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _nothing(_step: int) -> None: ...


def _no_penalty() -> float:
    return 0.0


def _no_numbers() -> dict[str, Any]:
    return {}


def _no_numbers_at(_step: int) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Task:
    """What one training run is."""

    options: FitConfig
    parameters: dict[str, nn.Parameter]  # only these move
    batch: Callable[[int, int], Any]  # (first row, rows) -> what loss takes
    loss: Callable[[Any], Tensor]  # batch -> mean nats per target
    # kept step -> {file name: tensors (.safetensors) or values (.json)}
    export: Callable[[int], dict[str, dict]]
    steps: int
    tokens_per_row: int
    validate: Callable[[], float] | None = None  # mean nats on the shared validation set
    before_step: Callable[[int], None] = _nothing
    # balance and z-loss of the forward pass just made
    penalty: Callable[[], Tensor | float] = _no_penalty
    after_step: Callable[[], dict[str, Any]] = _no_numbers  # numbers for the history row
    # after which steps to validate beside the last; none: as the options say
    validates_at: Callable[[int], bool] | None = None
    # step of a validation just made -> numbers for its history row
    after_validation: Callable[[int], dict[str, Any]] = _no_numbers_at
    state: dict[str, Tensor] = field(default_factory=dict)  # other tensors that must survive
    flops_per_token: float = 0.0
    bf16: bool = False
    # parameters that compute in bf16 while they train; fit leaves them fp32
    bf16_params: tuple[str, ...] = ()
    # parameters without a gradient in the first step, as those that multiply them are still zero
    zero_first_gradient: tuple[str, ...] = ()
    # parameters that need not move, as no token may ever reach them
    may_rest: tuple[str, ...] = ()
    memory_plan: MemoryPlan | None = None  # None: what the options say, nothing chosen
    notes: tuple[str, ...] = ()  # what a person should know before it starts


@dataclass(frozen=True)
class NoTraining:
    """A part that needs no training: what is written instead."""

    write: Callable[[Path], dict[str, Any]]  # folder -> metrics, its files written


class HistoryWriter(Protocol):
    """Where fit reports to; history.Recorder is one."""

    def start(self, step: int) -> None:
        """Begin at a step: 0, or where a killed run goes on."""

    def row(self, row: dict[str, Any]) -> None:
        """Keep the numbers of a step."""

    def step_taken(self, step: int) -> None:
        """Tell a person how far the run is, after a step without a row."""

    def note(self, text: str) -> None:
        """Tell a person something on the way."""


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
    # address -> digest of what the training reads; none: unknown, and nobody compares
    inputs: Mapping[str, str] | None = None
    address: str = ""  # of what is trained; empty: unknown, and nobody compares
    peak: Peak = field(default_factory=Peak)  # made before the network was loaded, to count it
    watch: ThreadWatch | None = None  # none: the threads stay as they are
    rate: str = ""  # for messages: the setting that is its learning rate; empty: that of `settings`
    resumable: bool = True  # False: so short that it is made again, and no checkpoint is written

    @property
    def rate_setting(self) -> str:
        """The setting that is its learning rate, for messages."""
        return self.rate or f"{self.settings}.lr"


def lr_at(step: int, steps: int, opts: FitConfig) -> float:
    """Return the learning rate of a step: linear warm-up, then cosine to min_lr_share, or
    constant."""
    # A warm-up longer than the training would end it far below the rate that was asked for
    warmup_steps = min(opts.warmup_steps, steps)
    if step < warmup_steps:
        return opts.rate * (step + 1) / warmup_steps
    if opts.schedule == "constant":
        return opts.rate
    share = (step - warmup_steps) / max(1, steps - warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * share))
    return opts.rate * (opts.min_lr_share + (1 - opts.min_lr_share) * cosine)


def fit(task: Task, io: TrainIO) -> dict[str, Any]:
    """Train task for its steps from the last good checkpoint; leave the kept state in its
    parameters, in fp32.

    Returns metrics: steps, tokens, train_nats, valid_nats, best_step, seconds and their breakdown,
    first_step_s (of the last attempt), cpu_s (processor seconds of steps by phase, of all threads),
    tokens_per_s, peak_mb; rates and peaks are of all attempts. Raises NotFiniteError, Interrupted
    after saving, DiskFull, UnreadableFile, OtherCheckpoint, and PipelineError when nothing was
    trained.
    """
    _check_trainable(task, io)
    opts = task.options
    step_tokens = opts.batch_sequences * task.tokens_per_row
    plan = task.memory_plan or unbounded(opts, task.tokens_per_row, False, False)
    clock = StepClock(next(iter(task.parameters.values())).device)
    optimizer = AdamW(task.parameters, opts, task.bf16_params, plan.moments)
    run = None
    if io.resumable:
        run = restore(io.slots, task, optimizer, io.recorder.note, io.inputs, io.address)
    if run is None:
        run = TrainState(
            start_checksums=_checksums(task, optimizer),
            inputs=dict(io.inputs or {}),
            address=io.address,
        )
    clock.add_to(run.seconds, run.cpu_seconds)
    io.peak.carry(run.peak_bytes, run.host_peak_bytes)
    micro_batch = run.micro_batch
    guard = MemoryGuard(plan, io.peak, run, io.recorder.note)
    io.recorder.start(run.step)
    now = rounding(plan, run.micro_batch)
    go_on(run.rounding, micro_batch, now, run.step, io.recorder.note)
    for note in task.notes:
        io.recorder.note(note)
    if 0 < task.steps < opts.warmup_steps:
        io.recorder.note(
            f"{io.settings}.warmup_steps: {opts.warmup_steps} are more than the training's "
            f"{task.steps} steps, so the peak is reached at the last one; set it lower"
        )
    saved_at_s = time.monotonic()
    logged_step = run.step
    buffers = gradients_in(
        task.parameters.values(), GRADIENT_DTYPES[plan.gradients], plan.fuse_optimizer
    )
    stepping = closing(FusedStep(optimizer)) if plan.fuse_optimizer else nullcontext()

    with _asked_to_stop() as stop, buffers, stepping as fused:
        # After the gradient buffers are made, which stay and need not be given back. Where nothing
        # is trained one validation is all, and no block is worth keeping for the next step
        if task.steps:
            set_malloc_thresholds(plan.mmap_threshold_bytes, plan.trim_threshold_bytes)
        # reading a checkpoint is no part of the first step
        clock.lap("start")
        # one round more than steps: the last one evaluates and saves what the last step made
        while True:
            _evaluate_if_due(task, io, optimizer, run, clock)
            out_of_patience = opts.patience and run.evaluations_since_best >= opts.patience
            done = run.step >= task.steps or out_of_patience
            waited_s = time.monotonic() - saved_at_s
            saves = done or stop.is_set() or waited_s >= io.save_every_s
            if saves and io.resumable:
                run.peak_bytes, run.host_peak_bytes = io.peak.reached()
                with translate_disk_errors(io.slots):
                    save(io.slots, task, optimizer, run)
                io.publish()
                saved_at_s = time.monotonic()
                clock.lap("save")
            # One of several short trainings may be done while the job is not
            if stop.is_set() and not (done and io.resumable):
                how = "stopped and saved" if io.resumable else "stopped"
                raise Interrupted(f"{io.name}: {how} at step {run.step} of {task.steps}")
            if done:
                break

            task.before_step(run.step)
            lr = lr_at(run.step, task.steps, opts)
            optimizer.lr = lr
            nats = _add_gradients(task, plan, guard, clock, run.step)
            norm = fused.norm() if fused else optimizer.norm()
            if not math.isfinite(nats + norm):
                what = (
                    f"the loss at step {run.step} is {nats} (gradient norm {norm}, "
                    f"learning rate {lr:.2g})"
                )
                raise NotFiniteError(_not_finite(io, run, what))
            # a fused step was taken inside the backward pass
            if not fused:
                optimizer.step(_clip_scale(norm, opts.clip_norm))
            numbers = task.after_step()
            clock.lap("optimizer")
            run.step += 1
            if io.watch is not None:
                told = io.watch.after_step(clock.since_step())
                if told:
                    io.recorder.note(told)
                    lowered = {"step": run.step, "threads": io.watch.threads}
                    run.rounding.append(run.rounding[-1] | lowered)
            run.recent_nats = [*run.recent_nats, nats][-TAIL_STEPS:]

            if run.step % io.log_every_steps == 0 or run.step == task.steps:
                laps = clock.since_row()
                tokens = (run.step - logged_step) * step_tokens
                logged_step = run.step
                io.recorder.row(
                    {
                        "step": run.step,
                        "tokens": run.step * step_tokens,
                        "train_nats": run.recent_nats[-1],
                        "lr": lr,
                        "grad_norm": norm,
                        # a run of nothing but its last row may have taken no time at all
                        "tokens_per_s": tokens / max(sum(laps.values()), 1e-9),
                        "rss_mb": io.peak.bytes() / 1e6,
                        **_in_seconds(laps),
                        **numbers,
                        "time": time.time(),
                    }
                )
            else:
                io.recorder.step_taken(run.step)

    _check_moved(task, optimizer, run, io)
    optimizer.restore_fp32()
    if opts.keep == "best":
        load_best(io.slots, task, run)
    return _metrics(run, task, plan, io.peak) | {"first_step_s": clock.first_step_s}


def _evaluate_if_due(
    task: Task, io: TrainIO, optimizer: AdamW, run: TrainState, clock: StepClock
) -> None:
    """Where it is due, validate, keep the state if it is the best so far, and write the row. Raises
    NotFiniteError."""
    # a resumed run does not evaluate its first step again
    if task.validate is None or run.evaluated_step >= run.step or not _due(run.step, task):
        return
    valid_nats = task.validate()
    if not math.isfinite(valid_nats):
        what = f"the validation loss at step {run.step} is {valid_nats}"
        raise NotFiniteError(_not_finite(io, run, what))
    if run.evaluated(valid_nats) and task.options.keep == "best":
        save_best(io.slots, task, optimizer, run)
    clock.lap("evaluate")
    io.recorder.row(
        {
            "step": run.step,
            "tokens": run.step * task.options.batch_sequences * task.tokens_per_row,
            "valid_nats": run.valid_nats,
            **task.after_validation(run.step),
            "time": time.time(),
        }
    )


def _add_gradients(
    task: Task, plan: MemoryPlan, guard: MemoryGuard, clock: StepClock, step: int
) -> float:
    """Run a step's batch forward and backward, in as many pieces as there is memory for; return its
    mean nats."""
    sequences = task.options.batch_sequences
    losses = []
    first_row = step * sequences
    for size in guard.sizes(sequences):
        batch = task.batch(first_row, size)
        first_row += size
        clock.lap("data")
        loss = task.loss(batch)
        total = (loss + task.penalty()) * (size / sequences)
        if plan.trim_each_pass:
            trim_heap()
        clock.lap("forward")
        total.backward()
        losses.append((loss.detach(), size))
        if plan.trim_each_pass:
            trim_heap()
        clock.lap("backward")
    # Read once all passes are under way: a GPU would have nothing to do between them
    return sum(loss.item() * size / sequences for loss, size in losses)


def _metrics(run: TrainState, task: Task, plan: MemoryPlan, peak: Peak) -> dict[str, Any]:
    opts = task.options
    tokens = run.step * opts.batch_sequences * task.tokens_per_row
    training_s = sum(run.seconds.get(phase, 0.0) for phase in PHASES)
    tokens_per_s = tokens / training_s if training_s else 0.0
    keeps_best = opts.keep == "best"
    train_nats = None
    if run.recent_nats:
        train_nats = sum(run.recent_nats) / len(run.recent_nats)
    return {
        "steps": run.step,
        "planned_steps": task.steps,
        "patience": opts.patience,
        "tokens": tokens,
        "train_nats": train_nats,
        "valid_nats": run.best_nats if keeps_best else run.valid_nats,
        "kept_step": run.best_step if keeps_best and task.validate else run.step,
        "seconds": sum(run.seconds.values()),
        "training_s": training_s,
        **_in_seconds(dict(sorted(run.seconds.items()))),
        "cpu_s": {phase: run.cpu_seconds.get(phase, 0.0) for phase in PHASES},
        "tokens_per_s": tokens_per_s,
        "flops_per_token": task.flops_per_token,
        "mfu": tokens_per_s * task.flops_per_token / product_flops_per_s(task.bf16),
        "parameters": sum(parameter.numel() for parameter in task.parameters.values()),
        "memory_plan": asdict(plan) | {"micro_batch_sequences": run.micro_batch},
        "rounding": run.rounding,
        **peak.report(),
    }


def _in_seconds(phases: dict[str, float]) -> dict[str, float]:
    """Return seconds by phase under the names that rows and metrics have for them."""
    return {f"{phase}_s": seconds for phase, seconds in phases.items()}


def _due(step: int, task: Task) -> bool:
    """Whether to evaluate at a step: at the last one, and every so many unless that is 0, or where
    the task says."""
    if step == task.steps:
        return True
    if task.validates_at is not None:
        return task.validates_at(step)
    every = task.options.eval_every_steps
    return bool(every) and step > 0 and step % every == 0


def _clip_scale(norm: float, clip_norm: float) -> float:
    """Return what to multiply gradients of that norm by; clip_norm 0 clips nothing."""
    if not clip_norm:
        return 1.0
    # the small number as in torch's clip_grad_norm_: a norm of zero must not divide
    return min(1.0, clip_norm / (norm + 1e-6))


def _check_trainable(task: Task, io: TrainIO) -> None:
    if not task.parameters or not all(p.requires_grad for p in task.parameters.values()):
        raise PipelineError(
            f"{io.name} has no parameters to train: this is a fault of the family, please report it"
        )


def _checksums(task: Task, optimizer: AdamW) -> dict[str, int]:
    """Return a checksum per parameter that training changes; how _check_moved knows."""
    return {name: optimizer.checksum(name) for name in task.parameters}


def _check_moved(task: Task, optimizer: AdamW, run: TrainState, io: TrainIO) -> None:
    """Raise PipelineError when a parameter never changed: a run that trains nothing must not pass
    for one that did."""
    if not run.step:
        return
    excused = task.may_rest
    if run.step == 1:
        excused = (*excused, *task.zero_first_gradient)
    still = []
    for name, checksum in _checksums(task, optimizer).items():
        if checksum == run.start_checksums[name] and name not in excused:
            still.append(name)
    if still:
        raise PipelineError(
            f"{io.name}: {len(still)} of {len(task.parameters)} tensors did not change in "
            f"{run.step} steps, first {still[0]}; raise {io.rate_setting}, or report this if the "
            "rate is sensible"
        )


def _not_finite(io: TrainIO, run: TrainState, what: str) -> str:
    last = "no checkpoint was saved yet"
    if run.saved_step:
        last = f"the last good checkpoint is step {run.saved_step} in {io.slots}"
    return (
        f"{io.name}: {what}; {last}. "
        f"Try a lower {io.rate_setting}, a longer {io.settings}.warmup_steps, a smaller "
        f"{io.settings}.clip_norm, or dtype: fp32"
    )


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """Turn SIGINT and SIGTERM into an event while training."""
    stop = threading.Event()
    # Python lets the main thread alone set handlers
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, lambda *_: stop.set())
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
