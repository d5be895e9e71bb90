"""The router: one linear gate per layer that picks K of E experts for every token.

Weights of the picked experts are a softmax over their logits alone (top-k, then renormalised), the
convention of Mixtral and of Qwen3-MoE with norm_topk_prob, so an expert trained alone keeps weight
1.

B sequences, T tokens, N = B*T, D model width, E experts, K experts per token, R = N*K, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .experts import Expert, mix


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

    share_E: torch.Tensor  # of assignments, sums to 1
    probability_E: torch.Tensor  # mean softmax over all experts, differentiable
    z: torch.Tensor  # mean squared logsumexp of the logits, differentiable
    dropped: float  # share of assignments over capacity


class Router(nn.Module):
    """Gates weight_ED per layer, with a selection bias that only training uses."""

    def __init__(self, weight_LED: torch.Tensor, gating: Gating):
        super().__init__()
        self.gates = nn.ParameterList(w_ED.detach().clone().float() for w_ED in weight_LED)
        self.register_buffer("bias_LE", torch.zeros(weight_LED.shape[:2]))
        self.register_buffer("count_LE", torch.zeros(weight_LED.shape[:2]), persistent=False)
        self.gating, self.temperature, self.stats = gating, 1.0, {}

    def route(self, layer: int, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (index_NK, weight_NK); while training also records the layer's Load."""
        # the gate stays fp32 under autocast: a tie broken by bf16 rounding would change experts
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = F.linear(x_ND.float(), self.gates[layer]) / self.temperature
        if self.training and self.gating.noise:
            logits_NE = logits_NE + self.gating.noise * torch.randn_like(logits_NE)
        bias_E = (
            self.bias_LE[layer] if self.training else 0.0
        )  # an exported gate has no place for it
        index_NK = (logits_NE + bias_E).topk(self.gating.top_k).indices
        weight_NK = logits_NE.gather(1, index_NK).softmax(-1)
        if (
            self.gating.top_k == 1
        ):  # a lone weight is a constant 1: pass the probability's gradient straight through
            p_NK = logits_NE.softmax(-1).gather(1, index_NK)
            weight_NK = weight_NK + (p_NK - p_NK.detach())
        if self.training:
            index_NK = self._record(layer, logits_NE, index_NK)
        return index_NK, weight_NK

    def _record(self, layer, logits_NE, index_NK):
        n_experts = logits_NE.shape[1]
        count_E = index_NK.flatten().bincount(minlength=n_experts).float()
        self.count_LE[layer] += count_E
        kept_NK = within_capacity(index_NK, n_experts, self.gating.capacity_factor)
        self.stats[layer] = RouterStats(
            share_E=count_E / count_E.sum(),
            probability_E=logits_NE.softmax(-1).mean(0),
            z=logits_NE.logsumexp(-1).square().mean(),
            dropped=(kept_NK < 0).float().mean().item(),
        )
        return kept_NK

    def balance_loss(self) -> torch.Tensor:
        """Return the scalar mean over layers of E * sum_i f_i P_i (Switch, with f divided by k: 1
        is an even load)."""
        terms = [len(a.share_E) * (a.share_E * a.probability_E).sum() for a in self.stats.values()]
        return torch.stack(terms).mean()

    def z_loss(self) -> torch.Tensor:
        """Return the scalar mean over layers of the router z-loss (ST-MoE, equation 5)."""
        return torch.stack([a.z for a in self.stats.values()]).mean()

    def end_step(self, nudge: float) -> torch.Tensor:
        """Return share_LE of assignments since the last call.

        Moves the selection bias by `nudge` towards underused experts when balance is bias
        (2408.15664).
        """
        share_LE = self.count_LE / self.count_LE.sum(1, keepdim=True).clamp(min=1)
        self.count_LE.zero_()
        if self.gating.balance == "bias":
            self.bias_LE += nudge * torch.sign(1 / share_LE.shape[1] - share_LE)
        return share_LE

    def exported(self) -> dict[str, torch.Tensor]:
        """Return gate weight_ED per layer by Hugging Face name, the temperature folded in; the bias
        has no place."""
        return {gate_name(i): g.detach() / self.temperature for i, g in enumerate(self.gates)}


def gate_name(layer: int) -> str:
    """Return the Hugging Face name of a layer's gate."""
    return f"model.layers.{layer}.mlp.gate.weight"


class Mixture(nn.Module):
    """Experts joined by a router; fits the trunk's `fill`."""

    def __init__(self, experts: Sequence[Expert], router: Router):
        super().__init__()
        self.experts, self.router = nn.ModuleList(experts), router

    def forward(self, layer: int, x_BTD: torch.Tensor) -> torch.Tensor:
        """Return y_BTD of one layer."""
        x_ND = x_BTD.flatten(0, -2)
        return mix(self.experts, layer, x_ND, *self.router.route(layer, x_ND)).view_as(x_BTD)


class UniformMixture(nn.Module):
    """Every expert with the same weight; fits the trunk's `fill`."""

    def __init__(self, experts: Sequence[Expert]):
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, layer: int, x_BTD: torch.Tensor) -> torch.Tensor:
        """Return y_BTD, the mean of the experts' outputs."""
        return torch.stack([e(layer, x_BTD) for e in self.experts]).mean(0)


class CoordinatedExpert(nn.Module):
    """An expert beside the frozen anchor under a two-way gate, as FlexOlmo trains it (2507.07024,
    section 3.2).

    The anchor's logit is 0; the expert's is row . x + min(bias, 0).
    """

    def __init__(self, anchor: Expert, expert: Expert, row_LD: torch.Tensor, bias: float):
        super().__init__()
        self.anchor, self.expert = anchor, expert
        self.row_LD = nn.Parameter(row_LD.clone())
        self.bias_L = nn.Parameter(torch.full((row_LD.shape[0],), bias))
        self.z: dict[int, torch.Tensor] = {}

    def forward(self, layer: int, x_BTD: torch.Tensor) -> torch.Tensor:
        """Return y_BTD of one layer and keep its z-loss term."""
        with torch.autocast(x_BTD.device.type, enabled=False):  # fp32, as the gates it may become
            logit_BT = x_BTD.float() @ self.row_LD[layer] + self.bias_L[layer].clamp(max=0)
            self.z[layer] = F.softplus(logit_BT).square().mean()  # logsumexp of (0, logit)
        share_BT1 = logit_BT.sigmoid().unsqueeze(-1)
        y_BTD = share_BT1 * self.expert(layer, x_BTD) + (1 - share_BT1) * self.anchor(layer, x_BTD)
        return y_BTD.to(x_BTD.dtype)


def within_capacity(index_NK: torch.Tensor, n_experts: int, factor: float | None) -> torch.Tensor:
    """Return index_NK with -1 where an expert is over floor(factor * N * K / E) tokens, first come
    first served."""
    if factor is None:
        return index_NK
    slots = max(1, int(factor * index_NK.numel() / n_experts))
    flat_R = index_NK.T.flatten()  # every token's first choice comes before any second choice
    place_RE = F.one_hot(flat_R, n_experts).cumsum(0)
    place_R = place_RE.gather(1, flat_R.unsqueeze(1)).squeeze(1)
    kept_R = flat_R.masked_fill(place_R > slots, -1)
    return kept_R.view(index_NK.shape[1], -1).T
