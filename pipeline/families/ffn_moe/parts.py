"""Pieces of an ffn_moe run as its trainings, its tables and its server need them: opened, frozen,
on the device.

B sequences, T tokens, N = B*T, D model width, E experts, L layers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from ...data.text.mixture import DomainMixture
from ...data.text.shards import Shards
from ...errors import MismatchError
from ...hardware import device, uses_bf16
from ...model import low_rank, router_init
from ...model.chunks import chunk_logits_on, chunk_of
from ...model.experts import Expert, common_layers, from_tensors
from ...model.loss import chunked_token_loss
from ...model.low_rank import LowRankExpert
from ...model.router import Gating, Mixture, Router
from ...model.router_init import FeatureStatistics
from ...model.trunk import Ffn, Trunk, build, open_tensors
from ...protocols import Progress, quiet
from ...store.reading import read_object
from ...train.memory_meter import trim_heap
from .. import Parts
from .config import FfnMoeConfig
from .pretrained import check_vocabulary, is_pinned, open_pretrained, pinned_tensors
from .sections import ANCHOR

FROZEN = "frozen.safetensors"  # the trunk in bf16, for jobs to map
EXPERT = "expert.safetensors"  # an expert's own networks, or deltas
EVALUATION_SEQUENCES = 16


def mixture_of(
    experts: Sequence[Expert],
    weight_LED: torch.Tensor,
    top_k: int,
) -> Mixture:
    """Return frozen experts joined by fixed gates, in the layers where they have networks of their
    own."""
    router = Router(weight_LED, Gating(top_k), common_layers(experts))
    mixture = Mixture(experts, router).to(device())
    return mixture.requires_grad_(False).eval()


def token_loss(
    trunk: Trunk,
    ffn: Ffn,
    ids_BT: torch.Tensor,
    bf16: bool,
    chunk_logits: int | None = None,
) -> torch.Tensor:
    """Return nats_BT of every token after the first, without gradients."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    autocast = torch.autocast(ids_BT.device.type, dtype, enabled=bf16)
    with torch.no_grad(), autocast:
        h_BTD = trunk.hidden(ids_BT[:, :-1], ffn)
    h_ND = h_BTD.flatten(0, 1)
    target_N = ids_BT[:, 1:].flatten()
    chunk = chunk_of(len(trunk.head), chunk_logits or chunk_logits_on(ids_BT.device.type))
    nats_N = chunked_token_loss(h_ND, trunk.head, target_N, dtype, chunk)
    return nats_N.view(len(ids_BT), -1)


def token_losses(
    trunk: Trunk,
    ffn: Ffn,
    batches: Sequence[torch.Tensor],
    bf16: bool,
    chunk_logits: int | None = None,
    told: Callable[[float], None] | None = None,
) -> torch.Tensor:
    """Return nats_N of every token after the first of all rows of some ids_BT, one batch after
    another; `told` hears before each the share that is done.

    What is kept is taken once, before all passes: a few losses kept from each would lie between
    the blocks that the next one frees and needs, and the heap would grow with every pass.
    """
    tokens = sum(len(ids_BT) * (ids_BT.shape[1] - 1) for ids_BT in batches)
    nats_N = torch.empty(tokens, device=batches[0].device)
    done = 0
    for number, ids_BT in enumerate(batches):
        if told is not None:
            told(number / len(batches))
        nats_BT = token_loss(trunk, ffn, ids_BT, bf16, chunk_logits)
        nats_N[done : done + nats_BT.numel()] = nats_BT.flatten()
        done += nats_BT.numel()
    return nats_N


def initial_gates(cfg: FfnMoeConfig, parts: Parts, init: str) -> torch.Tensor:
    """Return weight_LED of the stack's untrained gates by the name of their initialisation."""
    if init == "rows":
        return _coordinated_rows(cfg, parts)
    anchor = cfg.trunk.anchor == "keep"
    return gates_from(cfg, stored_statistics(cfg, parts, anchor), init)


def gates_from(
    cfg: FfnMoeConfig,
    statistics: Sequence[FeatureStatistics],
    init: str,
) -> torch.Tensor:
    """Return weight_LED of gates that need nothing but the experts' statistics, in their order."""
    opts = cfg.router
    if init == "uniform":
        return router_init.uniform(statistics)
    if init == "random":
        return router_init.random(statistics)
    if init == "centroid":
        return router_init.centroid(statistics, margin=opts.margin)
    if init == "ridge":
        return router_init.ridge(statistics, penalty=opts.ridge_lambda, margin=opts.margin)
    # A name that the settings allow and nobody computes must not become another's gates
    raise NotImplementedError(f"router.init: no gates are made for {init}")


