"""What the gates of a stack choose while a model runs: heard by hooks, as the stock classes keep
none of it.

T tokens, L layers, K experts per token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class GateChoice:
    """What the gates chose at one position, per layer: numbers of experts and their weights."""

    experts: list[list[int]]
    weights: list[list[float]]


class GateRecorder:
    """What one layer's gate chose, as its forward hook."""

    def __init__(self) -> None:
        # One tensor of (T, K) per call: the prompt's positions, then one position each.
        self.index: list[torch.Tensor] = []
        self.weight: list[torch.Tensor] = []

    def __call__(self, _gate: nn.Module, _inputs: Any, outputs: Sequence[torch.Tensor]) -> None:
        _, weight_TK, index_TK = outputs
        self.index.append(index_TK)
        self.weight.append(weight_TK)


class GateRecorders(list[GateRecorder]):
    """The recorders of all layers, in their order."""

    def positions(self, first: int, end: int) -> list[GateChoice]:
        """Return what was chosen at positions first to end - 1."""
        index = [torch.cat(layer.index) for layer in self]
        index_TLK = torch.stack(index, 1)
        weight = [torch.cat(layer.weight) for layer in self]
        weight_TLK = torch.stack(weight, 1)
        experts = index_TLK[first:end].tolist()
        weights = weight_TLK[first:end].tolist()
        return list(map(GateChoice, experts, weights))


@contextmanager
def recorded(model: nn.Module) -> Iterator[GateRecorders]:
    """Record what the gates choose while the context is open."""
    recorders = GateRecorders()
    hooks = []
    # named_modules goes by registration, which for layers is their order.
    for name, module in model.named_modules():
        if name.endswith(".mlp.gate"):
            recorder = GateRecorder()
            recorders.append(recorder)
            hooks.append(module.register_forward_hook(recorder))
    try:
        yield recorders
    finally:
        for hook in hooks:
            hook.remove()
