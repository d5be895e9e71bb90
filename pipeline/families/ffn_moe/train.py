"""FFN experts of a language model: what each of the trainings is, and how the stack is put
together.

B sequences, T tokens, N = B*T, D model width, E experts, L layers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ...config.fit import FitConfig
from ...data.text.mixture import DomainMixture
from ...data.text.shards import Shards
from ...hardware import device, uses_bf16
from ...model.chunks import chunk_of
from ...model.experts import Expert, clone, in_layers, reinit_like
from ...model.loss import cross_entropy
from ...model.low_rank import DRAWN, LowRankExpert
from ...model.router import CoordinatedExpert, Gating, Mixture, Router
from ...model.router_init import FeatureStatistics
from ...model.trunk import Ffn, Trunk, settings_of
from ...train.flops import Shape
from ...train.loop import NoTraining, Task
from .. import Parts
from .config import FfnMoeConfig
from .cost import Trains, dense_options, dense_width, expert_shape, memory_plan
from .parts import (
    EVALUATION_SEQUENCES,
    FROZEN,
    batch_of,
    expert_layers,
    expert_rows,
    expert_shards,
    feature_statistics,
    in_bf16,
    initial_gates,
    new_trunk,
    shards_of,
    stored_experts,
    stored_trunk,
    token_losses,
    training_expert,
    training_rows,
    training_tokens,
    training_trunk,
    validation_rows,
)
from .pinning import write_pin
from .rates import known
from .stages import FROM_ZERO

LEAST_SHARE = 1e-9  # of an expert in the logarithm of the history's entropy


def shared(cfg: FfnMoeConfig, parts: Parts) -> Task | NoTraining:
    """Return the trunk's training: trunk and dummy on all of the trunk's domains; what is written
    instead for a pretrained trunk that is pinned as it is.

    Raises MismatchError when the tokenizer has tokens that a pretrained trunk has not.
    """
    cfg = known(cfg, parts, "train_shared")
    domains = cfg.trunk_domains
    shards = shards_of(parts, domains)
    if cfg.trunk.is_pinned:
        mixed = training_rows(cfg, shards, "statistics", domains, how="equal")
        held_out = held_out_batches(cfg, shards, cfg.trunk, domains, EVALUATION_SEQUENCES)
        return NoTraining(partial(write_pin, cfg, parts, mixed, held_out))
    torch.manual_seed(cfg.seed_of("shared"))
    trunk, dummy = new_trunk(cfg, shards, progress=parts.progress)
    rows = training_rows(cfg, shards, "shared", domains, how=cfg.trunk.mixture)

    def export(_kept_step: int) -> dict[str, dict]:
        # The anchor competes with experts of every domain, so its statistics weigh these equally
        mixed = training_rows(cfg, shards, "statistics", rows.domains, how="equal")
        statistics = feature_statistics(
            cfg, trunk, dummy, mixed, cfg.trunk.statistics_tokens, progress=parts.progress
        )
        files: dict[str, dict] = {
            "trunk.safetensors": trunk.named(),
            "dummy.safetensors": dummy.named(),
            "statistics.safetensors": statistics.tensors(),
            "trunk.json": settings_of(trunk),
        }
        if uses_bf16(cfg.dtype):
            # Rounded once here, so that jobs side by side map the same pages
            files[FROZEN] = in_bf16(trunk.named())
        return files

    return text_task(
        cfg,
        cfg.trunk,
        trunk=trunk,
        ffn=dummy,
        trains="all",
        parameters={**trunk.named(), **dummy.named()},
        rows=rows,
        judged_on=rows.domains,
        export=export,
    )


def expert(cfg: FfnMoeConfig, parts: Parts, item: str) -> Task:
    """Return one expert's training: its own feed-forward networks on its own domain, the trunk
    frozen."""
    return expert_task(known(cfg, parts, "train_experts", item), parts, item, (item,))


def expert_task(cfg: FfnMoeConfig, parts: Parts, item: str, domains: Sequence[str]) -> Task:
    """Return the training of an expert of some domains, each as often; `item` is whose seeds it
    has."""
    shards = expert_shards(cfg, parts, domains)
    trunk, dummy = training_trunk(cfg, parts)
    torch.manual_seed(cfg.seed_of("expert", item))
    layers = expert_layers(cfg, len(dummy.layers))
    own = _new_expert(cfg, dummy, layers).to(device())
    rows = expert_rows(cfg, shards, item, domains)
    # Statistics are of the domain alone, whatever general text the expert trains on beside it
    own_rows = training_rows(cfg, shards, f"statistics {item}", domains, how="equal")

    def export_of(ffn: Ffn) -> dict[str, dict]:
        # The anchor's are along the dummy: a class that is summed along another network is told
        # from the anchor's by what ran, and gates then follow what was picked in earlier layers
        runs = dummy if cfg.expert.statistics_path == "base" else ffn
        statistics = feature_statistics(
            cfg, trunk, runs, own_rows, cfg.expert.statistics_tokens, layers, parts.progress
        )
        return {
            "expert.safetensors": own.named(),
            "statistics.safetensors": statistics.tensors(),
        }

    common = partial(
        text_task,
        cfg,
        cfg.expert,
        trunk=trunk,
        trains="ffn" if cfg.expert.is_whole else "expert",
        rows=rows,
        judged_on=domains,
    )
    parameters = own.named()
    # Deltas are too small to gain by bf16, and what multiplies a zero has no gradient at first
    deltas = tuple(parameters) if cfg.expert.delta_rank else ()
    still = tuple(name for name in deltas if DRAWN in name)
    if not cfg.expert.coordinate:
        task = common(
            ffn=own,
            parameters=parameters,
            export=lambda _kept_step: export_of(own),
            fp32=deltas,
        )
        return replace(task, zero_first_gradient=still)

    pair = _coordinated(cfg, parts, trunk, dummy, own, own_rows)
    gate = {"row": pair.row_LD, "bias": pair.bias_L}

    def penalty() -> torch.Tensor:
        z_L = torch.stack(list(pair.z.values()))
        return cfg.expert.z_weight * z_L.mean()

    task = common(
        ffn=pair,
        parameters={**parameters, **gate},
        export=lambda _kept_step: {**export_of(pair), "gate.safetensors": gate},
        fp32=(*gate, *deltas),
    )
    return replace(task, penalty=penalty, zero_first_gradient=still)


def _new_expert(cfg: FfnMoeConfig, dummy: Expert, layers: Sequence[int]) -> Expert:
    """Return an expert to train: deltas on the dummy, or networks of its own, in those layers;
    elsewhere the frozen dummy's stand."""
    if cfg.expert.delta_rank:
        base = training_expert(cfg, dummy)
        return LowRankExpert(base, cfg.expert.delta_rank, cfg.expert.delta_scale, layers)
    if len(layers) == len(dummy.layers):
        return clone(dummy) if cfg.expert.init == "trunk" else reinit_like(dummy)
    start = dummy if cfg.expert.init == "trunk" else reinit_like(dummy)
    return clone(in_layers(start, training_expert(cfg, dummy), layers))


