"""The run's language model with its adapters: opened, told apart, frozen.

B sequences, T tokens, S layers that are read, D model width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ....errors import ConfigError
from ....hardware import device
from ....model.experts import Expert
from ....model.language_model import LanguageModel
from ....model.trunk import Ffn, Trunk
from ... import Parts
from ...adapters import peft_io
from ...adapters.base import BUILT, ModelRef
from ..config import FfnMoeConfig
from ..parts import stored_trunk, training_expert, training_trunk

PROJECTIONS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
# Files of the trunk's artifact that say which model this is
OF_BASE = ("trunk.safetensors", "dummy.safetensors", "pin.json")


@dataclass(frozen=True)
class Options:
    """A new adapter as PEFT is told of it."""

    r: int
    alpha: float
    targets: str
    dropout: float = 0.0

    @classmethod
    def of(cls, cfg: FfnMoeConfig, layers: int) -> "Options":
        """Return a run's, on a model of so many layers. Raises ConfigError for layers that it has
        not."""
        rank = cfg.expert.adapter_rank
        alpha = cfg.expert.delta_scale * rank
        if cfg.expert.layers == "all":
            return cls(rank, alpha, rf".*\.({PROJECTIONS})")
        try:
            chosen = "|".join(map(str, cfg.expert.in_layers(layers)))
        except ValueError as error:
            raise ConfigError(f"expert.layers: {error}") from None
        return cls(rank, alpha, rf".*\.layers\.({chosen})\..*\.({PROJECTIONS})")


class Adapted(LanguageModel):
    """A language model with some adapters, as one of them changes it, or none."""

    def __init__(self, adapters: peft_io.Adapters, name: str | None = None):
        super().__init__(peft_io.core_of(adapters))
        self.adapters = adapters
        self.name = name

    def under(self, name: str | None) -> "Adapted":
        """Return the same model as another adapter changes it, or as none does."""
        return Adapted(self.adapters, name)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Have the network compute under this adapter while the context is open."""
        with peft_io.active(self.adapters, self.name):
            yield

    def hidden(self, ids_BT: torch.Tensor, ffn: Ffn | None = None) -> torch.Tensor:
        """Return h_BTD after the final norm."""
        with self.active():
            return super().hidden(ids_BT, ffn)


def base_ref(cfg: FfnMoeConfig, parts: Parts) -> ModelRef:
    """Return which model the run's adapters are made on: the trunk's own files, wherever they came
    from."""
    known = parts.manifest("train_shared").files
    files = {name: known[name]["sha256"] for name in OF_BASE if name in known}
    return ModelRef("built", cfg.trunk.init or BUILT, cfg.trunk.revision, files)


def stored_base(cfg: FfnMoeConfig, parts: Parts) -> LanguageModel:
    """Return the run's base, frozen and mapped."""
    return _whole(*stored_trunk(cfg, parts))


def training_base(cfg: FfnMoeConfig, parts: Parts) -> LanguageModel:
    """Return the base as trainings on it need it: in bf16 where they are."""
    trunk, dummy = training_trunk(cfg, parts)
    return _whole(trunk, training_expert(cfg, dummy))


def _whole(trunk: Trunk, dummy: Expert) -> LanguageModel:
    return LanguageModel.of(trunk, dummy).requires_grad_(False).eval()


def stored_adapters(cfg: FfnMoeConfig, parts: Parts) -> Adapted:
    """Return the base with every expert's adapter, as none of them changes it.

    Raises MismatchError for an adapter of another base, and what parts raise.
    """
    base = stored_base(cfg, parts)
    folders = {name: parts.folder("train_experts", name) for name in cfg.experts}
    return opened(base, folders, base_ref(cfg, parts))


def opened(base: LanguageModel, folders: dict[str, Path], pin: ModelRef) -> Adapted:
    """Return a base with the adapters that lie in folders, by name. Raises MismatchError."""
    model: Any = base.network
    for name, folder in folders.items():
        model = peft_io.load(model, folder, name, pin)
    return Adapted(model.to(device()).requires_grad_(False).eval())
