"""What each job of an ffn_moe run will spend: tokens, parameters, operations, memory."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil

from ...config.fit import FitConfig
from ...hardware import device, gpu_bytes
from ...train.flops import ExpertShape, JobCost, Shape, Trains
from ...train.lr_search import PLANNED_RATES, in_small
from ...train.memory_plan import FAST_TOKENS, LEAN_TOKENS, MemoryPlan, plan_memory
from . import passes
from .config import FfnMoeConfig
from .pass_memory import pass_bytes
from .rates import search_of, trained_by, with_ramp
from .sections import ADAPTER
from .stages import FROM_ZERO, SEARCHES
from .trunk_sizes import stored_bytes, trunk_shape

# of a processor, beside those of every pass
INT8_BYTES = 5_000_000  # code of the library that keeps 8-bit moments
PEFT_BYTES = 58_000_000  # code of PEFT, which a job of adapters imports


def stage_tokens(
    cfg: FfnMoeConfig,
    stage: str,
    item: str | None,
    domain_tokens: Mapping[str, int],
) -> int:
    """Return the training tokens of one job; domain_tokens counts each domain's training text.

    Raises KeyError for a duration in epochs over a domain that was not counted.
    """
    if stage == "train_dense":
        return _dense_tokens(cfg, item, domain_tokens)
    if stage in SEARCHES.values():
        opts, _ = search_settings(cfg, stage, item, domain_tokens)
        steps = opts.resolve_steps(cfg.trunk.context_tokens, 0)
        return PLANNED_RATES * steps * opts.batch_sequences * cfg.trunk.context_tokens
    if stage == "train_experts" and item in cfg.expert.imported:
        return 0  # nothing of it is spent here
    if stage == "train_joint":
        return tokens_on(cfg, cfg.joint, cfg.joint_domains, domain_tokens)
    opts, _ = _settings(cfg, stage, item)
    if stage == "train_shared":
        return tokens_on(cfg, opts, cfg.trunk_domains, domain_tokens)
    if stage == "train_router":
        return tokens_on(cfg, opts, cfg.experts_with_text, domain_tokens)
    return tokens_on(cfg, opts, (_named(item),), domain_tokens)


def _taught_tokens(
    cfg: FfnMoeConfig, domains: Sequence[str], domain_tokens: Mapping[str, int]
) -> list[int]:
    """Return the tokens of an expert of each domain as it is trained here, whichever are imported:
    what others are given by them has no import in its address. Raises KeyError as stage_tokens
    does."""
    return [tokens_on(cfg, cfg.expert, (domain,), domain_tokens) for domain in domains]


def tokens_on(
    cfg: FfnMoeConfig,
    opts: FitConfig,
    domains: Sequence[str],
    domain_tokens: Mapping[str, int],
) -> int:
    """Return the tokens of a training on some domains. Raises KeyError as stage_tokens does."""
    context = cfg.trunk.context_tokens
    epoch_tokens = 0
    if opts.epochs is not None:  # else nobody need have counted
        for domain in domains:
            # Whole windows alone, as DomainMixture counts; each needs one token more than it has
            windows = (domain_tokens[domain] - 1) // context
            epoch_tokens += windows * context
    steps = opts.resolve_steps(context, epoch_tokens)
    return steps * opts.batch_sequences * context


def _dense_tokens(cfg: FfnMoeConfig, item: str | None, domain_tokens: Mapping[str, int]) -> int:
    domains = cfg.dense_domains
    experts = _taught_tokens(cfg, domains, domain_tokens)
    if item == "path":
        return max(experts)
    total = sum(experts) + tokens_on(cfg, cfg.router, domains, domain_tokens)
    if item in FROM_ZERO:
        total += stage_tokens(cfg, "train_shared", None, domain_tokens)
    return total


def dense_options(cfg: FfnMoeConfig, item: str, domain_tokens: Mapping[str, int]) -> FitConfig:
    """Return a dense baseline's settings, its steps such that it sees the tokens its name
    promises."""
    base, _ = _settings(cfg, "train_dense", item)
    lr = base.lr
    if item not in FROM_ZERO and cfg.dense.lr:
        lr = cfg.dense.lr
    batch_tokens = base.batch_sequences * cfg.trunk.context_tokens
    # Rounded up: no baseline may lose for want of the last batch
    steps = ceil(_dense_tokens(cfg, item, domain_tokens) / batch_tokens)
    return base.model_copy(update={"steps": steps, "epochs": None, "tokens": None, "lr": lr})


def search_settings(
    cfg: FfnMoeConfig, search: str, item: str | None, domain_tokens: Mapping[str, int]
) -> tuple[FitConfig, Trains]:
    """Return the settings of a search's short trainings, whose rate is still open, and what they
    move.

    Raises KeyError for a duration in epochs over a domain that was not counted.
    """
    opts, trains = _settings(cfg, search, item)
    step_tokens = opts.batch_sequences * cfg.trunk.context_tokens
    stage = trained_by(search)
    if stage in ("train_shared", "train_router", "train_joint"):
        steps = stage_tokens(cfg, stage, item, domain_tokens) / step_tokens
        return with_ramp(in_small(opts, cfg.lr_search, steps), steps), trains
    # An expert for each of the trunk's domains: which of all get one is no part of the search
    domains = cfg.trunk_domains
    counted = _taught_tokens(cfg, domains, domain_tokens)
    return in_small(opts, cfg.lr_search, sum(counted) / step_tokens, len(domains)), trains


def dense_width(cfg: FfnMoeConfig, item: str) -> int:
    """Return the feed-forward width of a dense baseline that starts from zero."""
    return cfg.trunk.d_ff * (cfg.router.top_k if item == "wide" else 1)


def _settings(cfg: FfnMoeConfig, stage: str, item: str | None) -> tuple[FitConfig, Trains]:
    """Return the settings that a training goes by, or that a search is for, and what it moves."""
    if stage in SEARCHES.values():
        stage = trained_by(stage)
    if stage == "train_shared":
        return cfg.trunk, "all"
    if stage == "train_experts":
        return cfg.expert, "ffn"
    if stage == "train_router":
        return cfg.router, "gates"
    if stage == "train_joint":
        return cfg.joint, "all"
    if item in FROM_ZERO:
        return cfg.trunk, "all"
    return cfg.expert, "ffn" if item == "ffn" else "all"


def _named(item: str | None) -> str:
    if item is None:
        raise KeyError("a job of one among several has no name")
    return item


def cost(
    cfg: FfnMoeConfig,
    stage: str,
    item: str | None,
    domain_tokens: Mapping[str, int] | None,
    bf16: bool,
) -> JobCost | None:
    """Return what a training job, or the report, will spend; tokens and operations are None while
    the token counts are unknown.

    None for a pretrained trunk that is not on this machine yet.
    """
    if stage in ("train_router", "evaluate") and cfg.expert.form == ADAPTER:
        return None  # it follows from statistics
    if stage == "train_experts" and item in cfg.expert.imported:
        return None
    shape = trunk_shape(cfg)
    if shape is None:
        return None
    stack = _stack(cfg, shape)
    if stage == "evaluate":
        return passes.of_report(cfg, stack, bf16)
    if stage == "train_shared" and cfg.trunk.is_pinned:
        return passes.of_pin(cfg, stack, bf16)
    if stage == "train_dense" and item in FROM_ZERO:
        trunk = cfg.trunk.model_copy(update={"d_ff": dense_width(cfg, item)})
        shape = Shape.from_config(trunk, cfg.tokenizer.vocab_size)
    opts, trains = _settings(cfg, stage, item)
    # asked here alone: what others make of an expert's duration does not depend on its form
    of_experts = stage in ("train_experts", SEARCHES["train_experts"])
    if of_experts and cfg.expert.form == ADAPTER:
        trains = "adapter"
    expert = expert_shape(cfg, shape)
    if of_experts and expert is not None:
        trains = "expert"
    if trains == "gates":
        gated = shape.layers if expert is None else len(expert.layers)
        parameters = gated * shape.d_model * _stacked(cfg)
    elif expert is not None and trains == "expert":
        parameters = shape.expert_parameters(expert)
    elif trains == "ffn":
        parameters = shape.ffn_parameters
    elif trains == "adapter":
        parameters = adapter_parameters(cfg, shape)
    else:
        parameters = shape.trunk_parameters + shape.ffn_parameters
    try:
        tokens = stage_tokens(cfg, stage, item, domain_tokens or {})
    except KeyError:  # a duration in epochs, before preprocess has counted the text
        tokens = None
    name = f"{stage}-{item}" if item else stage
    plan = memory_plan(cfg, opts, shape, trains, bf16, name)
    adapter = adapter_parameters(cfg, shape) if trains == "adapter" else 0
    stored = stored_bytes(cfg, shape)
    begun = passes.gates_bytes(cfg, stack) if trains == "gates" else 0
    frozen = frozen_bytes(shape, trains, bf16, _beside(cfg), expert, stored)
    peak = peak_bytes(
        shape,
        trains,
        plan,
        bf16,
        _beside(cfg),
        cfg.router.top_k,
        adapter,
        expert,
        stored,
        begun,
    )
    if tokens == 0:
        # Nothing is kept for a backward pass that is never made, and nothing is rounded beforehand
        frozen = frozen_bytes(shape, trains, bf16, _beside(cfg), expert, stored, once=True)
        batch = min(opts.eval_tokens, plan.micro_batch_sequences * shape.context_tokens)
        own = passes.forward_bytes(stack, batch, bf16, int(frozen[1]))
        own += passes.kernels_bytes(batch, bf16)
        if stored not in (None, 2 if bf16 else 4):
            own += passes.cast_bytes(shape, 2 if bf16 else 4)
        peak = int(frozen[0]) + max(own, begun) + passes.code_bytes()
    found = JobCost.of(
        stage,
        item,
        tokens=tokens,
        flops_per_token=shape.train_flops_per_token(trains, expert, cfg.router.top_k),
        parameters=parameters,
        plan=plan,
        peak_bytes=peak,
        mapped_bytes=int(frozen[0]) + passes.code_bytes(),
        beside_flops=passes.beside_training(cfg, stack, stage, opts, tokens or 0),
    )
    if stage in SEARCHES.values():
        return of_rates(found, opts, shape)
    return with_search(cfg, found)


def with_search(cfg: FfnMoeConfig, found: JobCost) -> JobCost:
    """Return the cost of a training with the search that its rate is from, where that is auto."""
    search = search_of(cfg, found.stage, found.item)
    if search is None:
        return found
    return replace(found, summary=f"{found.summary}; lr from {search[0]}")


def of_rates(found: JobCost, opts: FitConfig, shape: Shape) -> JobCost:
    """Return the cost of a search, each of whose rates ends with a validation."""
    summary = f"{found.summary}; {PLANNED_RATES} rates"
    if found.flops is None:
        return replace(found, summary=summary)
    judged = PLANNED_RATES * opts.eval_tokens * shape.forward_flops_per_token()
    return replace(found, summary=summary, flops=found.flops + judged)


def expert_shape(cfg: FfnMoeConfig, shape: Shape) -> ExpertShape | None:
    """Return what an expert is where it is not whole networks in every layer.

    None too for layers that the trunk does not have, which is told elsewhere.
    """
    if cfg.expert.is_whole or cfg.expert.form == ADAPTER:
        return None
    try:
        return ExpertShape(cfg.expert.in_layers(shape.layers), cfg.expert.delta_rank)
    except ValueError:
        return None


def adapter_parameters(cfg: FfnMoeConfig, shape: Shape) -> int:
    """Return how many numbers one expert of a run is that adds to linear layers."""
    layers = len(cfg.expert.in_layers(shape.layers))
    return shape.adapter_parameters(cfg.expert.adapter_rank, layers)


def memory_plan(
    cfg: FfnMoeConfig,
    opts: FitConfig,
    shape: Shape,
    trains: Trains,
    bf16: bool,
    name: str = "this training",
) -> MemoryPlan:
    """Return how a training runs under cfg.runtime.memory_budget. Raises BudgetError when nothing
    fits."""
    gates = trains == "gates"
    divisible = True
    if gates:  # no other training may depend on the router's settings: its address has none of them
        # These look at all tokens of a batch together: in pieces they would be something else
        per_batch = cfg.router.balance == "aux" or cfg.router.capacity_factor or cfg.router.noise
        divisible = not per_batch

    # no other training reads how an expert is made: its address has none of it
    adapter = adapter_parameters(cfg, shape) if trains == "adapter" else 0
    expert = expert_shape(cfg, shape) if trains in ("expert", "gates") else None
    stored = stored_bytes(cfg, shape)
    begun = passes.gates_bytes(cfg, _stack(cfg, shape)) if gates else 0
    small = trains == "adapter" or (trains == "expert" and cfg.expert.delta_rank > 0)

    def predict(tried: MemoryPlan) -> int:
        return peak_bytes(
            shape,
            trains,
            tried,
            bf16,
            _beside(cfg),
            cfg.router.top_k,
            adapter,
            expert,
            stored,
            begun,
        )

    return plan_memory(
        opts,
        shape.context_tokens,
        cfg.runtime.memory_budget,
        predict,
        row_bytes=shape.context_tokens * shape.d_model * (2 if bf16 else 4),
        divisible=divisible,
        can_checkpoint=not gates,
        gpu_bytes=gpu_bytes(),
        fast_tokens=LEAN_TOKENS if small else FAST_TOKENS,
        name=name,
    )


def stack_shape(cfg: FfnMoeConfig) -> passes.StackShape | None:
    """Return the sizes of a run's stack; None for a pretrained trunk that is not on this machine
    yet."""
    shape = trunk_shape(cfg)
    return None if shape is None else _stack(cfg, shape)


def _stack(cfg: FfnMoeConfig, shape: Shape) -> passes.StackShape:
    """Return the sizes of a run's stack."""
    return passes.StackShape(
        shape, _stacked(cfg), expert_shape(cfg, shape), stored_bytes(cfg, shape)
    )


