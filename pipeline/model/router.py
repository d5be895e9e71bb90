"""The router: one linear gate per layer that picks K of E experts for every token.

Weights of the picked experts are a softmax over their logits alone (top-k, then renormalised), the
convention of Mixtral and of Qwen3-MoE with norm_topk_prob, so an expert trained alone keeps weight
1.

B sequences, T tokens, N = B*T, D model width, E experts, K experts per token, R = N*K, L layers.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .experts import Expert, mix
from .low_rank import base_of, mix_on_base

GATE_NAME = re.compile(r"model\.layers\.(\d+)\.mlp\.gate\.weight")


@dataclass(frozen=True)
class Gating:
    """How gates behave while they train; evaluation uses top_k alone.

    temperature divides the logits; noise is a standard deviation; capacity_factor None is dropless.
    """

    top_k: int
    noise: float = 0.0
    capacity_factor: float | None = None
    balance: str = "none"


@dataclass
class RouterStats:
    """What one layer's gate did in one forward pass."""

    share_E: Tensor  # of assignments, sums to 1
    probability_E: Tensor  # mean softmax over all experts, differentiable
    z: Tensor  # mean squared logsumexp of the logits, differentiable
    dropped: Tensor  # share of assignments over capacity


class Router(nn.Module):
    """Gates weight_ED per layer with experts, with a selection bias that only training uses.

    layers: the numbers of those layers, where they are not all; gates and buffers are in their
    order.
    """

    bias_LE: Tensor
    count_LE: Tensor

    def __init__(self, weight_LED: Tensor, gating: Gating, layers: Sequence[int] | None = None):
        super().__init__()
        count, n_experts = weight_LED.shape[:2]
        self.layers = tuple(layers or range(count))
        self.place = {layer: place for place, layer in enumerate(self.layers)}
        self.gates = nn.ParameterList()
        for gate_ED in weight_LED:
            # a copy, as what came from a closed form or a file is left as it was
            self.gates.append(gate_ED.detach().clone().float())
        self.register_buffer("bias_LE", torch.zeros(count, n_experts))
        # counts are of one step, which is never saved in its middle
        self.register_buffer("count_LE", torch.zeros(count, n_experts), persistent=False)
        self.gating = gating
        self.temperature = 1.0
        # of rows and a gate, logits_NE; a server has one of its own
        self.product: Callable[[Tensor, Tensor], Tensor] = F.linear
        self.stats: dict[int, RouterStats] = {}  # by layer
        # told (layer, logits_NE, index_NK) of every pass in evaluation
        self.listener: Callable[[int, Tensor, Tensor], None] | None = None

    def route(self, layer: int, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return (index_NK, weight_NK); while training also records the layer's RouterStats."""
        top_k = self.gating.top_k
        # the gate stays fp32 under autocast: a tie broken by bf16 rounding would change experts
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = self.product(x_ND.float(), self.gates[self.place[layer]])
            logits_NE = logits_NE / self.temperature
        if self.training and self.gating.noise:
            noise_NE = torch.randn_like(logits_NE)
            logits_NE = logits_NE + self.gating.noise * noise_NE

        selection_NE = logits_NE
        if self.training:
            # only while training, as an exported gate has no place for a bias; it decides who is
            # picked and never how much the picked ones weigh
            selection_NE = logits_NE + self.bias_LE[self.place[layer]]
        index_NK = selection_NE.topk(top_k).indices
        weight_NK = logits_NE.gather(1, index_NK).softmax(-1)
        if top_k == 1:
            # a lone weight is a constant 1: let the probability's gradient pass straight through
            probability_NK = logits_NE.softmax(-1).gather(1, index_NK)
            weight_NK = weight_NK + (probability_NK - probability_NK.detach())
        if self.training:
            index_NK = self._record(layer, logits_NE, index_NK)
        elif self.listener is not None:
            self.listener(layer, logits_NE, index_NK)
        return index_NK, weight_NK

    def _record(self, layer: int, logits_NE: Tensor, index_NK: Tensor) -> Tensor:
        """Keep the layer's stats; return index_NK with -1 where an expert is over capacity."""
        n_experts = logits_NE.shape[1]
        count_E = index_NK.flatten().bincount(minlength=n_experts).float()
        self.count_LE[self.place[layer]] += count_E
        kept_NK = within_capacity(index_NK, n_experts, self.gating.capacity_factor)
        self.stats[layer] = RouterStats(
            share_E=count_E / count_E.sum(),
            probability_E=logits_NE.softmax(-1).mean(0),
            z=logits_NE.logsumexp(-1).square().mean(),
            # a number of it would make a GPU wait at every layer
            dropped=(kept_NK < 0).float().mean(),
        )
        return kept_NK

    def balance_loss(self) -> Tensor:
        """Return the scalar mean over layers of E * sum_i f_i P_i (Switch, 2101.03961, with f
        divided by k: 1 is an even load)."""
        terms = []
        for layer in self.stats.values():
            n_experts = len(layer.share_E)
            agreement = (layer.share_E * layer.probability_E).sum()
            terms.append(n_experts * agreement)
        return torch.stack(terms).mean()

    def z_loss(self) -> Tensor:
        """Return the scalar mean over layers of the router z-loss (ST-MoE, 2202.08906, equation
        5)."""
        terms = [layer.z for layer in self.stats.values()]
        return torch.stack(terms).mean()

    def end_step(self, nudge: float) -> Tensor:
        """Return share_LE of assignments since the last call.

        Moves the selection bias by `nudge` towards underused experts when balance is bias
        (2408.15664).
        """
        # at least 1: a step without a training pass has shares of zero, not of nan
        total_L1 = self.count_LE.sum(1, keepdim=True).clamp(min=1)
        share_LE = self.count_LE / total_L1
        self.count_LE.zero_()
        if self.gating.balance == "bias":
            even_share = 1 / share_LE.shape[1]
            self.bias_LE += nudge * torch.sign(even_share - share_LE)
        return share_LE

    def exported(self) -> dict[str, Tensor]:
        """Return gate weight_ED per layer by Hugging Face name, the temperature folded in; the bias
        has no place."""
        exported = {}
        for name, gate_ED in self.named().items():
            exported[name] = gate_ED.detach() / self.temperature
        return exported

    def named(self) -> dict[str, nn.Parameter]:
        """Return the gates by Hugging Face name."""
        return {gate_name(layer): self.gates[place] for layer, place in self.place.items()}


def gate_name(layer: int) -> str:
    """Return the Hugging Face name of a layer's gate."""
    return f"model.layers.{layer}.mlp.gate.weight"


def gate_layers(stored: Mapping[str, Tensor]) -> list[int]:
    """Return the numbers of the layers that stored gates are of, in order.

    Raises ValueError for what is no gate.
    """
    layers = []
    for name in stored:
        found = GATE_NAME.fullmatch(name)
        if found is None:
            raise ValueError(f"{name} is no gate")
        layers.append(int(found[1]))
    # by number: the names of ten layers and more do not sort as their numbers do
    return sorted(layers)


class Mixture(nn.Module):
    """Experts joined by a router; the trunk takes it as its `ffn`.

    Where the router has no gate every expert has its base's network, which runs once.
    """

    base: Expert | None  # of which all experts are deltas

    def __init__(self, experts: Sequence[Expert], router: Router):
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.router = router
        # past nn.Module, as an expert does: the base is no part of the mixture
        object.__setattr__(self, "base", base_of(experts))

    def forward(self, layer: int, x_BTD: Tensor) -> Tensor:
        """Return y_BTD of one layer."""
        if layer not in self.router.place:
            y_BTD: Tensor = self.experts[0](layer, x_BTD)
            return y_BTD
        x_ND = x_BTD.flatten(0, -2)
        index_NK, weight_NK = self.router.route(layer, x_ND)
        routed = (self.experts, layer, x_ND, index_NK, weight_NK)
        y_ND = mix(*routed) if self.base is None else mix_on_base(self.base, *routed)
        return y_ND.view_as(x_BTD)


class UniformMixture(nn.Module):
    """Every expert with the same weight; the trunk takes it as its `ffn`."""

    def __init__(self, experts: Sequence[Expert]):
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, layer: int, x_BTD: Tensor) -> Tensor:
        """Return y_BTD, the mean of the experts' outputs."""
        outputs = [expert(layer, x_BTD) for expert in self.experts]
        return torch.stack(outputs).mean(0)


