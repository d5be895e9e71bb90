"""Joint training: trunk, experts and gates at once, or a dense model, from zero.

B sequences, T tokens, N = B*T, D model width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ....data.text.mixture import DomainMixture
from ....hardware import device, uses_bf16
from ....model.chunks import chunk_of
from ....model.loss import smoothed_cross_entropy
from ....model.trunk import settings_of
from ....train.flops import Shape
from ....train.loop import Task
from ....train.memory_plan import MemoryPlan
from ... import Parts
from ..bundle import stock_settings
from ..config import FfnMoeConfig
from ..parts import batch_of, shards_of, training_rows
from ..rates import known
from ..stock import dense_settings
from ..train import evaluating, held_out_batches
from .cost import joint_plan, train_flops_per_token
from .epochs import Epochs
from .network import JointModel, mixture_layers, new_model
from .section import JointConfig
from .sums import TrainingSums, ValidationSums


def joint(cfg: FfnMoeConfig, parts: Parts, item: str) -> Task:
    """Return the training of one of joint.models on the tokens of all of them."""
    return joint_task(known(cfg, parts, "train_joint", item), parts, item)


def joint_task(cfg: FfnMoeConfig, parts: Parts, item: str) -> Task:
    """Return the training of a joint model whose rate is known."""
    opts = cfg.joint
    domains = cfg.joint_domains
    shards = shards_of(parts, domains)
    # One seed and one order of rows for all: what differs is what the models are
    torch.manual_seed(cfg.seed_of("joint"))
    model = new_model(cfg, shards, item)
    rows = training_rows(cfg, shards, "joint", domains, how=opts.mixture)
    shape = Shape.from_hf_config(model.trunk.config.to_dict(), rows.context_tokens)
    plan = joint_plan(cfg, item, shape, uses_bf16(cfg.dtype))
    if plan.checkpointing:
        model.trunk.checkpoint()
    held_out = held_out_batches(cfg, shards, opts, domains, plan.micro_batch_sequences)
    training = _JointTraining(
        opts,
        model,
        held_out,
        plan,
        Epochs(opts, rows.context_tokens, rows.tokens()),
        TrainingSums(model.router, device()),
        uses_bf16(cfg.dtype),
    )
    return _task(cfg, item, training, rows, train_flops_per_token(cfg, item, shape))


def _task(
    cfg: FfnMoeConfig,
    item: str,
    training: "_JointTraining",
    rows: DomainMixture,
    flops_per_token: float,
) -> Task:
    model = training.model
    plan = training.plan
    # A tie of gates broken by rounding would change experts
    gates = () if model.router is None else tuple(model.router.named())
    bf16_params: tuple[str, ...] = ()
    if training.bf16:
        bf16_params = tuple(name for name in model.parameters if name not in gates)

    def batch(first: int, count: int) -> torch.Tensor:
        return batch_of(rows, first, count)

    def export(kept_step: int) -> dict[str, dict]:
        training.set_temperature(max(0, kept_step - 1))
        return _exported(cfg, item, model)

    return Task(
        options=training.opts,
        parameters=model.parameters,
        batch=batch,
        loss=torch.compile(training.loss) if plan.compile else training.loss,
        penalty=training.penalty,
        export=export,
        steps=training.epochs.steps,
        tokens_per_row=rows.context_tokens,
        validate=training.validate,
        validates_at=None if training.opts.eval_every_steps else training.epochs.ends_at,
        after_validation=training.after_validation,
        before_step=training.before_step,
        after_step=training.after_step,
        state=training.sums.state,
        flops_per_token=flops_per_token,
        bf16=training.bf16,
        bf16_params=bf16_params,
        # Routing that forgets an expert is a result, which the history tells
        may_rest=model.of_experts,
        memory_plan=plan,
    )


def _exported(cfg: FfnMoeConfig, item: str, model: JointModel) -> dict[str, dict]:
    """Return a model's files: the stock class of its config.json loads them as they are."""
    settings = settings_of(model.trunk)
    tensors: dict[str, torch.Tensor] = dict(model.parameters)
    stock = dense_settings(settings)
    if model.router is not None:
        # The temperature is folded into the gates
        tensors |= model.router.exported()
        opts = cfg.joint
        stock = stock_settings(settings, opts.experts, opts.top_k, mixture_layers(cfg))
    return {"model.safetensors": tensors, "trunk.json": settings, "config.json": stock}