def shards_of(parts: Parts, domains: Iterable[str]) -> Shards:
    """Return the token shards of some domains, each once."""
    folders = [parts.folder("preprocess", domain) for domain in dict.fromkeys(domains)]
    return Shards(*folders)


def expert_shards(cfg: FfnMoeConfig, parts: Parts, domains: Sequence[str]) -> Shards:
    """Return the token shards that an expert of some domains is trained on."""
    general = cfg.trunk_domains if cfg.partition.overlap else ()
    return shards_of(parts, (*domains, *general))


def training_rows(
    cfg: FfnMoeConfig,
    shards: Shards,
    purpose: str,
    domains: Sequence[str],
    *,
    how: Literal["natural", "equal"] = "natural",
    general: Sequence[str] = (),
    general_share: float = 0.0,
) -> DomainMixture:
    """Return the training rows of some domains, in an order of their own for each purpose."""
    return DomainMixture(
        shards,
        "train",
        tuple(domains),
        cfg.trunk.context_tokens,
        seed=cfg.seed_of("rows", purpose),
        how=how,
        general=tuple(general),
        general_share=general_share,
    )


def expert_rows(
    cfg: FfnMoeConfig, shards: Shards, item: str, domains: Sequence[str]
) -> DomainMixture:
    """Return the training rows of an expert of some domains, each as often, with its share of
    general text; `item` is whose order they have."""
    return training_rows(
        cfg,
        shards,
        f"expert {item}",
        domains,
        how="equal",
        # Of what the trunk has seen: a domain that is added changes no other's expert
        general=cfg.trunk_domains,
        general_share=cfg.partition.overlap,
    )


def batch_of(rows: DomainMixture, first: int, count: int) -> torch.Tensor:
    """Return ids_BT of rows first..first+count, each with the token after its last, on the
    device."""
    ids = rows.rows(first, count)
    return torch.from_numpy(ids).to(device())