class CoordinatedExpert(nn.Module):
    """An expert beside the frozen anchor under a two-way gate, as FlexOlmo trains it (2507.07024,
    section 3.2).

    The anchor's logit is 0; the expert's is row . x + min(bias, 0).
    """

    def __init__(self, anchor: Expert, expert: Expert, row_LD: Tensor, bias: float):
        super().__init__()
        self.anchor = anchor
        self.expert = expert
        self.row_LD = nn.Parameter(row_LD.clone())
        layers = row_LD.shape[0]
        self.bias_L = nn.Parameter(torch.full((layers,), bias))
        self.z: dict[int, Tensor] = {}  # by layer, of the last forward pass

    def forward(self, layer: int, x_BTD: Tensor) -> Tensor:
        """Return y_BTD of one layer and keep its z-loss term."""
        # fp32 as the router's gates, whose rows these may become
        with torch.autocast(x_BTD.device.type, enabled=False):
            bias = self.bias_L[layer].clamp(max=0)
            logit_BT = x_BTD.float() @ self.row_LD[layer] + bias
            # softplus is the logsumexp of (0, logit)
            self.z[layer] = F.softplus(logit_BT).square().mean()
        share_BT1 = logit_BT.sigmoid().unsqueeze(-1)
        expert_BTD = share_BT1 * self.expert(layer, x_BTD)
        anchor_BTD = (1 - share_BT1) * self.anchor(layer, x_BTD)
        return (expert_BTD + anchor_BTD).to(x_BTD.dtype)


def within_capacity(index_NK: Tensor, n_experts: int, factor: float | None) -> Tensor:
    """Return index_NK with -1 where an expert is over floor(factor * N * K / E) tokens, first come
    first served."""
    if factor is None:
        return index_NK
    even_share = factor * index_NK.numel() / n_experts
    capacity = max(1, int(even_share))
    # transposed, so that every token's first choice comes before any second choice
    flat_R = index_NK.T.flatten()
    queue_RE = F.one_hot(flat_R, n_experts).cumsum(0)
    place_R1 = queue_RE.gather(1, flat_R.unsqueeze(1))
    over_R = place_R1.squeeze(1) > capacity
    kept_R = flat_R.masked_fill(over_R, -1)
    top_k = index_NK.shape[1]
    return kept_R.view(top_k, -1).T
