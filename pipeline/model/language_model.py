"""A trunk whose slots its own networks fill for good: the stock language model that adapters stand
on, and what their router reads of it.

B sequences, T tokens, S layers that are read, D model width, N pieces of texts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .experts import Expert
from .kernels.frozen import patch_linear
from .trunk import Ffn, Trunk

# of a state, below which it is not divided by
LEAST_POWER = 1e-6


class LanguageModel(Trunk):
    """Embedding, layers with their feed-forward networks, and LM head."""

    @classmethod
    def of(cls, trunk: Trunk, ffn: Expert) -> "LanguageModel":
        """Return the model that a trunk is with a network of each layer, which are not copied."""
        for layer, network in zip(trunk.network.model.layers, ffn.layers, strict=True):
            layer.mlp = network
        # a network may be stored in another dtype than the one that is computed in
        patch_linear(trunk.network)
        return cls(trunk.network)

    def hidden(self, ids_BT: Tensor, ffn: Ffn | None = None) -> Tensor:
        """Return h_BTD after the final norm; the slots are filled, so `ffn` has no place in it."""
        return self.network.model(input_ids=ids_BT, use_cache=False).last_hidden_state

    @torch.no_grad()
    def states(self, ids_BT: Tensor, layers: Sequence[int], bf16: bool = False) -> Tensor:
        """Return x_BTSD, the states after some layers, each scaled to a mean square of one."""
        dtype = torch.bfloat16 if bf16 else torch.float32
        autocast = torch.autocast(ids_BT.device.type, dtype, enabled=bf16)
        with _kept(self.network.model.layers, layers) as found, autocast:
            self.hidden(ids_BT)
        x_BTSD = torch.stack([found[layer].float() for layer in layers], 2)
        power_BTS1 = x_BTSD.square().mean(-1, keepdim=True)
        return x_BTSD * power_BTS1.clamp(min=LEAST_POWER).rsqrt()


def filled(_layer: int, _x_BTD: Tensor) -> Tensor:
    """Stands where an ffn from x_BTD is asked for, with a model whose slots are filled."""
    raise AssertionError("the slots of this model are filled")


def first_tokens(x_BTSD: Tensor, tokens: int) -> Tensor:
    """Return x_BSD, what the first tokens of each text are on average.

    A state sees the tokens up to its own alone, so this depends on no later one. The first token
    sees nothing, and attention makes it a place to rest on (2309.17453): it says little of a text
    and counts only where it is alone.
    """
    first = 1 if x_BTSD.shape[1] > 1 else 0
    return x_BTSD[:, first:tokens].mean(1)


def pieces(x_BTSD: Tensor, tokens: int) -> Tensor:
    """Return x_NSD, what each whole piece of so many tokens is on average, the first token of a
    text left out; a text that is shorter than a piece is one."""
    rest_BTSD = x_BTSD[:, 1:]
    count = rest_BTSD.shape[1] // tokens
    if not count:
        return first_tokens(x_BTSD, x_BTSD.shape[1])
    whole_BTSD = rest_BTSD[:, : count * tokens]
    return whole_BTSD.unflatten(1, (count, tokens)).mean(2).flatten(0, 1)


@contextmanager
def _kept(modules: nn.ModuleList, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Keep what the layers give while the context is open, by their numbers."""
    found: dict[int, Tensor] = {}
    hooks = []
    for number in layers:

        def keep(_layer: nn.Module, _inputs: Any, output: Any, at: int = number) -> None:
            found[at] = output[0] if isinstance(output, tuple) else output

        hooks.append(modules[number].register_forward_hook(keep))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
