"""The tensors of what is exported, each read from its part of the store when it is written.

D model width, E experts, L layers, I numbers in, O out, r rank.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....model.experts import Expert
from ....model.low_rank import Delta, LowRankExpert
from ....model.router import gate_name
from ....model.trunk import Trunk
from ....store.streamed import Streamed
from ..naming import NAMINGS

PREFIX = "base_model.model."  # of PEFT's names

Tensors = dict[str, Streamed]  # by Hugging Face names


def trunk_tensors(trunk: Trunk) -> Tensors:
    """Return a trunk's tensors; a tied head is the embedding and not among them."""
    return streamed(trunk.named())


def expert_tensors(expert: Expert) -> Tensors:
    """Return the tensors of an expert's networks in all layers, by the names they have in a dense
    model: its base's where it has none of its own, and with a low-rank delta on it in fp32."""
    whole = streamed((expert.base or expert).named())
    if not isinstance(expert, LowRankExpert):
        return whole | streamed(expert.named())
    for layer in expert.own_layers:
        for projection, delta in expert.deltas(layer).items():
            name = f"model.layers.{layer}.mlp.{projection}.weight"
            stored = whole[name]
            read = _merged(stored, delta, expert.scale)
            whole[name] = Streamed(stored.shape, torch.float32, read)
    return whole


def adapted_tensors(
    whole: Mapping[str, Streamed], lora: Mapping[str, Tensor], scale: float
) -> Tensors:
    """Return a dense model's tensors with an adapter added, in fp32 where it adds something.

    lora: by PEFT's names.
    """
    out = dict(whole)
    for name, stored in whole.items():
        stem = f"{PREFIX}{name.removesuffix('.weight')}"
        a_rI = lora.get(f"{stem}.lora_A.weight")
        if a_rI is not None:
            read = _added(stored, lora[f"{stem}.lora_B.weight"], a_rI, scale)
            out[name] = Streamed(stored.shape, torch.float32, read)
    return out


def mean_tensors(experts: Sequence[Mapping[str, Streamed]]) -> Tensors:
    """Return the weight soup (2203.05482): the mean of the experts' tensors."""
    out = {}
    for name, first in experts[0].items():
        each = [tensors[name] for tensors in experts]
        out[name] = Streamed(first.shape, first.dtype, _mean(each, first.dtype))
    return out


@dataclass(frozen=True)
class MixtureTensors:
    """The feed-forward networks and gates of a mixture, by a stock class's names."""

    gates: Tensors
    base: Tensors  # the networks of layers that have no experts
    experts: list[Tensors]  # in the order of the gates' rows


def mixture_tensors(
    experts: Sequence[Mapping[str, Streamed]],
    base: Mapping[str, Streamed],
    gates: Mapping[str, Tensor],
    stock: Mapping[str, Any],
) -> MixtureTensors:
    """Return what is put into a stock class with these settings: where it knows no layers without
    experts, the base's networks there as everyone's.

    experts, base: tensors in all layers by a dense model's names. gates: of the layers that have
    some, by the store's.
    """
    naming = NAMINGS[stock["architectures"][0]]
    every = range(stock["num_hidden_layers"])
    plain = stock.get("mlp_only_layers") or ()
    sparse = [layer for layer in every if layer not in plain]
    filled = all_gates(gates, len(every), len(experts))
    kept = {}
    for layer in sparse:
        name = gate_name(layer)
        kept[naming.gate(name)] = Streamed.of(filled[name])
    named = []
    for number, tensors in enumerate(experts):
        own = _of_layers(tensors, sparse)
        named.append({naming.expert(number, name): own[name] for name in own})
    return MixtureTensors(kept, _of_layers(base, plain), named)


def _of_layers(tensors: Mapping[str, Streamed], layers: Iterable[int]) -> Tensors:
    prefixes = tuple(f"model.layers.{layer}." for layer in layers)
    return {name: tensors[name] for name in tensors if name.startswith(prefixes)}


def streamed(tensors: Mapping[str, Tensor]) -> Tensors:
    """Return tensors that are open as such that are read when they are written."""
    return {name: Streamed.of(tensor) for name, tensor in tensors.items()}


def widest(tensors: Iterable[Streamed]) -> torch.dtype:
    """Return a dtype that loses nothing of any tensor: a kept anchor may be of another."""
    first, *others = [tensor.dtype for tensor in tensors]
    for dtype in others:
        first = torch.promote_types(first, dtype)
    return first


def _added(stored: Streamed, b_Or: Tensor, a_rI: Tensor, scale: float) -> Callable[[], Tensor]:
    # A function of its own, as one of a loop would have the last name's matrices
    return lambda: torch.add(stored.read().float(), b_Or @ a_rI, alpha=scale)


def _merged(stored: Streamed, delta: Delta, scale: float) -> Callable[[], Tensor]:
    # A function of its own, as one of a loop would have the last layer's delta
    def read() -> Tensor:
        with torch.no_grad():
            return torch.add(stored.read().float(), delta.product_OI, alpha=scale)

    return read


def all_gates(gates: Mapping[str, Tensor], layers: int, experts: int) -> dict[str, Tensor]:
    """Return the gates of every layer: of zeros where there is none, as all experts are the base's
    network there and it is all the same which of them are taken."""
    like_ED = next(iter(gates.values()))
    nothing_ED = like_ED.new_zeros(experts, like_ED.shape[1])
    return {gate_name(at): gates.get(gate_name(at), nothing_ED) for at in range(layers)}


def _mean(each: Sequence[Streamed], dtype: torch.dtype) -> Callable[[], Tensor]:
    # A function of its own, as one of a loop would have the last name's tensors
    def read() -> Tensor:
        total = each[0].read().float()
        for tensor in each[1:]:
            total = total + tensor.read().float()
        return (total / len(each)).to(dtype)

    return read
