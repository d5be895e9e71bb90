"""Pieces of an ffn_moe run as its trainings, its tables and its server need them: opened, frozen,
on the device.

B sequences, T tokens, N = B*T, D model width, E experts, L layers.
"""

import json
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from ...data.text.shards import DomainMixture as Rows
from ...data.text.shards import Shards
from ...errors import MismatchError
from ...hardware import device, uses_bf16
from ...model import router_init
from ...model.experts import Expert, from_tensors
from ...model.loss import CHUNK_LOGITS, chunk_of, chunked_token_loss
from ...model.router import Gating, Mixture, Router
from ...model.router_init import FeatureStatistics
from ...model.trunk import SUPPORTED, Ffn, Trunk, build, open_tensors, pretrained
from .config import FfnMoeConfig

ANCHOR = "anchor"
FROZEN = "frozen.safetensors"  # the trunk in bf16, for jobs to map
EVALUATION_SEQUENCES = 16
# no setting of expert.*, as the trunk's address does not hold those
ANCHOR_STATISTICS_TOKENS = 65_536


def mixture_of(experts: Sequence[Expert], weight_LED: torch.Tensor, top_k: int) -> Mixture:
    """Return frozen experts joined by fixed gates."""
    return (
        Mixture(experts, Router(weight_LED, Gating(top_k)))
        .to(device())
        .requires_grad_(False)
        .eval()
    )


def token_loss(
    trunk: Trunk, ffn: Ffn, ids_BT: torch.Tensor, bf16: bool, chunk_logits: int = CHUNK_LOGITS
) -> torch.Tensor:
    """Return nats_BT of every token after the first, without gradients."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    with torch.no_grad(), torch.autocast(ids_BT.device.type, dtype, enabled=bf16):
        h_BTD = trunk.hidden(ids_BT[:, :-1], ffn)
    h_ND, chunk = h_BTD.flatten(0, 1), chunk_of(len(trunk.head), chunk_logits)
    return chunked_token_loss(h_ND, trunk.head, ids_BT[:, 1:].flatten(), dtype, chunk).view(
        len(ids_BT), -1
    )


def initial_gates(cfg: FfnMoeConfig, parts, init: str, anchor: bool | None = None) -> torch.Tensor:
    """Return weight_LED of untrained gates by the name of their initialisation."""
    sums = stored_statistics(cfg, parts, cfg.trunk.anchor == "keep" if anchor is None else anchor)
    if init == "rows":
        return _own_rows(cfg, parts)
    makers = {
        "uniform": router_init.uniform,
        "random": router_init.random,
        "centroid": partial(router_init.centroid, margin=cfg.router.margin),
        "ridge": partial(
            router_init.ridge, penalty=cfg.router.ridge_lambda, margin=cfg.router.margin
        ),
    }
    return makers[init](sums)


def training_rows(cfg, shards, purpose, domains, **how) -> Rows:
    """Return the training rows of some domains, in an order of their own for each purpose."""
    return Rows(
        shards,
        "train",
        tuple(domains),
        cfg.trunk.context_tokens,
        seed=cfg.seed_of("rows", purpose),
        **how,
    )


def new_trunk(cfg: FfnMoeConfig, shards: Shards, d_ff: int | None = None) -> tuple[Trunk, Expert]:
    """Return trunk and dummy to train: from trunk.init, or drawn from torch's generator, optionally
    of width d_ff.

    Raises MismatchError when the tokenizer has entries that a pretrained trunk has not.
    """
    t = cfg.trunk
    if not t.init:
        trunk, dummy = build(_settings(cfg, shards, d_ff or t.d_ff))
        return trunk.to(device()), dummy.to(device())
    trunk, dummy = _pretrained(cfg)
    if shards.vocab_size > trunk.head.shape[0]:
        raise MismatchError(
            f"tokenizer {cfg.tokenizer.pretrained} has {shards.vocab_size} entries, trunk {t.init} has "
            f"{trunk.head.shape[0]}: name the trunk's own tokenizer in tokenizer.pretrained"
        )
    return trunk.to(device()), dummy.to(device())


def _settings(cfg: FfnMoeConfig, shards: Shards, d_ff: int) -> dict:
    t = cfg.trunk
    return {
        "model_type": "qwen3",
        "vocab_size": shards.vocab_size,
        "hidden_size": t.d_model,
        "num_hidden_layers": t.layers,
        "num_attention_heads": t.heads,
        "num_key_value_heads": t.kv_heads or t.heads,
        "head_dim": t.head_dim or t.d_model // t.heads,
        "intermediate_size": d_ff,
        "max_position_embeddings": t.context_tokens,
        "tie_word_embeddings": t.tie_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": t.rope_theta},
        "bos_token_id": shards.end_id,
        "eos_token_id": shards.end_id,
    }


def _pretrained(cfg: FfnMoeConfig) -> tuple[Trunk, Expert]:
    try:
        return pretrained(cfg.trunk.init, cfg.trunk.revision)
    except (OSError, ValueError) as error:
        raise MismatchError(
            f"trunk.init {cfg.trunk.init} cannot be loaded ({error}); give a folder or Hub name of a "
            f"{', '.join(SUPPORTED)} model with safetensors weights"
        ) from None


def stored_trunk(cfg: FfnMoeConfig, parts) -> tuple[Trunk, Expert]:
    """Return the run's trunk and dummy in fp32, frozen, memory-mapped where they are in main
    memory."""
    return _opened(parts, parts.tensors("train_shared", "trunk.safetensors"))


def training_trunk(cfg: FfnMoeConfig, parts) -> tuple[Trunk, Expert]:
    """Return the trunk as trainings on top of it need it, and the dummy, frozen: mapped bf16 where
    they are bf16."""
    if not uses_bf16(cfg.dtype):
        return stored_trunk(cfg, parts)
    if FROZEN in parts.manifest("train_shared").files:
        return _opened(parts, parts.tensors("train_shared", FROZEN))
    return _opened(parts, in_bf16(parts.tensors("train_shared", "trunk.safetensors")))


def _opened(parts, tensors: dict[str, torch.Tensor]) -> tuple[Trunk, Expert]:
    settings = json.loads((parts.folder("train_shared") / "trunk.json").read_text("utf-8"))
    trunk, dummy = open_tensors(
        settings, tensors, parts.tensors("train_shared", "dummy.safetensors")
    )
    return trunk.to(device()), dummy.to(device())


def in_bf16(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors rounded to bf16."""
    return {name: tensor.detach().to(torch.bfloat16) for name, tensor in tensors.items()}


