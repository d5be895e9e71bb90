"""What an adapter's training is, and what the router of adapters is made of instead of a training.

B sequences, T tokens.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from ....hardware import device
from ....train.loop import Task
from ... import Parts
from ...adapters import peft_io
from ..config import FfnMoeConfig
from ..parts import expert_rows, expert_shards, training_rows
from ..rates import known
from ..train import text_task
from .model import Options, base_ref, training_base
from .statistics import text_statistics


def expert(cfg: FfnMoeConfig, parts: Parts, item: str) -> Task:
    """Return one adapter's training: a LoRA on the language model, on its own domain, the model
    frozen."""
    return expert_task(known(cfg, parts, "train_experts", item), parts, item, (item,))


def expert_task(cfg: FfnMoeConfig, parts: Parts, item: str, domains: Sequence[str]) -> Task:
    """Return the training of an adapter on some domains, each as often; `item` is its name, and
    whose seeds it has."""
    shards = expert_shards(cfg, parts, domains)
    base = training_base(cfg, parts)
    # The first weights are drawn from torch's generator
    torch.manual_seed(cfg.seed_of("expert", item))
    options = Options.of(cfg, base.config.num_hidden_layers)
    adapters = peft_io.add(base.network, item, options, "expert").to(device())
    parameters = peft_io.adapter_parameters(adapters, item)
    rows = expert_rows(cfg, shards, item, domains)

    def export(_kept_step: int) -> dict[str, dict]:
        # Of the domain alone, and as the base reads it: texts are routed before an adapter has
        # read them
        own_rows = training_rows(cfg, shards, f"statistics {item}", domains, how="equal")
        with peft_io.active(adapters, None):
            statistics = text_statistics(
                cfg, base, own_rows, cfg.expert.statistics_tokens, parts.progress
            )
        files = peft_io.files(adapters, item, base_ref(cfg, parts), {"domain": item})
        return {**files, "statistics.safetensors": statistics.tensors()}

    task = text_task(
        cfg,
        cfg.expert,
        trunk=base,
        ffn=base,  # whose slots are filled: only its mode is asked for
        trains="adapter",
        parameters=parameters,
        rows=rows,
        judged_on=domains,
        export=export,
    )
    # lora_B is zero in the first step, and so is every gradient of lora_A
    still = tuple(name for name in parameters if "lora_A" in name)
    return replace(task, zero_first_gradient=still)
