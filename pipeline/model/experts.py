"""Experts: a feed-forward network per layer, and the sparse mixture of several.

B sequences, T tokens, N = B*T, D model width, F feed-forward width, E experts, K experts per token,
R = N*K routed rows.
"""

import copy
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels.frozen import patch_linear
from .kernels.swiglu import is_swiglu, swiglu

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Rows of an expert's block are filled up to a multiple of this. oneDNN compiles and keeps a kernel
# for every shape that it meets: with blocks of any length that cost 25 MB a step.
BLOCK_ROWS = 64
HF_NAME = re.compile(r"model\.layers\.(\d+)\.mlp\.(.+)")


class Expert(nn.Module):
    """One feed-forward network per layer; the dummy, the anchor and a dense baseline's FFN are
    Experts too.

    An expert of chosen layers has None elsewhere, where the networks of its `base` stand.
    """

    base: "Expert | None"

    def __init__(self, layers: Iterable[nn.Module | None], base: "Expert | None" = None):
        super().__init__()
        # torch keeps a place without a module, though it does not declare so
        self.layers = nn.ModuleList(cast("Iterable[nn.Module]", layers))
        patch_linear(self.layers)
        # past nn.Module: the base is everyone's, and no part of what is trained, moved or stored
        object.__setattr__(self, "base", base)

    @property
    def own_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have a network of the expert's own."""
        return tuple(i for i, network in enumerate(self.layers) if network is not None)

    def forward(self, layer: int, x_BTD: Tensor) -> Tensor:
        """Return y_BTD of one layer's network; this is what the trunk takes as its `ffn`."""
        network = self.layers[layer]
        if network is None and self.base is not None:
            return self.base(layer, x_BTD)
        if is_swiglu(network):
            return swiglu(network, x_BTD)
        return network(x_BTD)

    def named(self) -> dict[str, nn.Parameter]:
        """Return the expert's own parameters under the names they have in a dense Hugging Face
        model."""
        names = {}
        for layer in self.own_layers:
            for name, parameter in self.layers[layer].named_parameters():
                names[f"model.layers.{layer}.mlp.{name}"] = parameter
        return names

    def load(self, tensors: Mapping[str, Tensor], assign: bool = False) -> None:
        """Copy tensors of Hugging Face names into the parameters, or make them the parameters.

        Raises RuntimeError that names every tensor that is missing, strange or of another shape.
        """
        own_names = {}
        for name, tensor in tensors.items():
            # detached, as torch would take over a Parameter itself: freezing the new expert would
            # freeze the one that it came from
            own_names[HF_NAME.sub(r"layers.\1.\2", name)] = tensor.detach()
        self.load_state_dict(own_names, assign=assign)


def clone(expert: Expert) -> Expert:
    """Return a trainable copy in fp32, whatever was frozen in the original and in which dtype; a
    base stays the one it is."""
    memo: dict[int, Any] = {id(expert.base): expert.base}
    for parameter in expert.parameters():
        # deepcopy takes these in place of copies of its own
        memo[id(parameter)] = nn.Parameter(parameter.detach().to(torch.float32, copy=True))
    return copy.deepcopy(expert, memo).requires_grad_(True)


def in_layers(expert: Expert, base: Expert, layers: Collection[int]) -> Expert:
    """Return an expert of chosen layers: its networks there, the base's elsewhere."""
    networks = []
    for layer, network in enumerate(expert.layers):
        networks.append(network if layer in layers else None)
    return Expert(networks, base)


def common_layers(experts: Sequence[Expert]) -> tuple[int, ...]:
    """Return the numbers of the layers in which every expert has a network of its own; those of a
    base are its own in all."""
    everywhere = [set(expert.own_layers) for expert in experts]
    return tuple(sorted(set.intersection(*everywhere)))


def from_tensors(
    like: Expert,
    tensors: Mapping[str, Tensor],
    layers: Collection[int] | None = None,
) -> Expert:
    """Return a frozen expert of the same architecture around stored tensors, which are neither
    copied nor cast.

    layers: those it has networks of its own in, all by default; elsewhere those of `like` stand.
    Raises RuntimeError when names are missing or strange or a shape differs.
    """
    # on the meta device a network has shapes and no memory, so building it costs nothing
    with torch.device("meta"):
        expert = Expert(_same_kind(network) for network in like.layers)
    if layers is not None and len(layers) < len(like.layers):
        expert = in_layers(expert, like, layers)
    expert.load(tensors, assign=True)
    return expert.requires_grad_(False).eval()


