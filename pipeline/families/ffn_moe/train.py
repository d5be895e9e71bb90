"""FFN experts of a language model: what each of the trainings is, and how the stack is put
together.

B sequences, T tokens, N = B*T, D model width, E experts, L layers.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import torch

from ...data.text.shards import DomainMixture as Rows
from ...data.text.shards import Shards
from ...hardware import device, uses_bf16
from ...model.experts import clone, reinit_like
from ...model.loss import chunk_of, cross_entropy
from ...model.router import CoordinatedExpert, Gating, Mixture, Router, gate_name
from ...model.router_init import FeatureStatistics
from ...model.trunk import settings_of
from ...train.flops import Shape
from ...train.loop import Task
from . import cost as ffn_cost
from .config import FfnMoeConfig
from .cost import FROM_ZERO, dense_options, dense_width
from .parts import (
    ANCHOR_STATISTICS_TOKENS,
    FROZEN,
    computing,
    in_bf16,
    initial_gates,
    new_trunk,
    stored_experts,
    stored_trunk,
    sum_up,
    token_loss,
    training_rows,
    training_trunk,
)


def shared(cfg: FfnMoeConfig, parts) -> Task:
    """Return the trunk's training: trunk and dummy on all of the trunk's domains.

    Raises MismatchError when the tokenizer has tokens that a pretrained trunk has not.
    """
    shards = Shards(parts.folder("preprocess"))
    torch.manual_seed(cfg.seed_of("shared"))
    trunk, dummy = new_trunk(cfg, shards)
    rows = training_rows(
        cfg, shards, "shared", cfg.trunk.domains or shards.domains, how=cfg.trunk.mixture
    )

    def export(_kept_step: int) -> dict:
        mixed = training_rows(cfg, shards, "statistics", rows.domains, how="equal")
        sums = sum_up(cfg, trunk, dummy, mixed, ANCHOR_STATISTICS_TOKENS)
        frozen = {FROZEN: in_bf16(trunk.named())} if uses_bf16(cfg.dtype) else {}
        return frozen | {
            "trunk.safetensors": trunk.named(),
            "dummy.safetensors": dummy.named(),
            "statistics.safetensors": sums.tensors(),
            "trunk.json": settings_of(trunk),
        }

    network = {**trunk.named(), **dummy.named()}
    return _task(cfg, cfg.trunk, trunk, dummy, network, rows, rows.domains, export, trains="all")


def expert(cfg: FfnMoeConfig, parts, item: str) -> Task:
    """Return one expert's training: its own feed-forward networks on its own domain, the trunk
    frozen."""
    shards = Shards(parts.folder("preprocess"))
    trunk, dummy = training_trunk(cfg, parts)
    torch.manual_seed(cfg.seed_of("expert", item))
    own = (clone(dummy) if cfg.expert.init == "trunk" else reinit_like(dummy)).to(device())
    general = {
        "general": cfg.trunk.domains or shards.domains,
        "general_share": cfg.partition.overlap,
    }
    rows = training_rows(cfg, shards, f"expert {item}", (item,), **general)
    only_own = training_rows(cfg, shards, f"statistics {item}", (item,))
    ffn = _pair(cfg, parts, trunk, dummy, own, only_own) if cfg.expert.coordinate else own
    extra = {"row": ffn.row_LD, "bias": ffn.bias_L} if cfg.expert.coordinate else {}

    def export(_kept_step: int) -> dict:
        files = {"expert.safetensors": own.named()}
        files["statistics.safetensors"] = sum_up(
            cfg, trunk, ffn, only_own, cfg.expert.statistics_tokens
        ).tensors()
        return files | ({"gate.safetensors": extra} if extra else {})

    network = {**own.named(), **extra}
    task = _task(
        cfg,
        cfg.expert,
        trunk,
        ffn,
        network,
        rows,
        (item,),
        export,
        trains="ffn",
        fp32=tuple(extra),
    )
    if not extra:
        return task
    return replace(
        task, penalty=lambda: cfg.expert.z_weight * torch.stack(list(ffn.z.values())).mean()
    )


def router(cfg: FfnMoeConfig, parts) -> Task:
    """Return the gates' training: everything else frozen, on all domains mixed."""
    shards = Shards(parts.folder("preprocess"))
    torch.manual_seed(cfg.seed_of("router"))
    trunk, _ = training_trunk(cfg, parts)
    opts = cfg.router
    gating = Gating(opts.top_k, opts.noise, opts.capacity_factor, opts.balance)
    gates = Router(initial_gates(cfg, parts, opts.init), gating).to(device())
    stack = Mixture([computing(cfg, e) for _, e in stored_experts(cfg, parts)], gates)
    rows = training_rows(cfg, shards, "router", cfg.experts, how="equal")
    steps = opts.resolve_steps(rows.context_tokens, rows.tokens())
    temperature = partial(_temperature, cfg, steps, rows.tokens())
    gates.temperature = temperature(0)

    def before_step(step: int) -> None:
        gates.train()
        gates.temperature = temperature(step)

    def after_step() -> dict:
        share_LE = gates.end_step(opts.balance_weight)
        mean_E = share_LE.mean(0)
        return {
            "load": [round(x, 4) for x in mean_E.tolist()],
            "entropy": -(mean_E * mean_E.clamp(min=1e-9).log()).sum().item(),
            "temperature": gates.temperature,
            "balance": gates.balance_loss().item(),
            "z": gates.z_loss().item(),
            "dropped": sum(a.dropped for a in gates.stats.values()) / len(gates.stats),
        }

    def penalty() -> torch.Tensor:
        balance = opts.balance_weight * gates.balance_loss() if opts.balance == "aux" else 0.0
        return balance + opts.z_weight * gates.z_loss()

    def export(kept_step: int) -> dict:
        gates.temperature = temperature(max(0, kept_step - 1))
        return {"router.safetensors": gates.exported()}

    network = {gate_name(i): gate for i, gate in enumerate(gates.gates)}
    task = _task(
        cfg,
        opts,
        trunk,
        stack,
        network,
        rows,
        cfg.experts,
        export,
        trains="gates",
        fp32=tuple(network),
    )
    hooks = {"before_step": before_step, "after_step": after_step, "state": {"bias": gates.bias_LE}}
    return replace(task, penalty=penalty, **hooks)


