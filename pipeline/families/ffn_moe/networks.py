"""The rows of the quality table that a network can be run for: the parts of a stack, its dense
rivals, and its experts joined in every other way.

L layers, E experts, D model width.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch

from ...data.text.shards import Shards
from ...hardware import device
from ...model.experts import Expert, Soup
from ...model.low_rank import DeltaSoup, LowRankExpert
from ...model.router import UniformMixture
from ...model.router_init import FeatureStatistics
from ...model.trunk import Trunk, open_dense
from .. import Parts
from .config import FfnMoeConfig
from .cost import stage_tokens
from .evaluator import NetworkRow
from .joint.rows import joint_rows
from .parts import (
    gates_from,
    mixture_of,
    stored_settings,
    stored_statistics,
    training_tokens,
)
from .sections import ANCHOR
from .stack import FfnStack
from .stages import FROM_ZERO

AXES = {
    "total": "same total tokens",
    "path": "tokens and wall-clock of one expert's path",
    "ffn": "same total tokens, FFN only",
    "wide": "same active parameters, same total tokens",
    "scratch": "same total tokens, from zero",
}
TRUNK = "trunk + dummy"
SOUP = "weight soup"


def stack_row(cfg: FfnMoeConfig) -> str:
    """Return the name of the run's own stack in the quality table."""
    # Whatever an epoch holds: a router that has any steps is trained
    steps = cfg.router.resolve_steps(cfg.trunk.context_tokens, 10**9)
    trained = " trained" if steps > 0 else ""
    anchor = " + anchor" if cfg.trunk.anchor == "keep" else ""
    return f"{cfg.router.init}{trained} top-{cfg.router.top_k}{anchor} (the stack)"


def network_rows(
    cfg: FfnMoeConfig,
    parts: Parts,
    shards: Shards,
    dummy: Expert,
    stack: FfnStack,
) -> Iterator[NetworkRow]:
    """Yield the rows of the quality table that a network can be run for, the stack last."""
    trunk = stack.trunk
    experts = list(stack.experts.values())
    own = {name: each for name, each in stack.experts.items() if name != ANCHOR}
    only_own = list(own.values())
    domain_tokens = training_tokens(shards)
    trunk_tokens = stage_tokens(cfg, "train_shared", None, domain_tokens)
    joined_tokens = trunk_tokens
    kept = float(len(experts))
    k = cfg.router.top_k

    yield NetworkRow(
        name=TRUNK,
        kind="part",
        trunk=trunk,
        ffn=dummy,
        train_tokens=trunk_tokens,
    )
    for name, expert in own.items():
        expert_tokens = stage_tokens(cfg, "train_experts", name, domain_tokens)
        if name in cfg.expert.imported:
            # Spent elsewhere, and told all the same
            expert_tokens = parts.manifest("train_experts", name).metrics["trained_tokens"]
        joined_tokens += expert_tokens
        yield NetworkRow(
            name=name,
            kind="expert",
            trunk=trunk,
            ffn=expert,
            train_tokens=trunk_tokens + expert_tokens,
        )
    yield from rival_rows(cfg, parts, domain_tokens)
    # What needs no router: experts merged into one, or all of them run on every token
    yield NetworkRow(
        name=SOUP,
        kind="merge",
        trunk=trunk,
        ffn=soup(only_own),
        train_tokens=joined_tokens,
    )
    all_tokens = joined_tokens + stage_tokens(cfg, "train_router", None, domain_tokens)
    if cfg.evaluate.rivals == "all":
        yield NetworkRow(
            name="uniform mixture",
            kind="merge",
            trunk=trunk,
            ffn=UniformMixture(only_own),
            active_ffns=len(own),
            kept_ffns=len(own),
            train_tokens=joined_tokens,
        )
        anchored = stored_statistics(cfg, parts, anchor=True)
        yield from _untrained(cfg, anchored, stack, joined_tokens)
        yield from _other_top_k(cfg, stack, all_tokens)
        yield _other_anchor(cfg, anchored, trunk, [dummy, *only_own], joined_tokens)
    yield NetworkRow(
        name=stack_row(cfg),
        kind="router",
        trunk=trunk,
        ffn=stack.mixture,
        active_ffns=k,
        kept_ffns=kept,
        train_tokens=all_tokens,
    )


