"""Dropout of what attention and feed-forward networks add to the residual stream (1706.03762,
section 5.4).

B sequences, T tokens, D model width.
"""

from typing import Any

from torch import Tensor, nn

from .trunk import Trunk


class DroppedNetwork(nn.Module):
    """What fills a trunk's slots, with dropout behind it and behind the trunk's attention.

    One module for both, so that whoever puts what is in the slots into evaluation has no dropout
    left anywhere.
    """

    def __init__(self, trunk: Trunk, network: nn.Module, share: float):
        super().__init__()
        self.network = network
        self.dropout = nn.Dropout(share)
        for layer in trunk.network.model.layers:
            layer.self_attn.register_forward_hook(self._drop)

    def forward(self, layer: int, x_BTD: Tensor) -> Tensor:
        """Return y_BTD of one layer."""
        y_BTD: Tensor = self.dropout(self.network(layer, x_BTD))
        return y_BTD

    def _drop(self, _attention: nn.Module, _inputs: Any, output: Any) -> Any:
        # Hugging Face's attention answers with its weights behind
        h_BTD, *rest = output
        return (self.dropout(h_BTD), *rest)