def router(cfg: FfnMoeConfig, parts: Parts) -> Task:
    """Return the gates' training: everything else frozen, on all experts' domains mixed."""
    cfg = known(cfg, parts, "train_router")
    shards = shards_of(parts, cfg.experts_with_text)
    torch.manual_seed(cfg.seed_of("router"))
    trunk, dummy = training_trunk(cfg, parts)
    opts = cfg.router
    gating = Gating(opts.top_k, opts.noise, opts.capacity_factor, opts.balance)
    weight_LED = initial_gates(cfg, parts, opts.init)
    gates = Router(weight_LED, gating, expert_layers(cfg, len(dummy.layers))).to(device())
    # Full experts need the dummy for a pattern alone; on others' way its own networks run
    base = dummy if cfg.expert.is_whole else training_expert(cfg, dummy)
    rows = training_rows(cfg, shards, "router", cfg.experts_with_text, how="equal")
    steps = opts.resolve_steps(rows.context_tokens, rows.tokens())
    # One after another, each rounded before the next is opened. Gates that are validated alone
    # round nothing: a product casts its matrix as it would be rounded here.
    experts = []
    for _, stored in stored_experts(cfg, parts, base):
        experts.append(training_expert(cfg, stored) if steps else stored)
    epoch_steps = rows.tokens() / (opts.batch_sequences * rows.context_tokens)
    temperature = partial(opts.temperature.at, steps=steps, epoch_steps=epoch_steps)
    gates.temperature = temperature(0)

    def before_step(step: int) -> None:
        gates.train()  # validation has put them into evaluation, where they draw and count nothing
        gates.temperature = temperature(step)

    def after_step() -> dict:
        share_LE = gates.end_step(opts.balance_weight)
        mean_E = share_LE.mean(0)
        log_E = mean_E.clamp(min=LEAST_SHARE).log()
        entropy = -(mean_E * log_E).sum()
        dropped = [stats.dropped.item() for stats in gates.stats.values()]
        return {
            "load": [round(share, 4) for share in mean_E.tolist()],
            "entropy": entropy.item(),
            "temperature": gates.temperature,
            "balance": gates.balance_loss().item(),
            "z": gates.z_loss().item(),
            "dropped": sum(dropped) / len(dropped),
        }

    def penalty() -> torch.Tensor:
        z = opts.z_weight * gates.z_loss()
        if opts.balance == "aux":
            return opts.balance_weight * gates.balance_loss() + z
        return z

    def export(kept_step: int) -> dict[str, dict]:
        # The temperature is folded into the gates: that of the step which is kept, not of the last
        gates.temperature = temperature(max(0, kept_step - 1))
        return {"router.safetensors": gates.exported()}

    parameters = gates.named()
    task = text_task(
        cfg,
        opts,
        trunk=trunk,
        ffn=Mixture(experts, gates),
        trains="gates",
        parameters=parameters,
        rows=rows,
        judged_on=cfg.experts_with_text,
        export=export,
        # A tie broken by rounding would change experts
        fp32=tuple(parameters),
    )
    return replace(
        task,
        penalty=penalty,
        before_step=before_step,
        after_step=after_step,
        state={"bias": gates.bias_LE},
    )


