"""What each job of an ffn_moe run will spend: tokens, parameters, operations, memory."""

from collections.abc import Mapping
from math import ceil

from ..budget import Job, Shape
from ..config import Config, Fit

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
    held = len(cfg.experts) if stage == "train_router" else 1
    sequences = opts.micro_batch_sequences or opts.batch_sequences
    gates = cfg.trunk.layers * cfg.trunk.d_model * (len(cfg.experts) + (cfg.trunk.anchor == "keep"))
    parameters = {
        "all": shape.trunk_parameters + shape.ffn_parameters, "ffn": shape.ffn_parameters, "gates": gates,
    }[trains]  # fmt: skip
    try:
        tokens = stage_tokens(cfg, stage, item, domain_tokens or {})
    except KeyError:  # a duration in epochs, before preprocess has counted the text
        tokens = None
    flops = None if tokens is None else tokens * shape.train_flops_per_token(trains)
    return Job(stage, item, tokens, parameters, flops, shape.peak_bytes(trains, sequences, bf16, held))