@dataclass
class _JointTraining:
    """What a step and a validation of a joint training do."""

    opts: JointConfig
    model: JointModel
    held_out: list[torch.Tensor]  # batches of ids_BT, the same in every validation
    plan: MemoryPlan
    epochs: Epochs
    sums: TrainingSums
    bf16: bool
    # of the forward pass just made
    rows: int = 0
    smoothed: torch.Tensor | None = None  # mean nats against smoothed targets
    plain: torch.Tensor | None = None  # mean nats
    # of the last validation
    valid: dict[str, float] | None = None

    def set_temperature(self, step: int) -> None:
        """Have the gates divide by the temperature of a step."""
        if self.model.router is not None:
            temperature = self.opts.temperature.at(step, self.epochs.steps, self.epochs.epoch_steps)
            self.model.router.temperature = temperature

    def before_step(self, step: int) -> None:
        """Prepare a step."""
        self.model.ffn.train()
        self.set_temperature(step)

    def loss(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Return mean nats of ids_BT after the first; the gradient comes by `penalty`, which has
        all of what is minimised beyond them."""
        h_BTD = self.model.trunk.hidden(ids_BT[:, :-1], self.model.ffn)
        self.smoothed, self.plain = self._nats(h_BTD, self.model.trunk.head, ids_BT)
        self.rows = len(ids_BT)
        return self.plain

    def _nats(
        self, h_BTD: torch.Tensor, head_VD: torch.Tensor, ids_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean nats against smoothed targets, and against the targets."""
        target_N = ids_BT[:, 1:].flatten()
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        smoothed, plain = smoothed_cross_entropy(
            h_BTD.flatten(0, 1),
            head_VD,
            target_N,
            self.opts.label_smoothing,
            dtype,
            chunk_of(len(head_VD), self.plan.chunk_logits),
        )
        return smoothed / len(target_N), plain / len(target_N)

    def penalty(self) -> torch.Tensor:
        """Return what is minimised less the loss: what smoothing adds, and the auxiliary loss."""
        if self.smoothed is None or self.plain is None:
            raise AssertionError("a penalty before any forward pass")
        router = self.model.router
        aux = self.plain.new_zeros(())
        if router is not None:
            aux = router.balance_loss()
        total = self.smoothed + self.opts.aux_weight * aux
        self.sums.add_pass(self.rows, total, self.plain, aux)
        return total - self.plain

    def after_step(self) -> dict[str, Any]:
        """Count the step; return numbers for its row."""
        self.sums.end_step()
        router = self.model.router
        if router is None:
            return {}
        return {"temperature": router.temperature, "balance": router.balance_loss().item()}

    def validate(self) -> float:
        """Return mean nats on the validation set; keep what `after_validation` tells."""
        router = self.model.router
        heard = None if router is None else ValidationSums(router)
        totals = [0.0, 0.0]
        tokens = 0
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        autocast = torch.autocast(device(), dtype, enabled=self.bf16)
        if router is not None:
            router.listener = heard
        with evaluating(self.model.ffn), torch.no_grad():
            # detached, or the head's gradient would be made beside the loss
            head_VD = self.model.trunk.head.detach()
            for ids_BT in self.held_out:
                with autocast:
                    h_BTD = self.model.trunk.hidden(ids_BT[:, :-1], self.model.ffn)
                count = ids_BT[:, 1:].numel()
                for place, nats in enumerate(self._nats(h_BTD, head_VD, ids_BT)):
                    totals[place] += nats.item() * count
                tokens += count
        if router is not None:
            router.listener = None
        smoothed, plain = (total / tokens for total in totals)
        aux = 0.0 if heard is None else heard.balance_loss()
        self.valid = {"valid_total": smoothed + self.opts.aux_weight * aux, "valid_aux": aux}
        return plain

    def after_validation(self, step: int) -> dict[str, Any]:
        """Return what a validation's row has beside its loss: the epoch that ended, its means."""
        found: dict[str, Any] = {"epoch": self.epochs.at(step), **(self.valid or {})}
        if self.model.router is not None:
            found["temperature"] = self.model.router.temperature
        return found | self.sums.told()
