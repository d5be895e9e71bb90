"""What the passes of an ffn_moe run cost that train nothing: validation, statistics, the report.

L layers, D model width, F feed-forward width, V vocabulary, N tokens of a batch.
"""

from dataclasses import dataclass
from math import ceil

from ...config.fit import FitConfig
from ...hardware import KEPT_KERNELS, device
from ...model.chunks import (
    CHUNK_LOGITS,
    PIECE_NUMBERS,
    WHOLE_NUMBERS,
    workspace_bytes,
)
from ...model.kernels.shared_base import BLOCK_ROWS, CHUNK_TOKENS
from ...model.router_init import SQUARE_ROWS, in_a_row
from ...train.flops import ExpertShape, JobCost, Shape
from .config import FfnMoeConfig
from .continuations import PROMPT_TOKENS
from .parts import EVALUATION_SEQUENCES
from .samples import shown_tokens
from .trunk_sizes import is_gguf

TRAIN_SAMPLE_TOKENS = 16_384  # of training text behind a train-test gap, all domains together
STATISTICS_BYTES = 8 + 4  # of a number of x x^T: summed in fp64, written in fp32
# of a processor; a GPU's peak is what was asked for
RIDGE_SQUARES = 2  # of D x D in fp64: the one that is solved, and its factors
# and of L x D for each expert: mean inputs; gates solved, of one length, scaled, and in fp32
RIDGE_GATES = 4.5
KERNEL_BYTES = 42_000_000  # pages of libraries' files that the first step or pass touches
MOST_OF_HEAP_BYTES = 2**25  # DEFAULT_MMAP_THRESHOLD_MAX of mallopt(3), where pointers have 8 bytes
# of a bf16 product of any sizes: its kernel, which is kept for the next of the same
PRODUCT_BYTES = 610_000
DENSE_PRODUCTS = 8  # a pass's kinds of products: attention's, a network's, the head's
EXPERT_PRODUCTS = 4  # and an expert's, for every number of rows that it may have
HEAP_BYTES = 15_000_000  # what the allocator keeps between blocks, however small the batch
# Of a .gguf file each entry of the vocabulary is five numpy arrays while the gguf package reads it:
# its length, its text and its kind, and the same two of a merge (161 MB of 49,152 entries)
GGUF_ENTRY_BYTES = 3270


@dataclass(frozen=True)
class StackShape:
    """The sizes of a trunk and of the experts on it."""

    shape: Shape
    experts: int
    expert: ExpertShape | None  # None: whole networks in every layer
    stored: int | None  # bytes of a number in the files of a pinned trunk

    @property
    def model_bytes(self) -> int:
        """Bytes of trunk and dummy as they are mapped."""
        return (self.shape.trunk_parameters + self.shape.ffn_parameters) * (self.stored or 4)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's file."""
        if self.expert is None:
            return 4 * self.shape.ffn_parameters
        return 4 * self.shape.expert_parameters(self.expert)

    def forward(self, experts: float) -> float:
        """Operations of a token's forward pass with so many experts."""
        ffns = experts if self.expert is None else self.shape.ffns(experts, self.expert)
        return self.shape.forward_flops_per_token(ffns)


def code_bytes() -> int:
    """Return the pages of libraries' files that a job touches which it did not with its imports:
    mapped, as a model's are, and none of a GPU's memory."""
    return 0 if device() == "cuda" else KERNEL_BYTES


def heap_bytes() -> int:
    """Return what the allocator keeps between blocks, however small the batch."""
    return 0 if device() == "cuda" else HEAP_BYTES


def kernels_bytes(tokens: int, bf16: bool, lengths: int = 0) -> int:
    """Return what kernels of products take that passes of a stack over N tokens leave; lengths: how
    many other numbers of tokens there are passes over."""
    if not bf16 or device() == "cuda":
        return 0
    blocks = ceil(min(tokens, CHUNK_TOKENS) / BLOCK_ROWS)
    products = DENSE_PRODUCTS * (1 + lengths) + EXPERT_PRODUCTS * blocks
    return PRODUCT_BYTES * min(KEPT_KERNELS, products)


def forward_bytes(stack: StackShape, tokens: int, bf16: bool, cast: int = 0) -> int:
    """Return what a pass over N tokens takes that keeps nothing, beside the weights and code; cast:
    bytes of weights that are cast for the layer that runs. Layers come first, then the head."""
    in_layers = body_bytes(stack.shape, tokens, bf16) + cast
    return max(in_layers, head_bytes(stack.shape, tokens, bf16)) + heap_bytes()


def head_bytes(shape: Shape, tokens: int, bf16: bool) -> int:
    """Return what the losses of N tokens take once their rows have passed all layers."""
    unit = 2 if bf16 else 4
    # what the last layer gives, before its norm and after
    rows = 2 * 4 * tokens * shape.d_model
    logits = workspace_bytes(tokens, shape.vocab_size, CHUNK_LOGITS, unit)
    return rows + logits