def dense(cfg: FfnMoeConfig, parts, item: str) -> Task:
    """Return one dense baseline's training; see Dense.baselines for what each has in common with
    the stack."""
    shards = Shards(parts.folder("preprocess"))
    torch.manual_seed(cfg.seed_of("dense", item))
    seen = cfg.experts
    if item in FROM_ZERO:
        trunk, ffn = new_trunk(cfg, shards, dense_width(cfg, item))
        seen = tuple(dict.fromkeys((*(cfg.trunk.domains or shards.domains), *seen)))
    else:
        trunk, dummy = training_trunk(cfg, parts) if item == "ffn" else stored_trunk(cfg, parts)
        ffn = clone(dummy).to(device())
        if item != "ffn":
            trunk.unfreeze()
    opts = dense_options(cfg, item, {d: shards.tokens("train", d) for d in shards.domains})
    rows = training_rows(cfg, shards, f"dense {item}", seen, how=cfg.trunk.mixture)
    network = {**({} if item == "ffn" else trunk.named()), **ffn.named()}

    def export(_kept_step: int) -> dict:
        exact = (
            stored_trunk(cfg, parts)[0] if item == "ffn" else trunk
        )  # ffn may have trained on a rounded one
        return {
            "model.safetensors": {**exact.named(), **ffn.named()},
            "trunk.json": settings_of(trunk),
        }

    return _task(
        cfg, opts, trunk, ffn, network, rows, seen, export, trains="ffn" if item == "ffn" else "all"
    )