def validation_rows(cfg: FfnMoeConfig, shards: Shards, domain: str, most: int) -> np.ndarray:
    """Return ids_BT of the first rows of a domain's validation text, at most so many: one order for
    all of a run, so that whatever is judged there is judged on the same rows."""
    context = cfg.trunk.context_tokens
    rows = DomainMixture(shards, "valid", (domain,), context, seed=0)
    windows = max(1, shards.tokens("valid", domain) // context - 1)
    return rows.rows(0, min(most, windows))


def training_tokens(shards: Shards) -> dict[str, int]:
    """Return how many tokens of training text each domain has."""
    return {domain: shards.tokens("train", domain) for domain in shards.domains}


def new_trunk(
    cfg: FfnMoeConfig,
    shards: Shards,
    d_ff: int | None = None,
    progress: Progress = quiet,
) -> tuple[Trunk, Expert]:
    """Return trunk and dummy to train: from trunk.init, or drawn from torch's generator, optionally
    of width d_ff.

    Raises MismatchError when the tokenizer has entries that a pretrained trunk has not.
    """
    if cfg.trunk.init is None:
        settings = _hf_config(cfg, shards, d_ff or cfg.trunk.d_ff)
        trunk, dummy = build(settings)
        return trunk.to(device()), dummy.to(device())
    trunk, dummy = open_pretrained(cfg, progress)
    check_vocabulary(cfg, shards.vocab_size, len(trunk.head))
    return trunk.to(device()), dummy.to(device())


def _hf_config(cfg: FfnMoeConfig, shards: Shards, d_ff: int) -> dict:
    """Return a new trunk's settings by the names of Hugging Face config fields."""
    opts = cfg.trunk
    return {
        "model_type": "qwen3",
        "vocab_size": shards.vocab_size,
        "hidden_size": opts.d_model,
        "num_hidden_layers": opts.layers,
        "num_attention_heads": opts.heads,
        "num_key_value_heads": opts.kv_heads or opts.heads,
        "head_dim": opts.head_dim or opts.d_model // opts.heads,
        "intermediate_size": d_ff,
        "max_position_embeddings": opts.context_tokens,
        "tie_word_embeddings": opts.tie_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": opts.rope_theta},
        # one token leads every document, so a text starts as the last one ended
        "bos_token_id": shards.end_id,
        "eos_token_id": shards.end_id,
    }


def stored_trunk(cfg: FfnMoeConfig, parts: Parts) -> tuple[Trunk, Expert]:
    """Return the run's trunk and dummy as they are stored, computing in fp32, frozen, memory-mapped
    where they are in main memory."""
    if is_pinned(parts):
        return _pinned(parts, torch.float32)
    tensors = parts.tensors("train_shared", "trunk.safetensors")
    return _opened(parts, tensors)


def training_trunk(cfg: FfnMoeConfig, parts: Parts) -> tuple[Trunk, Expert]:
    """Return the trunk as trainings on top of it need it, and the dummy, frozen: mapped bf16 where
    they are bf16."""
    if not uses_bf16(cfg.dtype):
        return stored_trunk(cfg, parts)
    if is_pinned(parts):
        return _pinned(parts, torch.bfloat16)
    if FROZEN in parts.manifest("train_shared").files:
        rounded = parts.tensors("train_shared", FROZEN)
        return _opened(parts, rounded)
    # The trunk was trained where bf16 is not native: rounded here, in memory of this job's own
    exact = parts.tensors("train_shared", "trunk.safetensors")
    return _opened(parts, in_bf16(exact))


def _pinned(parts: Parts, dtype: torch.dtype) -> tuple[Trunk, Expert]:
    """Return trunk and dummy mapped from the pinned model's own files, in the dtype that these
    have; what passes between layers has the dtype that is asked for."""
    settings = stored_settings(parts, "train_shared")
    tensors = pinned_tensors(parts, settings)
    trunk, dummy = open_tensors(settings, *tensors, dtype)
    return trunk.to(device()), dummy.to(device())


def _opened(
    parts: Parts,
    tensors: Mapping[str, torch.Tensor],
) -> tuple[Trunk, Expert]:
    settings = stored_settings(parts, "train_shared")
    dummy_tensors = parts.tensors("train_shared", "dummy.safetensors")
    trunk, dummy = open_tensors(settings, tensors, dummy_tensors)
    return trunk.to(device()), dummy.to(device())


def stored_settings(parts: Parts, stage: str, item: str | None = None) -> dict[str, Any]:
    """Return the Hugging Face config fields of the trunk that a stage left."""
    file = parts.folder(stage, item) / "trunk.json"
    return read_object(file)


def in_bf16(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors rounded to bf16."""
    out = {}
    for name, tensor in tensors.items():
        out[name] = tensor.detach().to(torch.bfloat16)
    return out


def training_expert(cfg: FfnMoeConfig, expert: Expert) -> Expert:
    """Return a frozen expert as a training computes with it: rounded once where trainings are
    bf16.

    Deltas stay in fp32, as they are small and each product casts them anyway.
    """
    if not uses_bf16(cfg.dtype) or isinstance(expert, LowRankExpert):
        return expert
    if all(parameter.dtype == torch.bfloat16 for parameter in expert.parameters()):
        # As it is: experts on one base are known by it
        return expert
    return from_tensors(expert.base or expert, in_bf16(expert.named()), expert.own_layers)


def expert_layers(cfg: FfnMoeConfig, count: int) -> tuple[int, ...]:
    """Return the numbers of the layers with experts in a trunk of so many. Raises MismatchError."""
    try:
        return cfg.expert.in_layers(count)
    except ValueError as error:
        raise MismatchError(f"expert.layers: {error}") from None


def stored_experts(
    cfg: FfnMoeConfig, parts: Parts, dummy: Expert | None = None
) -> Iterator[tuple[str, Expert]]:
    """Yield the stack's experts by name, the anchor first when it is kept, all frozen and mapped,
    one after another.

    dummy: the run's, where it is open already.
    """
    if dummy is None:
        _, dummy = stored_trunk(cfg, parts)
    if cfg.trunk.anchor == "keep":
        yield ANCHOR, dummy
    for name in cfg.experts:
        yield name, _stored_expert(cfg, parts, dummy, name)


def _stored_expert(cfg: FfnMoeConfig, parts: Parts, dummy: Expert, name: str) -> Expert:
    # A function of its own: in the loop above its names would keep one file mapped while the next
    # one is opened
    return open_expert(cfg, dummy, parts.tensors("train_experts", EXPERT, name))


def open_expert(cfg: FfnMoeConfig, dummy: Expert, tensors: Mapping[str, torch.Tensor]) -> Expert:
    """Return a frozen expert of the run's form around stored tensors."""
    if cfg.expert.delta_rank:
        return low_rank.from_tensors(dummy, tensors, cfg.expert.delta_scale).to(device())
    layers = expert_layers(cfg, len(dummy.layers))
    return from_tensors(dummy, tensors, layers).to(device())


def expert_bytes(cfg: FfnMoeConfig, parts: Parts, file: str = EXPERT) -> int:
    """Return how many bytes the largest expert's own weights take, in a file of its artifact."""
    sizes = []
    for name in cfg.experts:
        sizes.append((parts.folder("train_experts", name) / file).stat().st_size)
    return max(sizes)


def stored_statistics(cfg: FfnMoeConfig, parts: Parts, anchor: bool) -> list[FeatureStatistics]:
    """Return the feature statistics of the stack's experts in order, the dummy's first when
    `anchor`."""
    found = []
    for name in cfg.experts:
        tensors = parts.tensors("train_experts", "statistics.safetensors", name)
        found.append(FeatureStatistics.from_tensors(tensors))
    if not anchor:
        return found
    tensors = parts.tensors("train_shared", "statistics.safetensors")
    everywhere = FeatureStatistics.from_tensors(tensors)
    # The trunk's are of every layer: it does not know where experts will be
    layers = expert_layers(cfg, len(everywhere.sum_LD))
    general = everywhere.of_layers(layers)
    if cfg.expert.statistics_path == "base":
        general = general.without(_taught(cfg))
    return [general, *found]


def _taught(cfg: FfnMoeConfig) -> list[int]:
    """Return the numbers of the trunk's domains that have an expert in the stack."""
    mixed = cfg.trunk_domains
    return [number for number, domain in enumerate(mixed) if domain in cfg.experts]


def _coordinated_rows(cfg: FfnMoeConfig, parts: Parts) -> torch.Tensor:
    """Return weight_LED of the rows coordinated experts learned; an anchor's row is zero, the bias
    is dropped."""
    rows = []
    for name in cfg.experts:
        gate = parts.tensors("train_experts", "gate.safetensors", name)
        rows.append(gate["row"])
    if cfg.trunk.anchor == "keep":
        rows.insert(0, torch.zeros_like(rows[0]))
    return torch.stack(rows, 1)


def feature_statistics(
    cfg: FfnMoeConfig,
    trunk: Trunk,
    ffn: Ffn,
    rows: DomainMixture,
    tokens: int,
    layers: Sequence[int] | None = None,
    progress: Progress = quiet,
) -> FeatureStatistics:
    """Return statistics of the feed-forward inputs over the first tokens of rows, in evaluation
    mode; of some layers alone where they are given."""
    settings = trunk.config
    if layers is None:
        layers = range(settings.num_hidden_layers)
    # Of an equal mixture row g is of domain g mod n, so its sums can be kept by domain
    domains = len(rows.domains) if rows.how == "equal" else 0
    statistics = FeatureStatistics.empty(len(layers), settings.hidden_size, domains)
    observed = statistics.observe(ffn, layers)
    available = min(tokens, rows.tokens())
    wanted = max(1, available // rows.context_tokens)
    # The sums are a few times the size of a small expert: what a training before left free in the
    # heap goes first (624 MB after a rank-64 expert of 1.5 B numbers, beside sums of 1,309)
    trim_heap()
    # Under a budget one at a time, as the training that follows starts with
    sequences = 1 if cfg.runtime.memory_budget else EVALUATION_SEQUENCES
    bf16 = uses_bf16(cfg.dtype)
    with torch.no_grad():
        for at in range(0, wanted, sequences):
            progress(f"statistics of {wanted * rows.context_tokens:,} tokens", at / wanted)
            count = min(sequences, wanted - at)
            ids_BT = batch_of(rows, at, count)
            # Entered for each batch: leaving it lets go of the weights it cast
            with torch.autocast(device(), torch.bfloat16, enabled=bf16):
                trunk.hidden(ids_BT[:, :-1], observed)
    return statistics.on_processor()