def body_bytes(shape: Shape, tokens: int, bf16: bool) -> int:
    """Return what N tokens take on their way through the layers of a pass that keeps nothing."""
    return sum(_blocks(shape, tokens, bf16))


def from_heap_bytes(shape: Shape, tokens: int, bf16: bool) -> int:
    """Return what of that is in blocks that glibc takes from the heap by its own thresholds; those
    that are larger it maps, and gives back."""
    blocks = _blocks(shape, tokens, bf16)
    return sum(block for block in blocks if block <= MOST_OF_HEAP_BYTES)


def _blocks(shape: Shape, tokens: int, bf16: bool) -> list[int]:
    # What passes between layers stays fp32; of a network three products, and half a dozen rows
    row = 4 * tokens * shape.d_model
    product = (2 if bf16 else 4) * tokens * shape.d_ff
    return 6 * [row] + 3 * [product]


def cast_bytes(shape: Shape, unit: int) -> int:
    """Return the bytes of stored weights that are cast at a time: the head, for a whole pass where
    it is small, and one matrix."""
    head = shape.vocab_size * shape.d_model
    if head > WHOLE_NUMBERS:
        head = PIECE_NUMBERS
    return (head + shape.d_model * shape.d_ff) * unit


def statistics_bytes(layers: int, d_model: int) -> int:
    """Return the bytes of the sums of x x^T of so many layers."""
    return STATISTICS_BYTES * layers * d_model**2


def gates_bytes(cfg: FfnMoeConfig, stack: StackShape) -> int:
    """Return what the gates of a stack take before they are trained, beside mapped statistics."""
    if device() == "cuda" or cfg.router.init == "rows":
        # they are made in main memory
        return 0
    held = copied_bytes(stack) if cfg.trunk.anchor == "keep" else 0
    if cfg.router.init == "ridge":
        held += ridge_bytes(stack, stack.experts)
    return held


def copied_bytes(stack: StackShape) -> int:
    """Return what of the trunk's statistics is copied from their file: those of layers with
    experts, where others are between them."""
    if stack.expert is None or in_a_row(stack.expert.layers):
        return 0
    return 4 * len(stack.expert.layers) * stack.shape.d_model**2


def ridge_bytes(stack: StackShape, experts: int) -> int:
    """Return what the closed form of so many experts' gates takes at its peak."""
    shape = stack.shape
    layers = shape.layers if stack.expert is None else len(stack.expert.layers)
    rows = RIDGE_SQUARES * shape.d_model + experts * (SQUARE_ROWS + RIDGE_GATES * layers)
    return int(8 * shape.d_model * rows)


def statistics_flops(shape: Shape, tokens: int) -> float:
    """Operations of the statistics of so many tokens: a pass without the head, and x x^T of every
    layer."""
    body = shape.forward_flops_per_token() - 2 * shape.vocab_size * shape.d_model
    return tokens * (body + 2 * shape.layers * shape.d_model**2)


def beside_training(
    cfg: FfnMoeConfig, stack: StackShape, stage: str, opts: FitConfig, tokens: int
) -> float:
    """Operations of a training's validations, and of the statistics that it ends with."""
    steps = tokens // (opts.batch_sequences * cfg.trunk.context_tokens)
    validations = 1
    if opts.eval_every_steps and steps:
        validations += (steps - 1) // opts.eval_every_steps
    experts = cfg.router.top_k if stage == "train_router" else 1
    flops = validations * opts.eval_tokens * stack.forward(experts)
    if stage == "train_shared":
        flops += statistics_flops(stack.shape, cfg.trunk.statistics_tokens)
    elif stage == "train_experts":
        flops += statistics_flops(stack.shape, cfg.expert.statistics_tokens)
    return flops


def of_pin(cfg: FfnMoeConfig, stack: StackShape, bf16: bool) -> JobCost:
    """Return the cost of a pinned trunk: nothing is trained, but it is validated once and its
    statistics are taken."""
    shape = stack.shape
    flops = cfg.trunk.eval_tokens * shape.forward_flops_per_token()
    flops += statistics_flops(shape, cfg.trunk.statistics_tokens)
    mapped = stack.model_bytes + code_bytes()
    told = "pinned, not trained"
    once = shape.forward_flops_per_token()
    own = pin_bytes(cfg, stack, bf16)
    return JobCost("train_shared", None, 0, 0, flops, mapped + own, told, mapped, once)


