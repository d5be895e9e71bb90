"""What each job of an ffn_moe run will spend: tokens, parameters, operations, memory."""

from collections.abc import Mapping
from math import ceil

from ..budget import Job, Shape, device
from ..config import Config, Fit
from ..means import Means, choose
from ..model.loss import LEAST_CHUNK_TOKENS

KERNEL_BYTES = 42_000_000  # code that the first step touches, compiled kernels
HEAP_BYTES = 15_000_000  # what the allocator keeps between blocks, however small the batch
MOST_FRAGMENTS_BYTES = 155_000_000  # and as much as there are activations, up to this
FROM_ZERO = ("wide", "scratch")  # dense baselines that do not continue the trunk


def stage_tokens(cfg: Config, stage: str, item: str | None, domain_tokens: Mapping[str, int]) -> int:
    """Return the training tokens of one job; domain_tokens counts each domain's training text."""
    if stage == "train_dense":
        return _dense_tokens(cfg, item, domain_tokens)
    opts = {"train_shared": cfg.trunk, "train_experts": cfg.expert, "train_router": cfg.router}[stage]
    trunk_domains = cfg.trunk.domains or cfg.partition.names
    read = {"train_shared": trunk_domains, "train_experts": (item,), "train_router": cfg.experts}[stage]
    context = cfg.trunk.context_tokens
    row_tokens = opts.batch_sequences * context
    windows = (domain_tokens[d] - 1 for d in read) if opts.epochs is not None else ()  # else nobody need have counted
    epoch_tokens = sum(count // context * context for count in windows)  # whole windows, as Mixture counts
    return opts.resolve_steps(context, epoch_tokens) * row_tokens


def _dense_tokens(cfg: Config, item: str, domain_tokens: Mapping[str, int]) -> int:
    each = [stage_tokens(cfg, "train_experts", name, domain_tokens) for name in cfg.experts]
    if item == "path":
        return max(each)
    total = sum(each) + stage_tokens(cfg, "train_router", None, domain_tokens)
    return total + (stage_tokens(cfg, "train_shared", None, domain_tokens) if item in FROM_ZERO else 0)


def dense_options(cfg: Config, item: str, domain_tokens: Mapping[str, int]) -> Fit:
    """Return a dense baseline's settings, its steps such that it sees the tokens its name promises."""
    base = cfg.trunk if item in FROM_ZERO else cfg.expert
    lr = base.lr if item in FROM_ZERO else (cfg.dense.lr or base.lr)
    steps = ceil(_dense_tokens(cfg, item, domain_tokens) / (base.batch_sequences * cfg.trunk.context_tokens))
    return base.model_copy(update={"steps": steps, "epochs": None, "tokens": None, "lr": lr})


def dense_width(cfg: Config, item: str) -> int:
    """Return the feed-forward width of a dense baseline that starts from zero."""
    return cfg.trunk.d_ff * (cfg.router.top_k if item == "wide" else 1)


def cost(cfg: Config, stage: str, item: str | None, domain_tokens: Mapping[str, int] | None, bf16: bool) -> Job:
    """Return what a training job will spend; tokens and operations are None while the token counts are unknown."""
    shape = Shape.of(cfg.trunk, cfg.tokenizer.vocab_size)
    if item in FROM_ZERO and stage == "train_dense":
        shape = Shape.of(cfg.trunk.model_copy(update={"d_ff": dense_width(cfg, item)}), cfg.tokenizer.vocab_size)
    trains = {"train_experts": "ffn", "train_router": "gates"}.get(stage, "ffn" if item == "ffn" else "all")
    opts = {"train_shared": cfg.trunk, "train_router": cfg.router}.get(stage, cfg.expert)
    if item in FROM_ZERO:
        opts = cfg.trunk
    gates = cfg.trunk.layers * cfg.trunk.d_model * (len(cfg.experts) + (cfg.trunk.anchor == "keep"))
    parameters = {
        "all": shape.trunk_parameters + shape.ffn_parameters, "ffn": shape.ffn_parameters, "gates": gates,
    }[trains]  # fmt: skip
    try:
        tokens = stage_tokens(cfg, stage, item, domain_tokens or {})
    except KeyError:  # a duration in epochs, before preprocess has counted the text
        tokens = None
    flops = None if tokens is None else tokens * shape.train_flops_per_token(trains)
    plan = means(cfg, opts, shape, trains, bf16, "-".join(filter(None, (stage, item))))
    peak = peak_bytes(shape, trains, plan, bf16, len(cfg.experts))
    return Job(stage, item, tokens, parameters, flops, peak, plan.words)


def means(cfg: Config, opts: Fit, shape: Shape, trains: str, bf16: bool, name: str = "this training") -> Means:
    """Return how a training runs under cfg.runtime.memory_budget. Raises BudgetError when nothing fits."""
    gates = trains == "gates"
    whole = gates and (cfg.router.balance == "aux" or cfg.router.capacity_factor or cfg.router.noise)
    return choose(
        opts, shape.context_tokens, cfg.runtime.memory_budget,
        lambda tried: peak_bytes(shape, trains, tried, bf16, len(cfg.experts)),
        row_bytes=shape.context_tokens * shape.d_model * (2 if bf16 else 4), divisible=not whole,
        can_checkpoint=not gates, gpu=device() == "cuda", name=name,
    )  # fmt: skip


def peak_bytes(shape: Shape, trains: str, plan: Means, bf16: bool, experts: int) -> int:
    """Return the predicted peak above imports of a training: of `all`, of an `ffn`, or of the `gates` over experts.

    Weights, moments and gradients are counted, activations estimated; the constants are fitted to
    benchmarks/memory.py, which compares this with what is measured.
    """
    unit, width = (2 if bf16 else 4), {"fp32": 4, "bf16": 2, "int8": 1 + 4 / 256}
    tables = shape.vocab_size * shape.d_model
    trained = {"all": shape.trunk_parameters + shape.ffn_parameters, "ffn": shape.ffn_parameters, "gates": 0}[trains]
    frozen = {"all": 0, "ffn": shape.trunk_parameters, "gates": shape.trunk_parameters + experts * shape.ffn_parameters}
    kept = trained * (4 + width[plan.gradients] + 2 * width[plan.moments]) + frozen[trains] * unit
    kept += 2 * unit * tables if trains == "all" else 0  # gradients of head and embedding until they are added up
    return int(KERNEL_BYTES + kept + _passing(shape, plan, unit, trains))


def _passing(shape: Shape, plan: Means, unit: int, trains: str) -> float:
    """Return what one forward and backward pass holds, with what the allocator holds beside it."""
    tokens = plan.micro_batch_sequences * shape.context_tokens
    layer = tokens * shape.layer_activations(trains) * unit
    chunk = max(LEAST_CHUNK_TOKENS, plan.chunk_logits // shape.vocab_size)
    logits = min(tokens, chunk) * shape.vocab_size * (4 + unit)
    inner = 2 * tokens * shape.d_ff * unit  # of a feed-forward network's backward pass
    if plan.checkpointing:
        held = shape.layers * tokens * shape.d_model * unit
        if plan.tidy and plan.micro_batch_sequences == 1:
            return held + max(logits, layer + inner) + (layer + inner) * plan.trim
        return 2 * (2 * held + layer + inner) + logits + HEAP_BYTES  # the first rows' blocks do not fit the later ones
    held = shape.layers * layer + max(logits, inner)
    return held if plan.tidy else held + HEAP_BYTES + min(shape.layers * layer, MOST_FRAGMENTS_BYTES)
