"""What the passes of an ffn_moe run cost that train nothing: validation, statistics, the report.

L layers, D model width, F feed-forward width, V vocabulary, N tokens of a batch.
"""

from dataclasses import dataclass

from ...config.fit import FitConfig
from ...hardware import device
from ...model.chunks import CHUNK_LOGITS, PIECE_NUMBERS, WHOLE_NUMBERS, workspace_bytes
from ...model.router_init import SQUARE_ROWS, in_a_row
from ...train.flops import ExpertShape, JobCost, Shape
from .config import FfnMoeConfig
from .continuations import PROMPT_TOKENS
from .parts import EVALUATION_SEQUENCES
from .samples import shown_tokens

TRAIN_SAMPLE_TOKENS = 16_384  # of training text behind a train-test gap, all domains together
STATISTICS_BYTES = 8 + 4  # of a number of x x^T: summed in fp64, written in fp32
# of a processor; a GPU's peak is what was asked for
RIDGE_SQUARES = 2  # of D x D in fp64: the one that is solved, and its factors
# and of L x D for each expert: mean inputs; gates solved, of one length, scaled, and in fp32
RIDGE_GATES = 4.5
KERNEL_BYTES = 42_000_000  # code that the first step or pass touches, compiled kernels
HEAP_BYTES = 15_000_000  # what the allocator keeps between blocks, however small the batch


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


def forward_bytes(stack: StackShape, tokens: int, bf16: bool) -> int:
    """Return what a pass over N tokens takes that keeps nothing, beside the weights."""
    shape = stack.shape
    # What passes between layers stays fp32; of a network three products, and half a dozen rows
    row = 4 * 6 * shape.d_model + (2 if bf16 else 4) * 3 * shape.d_ff
    logits = workspace_bytes(tokens, shape.vocab_size, CHUNK_LOGITS, 2 if bf16 else 4)
    code = 0 if device() == "cuda" else KERNEL_BYTES + HEAP_BYTES
    return tokens * row + logits + code


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


def of_pin(cfg: FfnMoeConfig, stack: StackShape) -> JobCost:
    """Return the cost of a pinned trunk: nothing is trained, but it is validated once and its
    statistics are taken."""
    shape = stack.shape
    most = EVALUATION_SEQUENCES * cfg.trunk.context_tokens  # tokens of a batch
    batch = min(most, max(cfg.trunk.eval_tokens, cfg.trunk.statistics_tokens))
    sums = statistics_bytes(shape.layers, shape.d_model)
    flops = cfg.trunk.eval_tokens * shape.forward_flops_per_token()
    flops += statistics_flops(shape, cfg.trunk.statistics_tokens)
    peak = stack.model_bytes + sums + forward_bytes(stack, batch, False)
    told = "pinned, not trained"
    once = shape.forward_flops_per_token()
    return JobCost("train_shared", None, 0, 0, flops, peak, told, stack.model_bytes, once)


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
    batch = cfg.evaluate.batch_sequences * cfg.trunk.context_tokens
    # The training text of each domain behind a gap runs at once
    batch = max(min(batch, tokens), TRAIN_SAMPLE_TOKENS // domains)
    taken = forward_bytes(stack, batch, False)
    unit = 2 if bf16 else 4
    if (stack.stored or 4) != unit:
        taken += cast_bytes(stack.shape, unit)
    if everything and device() != "cuda":
        # Untrained gates are made of the statistics of the anchor and all experts, between passes
        made = ridge_bytes(stack, own + 1) + KERNEL_BYTES + HEAP_BYTES
        taken = max(taken, made) + copied_bytes(stack)
    peak = mapped + taken + layer_bytes(stack, own, bf16)
    once = stack.shape.forward_flops_per_token()
    return JobCost("evaluate", None, tokens, 0, flops, peak, "", mapped, once)