def dense(cfg: FfnMoeConfig, parts: Parts, item: str) -> Task:
    """Return one dense baseline's training; see DenseConfig.baselines for what each has in common
    with the stack."""
    cfg = known(cfg, parts, "train_dense", item)
    shards = shards_of(parts, cfg.domains_read("train_dense", item))
    opts = dense_options(cfg, item, training_tokens(shards))
    return dense_task(cfg, parts, item, opts, cfg.dense_domains)


def dense_task(
    cfg: FfnMoeConfig, parts: Parts, item: str, opts: FitConfig, domains: Sequence[str]
) -> Task:
    """Return the training of a dense model on some domains; a continued one is known by what it
    trains."""
    if item in FROM_ZERO:
        # What the trunk saw and what the experts saw, each domain once
        domains = tuple(dict.fromkeys((*cfg.trunk_domains, *domains)))
    shards = shards_of(parts, domains)
    torch.manual_seed(cfg.seed_of("dense", item))
    if item in FROM_ZERO:
        trunk, ffn = new_trunk(cfg, shards, dense_width(cfg, item))
    elif item == "ffn":
        # Frozen, so it may be rounded where trainings are bf16; below it goes on training
        trunk, dummy = training_trunk(cfg, parts)
        ffn = clone(dummy).to(device())
    else:
        trunk, dummy = stored_trunk(cfg, parts)
        ffn = clone(dummy).to(device())
        trunk.unfreeze()
    rows = training_rows(cfg, shards, f"dense {item}", domains, how=cfg.trunk.mixture)
    parameters = ffn.named()
    if item != "ffn":
        parameters = {**trunk.named(), **parameters}

    def export(_kept_step: int) -> dict[str, dict]:
        # `ffn` may have trained on a rounded trunk; what is stored has the exact one
        exact = stored_trunk(cfg, parts)[0] if item == "ffn" else trunk
        return {
            "model.safetensors": {**exact.named(), **ffn.named()},
            "trunk.json": settings_of(trunk),
        }

    return text_task(
        cfg,
        opts,
        trunk=trunk,
        ffn=ffn,
        trains="ffn" if item == "ffn" else "all",
        parameters=parameters,
        rows=rows,
        judged_on=domains,
        export=export,
    )


