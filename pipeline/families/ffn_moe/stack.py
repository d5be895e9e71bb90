"""The finished stack of FFN experts: trunk, experts and router put together.

B sequences, T tokens, L layers, E experts, D model width.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...errors import MismatchError
from ...model.experts import Expert
from ...model.router import Mixture, gate_layers, gate_name
from ...model.trunk import Trunk
from .. import Parts
from .config import FfnMoeConfig
from .parts import mixture_of, stored_experts, stored_trunk, token_loss


@dataclass
class FfnStack:
    """Trunk, experts and router, assembled and frozen."""

    trunk: Trunk
    experts: Mapping[str, Expert]  # by name, in the order of the gates' rows
    mixture: Mixture

    @property
    def names(self) -> tuple[str, ...]:
        """The experts' names, in order."""
        return tuple(self.experts)

    @property
    def weight_LED(self) -> torch.Tensor:
        """The gates' rows, of every layer and expert."""
        gates = [gate.data for gate in self.mixture.router.gates]
        return torch.stack(gates)

    def token_loss(self, ids_BT: torch.Tensor, bf16: bool = False) -> torch.Tensor:
        """Return nats_BT of every token after the first."""
        return token_loss(self.trunk, self.mixture, ids_BT, bf16)


def assemble(cfg: FfnMoeConfig, parts: Parts) -> FfnStack:
    """Build the finished stack from its parts.

    Raises MissingArtifact, DamagedArtifact, or MismatchError for parts made on another trunk.
    """
    trunk, dummy = stored_trunk(cfg, parts)
    # The dummy says what an expert looks like, whether or not it stays as the anchor
    experts = dict(stored_experts(cfg, parts, dummy))
    return join(cfg, parts, trunk, experts)


def join(
    cfg: FfnMoeConfig,
    parts: Parts,
    trunk: Trunk,
    experts: Mapping[str, Expert],
) -> FfnStack:
    """Build the finished stack from a trunk and experts that are open already, in their order.

    Raises MissingArtifact, DamagedArtifact, or MismatchError for a router of other experts.
    """
    stored = parts.tensors("train_router", "router.safetensors")
    gates = [stored[gate_name(layer)] for layer in gate_layers(stored)]
    weight_LED = torch.stack(gates)
    rows = weight_LED.shape[1]
    if rows != len(experts):
        raise MismatchError(
            f"the router has {rows} rows for {len(experts)} experts", stage="train_router"
        )
    mixture = mixture_of(list(experts.values()), weight_LED, cfg.router.top_k)
    return FfnStack(trunk, experts, mixture)
