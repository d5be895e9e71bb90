"""Experts: a feed-forward network per layer, and the sparse mixture of several.

B sequences, T tokens, N = B*T, D model width, F feed-forward width, E experts, K experts per token,
R = N*K routed rows.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .kernels.swiglu import is_swiglu, swiglu
from .tensors import assign_parameter

BLOCK_ROWS = 64


class Expert(nn.Module):
    """One feed-forward network per layer; the dummy, the anchor and a dense baseline's FFN are
    Experts too."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, layer: int, x_BTD: torch.Tensor) -> torch.Tensor:
        """Return y_BTD of one layer's network; fits the trunk's `fill`."""
        net = self.layers[layer]
        return swiglu(net, x_BTD) if is_swiglu(net) else net(x_BTD)

    def named(self) -> dict[str, nn.Parameter]:
        """Return parameters under the names they have in a dense Hugging Face model."""
        return {
            f"model.layers.{i}.mlp.{n}": p
            for i, net in enumerate(self.layers)
            for n, p in net.named_parameters()
        }


def clone(expert: Expert) -> Expert:
    """Return a trainable copy, whatever was frozen in the original."""
    return copy.deepcopy(expert).requires_grad_(True)


def from_tensors(like: Expert, tensors: Mapping[str, torch.Tensor]) -> Expert:
    """Return a frozen expert of the same architecture around stored tensors, which are neither
    copied nor cast.

    Raises KeyError when names are missing or strange, ValueError when a shape differs.
    """
    with torch.device("meta"):
        expert = Expert([type(net)(net.config) for net in like.layers])
    assign_parameter(expert, expert.named(), tensors)
    return expert.requires_grad_(False).eval()


def reinit_like(like: Expert, d_ff: int | None = None) -> Expert:
    """Return a new expert of the same architecture, drawn from torch's generator, optionally of
    another width F."""
    return Expert([_fresh(net, d_ff) for net in like.layers]).requires_grad_(True)


def _fresh(net: nn.Module, d_ff: int | None) -> nn.Module:
    config = copy.copy(net.config)
    if d_ff is not None:
        config.intermediate_size = d_ff
    new = type(net)(config)
    for parameter in new.parameters():
        nn.init.normal_(parameter, std=config.initializer_range)
    return new


@torch.no_grad()
def average(experts: Sequence[Expert]) -> Expert:
    """Return the weight soup: the mean of the experts' parameters."""
    soup = clone(experts[0]).requires_grad_(False)
    for name, parameter in soup.named().items():
        parameter.copy_(torch.stack([e.named()[name] for e in experts]).mean(0))
    return soup


def mix(
    experts: Sequence[Expert],
    layer: int,
    x_ND: torch.Tensor,
    index_NK: torch.Tensor,
    weight_NK: torch.Tensor,
) -> torch.Tensor:
    """Return y_ND, each token's weighted sum over its chosen experts; index -1 drops a choice
    (capacity).

    Tokens are sorted by expert, so each expert runs once over a contiguous block.
    """
    flat_R = index_NK.flatten()
    order_R = flat_R.argsort(stable=True)
    counts = (flat_R + 1).bincount(minlength=len(experts) + 1).tolist()  # first bin: dropped
    top_k = index_NK.shape[1]
    blocks = x_ND[order_R // top_k].split(counts)
    parts = [torch.zeros_like(blocks[0])] + [
        _padded(e, layer, b) for e, b in zip(experts, blocks[1:], strict=True)
    ]
    y_RD = torch.cat([p.to(parts[-1].dtype) for p in parts])[order_R.argsort()]
    return (y_RD.view(-1, top_k, x_ND.shape[1]) * weight_NK.unsqueeze(-1)).sum(1).to(x_ND.dtype)


def _padded(expert: Expert, layer: int, x_RD: torch.Tensor) -> torch.Tensor:
    """Run an expert on a block filled up with zero rows to a multiple of BLOCK_ROWS.

    oneDNN compiles and keeps a kernel for every shape it meets: with blocks of any length that cost
    25 MB a step.
    """
    rows = x_RD.shape[0]
    return expert(layer, F.pad(x_RD, (0, 0, 0, -rows % BLOCK_ROWS)))[:rows]
