"""Low-rank experts: a frozen base network with a small trained delta on each of its matrices.

W + s B A in the place of each W of the base (2106.09685), trained as such, or taken afterwards from
a full expert as the best of its rank (FlexMoRE, 2602.08818). Tensors are named as PEFT names them,
less its prefix `base_model.model.`.

B sequences, T tokens, N = B*T, D model width, I numbers in, O out, M the lesser of both, r rank,
E experts, K experts per token.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import experts as full
from .experts import Expert
from .kernels.frozen import frozen_linear, product_dtype
from .kernels.low_rank import low_rank_swiglu
from .kernels.shared_base import Factors, shared_base_mix
from .kernels.swiglu import is_swiglu

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
DRAWN = "lora_A"  # the factor that starts at random; the other is zero
DELTA_NAME = re.compile(r"model\.layers\.(\d+)\.mlp\.(\w+)\.lora_([AB])\.weight")


class Delta(nn.Module):
    """s B A for one matrix: A drawn, B zero, so that it begins as nothing."""

    def __init__(self, rank: int, like: nn.Linear):
        super().__init__()
        outputs, inputs = like.weight.shape
        # a Linear draws itself as PEFT draws its A; in fp32, whatever the base is stored in
        self.lora_A = nn.Linear(inputs, rank, bias=False)
        self.lora_B = nn.Linear(rank, outputs, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    @property
    def product_OI(self) -> Tensor:
        """B A."""
        return self.lora_B.weight @ self.lora_A.weight

    def forward(self, x_BTI: Tensor) -> Tensor:
        """Return (x A^T) B^T in the dtype of x."""
        z_BTr = x_BTI @ self.lora_A.weight.to(x_BTI.dtype).T
        return z_BTr @ self.lora_B.weight.to(x_BTI.dtype).T


class _Deltas(nn.Module):
    """The deltas of one layer's network."""

    def __init__(self, rank: int, network: Any):
        super().__init__()
        for name in PROJECTIONS:
            self.add_module(name, Delta(rank, getattr(network, name)))


