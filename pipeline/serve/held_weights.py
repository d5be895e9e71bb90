"""Weights of a served model in the dtype that its products run in.

A bundle keeps weights as they were stored, in bf16 mostly, and a processor multiplies in fp32. A
training casts each for one product, as its memory is scarce; to give one token to one text that
cast takes as long as all else, so a server keeps what it cast, where there is room. SmolLM2-135M
with three experts of rank 16, one thread: a pass of one row 101 ms with casts, 62 without, of 16
rows 173 and 123.
"""

import torch
from torch import nn

from ..hardware import free_bytes
from ..model.kernels.frozen import FrozenLinear

# Of what is free; the rest is for texts, pictures and whatever else runs here.
SHARE = 0.5


def cast_weights(*modules: nn.Module, dtype: torch.dtype = torch.float32) -> bool:
    """Hold the weights of linear layers in a dtype, once and for all; return False, with nothing
    changed, where memory has no room for them, or they lie on a GPU and would grow."""
    weights: dict[int, nn.Parameter] = {}
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, FrozenLinear):
                for parameter in layer.parameters():
                    # a head that is tied to the embedding is one weight; of a mere pattern for
                    # experts there are no numbers
                    if parameter.dtype != dtype and not parameter.is_meta:
                        weights[id(parameter)] = parameter
    needed_bytes = sum(weight.numel() for weight in weights.values()) * dtype.itemsize
    for weight in weights.values():
        # a GPU's memory is the scarcer one: there weights may shrink and not grow
        if weight.device.type != "cpu" and weight.element_size() < dtype.itemsize:
            return False
    if needed_bytes > SHARE * free_bytes():
        return False
    for weight in weights.values():
        weight.data = weight.data.to(dtype)
    return True
