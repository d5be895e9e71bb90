"""What a joint training will spend: tokens, parameters, operations, memory.

L layers, D model width, F feed-forward width, E experts, K experts per token.
"""

from collections.abc import Mapping

from ....hardware import device, gpu_bytes
from ....train.flops import JobCost, Shape
from ....train.memory_plan import MemoryPlan, plan_memory
from ..config import FfnMoeConfig
from ..cost import INT8_BYTES, of_rates, stage_tokens, with_search
from ..pass_memory import pass_bytes
from ..passes import code_bytes
from ..stages import SEARCHES
from .network import mixture_layers
from .section import MOE

# Masks of dropout behind attention and network, a number for each of what they add
DROPOUT_ROWS = 2
# Copies of each choice's row that a mixture holds while it runs
MIXED_ROWS = 3


def joint_cost(
    cfg: FfnMoeConfig,
    stage: str,
    item: str,
    domain_tokens: Mapping[str, int] | None,
    bf16: bool,
) -> JobCost:
    """Return what the training of one of joint.models, or the search of its rate, will spend, if no
    patience ends it sooner; tokens and operations are None while the token counts are unknown."""
    shape = Shape.from_config(cfg.trunk, cfg.tokenizer.vocab_size)
    try:
        tokens = stage_tokens(cfg, stage, item, domain_tokens or {})
    except KeyError:  # a duration in epochs, before preprocess has counted the text
        tokens = None
    plan = joint_plan(cfg, item, shape, bf16, f"{stage}-{item}")
    is_search = stage == SEARCHES["train_joint"]
    beside_flops = 0.0
    if not is_search:
        beside_flops = _validation_flops(cfg, item, shape, tokens or 0, domain_tokens or {})
    found = JobCost.of(
        stage,
        item,
        tokens=tokens,
        flops_per_token=train_flops_per_token(cfg, item, shape),
        parameters=parameters(cfg, item, shape),
        plan=plan,
        peak_bytes=peak_bytes(cfg, item, shape, plan, bf16),
        beside_flops=beside_flops,
    )
    return of_rates(found, cfg.joint, shape) if is_search else with_search(cfg, found)


def active_ffns(cfg: FfnMoeConfig, item: str, shape: Shape) -> float:
    """Return how many feed-forward networks a layer run per token on average."""
    return cfg.joint.ffns(item, cfg.joint.top_k, shape.layers)


def kept_ffns(cfg: FfnMoeConfig, item: str, shape: Shape) -> float:
    """Return how many feed-forward networks a layer a model has on average."""
    return cfg.joint.ffns(item, cfg.joint.experts, shape.layers)


def parameters(cfg: FfnMoeConfig, item: str, shape: Shape) -> int:
    """Return how many numbers are trained."""
    gates = 0
    if item == MOE:
        gates = len(mixture_layers(cfg)) * cfg.joint.experts * shape.d_model
    return shape.stack_parameters(kept_ffns(cfg, item, shape)) + gates


def train_flops_per_token(cfg: FfnMoeConfig, item: str, shape: Shape) -> float:
    """Operations of forward and backward, the gates' own products left out; a token over capacity
    counts as any other."""
    return 3 * shape.forward_flops_per_token(active_ffns(cfg, item, shape))


def _validation_flops(
    cfg: FfnMoeConfig, item: str, shape: Shape, tokens: int, domain_tokens: Mapping[str, int]
) -> float:
    opts = cfg.joint
    steps = tokens // (opts.batch_sequences * cfg.trunk.context_tokens)
    validations: float = 1
    if opts.eval_every_steps:
        validations += max(0, steps - 1) // opts.eval_every_steps
    elif opts.epochs is not None:
        validations = max(1.0, opts.epochs)
    elif all(domain in domain_tokens for domain in cfg.joint_domains):
        an_epoch = sum(domain_tokens[domain] for domain in cfg.joint_domains)
        validations += tokens // an_epoch
    forward = shape.forward_flops_per_token(active_ffns(cfg, item, shape))
    return validations * opts.eval_tokens * forward


def joint_plan(
    cfg: FfnMoeConfig, item: str, shape: Shape, bf16: bool, name: str = "this training"
) -> MemoryPlan:
    """Return how a joint training runs under cfg.runtime.memory_budget. Raises BudgetError when
    nothing fits."""
    opts = cfg.joint
    is_mixture = item == MOE
    # A balance and a capacity are of all tokens of a batch, and in pieces other numbers are dropped
    per_batch = opts.dropout > 0
    if is_mixture:
        per_batch = per_batch or opts.aux_weight > 0 or opts.capacity_factor is not None

    def predict(tried: MemoryPlan) -> int:
        return peak_bytes(cfg, item, shape, tried, bf16)

    return plan_memory(
        opts,
        shape.context_tokens,
        cfg.runtime.memory_budget,
        predict,
        row_bytes=shape.context_tokens * shape.d_model * (2 if bf16 else 4),
        divisible=not per_batch,
        can_checkpoint=not is_mixture,
        gpu_bytes=gpu_bytes(),
        name=name,
    )


def peak_bytes(cfg: FfnMoeConfig, item: str, shape: Shape, plan: MemoryPlan, bf16: bool) -> int:
    """Return the predicted peak above imports of a joint training."""
    opts = cfg.joint
    unit = 2 if bf16 else 4
    kept = parameters(cfg, item, shape) * plan.state_bytes
    # gradients of head and embedding until they are added up
    kept += 2 * unit * shape.vocab_size * shape.d_model
    more: float = DROPOUT_ROWS * shape.d_model if opts.dropout else 0
    if item == MOE:
        # Of each choice what enters its expert and what comes out; one is counted with the layer
        in_mixtures = (2 * opts.top_k - 1) * shape.d_model
        more += in_mixtures * len(mixture_layers(cfg)) / shape.layers
        # Beside that one mixture's rows at a time: sorted by expert, answered, back in order
        tokens = plan.micro_batch_sequences * shape.context_tokens
        kept += MIXED_ROWS * opts.top_k * tokens * shape.d_model * unit
    active = active_ffns(cfg, item, shape)
    in_pass = pass_bytes(shape, plan, unit, "all", active, more_numbers=more)
    code = 0
    if device() != "cuda":
        code = code_bytes() + INT8_BYTES * (plan.moments == "int8")
    return int(kept + in_pass + code)
