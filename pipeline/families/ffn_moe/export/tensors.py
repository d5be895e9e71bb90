"""The tensors of what is exported, each read from its part of the store when it is written.

D model width, E experts, L layers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ....model.experts import Expert
from ....model.trunk import Trunk
from ....store.streamed import Streamed

Tensors = dict[str, Streamed]  # by Hugging Face names


def trunk_tensors(trunk: Trunk) -> Tensors:
    """Return a trunk's tensors; a tied head is the embedding and not among them."""
    return _streamed(trunk.named())


def expert_tensors(expert: Expert) -> Tensors:
    """Return an expert's tensors by the names they have in a dense model."""
    return _streamed(expert.named())


def mean_tensors(experts: Sequence[Mapping[str, Streamed]]) -> Tensors:
    """Return the weight soup (2203.05482): the mean of the experts' tensors."""
    out = {}
    for name, first in experts[0].items():
        each = [tensors[name] for tensors in experts]
        out[name] = Streamed(first.shape, first.dtype, _mean(each, first.dtype))
    return out


def mixture_tensors(
    experts: Iterable[Mapping[str, Streamed]],
    gates: Mapping[str, Tensor],
    expert_name: Callable[[int, str], str],
    gate_name: Callable[[str], str],
) -> Tensors:
    """Return a mixture's experts and gates by the names that a stock class gives them."""
    out = {}
    for number, tensors in enumerate(experts):
        for name, tensor in tensors.items():
            out[expert_name(number, name)] = tensor
    for name, gate_ED in gates.items():
        out[gate_name(name)] = Streamed.of(gate_ED)
    return out


def _streamed(named: Mapping[str, nn.Parameter]) -> Tensors:
    return {name: Streamed.of(parameter) for name, parameter in named.items()}


def _mean(each: Sequence[Streamed], dtype: torch.dtype) -> Callable[[], Tensor]:
    # A function of its own, as one of a loop would have the last name's tensors
    def read() -> Tensor:
        total = each[0].read().float()
        for tensor in each[1:]:
            total = total + tensor.read().float()
        return (total / len(each)).to(dtype)

    return read