def computing(cfg: FfnMoeConfig, expert: Expert) -> Expert:
    """Return a frozen expert as a training computes with it: rounded once where trainings are bf16."""
    return from_tensors(expert, in_bf16(expert.named())) if uses_bf16(cfg.dtype) else expert


def stored_experts(cfg: FfnMoeConfig, parts) -> Iterator[tuple[str, Expert]]:
    """Yield the stack's experts by name, the anchor first when it is kept, all frozen and mapped,
    one after another."""
    _, dummy = stored_trunk(cfg, parts)
    if cfg.trunk.anchor == "keep":
        yield ANCHOR, dummy
    for name in cfg.experts:
        yield (
            name,
            from_tensors(dummy, parts.tensors("train_experts", "expert.safetensors", name)).to(
                device()
            ),
        )


def stored_statistics(cfg: FfnMoeConfig, parts, anchor: bool) -> list[FeatureStatistics]:
    """Return the router statistics of the stack\'s experts in order, the dummy\'s first when
    `anchor`."""
    first = (
        [FeatureStatistics.from_tensors(parts.tensors("train_shared", "statistics.safetensors"))]
        if anchor
        else []
    )
    stored = (
        parts.tensors("train_experts", "statistics.safetensors", name) for name in cfg.experts
    )
    return [*first, *(FeatureStatistics.from_tensors(s) for s in stored)]


def _own_rows(cfg: FfnMoeConfig, parts) -> torch.Tensor:
    """Return weight_LED of the rows coordinated experts learned; an anchor's row is zero, the bias
    is dropped."""
    rows = [parts.tensors("train_experts", "gate.safetensors", name)["row"] for name in cfg.experts]
    anchor = [torch.zeros_like(rows[0])] if cfg.trunk.anchor == "keep" else []
    return torch.stack([*anchor, *rows], 1)


def sum_up(cfg, trunk, ffn, rows: Rows, tokens: int) -> FeatureStatistics:
    """Return statistics of the feed-forward inputs over the first tokens of rows, in evaluation
    mode."""
    layers, d_model = len(trunk.network.model.layers), trunk.config.hidden_size
    sums, context = FeatureStatistics.empty(layers, d_model), rows.context_tokens
    wanted = max(1, min(tokens, rows.tokens()) // context)
    sequences = 1 if cfg.runtime.memory_budget else EVALUATION_SEQUENCES
    with torch.no_grad():
        for at in range(0, wanted, sequences):
            ids_BT = torch.from_numpy(rows.rows(at, min(sequences, wanted - at))).to(device())
            with torch.autocast(ids_BT.device.type, torch.bfloat16, enabled=uses_bf16(cfg.dtype)):
                trunk.hidden(ids_BT[:, :-1], sums.observe(ffn))
    return sums
