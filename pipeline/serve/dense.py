"""A dense model beside a stack, as the scheduler runs it: its texts have slots of the stack's own
cache, and nobody speaks their tokens.

B rows, T tokens, D model width.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from ..hardware import device
from ..model.language_model import LanguageModel
from ..model.trunk import open_dense
from ..store.artifacts import load_tensors
from ..store.foreign import read_object
from .gates import GateChoice
from .held_weights import cast_weights
from .networks import Batch, OneReader
from .steady.network import SteadyNetwork, can_be_steady

WEIGHTS = "model.safetensors"


def opened_dense(folder: Path) -> LanguageModel:
    """Return the model in the folder of a stock checkpoint, mapped and frozen, on the device, once
    its files were looked at. Raises DamagedArtifact, UnreadableFile, ForeignFile, OSError, and
    RuntimeError for tensors that are none of its."""
    settings = read_object(folder, "config.json")
    trunk, ffn = open_dense(settings, load_tensors(folder / WEIGHTS))
    model = LanguageModel.of(trunk, ffn).to(device())
    return model.requires_grad_(False).eval()


class DenseModel(OneReader):
    """A language model without experts."""

    def __init__(self, model: LanguageModel):
        super().__init__(model.network, ())
        self.hold(model.network)

    def hold(self, network: Any) -> None:
        """Have the model's weights in the dtype of its products."""
        cast_weights(network)

    def hidden(self, batch: Batch) -> Tensor:
        """Return x_BTD after the final norm."""
        return self.run(batch)

    def heard(self, batch: Batch) -> list[list[GateChoice]]:
        """Return of each token that was read that no expert did."""
        told = []
        for chunk in batch.chunks:
            count = len(chunk.ids) if chunk.row.tells_all else 1
            told.append([GateChoice.of_nobody()] * count)
        return told


class SteadyDense(SteadyNetwork, DenseModel):
    """The same in bf16."""

    packs = True

    def hold(self, network: Any) -> None:
        """Have the model compute each row as it is alone."""
        self.make_steady(network)
        self.make_steady_silu(network)


def steady_dense(folder: Path) -> SteadyDense | None:
    """Return the model in a folder in bf16, None where it has no such form. Raises as
    `opened_dense`."""
    # opened once more, as what runs in bf16 is changed for it
    model = opened_dense(folder)
    return SteadyDense(model) if can_be_steady(model.network) else None