def _stacked(cfg: FfnMoeConfig) -> int:
    """Return how many feed-forward networks the stack has."""
    return len(cfg.experts) + (cfg.trunk.anchor == "keep")


def _beside(cfg: FfnMoeConfig) -> int:
    """Return how many experts of a stack stand beside the trunk's own networks; the anchor is these
    where experts are deltas on them."""
    return len(cfg.experts) if cfg.expert.delta_rank else _stacked(cfg)


def peak_bytes(
    shape: Shape,
    trains: Trains,
    plan: MemoryPlan,
    bf16: bool,
    experts: int,
    top_k: int = 2,
    adapter: int = 0,
    expert: ExpertShape | None = None,
    stored: int | None = None,
    begun: int = 0,
) -> int:
    """Return the predicted peak above imports of a training: of `all`, of an `ffn`, of an `adapter`
    of so many numbers, or of the `gates` over experts. stored: bytes of a number in the files of a
    pinned trunk; begun: what is held before the first pass, beside files.

    Weights, moments and gradients are counted, activations estimated; the constants are fitted to
    benchmarks/memory.py, which compares this with what is measured.
    """
    unit = 2 if bf16 else 4
    active = top_k if trains == "gates" else 1
    trained = 0  # gates are too small to count
    if trains == "all":
        trained = shape.trunk_parameters + shape.ffn_parameters
    elif trains == "ffn":
        trained = shape.ffn_parameters
    elif trains == "adapter":
        trained = adapter
    elif expert is not None and trains == "expert":
        trained = shape.expert_parameters(expert)
    kept = trained * plan.state_bytes
    kept += sum(frozen_bytes(shape, trains, bf16, experts, expert, stored))
    if trains != "all" and stored not in (None, unit):
        kept += passes.cast_bytes(shape, unit)
    if trains == "all":
        # gradients of head and embedding until they are added up
        kept += 2 * unit * shape.vocab_size * shape.d_model
    code = 0
    if device() != "cuda":
        code = passes.code_bytes() + INT8_BYTES * (plan.moments == "int8")
        code += PEFT_BYTES * (trains == "adapter")
    lowest = min(expert.layers) if trains == "expert" and expert is not None else 0
    training = kept + pass_bytes(shape, plan, unit, trains, active, lowest)
    ended = 0.0
    if trains in ("ffn", "expert"):
        layers = shape.layers if expert is None else len(expert.layers)
        # Then the optimizer's state is gone, and the statistics come
        ended = sum(frozen_bytes(shape, trains, bf16, experts, expert, stored)) + 4 * trained
        ended += passes.statistics_bytes(layers, shape.d_model)
    started = frozen_bytes(shape, trains, bf16, experts, expert, stored)[0] + begun
    return int(max(started, training, ended) + code)


