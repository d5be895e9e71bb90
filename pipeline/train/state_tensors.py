"""The tensors of a checkpoint: everything that the next step depends on, named kind/name, and back.

Weights that compute in bf16 stand in two halves, which together are the fp32 master.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from .optimizer import AdamW
from .optimizer_state import SCALE


class Resumable(Protocol):
    """What of a task has to survive."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What is trained, by name."""

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Other tensors that the next step depends on, by name."""

    @property
    def bf16(self) -> bool:
        """Whether the network computes in bf16, whatever its parameters are kept in."""


def state_tensors(task: Resumable, optimizer: AdamW) -> dict[str, Tensor]:
    """Collect at save time everything the next step depends on, by kind and name."""
    tensors = masters(task, optimizer) | optimizer.tensors()
    for name, tensor in task.state.items():
        tensors[f"state/{name}"] = tensor
    tensors["generator/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["generator/cuda"] = torch.cuda.get_rng_state()
    return tensors


def masters(task: Resumable, optimizer: AdamW) -> dict[str, Tensor]:
    """Return the fp32 masters by name, those that compute in bf16 in two halves."""
    tensors = {}
    for name, parameter in task.parameters.items():
        tensors[f"parameter/{name}"] = parameter.detach()
    for name, residual_bits in optimizer.residual_bits.items():
        tensors[f"residual/{name}"] = residual_bits
    return tensors


def load_state(tensors: dict[str, Tensor], task: Resumable, optimizer: AdamW, steps: int) -> None:
    """Put back what `state_tensors` collected after so many steps."""
    kinds = by_kind(tensors)
    with torch.no_grad():
        for name, parameter in task.parameters.items():
            parameter.copy_(kinds["parameter"][name])
        for name, tensor in task.state.items():
            tensor.copy_(kinds["state"][name])
        optimizer.load(kinds, steps)
    generators = kinds["generator"]
    torch.set_rng_state(generators["cpu"])
    if "cuda" in generators and torch.cuda.is_available():
        torch.cuda.set_rng_state(generators["cuda"])


def shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    """Return what a checkpoint must have in common with the task that it is for.

    Not the generators' states, which differ between devices, nor the scales of 8-bit moments: a
    run may go on with moments of another kind.
    """
    found = {}
    for name, tensor in tensors.items():
        kind = name.partition("/")[0]
        if kind != "generator" and not kind.endswith(SCALE):
            found[name] = tensor.shape
    return found


def by_kind(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return {kind: {name: tensor}} of tensors named kind/name."""
    kinds: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        kinds.setdefault(kind, {})[name] = tensor
    return kinds