def soup(experts: Sequence[Expert]) -> Soup | DeltaSoup:
    """Return the mean of experts, of each layer when it runs."""
    deltas = [expert for expert in experts if isinstance(expert, LowRankExpert)]
    return DeltaSoup(deltas) if len(deltas) == len(experts) else Soup(experts)


def _untrained(
    cfg: FfnMoeConfig,
    anchored: Sequence[FeatureStatistics],
    stack: FfnStack,
    train_tokens: int,
) -> Iterator[NetworkRow]:
    """Yield what needs no training of a router, at the stack's own top-k. Statistics start with the
    anchor's."""
    k = cfg.router.top_k
    experts = list(stack.experts.values())
    statistics = anchored if cfg.trunk.anchor == "keep" else anchored[1:]
    torch.manual_seed(cfg.seed_of("random router"))
    untrained = {f"random router top-{k}": gates_from(cfg, statistics, "random")}
    for init in ("centroid", "ridge"):
        untrained[f"{init} top-{k}, untrained"] = gates_from(cfg, statistics, init)
    for name, weight_LED in untrained.items():
        yield NetworkRow(
            name=name,
            kind="router",
            trunk=stack.trunk,
            ffn=mixture_of(experts, weight_LED, k),
            active_ffns=k,
            kept_ffns=float(len(experts)),
            train_tokens=train_tokens,
        )


def _other_top_k(cfg: FfnMoeConfig, stack: FfnStack, train_tokens: int) -> Iterator[NetworkRow]:
    """Yield the stack's router with another number of experts a token."""
    experts = list(stack.experts.values())
    for other in (1, 2):
        if other != cfg.router.top_k and other <= len(experts):
            yield NetworkRow(
                name=f"the stack's router, top-{other}",
                kind="router",
                trunk=stack.trunk,
                ffn=mixture_of(experts, stack.weight_LED, other),
                active_ffns=other,
                kept_ffns=float(len(experts)),
                train_tokens=train_tokens,
            )


def _other_anchor(
    cfg: FfnMoeConfig,
    statistics: Sequence[FeatureStatistics],
    trunk: Trunk,
    experts: Sequence[Expert],
    train_tokens: int,
) -> NetworkRow:
    """Return the stack's alternative: with the anchor when it was discarded, without it when it was
    kept. Statistics and experts start with the anchor's."""
    keep = cfg.trunk.anchor == "discard"
    if not keep:
        statistics = statistics[1:]
        experts = experts[1:]
    k = min(cfg.router.top_k, len(experts))
    weight_LED = gates_from(cfg, statistics, "ridge")
    return NetworkRow(
        name=f"ridge top-{k} {'with' if keep else 'without'} anchor, untrained",
        kind="router",
        trunk=trunk,
        ffn=mixture_of(experts, weight_LED, k),
        active_ffns=k,
        kept_ffns=float(len(experts)),
        train_tokens=train_tokens,
    )


def rival_rows(
    cfg: FfnMoeConfig, parts: Parts, domain_tokens: Mapping[str, int]
) -> Iterator[NetworkRow]:
    """Yield the dense baselines, each opened when its turn comes, with the axis it shares with the
    stack, and the joint models."""
    for item in cfg.dense.baselines:
        yield _dense_row(cfg, parts, domain_tokens, item)
    yield from joint_rows(cfg, parts)


def _dense_row(
    cfg: FfnMoeConfig, parts: Parts, domain_tokens: Mapping[str, int], item: str
) -> NetworkRow:
    # A function of its own: in the loop above its names would hold one model while the next one is
    # opened
    stored = parts.tensors("train_dense", "model.safetensors", item)
    trunk, ffn = open_dense(stored_settings(parts, "train_dense", item), stored)
    width = cfg.router.top_k if item == "wide" else 1.0
    tokens = stage_tokens(cfg, "train_dense", item, domain_tokens)
    if item not in FROM_ZERO:
        # It continues the trunk, so what went into that went into it
        tokens += stage_tokens(cfg, "train_shared", None, domain_tokens)
    return NetworkRow(
        name=f"dense {item}",
        kind="dense",
        trunk=trunk.to(device()).eval(),
        ffn=ffn.to(device()).eval(),
        active_ffns=width,
        kept_ffns=width,
        axis=AXES[item],
        train_tokens=tokens,
    )
