"""A whole model of a joint training: new, and opened as it is stored.

Tensors have the names that Qwen3ForCausalLM and Qwen3MoeForCausalLM have for them.

L layers with a mixture, E experts, D model width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ....data.text.shards import Shards
from ....hardware import device
from ....model.experts import Expert, from_tensors, in_layers, reinit_like
from ....model.router import Gating, Mixture, Router, gate_name
from ....model.sublayer_dropout import DroppedNetwork
from ....model.trunk import Trunk, open_dense, open_tensors
from ..config import FfnMoeConfig
from ..naming import NAMINGS
from ..parts import mixture_of, new_trunk
from .section import MOE

NAMING = NAMINGS["Qwen3MoeForCausalLM"]


@dataclass(frozen=True)
class JointModel:
    """A trunk and what fills its slots while it trains, with every parameter by name."""

    trunk: Trunk
    ffn: nn.Module
    parameters: dict[str, nn.Parameter]
    router: Router | None = None  # of a mixture

    @property
    def of_experts(self) -> tuple[str, ...]:
        """Names of the parameters that only tokens of their expert reach."""
        return tuple(name for name in self.parameters if ".mlp.experts." in name)


def new_model(cfg: FfnMoeConfig, shards: Shards, item: str) -> JointModel:
    """Return a model to train, drawn from torch's generator: after the same draws trunk and first
    expert of a mixture are those of the dense one."""
    trunk, dummy = new_trunk(cfg, shards)
    if item == MOE:
        mixture, parameters = _new_mixture(cfg, trunk, dummy)
        return _model(cfg, trunk, mixture, parameters, mixture.router)
    return _model(cfg, trunk, dummy, dummy.named(), None)


def _model(
    cfg: FfnMoeConfig,
    trunk: Trunk,
    network: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    router: Router | None,
) -> JointModel:
    ffn = network
    if cfg.joint.dropout:
        ffn = DroppedNetwork(trunk, network, cfg.joint.dropout)
    return JointModel(trunk, ffn, trunk.named() | dict(parameters), router)


def _new_mixture(
    cfg: FfnMoeConfig, trunk: Trunk, dummy: Expert
) -> tuple[Mixture, dict[str, nn.Parameter]]:
    """Return a mixture to train in the layers that have one, beside the dummy's networks in the
    others, and its parameters by name."""
    opts = cfg.joint
    layers = mixture_layers(cfg)
    experts = [in_layers(dummy, dummy, layers)]
    pattern = Expert(dummy.layers[layer] for layer in layers)
    for _ in range(opts.experts - 1):
        drawn = dict(zip(layers, reinit_like(pattern).layers, strict=True))
        networks = [drawn.get(layer) for layer in range(len(dummy.layers))]
        experts.append(Expert(networks, dummy).to(device()))
    settings = trunk.config
    weight_LED = torch.empty(len(layers), opts.experts, settings.hidden_size)
    weight_LED.normal_(std=settings.initializer_range)
    gating = Gating(opts.top_k, capacity_factor=opts.capacity_factor)
    router = Router(weight_LED, gating, layers).to(device())
    plain = [layer for layer in range(len(dummy.layers)) if layer not in layers]
    parameters = in_layers(dummy, dummy, plain).named()
    for number, expert in enumerate(experts):
        for name, parameter in expert.named().items():
            parameters[NAMING.expert(number, name)] = parameter
    return Mixture(experts, router), parameters | router.named()


def mixture_layers(cfg: FfnMoeConfig) -> tuple[int, ...]:
    """Return the numbers of the layers with a mixture."""
    return cfg.joint.in_layers(cfg.trunk.layers)


def opened(
    cfg: FfnMoeConfig,
    item: str,
    settings: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
) -> tuple[Trunk, nn.Module]:
    """Return a stored model's trunk and what fills its slots, frozen.

    Raises KeyError or RuntimeError for tensors of another model.
    """
    if item != MOE:
        trunk, ffn = open_dense(settings, tensors)
        return trunk.to(device()), ffn.to(device())
    layers = mixture_layers(cfg)
    of_trunk = {name: tensor for name, tensor in tensors.items() if ".mlp." not in name}
    trunk, pattern = open_tensors(settings, of_trunk, dtype=torch.float32)
    plain = [layer for layer in range(len(pattern.layers)) if layer not in layers]
    base = from_tensors(pattern, _named_as(pattern, tensors, plain), plain) if plain else None
    experts = []
    for number in range(cfg.joint.experts):
        own = from_tensors(pattern, _named_as(pattern, tensors, layers, number), layers)
        experts.append(own if base is None else in_layers(own, base, layers))
    gates = torch.stack([tensors[gate_name(layer)] for layer in layers])
    return trunk.to(device()), mixture_of(experts, gates, cfg.joint.top_k)


def _named_as(
    pattern: Expert,
    tensors: Mapping[str, torch.Tensor],
    layers: Sequence[int],
    expert: int | None = None,
) -> dict[str, torch.Tensor]:
    """Return the tensors of some layers' networks under a dense model's names, of one expert or of
    none."""
    found = {}
    for name in in_layers(pattern, pattern, layers).named():
        stored = name if expert is None else NAMING.expert(expert, name)
        found[name] = tensors[stored]
    return found