def _task(cfg, opts, trunk, ffn, network, rows, judged_on, export, trains, fp32=()) -> Task:
    """Return the Task that all of this family's trainings are, up to what moves and on which text.

    `fp32` names the parameters that stay so in a bf16 training.
    """
    bf16 = uses_bf16(cfg.dtype)
    shape = Shape.from_hf_config(trunk.config.to_dict(), rows.context_tokens)
    memory_plan = ffn_cost.memory_plan(cfg, opts, shape, trains, bf16)
    if memory_plan.checkpointing:
        trunk.checkpoint()
    held_out = _validation(cfg, rows.shards, opts, judged_on, memory_plan.micro_batch_sequences)

    def batch(first: int, count: int) -> torch.Tensor:
        return torch.from_numpy(rows.rows(first, count)).to(device())

    def loss(ids_BT: torch.Tensor) -> torch.Tensor:
        return _mean_nats(trunk, ffn, ids_BT, bf16, memory_plan.chunk_logits)

    def validate() -> float:
        with _evaluating(ffn):
            parts = [
                token_loss(trunk, ffn, ids, bf16, memory_plan.chunk_logits).flatten()
                for ids in held_out
            ]
            return torch.cat(parts).mean().item()

    return Task(
        options=opts,
        parameters=network,
        batch=batch,
        export=export,
        validate=validate,
        memory_plan=memory_plan,
        loss=torch.compile(loss) if memory_plan.compile else loss,
        steps=opts.resolve_steps(rows.context_tokens, rows.tokens()),
        tokens_per_row=rows.context_tokens,
        bf16=bf16,
        flops_per_token=shape.train_flops_per_token(trains),
        bf16_params=tuple(n for n in network if n not in fp32) if bf16 else (),
    )


def _mean_nats(trunk, ffn, ids_BT, bf16, chunk_logits):
    """Return mean nats; in a bf16 training every weight on the way is bf16, so nothing is left to
    autocast."""
    h_BTD = trunk.hidden(ids_BT[:, :-1], ffn)
    target_N = ids_BT[:, 1:].flatten()
    dtype = torch.bfloat16 if bf16 else torch.float32
    chunk = chunk_of(len(trunk.head), chunk_logits)
    return cross_entropy(h_BTD.flatten(0, 1), trunk.head, target_N, dtype, chunk) / len(target_N)


class _evaluating:
    """Evaluation mode for a fill, back to training afterwards."""

    def __init__(self, ffn):
        self.ffn = ffn

    def __enter__(self):
        self.before = self.ffn.training
        self.ffn.eval()

    def __exit__(self, *_):
        self.ffn.train(self.before)


def _validation(cfg, shards, opts, domains, sequences) -> list[torch.Tensor]:
    """Return batches of ids_BT from the shared validation split, equal shares of the domains judged
    on."""
    context = cfg.trunk.context_tokens
    share = max(1, opts.eval_tokens // context // len(domains))
    parts = []
    for name in domains:
        rows = Rows(shards, "valid", (name,), context, seed=0)
        parts.append(rows.rows(0, min(share, max(1, shards.tokens("valid", name) // context - 1))))
    return list(torch.from_numpy(np.concatenate(parts)).to(device()).split(sequences))


def _pair(cfg, parts, trunk, dummy, own, rows) -> CoordinatedExpert:
    """Return the expert beside the frozen dummy; its gate row starts at the domain's mean input
    less the mixture's."""
    mixed = FeatureStatistics.from_tensors(parts.tensors("train_shared", "statistics.safetensors"))
    domain = sum_up(cfg, trunk, dummy, rows, cfg.expert.statistics_tokens)
    row_LD = torch.nn.functional.normalize(domain.mean_LD - mixed.mean_LD, dim=-1).float()
    return CoordinatedExpert(computing(cfg, dummy), own, row_LD, cfg.expert.coordinate_bias).to(
        device()
    )


def _temperature(cfg: FfnMoeConfig, steps: int, epoch_tokens: int, step: int) -> float:
    """Return the gates' temperature at a step: linear from start to end, then constant."""
    ramp = cfg.router.temperature
    per_epoch = epoch_tokens / (cfg.router.batch_sequences * cfg.trunk.context_tokens)
    length = (
        steps - 1 if ramp.epochs is None else ramp.epochs * per_epoch
    )  # the last step is step steps - 1
    return ramp.start + (ramp.end - ramp.start) * min(1.0, step / max(1.0, length))
