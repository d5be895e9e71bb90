"""The means by which a training keeps its memory promise, and their choice: predict, then take the
fastest that fits.

Every one of them leaves the mathematics as it is; moments and gradients in bf16 round differently.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from math import ceil

from ..errors import BudgetError, ConfigError

# of a forward pass: more is slower on a processor, as activations leave its caches
FAST_TOKENS = 2048
SMALL_CHUNK_LOGITS = (
    2**21,
    2**20,
)  # of the loss with one row at a time: 37 and 50 MB less than with 2**22
MMAP_THRESHOLD_BYTES, LOW_MMAP_THRESHOLD_BYTES = 2**22, 200_000
TRIM_THRESHOLD_BYTES, LOW_TRIM_THRESHOLD_BYTES = (
    48_000_000,
    128_000,
)  # of the heap: what goes back is asked for again soon
CLOSE = 0.97  # share of the budget at which the micro-batch is halved
DOUBT = 1.25  # times what a row is predicted to take
# for moments in bf16: beyond it a step changes the second one by less than bf16 can hold
MOST_BETA2 = 0.99

# of one number; 8-bit moments have an fp32 scale for every block of 256
NUMBER_BYTES = {"fp32": 4, "bf16": 2, "int8": 1 + 4 / 256}


@dataclass(frozen=True)
class MemoryPlan:
    """How one training runs."""

    micro_batch_sequences: int
    moments: str = "fp32"
    gradients: str = "fp32"
    checkpointing: bool = False
    chunk_logits: int = 2**22
    fuse_optimizer: bool = False
    compile: bool = False
    # larger blocks go back to the system at once, which costs page faults
    mmap_threshold_bytes: int = MMAP_THRESHOLD_BYTES
    trim_each_pass: bool = False  # after each forward and backward pass smaller ones do
    whole_batch: bool = False  # a batch must run in one piece
    budget_bytes: int | None = None
    bytes_per_row: int = field(default=0, compare=False)  # predicted for one more row

    @property
    def state_bytes(self) -> float:
        """Bytes of each parameter that is trained: its fp32 weight, its gradient, two moments."""
        return 4 + NUMBER_BYTES[self.gradients] + 2 * NUMBER_BYTES[self.moments]

    @property
    def low_mmap_threshold(self) -> bool:
        """Whether the allocator keeps next to nothing for itself."""
        return self.mmap_threshold_bytes < MMAP_THRESHOLD_BYTES

    @property
    def trim_threshold_bytes(self) -> int:
        """How much may be free at the heap's end before it goes back to the system."""
        return LOW_TRIM_THRESHOLD_BYTES if self.low_mmap_threshold else TRIM_THRESHOLD_BYTES

    @property
    def summary(self) -> str:
        """The means for people."""
        parts = [f"{self.micro_batch_sequences} sequences at a time"]
        parts += [f"{self.moments} moments"] if self.moments != "fp32" else []
        parts += [f"{self.gradients} gradients"] if self.gradients != "fp32" else []
        parts += ["checkpointing"] if self.checkpointing else []
        parts += ["fused optimizer"] if self.fuse_optimizer else []
        parts += (
            [f"mmap threshold ({self.mmap_threshold_bytes / 1e6:.1f} MB)"]
            if self.low_mmap_threshold
            else []
        )
        parts += ["compiled"] if self.compile else []
        return ", ".join(parts)


