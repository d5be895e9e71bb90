"""How a training keeps its memory promise: predict the peak of each candidate, then take the
fastest plan that fits.

Every plan leaves the mathematics as it is; moments and gradients in bf16 round differently.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import product
from math import ceil
from typing import TYPE_CHECKING

from ..config.fit import FitConfig
from ..errors import BudgetError, ConfigError
from ..model.chunks import CHUNK_LOGITS, chunk_logits_on
from .memory_meter import LOW_MMAP_THRESHOLD_BYTES, Peak

if TYPE_CHECKING:
    from .checkpoint import TrainState

Predict = Callable[["MemoryPlan"], int]  # plan -> peak in bytes

# Of a forward pass. More is slower on a processor, as activations leave its caches.
FAST_TOKENS = 2048
# The same where what is trained is small beside frozen weights, so that activations are most of the
# memory: on SmolLM2-135M at rank 64 passes of 512, 1,024 and 2,048 tokens took .86, 1.23 and 1.88
# GB, and 1.05, 1 and 1.09 times the time.
LEAN_TOKENS = 512
# Of the loss with one row at a time: 37 and 50 MB less than with 2**22.
SMALL_CHUNK_LOGITS = (2**21, 2**20)
# Blocks of the heap up to this are used again; larger ones are mapped, which costs page faults.
# Keeping those too was faster and took over twice the memory (docs/decisions.md, "The end of the
# heap stays").
MMAP_THRESHOLD_BYTES = 2**22
# What may be free at the heap's end: what goes back is asked for again soon.
TRIM_THRESHOLD_BYTES = 48_000_000
LOW_TRIM_THRESHOLD_BYTES = 128_000  # glibc's own
# Share of the budget at which the micro-batch is halved.
CLOSE = 0.97
# Of a GPU's memory; the rest is for kernels, workspaces and what the allocator cannot use
OF_GPU = 0.9
# Times what a row is predicted to take.
DOUBT = 1.25
# For moments in bf16: beyond it a step changes the second one by less than bf16 can hold.
MOST_BETA2 = 0.99
# Of one number; 8-bit moments have an fp32 scale for every block of 256.
NUMBER_BYTES = {"fp32": 4, "bf16": 2, "int8": 1 + 4 / 256}


@dataclass(frozen=True)
class MemoryPlan:
    """How one training runs."""

    micro_batch_sequences: int
    moments: str = "fp32"
    gradients: str = "fp32"
    checkpointing: bool = False
    chunk_logits: int = CHUNK_LOGITS
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
        """The plan for people: what differs from a plain training."""
        parts = [f"{self.micro_batch_sequences} sequences at a time"]
        if self.moments != "fp32":
            parts.append(f"{self.moments} moments")
        if self.gradients != "fp32":
            parts.append(f"{self.gradients} gradients")
        if self.checkpointing:
            parts.append("checkpointing")
        if self.fuse_optimizer:
            parts.append("fused optimizer")
        if self.low_mmap_threshold:
            parts.append(f"mmap threshold ({self.mmap_threshold_bytes / 1e6:.1f} MB)")
        if self.compile:
            parts.append("compiled")
        return ", ".join(parts)


def unbounded(
    opts: FitConfig,
    tokens_per_row: int,
    divisible: bool,
    gpu: bool,
    fast_tokens: int = FAST_TOKENS,
) -> MemoryPlan:
    """Return the plan without a budget: what the settings say, and a micro-batch of as many tokens
    as are fast on a processor.

    Raises ConfigError for moments that cannot be kept as they were asked for.
    """
    if opts.moments == "bf16" and opts.beta2 > MOST_BETA2:
        raise ConfigError(
            f"moments: bf16 with beta2 {opts.beta2:g} would never forget, as a bf16 number changes "
            f"by 0.4 % or not at all; set beta2 to {MOST_BETA2:g} or less, or moments to fp32 or "
            "int8"
        )
    whole_batch = opts.fuse_optimizer or not divisible
    if gpu or whole_batch:
        fast_sequences = opts.batch_sequences
    else:
        fast_sequences = max(1, fast_tokens // tokens_per_row)
    wanted_sequences = opts.micro_batch_sequences or fast_sequences
    return MemoryPlan(
        micro_batch_sequences=min(wanted_sequences, opts.batch_sequences),
        moments=opts.moments or "fp32",
        gradients=opts.gradients or "fp32",
        checkpointing=bool(opts.checkpointing),
        chunk_logits=chunk_logits_on("cuda" if gpu else "cpu"),
        fuse_optimizer=opts.fuse_optimizer,
        compile=opts.compile,
        whole_batch=whole_batch,
    )


def plan_memory(
    opts: FitConfig,
    tokens_per_row: int,
    budget_bytes: int | None,
    predict: Predict,
    *,
    row_bytes: int = 0,
    divisible: bool = True,
    can_checkpoint: bool = True,
    gpu_bytes: int | None = None,
    fast_tokens: int = FAST_TOKENS,
    name: str = "this job",
) -> MemoryPlan:
    """Return the fastest plan whose predicted peak fits; settings that were given stay as they
    are.

    row_bytes: of the residual stream of a row. `divisible`: a batch may be run in pieces.
    `can_checkpoint`: a forward pass may be made twice. gpu_bytes: the memory of the GPU that it
    runs on, none on a processor. Raises BudgetError with the smallest budget that works, or
    ConfigError.
    """
    first = unbounded(opts, tokens_per_row, divisible, gpu_bytes is not None, fast_tokens)
    first = replace(first, checkpointing=first.checkpointing and can_checkpoint)
    sizes = [first.micro_batch_sequences]
    if not first.whole_batch and not opts.micro_batch_sequences:
        sizes = _halves(first.micro_batch_sequences)
    checkpointing = [first.checkpointing]
    if can_checkpoint and opts.checkpointing is None:
        checkpointing = [False, True]
    if budget_bytes is None:
        if gpu_bytes is None:
            return first
        return _largest_pass(first, sizes, checkpointing, predict, int(OF_GPU * gpu_bytes))
    first = replace(first, budget_bytes=budget_bytes)

    tried = list(_candidates(opts, first, sizes, checkpointing, row_bytes))
    for plan in tried:
        if predict(plan) <= budget_bytes:
            return replace(plan, bytes_per_row=_bytes_per_row(plan, predict))
    smallest = min(tried, key=predict)
    smallest_bytes = predict(smallest)
    raise BudgetError(
        name,
        f"does not fit into runtime.memory_budget {budget_bytes / 1e6:.0f}MB: the smallest that "
        f"works is {ceil(smallest_bytes / 1e6)}MB ({smallest.summary})",
        smallest_bytes=smallest_bytes,
    )


def _largest_pass(
    first: MemoryPlan,
    sizes: list[int],
    checkpointing: list[bool],
    predict: Predict,
    room_bytes: int,
) -> MemoryPlan:
    """Return the plan that keeps most of a batch together where all of it would not fit on a GPU;
    the smallest where none is predicted to, as predictions refuse nobody who set no budget."""
    plan = first
    for again, size in product(checkpointing, sizes):
        plan = replace(first, micro_batch_sequences=size, checkpointing=again)
        if predict(plan) <= room_bytes:
            break
    return plan


def _bytes_per_row(plan: MemoryPlan, predict: Predict) -> int:
    """Return what each row after the first is predicted to add."""
    more_rows = plan.micro_batch_sequences - 1
    if not more_rows:
        return 0
    more_bytes = predict(plan) - predict(replace(plan, micro_batch_sequences=1))
    return max(0, more_bytes) // more_rows


def _halves(size: int) -> list[int]:
    """Return size, half of it, half of that, down to 1."""
    sizes = [size]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return sizes


def has_int8() -> bool:
    """Whether the library for 8-bit moments is installed; does not import it."""
    return find_spec("bitsandbytes") is not None


def _candidates(
    opts: FitConfig,
    first: MemoryPlan,
    sizes: list[int],
    checkpointing: list[bool],
    row_bytes: int,
) -> Iterator[MemoryPlan]:
    """Yield plans from the fastest to the most thrifty: each costs a little more time than the one
    before."""
    half = "bf16" if opts.beta2 <= MOST_BETA2 else "fp32"
    precisions = [("fp32", "fp32"), (half, "fp32"), (half, "bf16")]
    if has_int8():
        precisions.append(("int8", "bf16"))
    # with checkpointing the residual stream is what a pass keeps: its blocks are used again, and a
    # fifth more so that none of them is over the threshold
    stream_bytes = int(1.2 * row_bytes)
    allocators = [
        # checkpointing, mmap threshold, whether the heap is trimmed after each pass
        (False, MMAP_THRESHOLD_BYTES, False),
        (False, LOW_MMAP_THRESHOLD_BYTES, False),
        (True, stream_bytes, True),
        (True, LOW_MMAP_THRESHOLD_BYTES, False),
    ]
    usable = [allocator for allocator in allocators if allocator[0] in checkpointing]
    for (again, threshold_bytes, trims), (moments, gradients) in product(usable, precisions):
        low_threshold = threshold_bytes < MMAP_THRESHOLD_BYTES
        for size, chunk_logits in _passes(sizes, first.chunk_logits, low_threshold):
            # the stream of all rows of a pass is one block
            size_bytes = threshold_bytes * size if trims else threshold_bytes
            size_bytes = min(MMAP_THRESHOLD_BYTES, size_bytes)
            yield replace(
                first,
                micro_batch_sequences=size,
                moments=opts.moments or moments,
                gradients=opts.gradients or gradients,
                checkpointing=again,
                mmap_threshold_bytes=max(LOW_MMAP_THRESHOLD_BYTES, size_bytes),
                trim_each_pass=trims,
                chunk_logits=chunk_logits,
            )


def _passes(sizes: list[int], chunk_logits: int, low_threshold: bool) -> Iterator[tuple[int, int]]:
    """Yield rows of a pass with logits of a chunk.

    Where next to nothing stays in the heap there is no room for more than the smallest chunk;
    smaller chunks than the usual one pay only where no row is left to save.
    """
    for size in sizes:
        if size > 1:
            yield size, chunk_logits
        elif low_threshold:
            yield size, SMALL_CHUNK_LOGITS[-1]
        else:
            for small in SMALL_CHUNK_LOGITS:
                yield size, small


class MemoryGuard:
    """Rows of a forward pass: as many as the plan says, fewer where the measured peak comes near
    the budget.

    Under a budget the first passes start with one row and grow, so that a wrong prediction is seen
    before it costs anything; where it ended is kept with the run's progress, so that a resumed run
    splits its batches alike.
    """

    def __init__(
        self, plan: MemoryPlan, peak: Peak, run: "TrainState", note: Callable[[str], None]
    ):
        self.plan = plan
        self.peak = peak
        self.run = run
        self.note = note
        # what loading reached says nothing of a row; a peak that cannot be cleared counts once
        peak.clear()
        self.before_bytes = peak.bytes()
        self.halved_bytes = 0
        self.told = False
        rows = plan.micro_batch_sequences
        start_rows = rows if plan.budget_bytes is None or plan.whole_batch else 1
        run.max_micro_batch = min(run.max_micro_batch or rows, rows)
        run.micro_batch = min(run.micro_batch or start_rows, run.max_micro_batch)

    def sizes(self, total: int) -> Iterator[int]:
        """Yield rows until there are `total`; looks at the peak after each."""
        while total > 0:
            size = min(self.run.micro_batch, total)
            yield size
            total -= size
            if self.plan.budget_bytes is not None:
                self._adapt(size, self.plan.budget_bytes)

    def _adapt(self, size: int, budget_bytes: int) -> None:
        """Halve or double the micro-batch by the peak of a pass of that size."""
        run = self.run
        now_bytes = self.peak.bytes()
        used = f"{now_bytes / 1e6:,.0f} MB of {budget_bytes / 1e6:,.0f} MB used"
        smallest = run.micro_batch == 1 or self.plan.whole_batch
        if not smallest and now_bytes > max(CLOSE * budget_bytes, self.halved_bytes):
            run.micro_batch = run.micro_batch // 2
            run.max_micro_batch = run.micro_batch
            self.note(f"{used}: going on with {run.micro_batch} sequences at a time, same batches")
            # a mark that cannot be cleared stands as high as before: only more than it halves again
            self.peak.clear()
            self.halved_bytes = self.peak.bytes()
        elif smallest and now_bytes > budget_bytes and not self.told:
            self.told = True
            self.note(
                f"{used} with {size} sequences at a time, and fewer cannot be: the budget is not "
                f"kept; raise runtime.memory_budget to {ceil(now_bytes / 1e6)}MB"
            )
        elif size == run.micro_batch < run.max_micro_batch:
            grown = min(2 * size, run.max_micro_batch)
            # at most: gradients and moments came with the first row
            bytes_per_row = max(0, now_bytes - self.before_bytes) / size
            if self.plan.bytes_per_row:
                bytes_per_row = min(bytes_per_row, DOUBT * self.plan.bytes_per_row)
            if now_bytes + (grown - size) * bytes_per_row <= CLOSE * budget_bytes:
                run.micro_batch = grown