def reinit_like(like: Expert, d_ff: int | None = None) -> Expert:
    """Return a new expert of the same architecture, drawn from torch's generator, optionally of
    another width F."""
    networks = []
    for old in like.layers:
        new = _same_kind(old, d_ff)
        # Hugging Face draws the weights of whole models only, not of a network made by itself;
        # layer by layer, as the order of the draws is part of what a seed stands for
        for parameter in new.parameters():
            nn.init.normal_(parameter, std=_config_of(new).initializer_range)
        networks.append(new)
    return Expert(networks).requires_grad_(True)


def _same_kind(network: nn.Module, d_ff: int | None = None) -> nn.Module:
    """Return a network of the same class and sizes, optionally of another width F."""
    config = copy.copy(_config_of(network))
    if d_ff is not None:
        config.intermediate_size = d_ff
    return type(network)(config)


def _config_of(network: nn.Module) -> "PreTrainedConfig":
    """Return the configuration that every feed-forward network of Hugging Face keeps."""
    # torch declares every attribute of a module to be a tensor or a module
    return cast("PreTrainedConfig", network.config)


@torch.no_grad()
def average(experts: Sequence[Expert]) -> Expert:
    """Return the weight soup (2203.05482): the mean of the experts' parameters."""
    soup = clone(experts[0]).requires_grad_(False)
    named = [expert.named() for expert in experts]
    for name, parameter in soup.named().items():
        parameter.copy_(_mean([own[name] for own in named]))
    return soup


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).mean(0)


class Soup(nn.Module):
    """The weight soup as `average` makes it, each layer's mean made when the layer runs and let go
    after it: nobody holds one more expert."""

    def __init__(self, experts: Sequence[Expert]):
        super().__init__()
        self.experts = nn.ModuleList(experts)

    @torch.no_grad()
    def forward(self, layer: int, x_BTD: Tensor) -> Tensor:
        """Return y_BTD of one layer's mean network."""
        members = [cast("Expert", expert).layers[layer] for expert in self.experts]
        if members[0] is None:  # there the base of all of them stands
            return self.experts[0](layer, x_BTD)
        with torch.device("meta"):
            network = _same_kind(members[0])
        stored = [dict(member.named_parameters()) for member in members]
        mean = {name: _mean([own[name] for own in stored]) for name in stored[0]}
        network.load_state_dict(mean, assign=True)
        return Expert([network]).requires_grad_(False)(0, x_BTD)


def mix(
    experts: Sequence[Expert] | nn.ModuleList,
    layer: int,
    x_ND: Tensor,
    index_NK: Tensor,
    weight_NK: Tensor,
) -> Tensor:
    """Return y_ND, each token's weighted sum over its chosen experts; index -1 drops a choice
    (capacity).

    Tokens are sorted by expert, so each expert runs once over a contiguous block.
    """
    top_k = index_NK.shape[1]
    expert_R = index_NK.flatten()
    # stable: rows of a block keep the order of the tokens, so that sums round the same each time
    order_R = expert_R.argsort(stable=True)
    # one is added because bincount knows no negative numbers: the first bin holds what was dropped
    bins = len(experts) + 1
    rows_by_bin = (expert_R + 1).bincount(minlength=bins).tolist()
    x_RD = x_ND[order_R // top_k]
    dropped_RD, *blocks = x_RD.split(rows_by_bin)

    outputs = [torch.zeros_like(dropped_RD)]
    for expert, block_RD in zip(experts, blocks, strict=True):
        outputs.append(_run_padded(expert, layer, block_RD))
    # under autocast experts answer in bf16 while the dropped rows have the dtype of the input
    dtype = outputs[-1].dtype
    y_RD = torch.cat([output_RD.to(dtype) for output_RD in outputs])
    # back to the order of the tokens
    y_RD = y_RD[order_R.argsort()]
    y_NKD = y_RD.view(-1, top_k, x_ND.shape[1])
    y_ND = (y_NKD * weight_NK.unsqueeze(-1)).sum(1)
    return y_ND.to(x_ND.dtype)


def _run_padded(expert: nn.Module, layer: int, x_RD: Tensor) -> Tensor:
    """Run an expert on a block filled up with zero rows to a multiple of BLOCK_ROWS."""
    rows = x_RD.shape[0]
    padding = -rows % BLOCK_ROWS
    padded_RD = F.pad(x_RD, (0, 0, 0, padding))
    y_RD = expert(layer, padded_RD)
    return y_RD[:rows]