def pin_bytes(cfg: FfnMoeConfig, stack: StackShape, bf16: bool) -> int:
    """Return what a pin takes beside files. One follows another: a .gguf is decoded, the model is
    validated, statistics are summed, and written in fp32 beside their sums."""
    shape = stack.shape
    context = cfg.trunk.context_tokens
    unit = 2 if bf16 else 4
    cast = cast_bytes(shape, unit) if (stack.stored or 4) != unit else 0
    validated = min(EVALUATION_SEQUENCES * context, cfg.trunk.eval_tokens)
    judging = forward_bytes(stack, validated, bf16) + cast
    # Under a budget one sequence at a time
    sequences = 1 if cfg.runtime.memory_budget else EVALUATION_SEQUENCES
    observed = min(sequences * context, cfg.trunk.statistics_tokens)
    summing = 8 * shape.layers * shape.d_model**2 + body_bytes(shape, observed, bf16) + cast
    if device() == "cuda":
        # The sums stand beside the pass, and are written from main memory
        return max(judging, summing)
    written = statistics_bytes(shape.layers, shape.d_model)
    return max(judging, max(summing, written) + heap_bytes(), decoding_bytes(cfg, shape))


def decoding_bytes(cfg: FfnMoeConfig, shape: Shape) -> int:
    """Return what it takes to decode the model of a pin; 0 of one that is mapped as it is."""
    if not is_gguf(cfg):
        return 0
    # Of the largest tensor what was dequantised, in fp32, twice: in parts and put together, then as
    # it is and copied
    largest = max(shape.vocab_size, shape.d_ff) * shape.d_model
    return GGUF_ENTRY_BYTES * shape.vocab_size + 2 * 4 * largest


def layer_bytes(stack: StackShape, experts: int, bf16: bool) -> int:
    """Return what the report's mean of all experts takes of the layer that runs."""
    layers = stack.shape.layers if stack.expert is None else len(stack.expert.layers)
    one = stack.expert_bytes // layers
    if stack.expert is not None and stack.expert.rank:
        # Their factors beside each other, and in bf16 those cast
        return experts * (one + one // 2 * bf16)
    # Of one matrix all that there are, beside the means
    return one + experts * one // 3


def of_report(cfg: FfnMoeConfig, stack: StackShape, bf16: bool) -> JobCost:
    """Return the cost of the report: a pass over the held-out text for every row."""
    own = len(cfg.experts)
    k = min(cfg.router.top_k, stack.experts)
    dense = len(cfg.dense.baselines)
    everything = cfg.evaluate.rivals == "all"
    # Base, experts, dense baselines, soup; then the stack
    passes = 2 + own + dense
    flops = passes * stack.shape.forward_flops_per_token() + stack.forward(k)
    rivals = [1.0] * dense  # in networks a layer that are kept
    for item in cfg.joint.models:
        active = cfg.joint.ffns(item, cfg.joint.top_k, stack.shape.layers)
        flops += stack.shape.forward_flops_per_token(active)
        rivals.append(cfg.joint.ffns(item, cfg.joint.experts, stack.shape.layers))
    if stack.experts > 1:
        # One expert less at a time
        flops += stack.experts * stack.forward(min(k, stack.experts - 1))
    if everything:
        flops += stack.forward(own) + 4 * stack.forward(k) + stack.forward(3 - min(k, 2))
        for experts in range(1, stack.experts + 1):
            flops += stack.forward(experts)
    domains = len(cfg.partition.names)
    tokens = domains * cfg.evaluate.tokens_per_domain
    flops *= tokens
    compared = dense + cfg.joint.models.count("dense")
    gaps = TRAIN_SAMPLE_TOKENS * (compared + 1)
    written = cfg.evaluate.continuation_tokens if cfg.evaluate.samples else 0
    # Every token that is written runs all before it again, for base, one dense baseline and stack
    writing = 3 * domains * written * (PROMPT_TOKENS + written // 2)
    read = domains * cfg.evaluate.samples * shown_tokens(cfg, domains)
    flops += (gaps + writing + read) * stack.forward(k)
    mapped = stack.model_bytes + own * stack.expert_bytes
    if rivals:
        # One at a time
        mapped += 4 * stack.shape.stack_parameters(max(rivals))
    # of held-out text of a domain, or of the training text behind a gap
    longest = max(cfg.evaluate.tokens_per_domain, TRAIN_SAMPLE_TOKENS // domains)
    batch = min(cfg.evaluate.batch_sequences * cfg.trunk.context_tokens, longest)
    taken = forward_bytes(stack, batch, bf16, layer_bytes(stack, own, bf16))
    # Every token that is written makes a text of another length
    taken += kernels_bytes(batch, bf16, written)
    if device() != "cuda":
        # A report leaves glibc its own thresholds, so blocks come from the heap, whose holes are
        # about as large as what is in use (pass_memory)
        taken += from_heap_bytes(stack.shape, batch, bf16)
    unit = 2 if bf16 else 4
    # Dense models are stored in fp32
    if (stack.stored or 4) != unit or (rivals and bf16):
        taken += cast_bytes(stack.shape, unit)
    if everything and device() != "cuda":
        # Untrained gates are made of the statistics of the anchor and all experts, between passes
        made = ridge_bytes(stack, own + 1) + heap_bytes()
        taken = max(taken, made) + copied_bytes(stack)
    mapped += code_bytes()
    peak = mapped + taken
    once = stack.shape.forward_flops_per_token()
    return JobCost("evaluate", None, tokens, 0, flops, peak, "", mapped, once)
