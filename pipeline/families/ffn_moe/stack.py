"""The finished stack of FFN experts: trunk, experts and router put together.

B sequences, T tokens, L layers, E experts, D model width.
"""

from dataclasses import dataclass

import torch

from ...errors import MismatchError
from ...model.router import Mixture, gate_name
from ...model.trunk import Trunk
from .config import FfnMoeConfig
from .parts import mixture_of, stored_experts, stored_trunk, token_loss


@dataclass
class FfnStack:
    """Trunk, experts and router, assembled and frozen."""

    trunk: Trunk
    mixture: Mixture
    names: tuple[str, ...]  # of the experts, in order

    def token_loss(self, ids_BT: torch.Tensor, bf16: bool = False) -> torch.Tensor:
        """Return nats_BT of every token after the first."""
        return token_loss(self.trunk, self.mixture, ids_BT, bf16)


def assemble(cfg: FfnMoeConfig, parts) -> FfnStack:
    """Build the finished stack from its parts.

    Raises MissingArtifact, DamagedArtifact, or MismatchError for parts made on another trunk.
    """
    trunk, _ = stored_trunk(cfg, parts)
    named = list(stored_experts(cfg, parts))
    stored = parts.tensors("train_router", "router.safetensors")
    weight_LED = torch.stack([stored[gate_name(i)] for i in range(len(stored))])
    if weight_LED.shape[1] != len(named):
        raise MismatchError(
            f"the router has {weight_LED.shape[1]} rows for {len(named)} experts; run train_router"
        )
    mixture = mixture_of([e for _, e in named], weight_LED, cfg.router.top_k)
    return FfnStack(trunk, mixture, tuple(n for n, _ in named))
