"""What each job of an ffn_moe run will spend: tokens, parameters, operations, memory."""

from collections.abc import Mapping
from math import ceil

from ...config.fit import FitConfig
from ...hardware import device
from ...model.loss import MOST_SUMS, chunk_of, workspace_bytes
from ...train.flops import JobCost, Shape
from ...train.memory_plan import MemoryPlan, plan_memory
from .config import FfnMoeConfig

# of a processor; a GPU's peak is what was asked for
KERNEL_BYTES = 42_000_000  # code that the first step touches, compiled kernels
INT8_BYTES = 5_000_000  # code of the library that keeps 8-bit moments
HEAP_BYTES = 15_000_000  # what the allocator keeps between blocks, however small the batch
MOST_FRAGMENTS_BYTES = 155_000_000  # and as much as there are activations, up to this
FROM_ZERO = ("wide", "scratch")  # dense baselines that do not continue the trunk


def stage_tokens(
    cfg: FfnMoeConfig, stage: str, item: str | None, domain_tokens: Mapping[str, int]
) -> int:
    """Return the training tokens of one job; domain_tokens counts each domain's training text."""
    if stage == "train_dense":
        return _dense_tokens(cfg, item, domain_tokens)
    opts = {"train_shared": cfg.trunk, "train_experts": cfg.expert, "train_router": cfg.router}[
        stage
    ]
    trunk_domains = cfg.trunk.domains or cfg.partition.names
    read = {"train_shared": trunk_domains, "train_experts": (item,), "train_router": cfg.experts}[
        stage
    ]
    context = cfg.trunk.context_tokens
    row_tokens = opts.batch_sequences * context
    windows = (
        (domain_tokens[d] - 1 for d in read) if opts.epochs is not None else ()
    )  # else nobody need have counted
    epoch_tokens = sum(
        count // context * context for count in windows
    )  # whole windows, as Mixture counts
    return opts.resolve_steps(context, epoch_tokens) * row_tokens


def _dense_tokens(cfg: FfnMoeConfig, item: str, domain_tokens: Mapping[str, int]) -> int:
    each = [stage_tokens(cfg, "train_experts", name, domain_tokens) for name in cfg.experts]
    if item == "path":
        return max(each)
    total = sum(each) + stage_tokens(cfg, "train_router", None, domain_tokens)
    return total + (
        stage_tokens(cfg, "train_shared", None, domain_tokens) if item in FROM_ZERO else 0
    )


def dense_options(cfg: FfnMoeConfig, item: str, domain_tokens: Mapping[str, int]) -> FitConfig:
    """Return a dense baseline's settings, its steps such that it sees the tokens its name promises."""
    base = cfg.trunk if item in FROM_ZERO else cfg.expert
    lr = base.lr if item in FROM_ZERO else (cfg.dense.lr or base.lr)
    steps = ceil(
        _dense_tokens(cfg, item, domain_tokens) / (base.batch_sequences * cfg.trunk.context_tokens)
    )
    return base.model_copy(update={"steps": steps, "epochs": None, "tokens": None, "lr": lr})


def dense_width(cfg: FfnMoeConfig, item: str) -> int:
    """Return the feed-forward width of a dense baseline that starts from zero."""
    return cfg.trunk.d_ff * (cfg.router.top_k if item == "wide" else 1)


def cost(
    cfg: FfnMoeConfig,
    stage: str,
    item: str | None,
    domain_tokens: Mapping[str, int] | None,
    bf16: bool,
) -> JobCost | None:
    """Return what a training job will spend; tokens and operations are None while the token counts
    are unknown.

    None for a pretrained trunk that is not on this machine yet.
    """
    if (shape := _shape(cfg)) is None:
        return None
    if item in FROM_ZERO and stage == "train_dense":
        shape = Shape.from_config(
            cfg.trunk.model_copy(update={"d_ff": dense_width(cfg, item)}), cfg.tokenizer.vocab_size
        )
    trains = {"train_experts": "ffn", "train_router": "gates"}.get(
        stage, "ffn" if item == "ffn" else "all"
    )
    opts = {"train_shared": cfg.trunk, "train_router": cfg.router}.get(stage, cfg.expert)
    if item in FROM_ZERO:
        opts = cfg.trunk
    gates = shape.layers * shape.d_model * _stacked(cfg)
    parameters = {
        "all": shape.trunk_parameters + shape.ffn_parameters,
        "ffn": shape.ffn_parameters,
        "gates": gates,
    }[trains]
    try:
        tokens = stage_tokens(cfg, stage, item, domain_tokens or {})
    except KeyError:  # a duration in epochs, before preprocess has counted the text
        tokens = None
    plan = memory_plan(cfg, opts, shape, trains, bf16, "-".join(filter(None, (stage, item))))
    peak = peak_bytes(shape, trains, plan, bf16, _stacked(cfg), cfg.router.top_k)
    return JobCost.of(
        stage,
        item,
        tokens=tokens,
        flops_per_token=shape.train_flops_per_token(trains),
        parameters=parameters,
        plan=plan,
        peak_bytes=peak,
    )


