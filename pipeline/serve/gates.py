"""What the gates of a stack choose while a model runs, and who is chosen in their place where a
text has one reader.

B rows, T tokens, N = B*T, L layers, K experts per token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FREE = -1  # in the place of a reader's number: whom the gates choose
NOBODY = -2  # in that place: no expert, as a dense model reads


@dataclass(frozen=True)
class GateChoice:
    """What the gates chose at one position, per layer: numbers of experts and their weights.

    Tuples, as Python's collector of garbage stops following those that hold no more than numbers,
    and of each token that is kept there are dozens.
    """

    experts: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]

    @classmethod
    def of_reader(cls, number: int, layers: int = 1) -> "GateChoice":
        """Return the choice of one expert in every layer."""
        return cls(((number,),) * layers, ((1.0,),) * layers)

    @classmethod
    def of_nobody(cls) -> "GateChoice":
        """Return the choice where there are no experts."""
        return cls((), ())


class GateHearing:
    """Hears all gates of a model, layer after layer, and has them choose a text's one reader.

    The stock classes keep nothing of what they choose; `hear` is called with it by hooks, or by a
    mixture of ours.
    """

    def __init__(self) -> None:
        self._reader_N: Tensor | None = None
        self._is_on = False
        self._index: list[Tensor] = []
        self._weight: list[Tensor] = []

    def hook(self, model: nn.Module) -> None:
        """Hear the gates of a stock class from now on, whenever `listening`."""
        for name, module in model.named_modules():
            if name.endswith(".mlp.gate"):
                module.register_forward_hook(self._on_gate)

    def _on_gate(
        self, _gate: nn.Module, _inputs: Any, outputs: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        if not self._is_on:
            return None
        logits, weight_NK, index_NK = outputs
        index_NK, weight_NK = self.hear(index_NK, weight_NK)
        return logits, weight_NK, index_NK

    @contextmanager
    def listening(
        self, readers: Sequence[int], tokens: Sequence[int], device: torch.device
    ) -> Iterator[None]:
        """Hear the gates of one pass over rows of so many tokens each, each with its reader's
        number or FREE."""
        self._index = []
        self._weight = []
        self._reader_N = None
        if any(reader != FREE for reader in readers):
            reader_B = torch.tensor(readers, device=device)
            self._reader_N = reader_B.repeat_interleave(torch.tensor(tokens, device=device))
        self._is_on = True
        try:
            yield
        finally:
            self._is_on = False

    def hear(self, index_NK: Tensor, weight_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Keep what a layer's gate chose; return who is to read instead, and with which weight."""
        if self._reader_N is not None:
            reader_N1 = self._reader_N.unsqueeze(1)
            is_free_N1 = reader_N1 == FREE
            # the same expert in each place, in the first of them with all the weight
            alone_NK = torch.zeros_like(weight_NK)
            alone_NK[:, 0] = 1
            index_NK = torch.where(is_free_N1, index_NK, reader_N1)
            weight_NK = torch.where(is_free_N1, weight_NK, alone_NK)
        self._index.append(index_NK)
        self._weight.append(weight_NK)
        return index_NK, weight_NK

    def heard(self, places: Sequence[int]) -> list[GateChoice]:
        """Return what was chosen at some of the N positions of the pass."""
        index_NLK = torch.stack(self._index, 1)
        weight_NLK = torch.stack(self._weight, 1)
        experts = map(_as_tuples, index_NLK[places].tolist())
        weights = map(_as_tuples, weight_NLK[places].tolist())
        return list(map(GateChoice, experts, weights))

    @property
    def layers(self) -> int:
        """How many layers were heard."""
        return len(self._index)


def _as_tuples(rows: list[list[Any]]) -> tuple[tuple[Any, ...], ...]:
    return tuple(map(tuple, rows))