class LowRankExpert(Expert):
    """Deltas over a frozen base, in all layers or in chosen ones; the base is not part of it.

    scale: s, which is alpha / rank.
    """

    base: Expert

    def __init__(
        self, base: Expert, rank: int, scale: float, layers: Collection[int] | None = None
    ):
        deltas: list[nn.Module | None] = []
        for layer, network in enumerate(base.layers):
            chosen = layers is None or layer in layers
            deltas.append(_Deltas(rank, network) if chosen else None)
        super().__init__(deltas, base)
        self.rank = rank
        self.scale = scale
        self._cast: dict[tuple[int, torch.dtype], tuple[list, Factors]] = {}

    def forward(self, layer: int, x_BTD: Tensor) -> Tensor:
        """Return y_BTD of one layer's network."""
        deltas = self.layers[layer]
        if deltas is None:
            return self.base(layer, x_BTD)
        network = self.base.layers[layer]
        if is_swiglu(network):
            return low_rank_swiglu(network, deltas, self.scale, x_BTD)
        return _plain(network, deltas, self.scale, x_BTD)

    def deltas(self, layer: int) -> dict[str, Delta]:
        """Return the deltas of one layer by projection; none where the base stands."""
        found = self.layers[layer]
        return {} if found is None else {name: getattr(found, name) for name in PROJECTIONS}

    def factors(self, layer: int, dtype: torch.dtype) -> Factors | None:
        """Return what the deltas of one layer are multiplied with, cast; None where the base
        stands.

        A pass that is trained through holds its copies until its backward pass, so those are kept
        for the next one; what was changed since is cast anew. No other pass keeps any.
        """
        deltas = self.layers[layer]
        if deltas is None:
            return None
        stored = [parameter.detach() for parameter in deltas.parameters()]
        if all(factor.dtype == dtype for factor in stored):
            return Factors(self.scale, *stored)
        seen = [(factor.data_ptr(), factor._version) for factor in stored]
        kept = self._cast.get((layer, dtype))
        if kept is not None and kept[0] == seen:
            return kept[1]
        made = Factors(self.scale, *[factor.to(dtype) for factor in stored])
        if torch.is_grad_enabled():
            self._cast[layer, dtype] = (seen, made)
        return made

    @torch.no_grad()
    def merged_layers(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the expert's whole matrices in the layers of its own, by Hugging Face name, in
        fp32, one after another."""
        for layer in self.own_layers:
            deltas = self.deltas(layer)
            for name, stored in self.base.layers[layer].named_parameters():
                projection, _, kind = name.partition(".")
                whole = stored.detach().float()
                if kind == "weight":
                    whole = torch.add(whole, deltas[projection].product_OI, alpha=self.scale)
                yield f"model.layers.{layer}.mlp.{name}", whole

    def merged(self) -> Expert:
        """Return the frozen full expert that computes the same, in fp32."""
        return full.from_tensors(self.base, dict(self.merged_layers()), self.own_layers)


def base_of(experts: Sequence[Expert]) -> Expert | None:
    """Return the base that all experts are deltas on, or are; None where there are others."""
    bases = []
    for expert in experts:
        bases.append(expert.base if isinstance(expert, LowRankExpert) else expert)
    first = bases[0]
    alone = not any(isinstance(expert, LowRankExpert) for expert in experts)
    return None if alone or any(base is not first for base in bases) else first


def mix_on_base(
    base: Expert,
    experts: Sequence[Expert] | nn.ModuleList,
    layer: int,
    x_ND: Tensor,
    index_NK: Tensor,
    weight_NK: Tensor,
) -> Tensor:
    """Return y_ND as `experts.mix` does, of frozen experts on one base, whose products run once."""
    network = base.layers[layer]
    if not is_swiglu(network):
        return full.mix(experts, layer, x_ND, index_NK, weight_NK)
    dtype = product_dtype(x_ND)
    members = []
    for expert in experts:
        member = expert.factors(layer, dtype) if isinstance(expert, LowRankExpert) else None
        members.append(member)
    return shared_base_mix(network, members, x_ND, index_NK, weight_NK)


def _plain(network: Any, deltas: Any, scale: float, x: Tensor) -> Tensor:
    """Return y of a gated network of any activation, with biases or without."""

    def product(name: str, given: Tensor) -> Tensor:
        linear = getattr(network, name)
        y = frozen_linear(given, linear.weight, linear.bias)
        return y + scale * getattr(deltas, name)(given.to(y.dtype))

    act = network.act_fn(product("gate_proj", x)) * product("up_proj", x)
    return product("down_proj", act)


def from_tensors(base: Expert, tensors: Mapping[str, Tensor], scale: float) -> LowRankExpert:
    """Return a frozen low-rank expert around stored tensors, which are neither copied nor cast; its
    rank and layers are theirs.

    Raises RuntimeError when names are missing or strange or a shape differs, ValueError when there
    is no delta among them.
    """
    ranks = set()
    layers = set()
    for name, tensor in tensors.items():
        found = DELTA_NAME.fullmatch(name)
        if found:
            layers.add(int(found[1]))
        if found and found[3] == "A":
            ranks.add(len(tensor))
    if not ranks:
        raise ValueError("there is no low-rank delta among the tensors")
    with torch.device("meta"):
        expert = LowRankExpert(base, min(ranks), scale, layers)
    expert.load(tensors, assign=True)
    expert.requires_grad_(False).eval()
    return expert


@torch.no_grad()
def average(experts: Sequence[Expert], layers: Collection[int] | None = None) -> Expert:
    """Return the weight soup (2203.05482) of experts of one form: the mean of their matrices.

    The mean of E deltas of rank r is one of rank E r: their factors beside each other. layers: of
    deltas, those that it is wanted in, where not in all that they are in.
    """
    members = [each for each in experts if isinstance(each, LowRankExpert)]
    if len(members) < len(experts):
        return full.average(experts)
    first = members[0]
    rank = sum(each.rank for each in members)
    with torch.device("meta"):
        soup = LowRankExpert(first.base, rank, 1.0, layers or first.own_layers)
    tensors = {}
    named = [each.named() for each in members]
    for name in soup.named():
        factors: list[Tensor] = [own[name] for own in named]
        if DRAWN in name:
            tensors[name] = torch.cat(factors)
        else:
            shares = zip(members, factors, strict=True)
            scaled = [each.scale / len(members) * factor for each, factor in shares]
            tensors[name] = torch.cat(scaled, 1)
    soup.load(tensors, assign=True)
    soup.requires_grad_(False).eval()
    return soup


class DeltaSoup(nn.Module):
    """The weight soup of deltas as `average` makes it, of each layer when it runs: nobody holds all
    experts once more."""

    def __init__(self, experts: Sequence[LowRankExpert]):
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, layer: int, x_BTD: Tensor) -> Tensor:
        """Return y_BTD of one layer's mean network."""
        members = [cast("LowRankExpert", expert) for expert in self.experts]
        if members[0].layers[layer] is None:
            return members[0](layer, x_BTD)
        return average(members, [layer])(layer, x_BTD)


@dataclass(frozen=True)
class Compressed:
    """A full expert as deltas, and how much of its change they are."""

    expert: LowRankExpert
    kept: float  # sum of squares of all numbers of B A
    whole: float  # and of the full expert's change


@torch.no_grad()
def compress(
    expert: Expert, base: Expert, rank: int, layers: Collection[int] | None = None
) -> Compressed:
    """Return the low-rank expert that is nearest to a full one over a base: the truncated singular
    value decomposition of each matrix's change (FlexMoRE, 2602.08818), at scale 1.

    layers: those that keep a delta, by default those of the expert's own.
    """
    chosen = expert.own_layers if layers is None else layers
    small = LowRankExpert(base, rank, 1.0, chosen)
    kept = 0.0
    whole = 0.0
    for layer in small.own_layers:
        for name, delta in small.deltas(layer).items():
            trained = getattr(expert.layers[layer], name).weight
            start = getattr(base.layers[layer], name).weight
            s_M = _compress_into(delta, trained, start)
            kept += s_M[:rank].square().sum().item()
            whole += s_M.square().sum().item()
    small.requires_grad_(False).eval()
    return Compressed(small, kept, whole)


def _compress_into(delta: Delta, trained_OI: Tensor, start_OI: Tensor) -> Tensor:
    """Give a delta the largest singular values of a matrix's change; return all of them, s_M."""
    # A function of its own: in a loop its names would keep one matrix's factors beside the next's
    rank = len(delta.lora_A.weight)
    change_OI = trained_OI.float() - start_OI.float()
    u_OM, s_M, v_MI = torch.linalg.svd(change_OI, full_matrices=False)
    # the root of each singular value to either side, so that both train at like rates
    root_r = s_M[:rank].sqrt()
    found = len(root_r)
    delta.lora_A.weight.zero_()
    delta.lora_A.weight[:found] = root_r[:, None] * v_MI[:rank]
    delta.lora_B.weight[:, :found] = u_OM[:, :rank] * root_r
    return s_M