def frozen_bytes(
    shape: Shape,
    trains: Trains,
    bf16: bool,
    experts: int,
    expert: ExpertShape | None,
    stored: int | None,
    once: bool = False,
) -> tuple[float, float]:
    """Return the bytes of what a training does not move: mapped from files, and in memory of its
    own. once: of passes that are never trained through, which cast a layer at a time."""
    unit = 2 if bf16 else 4
    own = shape.ffn_parameters if expert is None else shape.expert_parameters(expert)
    if trains == "all":
        return 0, 0
    # What stands below deltas and between chosen layers, or below an adapter
    below = 0
    if trains == "adapter" or (expert is not None and expert.rank):
        below = shape.ffn_parameters
    elif expert is not None:
        below = shape.ffn_parameters - (own if trains == "expert" else 0)
    mapped: float = shape.trunk_parameters * unit + below * unit
    rounded: float = 0
    if stored is not None:
        # A copy of the networks is made of the file, whose pages stay
        mapped = (shape.trunk_parameters + shape.ffn_parameters) * stored
    elif trains != "adapter" and bf16:
        # A trunk that was trained here has its networks in fp32, which are rounded beside the file
        mapped += 4 * below
    if trains != "gates":
        return mapped, rounded
    if once:
        mapped += experts * own * 4
        rounded = shape.d_model * shape.d_ff
        if expert is not None and expert.rank:
            rounded = experts * own / len(expert.layers)
        rounded *= unit * bf16
    elif expert is not None and expert.rank:
        # Deltas stay in fp32 where they are, beside the copies that a mixture in bf16 keeps
        mapped += experts * own * 4
        rounded = experts * own * unit * bf16
    elif bf16:
        rounded = experts * own * unit
    else:
        mapped += experts * own * unit
    return mapped, rounded