def text_task(
    cfg: FfnMoeConfig,
    opts: FitConfig,
    *,
    trunk: Trunk,
    ffn: nn.Module,
    trains: Trains,
    parameters: Mapping[str, nn.Parameter],
    rows: DomainMixture,
    judged_on: Sequence[str],
    export: Callable[[int], dict[str, dict]],
    fp32: Sequence[str] = (),
) -> Task:
    """Return the Task that all of this family's trainings are.

    ffn stands in the trunk's open slot; of both only `parameters` move. judged_on are the domains
    of the validation set. fp32 names the parameters that stay so in a bf16 training.
    """
    bf16 = uses_bf16(cfg.dtype)
    shape = Shape.from_hf_config(trunk.config.to_dict(), rows.context_tokens)
    plan = memory_plan(cfg, opts, shape, trains, bf16)
    if plan.checkpointing:
        trunk.checkpoint()
    # Drawn once: every validation of a training is on the same rows
    held_out = held_out_batches(cfg, rows.shards, opts, judged_on, plan.micro_batch_sequences)

    bf16_params: tuple[str, ...] = ()
    if bf16:
        bf16_params = tuple(name for name in parameters if name not in fp32)

    def batch(first: int, count: int) -> torch.Tensor:
        return batch_of(rows, first, count)

    def loss(ids_BT: torch.Tensor) -> torch.Tensor:
        return _mean_nats(trunk, ffn, ids_BT, bf16, plan.chunk_logits)

    def validate() -> float:
        with evaluating(ffn):
            nats_N = token_losses(trunk, ffn, held_out, bf16, plan.chunk_logits)
        return nats_N.mean().item()

    # No other training reads how an expert is made, or how many are chosen: its address has neither
    expert = expert_shape(cfg, shape) if trains in ("expert", "gates") else None
    active = cfg.router.top_k if trains == "gates" else 1
    return Task(
        options=opts,
        parameters=dict(parameters),
        batch=batch,
        export=export,
        validate=validate,
        memory_plan=plan,
        loss=torch.compile(loss) if plan.compile else loss,
        steps=opts.resolve_steps(rows.context_tokens, rows.tokens()),
        tokens_per_row=rows.context_tokens,
        bf16=bf16,
        flops_per_token=shape.train_flops_per_token(trains, expert, active),
        bf16_params=bf16_params,
    )


def _mean_nats(
    trunk: Trunk,
    ffn: nn.Module,
    ids_BT: torch.Tensor,
    bf16: bool,
    chunk_logits: int,
) -> torch.Tensor:
    """Return mean nats; in a bf16 training every weight on the way is bf16, so nothing is left to
    autocast."""
    h_BTD = trunk.hidden(ids_BT[:, :-1], ffn)
    target_N = ids_BT[:, 1:].flatten()
    dtype = torch.bfloat16 if bf16 else torch.float32
    chunk = chunk_of(len(trunk.head), chunk_logits)
    h_ND = h_BTD.flatten(0, 1)
    return cross_entropy(h_ND, trunk.head, target_N, dtype, chunk) / len(target_N)


@contextmanager
def evaluating(ffn: nn.Module) -> Iterator[None]:
    """Put a feed-forward network into evaluation mode, and back into the one it was in."""
    before = ffn.training
    ffn.eval()
    try:
        yield
    finally:
        ffn.train(before)


def held_out_batches(
    cfg: FfnMoeConfig,
    shards: Shards,
    opts: FitConfig,
    domains: Sequence[str],
    sequences: int,
) -> list[torch.Tensor]:
    """Return batches of ids_BT from the shared validation split, equal shares of the domains judged
    on."""
    share = max(1, opts.eval_tokens // cfg.trunk.context_tokens // len(domains))
    parts = [validation_rows(cfg, shards, name, share) for name in domains]
    ids_BT = torch.from_numpy(np.concatenate(parts)).to(device())
    return list(ids_BT.split(sequences))


def _coordinated(
    cfg: FfnMoeConfig,
    parts: Parts,
    trunk: Trunk,
    dummy: Expert,
    own: Expert,
    rows: DomainMixture,
) -> CoordinatedExpert:
    """Return the expert beside the frozen dummy; its gate row starts at the domain's mean input
    less the mixture's."""
    stored = parts.tensors("train_shared", "statistics.safetensors")
    mixed = FeatureStatistics.from_tensors(stored)
    domain = feature_statistics(
        cfg, trunk, dummy, rows, cfg.expert.statistics_tokens, progress=parts.progress
    )
    apart_LD = domain.mean_LD - mixed.mean_LD
    row_LD = F.normalize(apart_LD, dim=-1).float()
    anchor = training_expert(cfg, dummy)
    pair = CoordinatedExpert(anchor, own, row_LD, cfg.expert.coordinate_bias)
    return pair.to(device())