def unbounded(opts, tokens_per_row: int, divisible: bool, gpu: bool) -> MemoryPlan:
    """Return the means without a budget: what the settings say, and the micro-batch that runs
    fastest.

    Raises ConfigError for moments that cannot be kept as they were asked for.
    """
    if opts.moments == "bf16" and opts.beta2 > MOST_BETA2:
        raise ConfigError(
            f"moments: bf16 with beta2 {opts.beta2:g} would never forget, as a bf16 number changes by 0.4 % or not at "
            f"all; set beta2 to {MOST_BETA2:g} or less, or moments to fp32 or int8"
        )
    whole = opts.fuse_optimizer or not divisible
    fast = opts.batch_sequences if gpu or whole else max(1, FAST_TOKENS // tokens_per_row)
    return MemoryPlan(
        micro_batch_sequences=min(opts.micro_batch_sequences or fast, opts.batch_sequences),
        moments=opts.moments or "fp32",
        gradients=opts.gradients or "fp32",
        checkpointing=bool(opts.checkpointing),
        fuse_optimizer=opts.fuse_optimizer,
        compile=opts.compile,
        whole_batch=whole,
    )


def plan_memory(
    opts,
    tokens_per_row: int,
    budget_bytes: int | None,
    predict: Callable[[MemoryPlan], int],
    *,
    row_bytes: int = 0,
    divisible: bool = True,
    can_checkpoint: bool = True,
    gpu: bool = False,
    name: str = "this job",
) -> MemoryPlan:
    """Return the fastest means whose predicted peak fits; settings that were given stay as they
    are.

    row_bytes: of the residual stream of a row. `divisible`: a batch may be run in pieces.
    `can_checkpoint`: a forward pass may be made twice. Raises BudgetError with the smallest budget
    that works, or ConfigError.
    """
    first = unbounded(opts, tokens_per_row, divisible, gpu)
    first = replace(first, checkpointing=first.checkpointing and can_checkpoint)
    if budget_bytes is None:
        return first
    free = not first.whole_batch and not opts.micro_batch_sequences
    sizes = _halves(first.micro_batch_sequences) if free else [first.micro_batch_sequences]
    again = (
        [False, True] if can_checkpoint and opts.checkpointing is None else [first.checkpointing]
    )
    start = replace(first, budget_bytes=budget_bytes)
    tried = list(_candidates(opts, start, sizes, again, row_bytes))
    for memory_plan in tried:
        if predict(memory_plan) <= budget_bytes:
            return replace(memory_plan, bytes_per_row=_more_bytes(memory_plan, predict))
    least = min(map(predict, tried))
    raise BudgetError(
        f"{name} does not fit into runtime.memory_budget {budget_bytes / 1e6:.0f}MB: the smallest that works is "
        f"{ceil(least / 1e6)}MB ({min(tried, key=predict).summary})"
    )


def _more_bytes(memory_plan: MemoryPlan, predict: Callable[[MemoryPlan], int]) -> int:
    more = memory_plan.micro_batch_sequences - 1
    return (
        max(0, predict(memory_plan) - predict(replace(memory_plan, micro_batch_sequences=1)))
        // more
        if more
        else 0
    )


def _halves(size: int) -> list[int]:
    return [size] + (_halves(size // 2) if size > 1 else [])


def _candidates(
    opts, first: MemoryPlan, sizes: list[int], again: list[bool], row_bytes: int
) -> Iterator[MemoryPlan]:
    """Yield means from the fastest to the most thrifty: each rung costs a little more time than the
    one before."""
    half = "bf16" if opts.beta2 <= MOST_BETA2 else "fp32"
    kinds = [("fp32", "fp32"), (half, "fp32"), (half, "bf16")] + [("int8", "bf16")] * has_int8()
    small = int(1.2 * row_bytes)
    rungs = [
        (False, MMAP_THRESHOLD_BYTES, False),
        (False, LOW_MMAP_THRESHOLD_BYTES, False),
        (True, small, True),
    ]
    rungs += [(True, LOW_MMAP_THRESHOLD_BYTES, False)]
    usable = [rung for rung in rungs if rung[0] in again]
    for (checkpointing, mmap_threshold_bytes, trim), (moments, gradients) in product(usable, kinds):
        for size, chunk_logits in _pieces(
            sizes, first.chunk_logits, lean=mmap_threshold_bytes < MMAP_THRESHOLD_BYTES
        ):
            yield replace(
                first,
                micro_batch_sequences=size,
                moments=opts.moments or moments,
                gradients=opts.gradients or gradients,
                checkpointing=checkpointing,
                mmap_threshold_bytes=max(
                    LOW_MMAP_THRESHOLD_BYTES,
                    min(MMAP_THRESHOLD_BYTES, mmap_threshold_bytes * (size if trim else 1)),
                ),
                trim_each_pass=trim,
                chunk_logits=chunk_logits,
            )


def _pieces(sizes: list[int], chunk_logits: int, lean: bool) -> Iterator[tuple[int, int]]:
    """Yield rows of a pass with logits of a chunk; a lean heap has no room for more than the
    smallest chunk."""
    for size in sizes:
        chunks = (
            [chunk_logits] if size > 1 else SMALL_CHUNK_LOGITS[-1:] if lean else SMALL_CHUNK_LOGITS
        )
        yield from ((size, chunk) for chunk in chunks)


def has_int8() -> bool:
    """Whether the library for 8-bit moments is installed."""
    return importlib.util.find_spec("bitsandbytes") is not None


class MemoryGuard:
    """Rows of a forward pass: as many as the means say, fewer where the measured peak comes near
    the budget.

    Under a budget the first passes start with one row and grow, so that a wrong prediction is seen
    before it costs anything; where it ended is kept with the run's progress, so that a resumed run
    splits its batches alike.
    """

    def __init__(self, memory_plan: MemoryPlan, peak, run, note: Callable[[str], None]):
        self.memory_plan, self.peak, self.run, self.note = memory_plan, peak, run, note
        peak.clear()  # what loading reached says nothing of a row
        self.before_bytes, self.halved_bytes = (
            peak.bytes(),
            0,
        )  # a peak that cannot be cleared counts once
        self.told = False
        rows = memory_plan.micro_batch_sequences
        run.most = min(run.most or rows, rows)
        run.micro = min(run.micro or (1 if self._watched else rows), run.most)

    @property
    def _watched(self) -> bool:
        return self.memory_plan.budget_bytes is not None and not self.memory_plan.whole_batch

    def sizes(self, total: int) -> Iterator[int]:
        """Yield rows until there are `total`; looks at the peak after each."""
        while total > 0:
            size = min(self.run.micro, total)
            yield size
            total -= size
            if self.memory_plan.budget_bytes is not None:
                self._adapt(size)

    def _adapt(self, size: int) -> None:
        run, budget_bytes, now = self.run, self.memory_plan.budget_bytes, self.peak.bytes()
        least = run.micro == 1 or self.memory_plan.whole_batch
        if not least and now > max(CLOSE * budget_bytes, self.halved_bytes):
            run.micro = run.most = run.micro // 2
            self.note(
                f"{now / 1e6:,.0f} MB of {budget_bytes / 1e6:,.0f} MB used: going on with {run.micro} sequences at a "
                "time, same batches"
            )
            self.peak.clear()
            self.halved_bytes = self.peak.bytes()
        elif least and now > budget_bytes and not self.told:
            self.told = True
            self.note(
                f"{now / 1e6:,.0f} MB of {budget_bytes / 1e6:,.0f} MB used with {size} sequences at a time, and fewer "
                f"cannot be: the budget is not kept; raise runtime.memory_budget to {ceil(now / 1e6)}MB"
            )
        elif size == run.micro < run.most:
            grown = min(2 * size, run.most)
            per_row = (
                max(0, now - self.before_bytes) / size
            )  # at most: gradients and moments came with the first row
            if self.memory_plan.bytes_per_row:
                per_row = min(per_row, DOUBT * self.memory_plan.bytes_per_row)
            if now + (grown - size) * per_row <= CLOSE * budget_bytes:
                run.micro = grown