def memory_plan(
    cfg: FfnMoeConfig,
    opts: FitConfig,
    shape: Shape,
    trains: str,
    bf16: bool,
    name: str = "this training",
) -> MemoryPlan:
    """Return how a training runs under cfg.runtime.memory_budget. Raises BudgetError when nothing
    fits."""
    gates = trains == "gates"
    whole = gates and (
        cfg.router.balance == "aux" or cfg.router.capacity_factor or cfg.router.noise
    )
    return plan_memory(
        opts,
        shape.context_tokens,
        cfg.runtime.memory_budget,
        lambda tried: peak_bytes(shape, trains, tried, bf16, _stacked(cfg), cfg.router.top_k),
        row_bytes=shape.context_tokens * shape.d_model * (2 if bf16 else 4),
        divisible=not whole,
        can_checkpoint=not gates,
        gpu=device() == "cuda",
        name=name,
    )


def _shape(cfg: FfnMoeConfig) -> Shape | None:
    """Return the trunk's shape; None when it is a pretrained one of which no settings are here."""
    if not cfg.trunk.init:
        return Shape.from_config(cfg.trunk, cfg.tokenizer.vocab_size)
    from transformers import AutoConfig

    try:
        stored = AutoConfig.from_pretrained(
            cfg.trunk.init, revision=cfg.trunk.revision, local_files_only=True
        )
        return Shape.from_hf_config(stored.to_dict(), cfg.trunk.context_tokens)
    except (OSError, ValueError, KeyError):
        return None  # the plan is made without it, and train_shared will say what is wrong


def _stacked(cfg: FfnMoeConfig) -> int:
    """Return how many feed-forward networks the stack has."""
    return len(cfg.experts) + (cfg.trunk.anchor == "keep")


def peak_bytes(
    shape: Shape, trains: str, plan: MemoryPlan, bf16: bool, experts: int, top_k: int = 2
) -> int:
    """Return the predicted peak above imports of a training: of `all`, of an `ffn`, or of the
    `gates` over experts.

    Weights, moments and gradients are counted, activations estimated; the constants are fitted to
    benchmarks/memory.py, which compares this with what is measured.
    """
    unit = 2 if bf16 else 4
    tables = shape.vocab_size * shape.d_model
    trained = {
        "all": shape.trunk_parameters + shape.ffn_parameters,
        "ffn": shape.ffn_parameters,
        "gates": 0,
    }[trains]
    frozen = {
        "all": 0,
        "ffn": shape.trunk_parameters,
        "gates": shape.trunk_parameters + experts * shape.ffn_parameters,
    }
    kept = trained * plan.state_bytes + frozen[trains] * unit
    kept += (
        2 * unit * tables if trains == "all" else 0
    )  # gradients of head and embedding until they are added up
    active = top_k if trains == "gates" else 1
    code = 0 if device() == "cuda" else KERNEL_BYTES + INT8_BYTES * (plan.moments == "int8")
    return int(kept + _passing(shape, plan, unit, trains, active) + code)


def _passing(shape: Shape, plan: MemoryPlan, unit: int, trains: str, active: int) -> float:
    """Return what one forward and backward pass holds, with what the allocator holds beside it."""
    tokens = plan.micro_batch_sequences * shape.context_tokens
    layer = tokens * shape.layer_activations(trains, active) * unit
    chunk = chunk_of(shape.vocab_size, plan.chunk_logits)
    logits = workspace_bytes(tokens, shape.vocab_size, plan.chunk_logits, unit)
    if trains == "all" and unit == 2 and tokens > MOST_SUMS * chunk:
        logits += 4 * shape.vocab_size * shape.d_model  # the head's gradient is added up in fp32
    inner = 2 * tokens * shape.d_ff * unit  # of a feed-forward network's backward pass
    held = shape.layers * (tokens * shape.d_model * unit if plan.checkpointing else layer)
    in_use = held + max(logits, layer + inner if plan.checkpointing else inner)
    if device() == "cuda":
        return in_use
    grown = (
        plan.budget_bytes is not None and plan.micro_batch_sequences > 1
    )  # the first rows' blocks were smaller
    in_heap = grown or tokens * shape.d_model * unit < plan.mmap_threshold_bytes
    if plan.checkpointing and in_heap and (grown or not plan.low_mmap_threshold):
        return 2 * (2 * held + layer + inner) + logits + HEAP_BYTES
    if plan.low_mmap_threshold:
        return in_use + (layer + inner) * plan.trim_each_pass
    again = layer / 2 if plan.checkpointing else 0  # holes where a layer was computed again
    return in_use + HEAP_BYTES + again + in_heap * min(held, MOST_FRAGMENTS_BYTES)
