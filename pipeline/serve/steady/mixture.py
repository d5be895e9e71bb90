"""A stack in bf16 whose gates choose experts for each token: products in bf16, and in fp32 all that
lies between them, the gates and the logits of likely tokens.

B texts, T tokens of each, N tokens of all, V vocabulary, A likely tokens, D model width,
F feed-forward width, E experts, K experts per token, R = N*K routed rows, C ranks of some experts'
deltas together, P rows of one expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...model.experts import Expert
from ...model.kernels.swiglu import is_swiglu
from ...model.low_rank import LowRankExpert, base_of
from ...model.router import Router
from ...model.trunk import Trunk
from ..generation import BASE_READER
from ..networks import TokenRouted
from .network import DTYPE, SteadyNetwork, has_steady_places
from .products import silu_

# Deltas of several experts run as one product with zeros for those that were not chosen, as long as
# their ranks together are so small a part of the model's width.
SHARE_OF_WIDTH = 8


@dataclass(frozen=True)
class Deltas:
    """The factors of some experts in one layer, beside each other."""

    first: int  # number of the first expert
    end: int
    owner_C: Tensor
    scale_C: Tensor
    in_CD: Tensor  # of gates, then of ups
    gate_FC: Tensor
    up_FC: Tensor
    down_CF: Tensor
    out_DC: Tensor

    def scales_PC(self, expert_P: Tensor) -> Tensor:
        """Return what each row's ranks are multiplied with: nothing where they are another
        expert's."""
        is_own_PC = self.owner_C == expert_P.unsqueeze(1)
        return torch.where(is_own_PC, self.scale_C, 0.0)


def can_be_steady(trunk: Trunk, experts: Sequence[Expert]) -> bool:
    """Whether this stack is one that runs so."""
    networks = []
    for expert in experts:
        owners = [expert, expert.base] if expert.base is not None else [expert]
        for owner in owners:
            if not isinstance(owner, LowRankExpert):
                networks += [network for network in owner.layers if network is not None]
    return has_steady_places(trunk.network) and all(map(is_swiglu, networks))


class SteadyMixture(SteadyNetwork, TokenRouted):
    """A trunk's own class with experts in its slots, full or low-rank ones unmerged."""

    packs = True

    def __init__(
        self,
        trunk: Trunk,
        experts: dict[str, Expert],
        router: Router,
        anchor: int | None = None,
    ):
        self._experts = list(experts.values())
        self._shared = base_of(self._experts)
        self._anchor = anchor  # the expert that is the base's own network, where one is
        extra = () if self._shared is None else (BASE_READER,)
        super().__init__(trunk.network, (*experts, *extra))
        whole = [each for each in self._experts if not isinstance(each, LowRankExpert)]
        bases = [each.base for each in self._experts if each.base is not None]
        self.make_steady(trunk.network, *whole, *bases)
        self._router = router
        router.product = self._products
        self._deltas = self._gathered(len(trunk.network.model.layers))
        for layer in trunk.network.model.layers:
            layer.mlp.ffn = self._mixed

    @property
    def weights(self) -> list[nn.Module]:
        """Where the weights are that its texts are read with."""
        bases = [expert.base for expert in self._experts if expert.base is not None]
        return [self.model, *self._experts, *bases]

    def number(self, reader: str) -> int:
        """Return the number of who can read a text. Raises ValueError for others."""
        if reader == BASE_READER and self._shared is None and self._anchor is not None:
            return self._anchor
        return super().number(reader)

    def _mixed(self, layer: int, x_BTD: Tensor) -> Tensor:
        """Return y_BTD of one layer."""
        x_ND = x_BTD.flatten(0, -2)
        if layer not in self._router.place:
            return self._swiglu(self._network(self._experts[0], layer), x_ND).view_as(x_BTD)
        index_NK, weight_NK = self._router.route(layer, x_ND)
        index_NK, weight_NK = self.hearing.hear(index_NK, weight_NK)
        join = self._full if self._shared is None else self._low_rank
        return join(layer, x_ND, index_NK, weight_NK).view_as(x_BTD)

    def _network(self, expert: Expert, layer: int) -> Any:
        """Return an expert's network, which is its base's where it has none."""
        own = None if isinstance(expert, LowRankExpert) else expert.layers[layer]
        if own is not None or expert.base is None:
            return own
        return expert.base.layers[layer]

    def _product(self, x_ND: Tensor, linear: Any) -> Tensor:
        """Return y_NF in fp32."""
        return self._products(x_ND, linear.weight).float()

    def _swiglu(self, network: Any, x_ND: Tensor) -> Tensor:
        """Return y_ND of one network."""
        x_ND = x_ND.to(DTYPE)
        h_NF = silu_(self._product(x_ND, network.gate_proj))
        h_NF *= self._product(x_ND, network.up_proj)
        return self._product(h_NF, network.down_proj)

    def _full(self, layer: int, x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor) -> Tensor:
        """Return y_ND, each token's weighted sum over its chosen experts."""
        top_k = index_NK.shape[1]
        expert_R = index_NK.flatten()
        y_RD = x_ND.new_empty(len(expert_R), x_ND.shape[1])
        for number in expert_R.unique().tolist():
            row_P = (expert_R == number).nonzero().flatten()
            network = self._network(self._experts[number], layer)
            y_RD[row_P] = self._swiglu(network, x_ND[row_P // top_k])
        return _weighted(y_RD, weight_NK)

    def _low_rank(self, layer: int, x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor) -> Tensor:
        """Return the same of deltas on one network, whose products run once for all of a token's
        experts: y = W_down sum_k w_k h_k + sum_k w_k s B_k (A_k h_k)."""
        top_k = index_NK.shape[1]
        network: Any = self._network(self._experts[0], layer)
        expert_R = index_NK.flatten()
        x_ND = x_ND.to(DTYPE)
        chosen = []
        gates: list[_Rows] = []
        ups: list[_Rows] = []
        for deltas in self._deltas[layer]:
            row_P = self._rows(layer, deltas, expert_R)
            scale_PC = deltas.scales_PC(expert_R[row_P])
            chosen.append((deltas, row_P, scale_PC))
            z_PC = self._products(x_ND, deltas.in_CD).float().repeat_interleave(top_k, 0)[row_P]
            z_gate_PC, z_up_PC = z_PC.chunk(2, 1)
            gates.append((row_P, self._products(z_gate_PC * scale_PC, deltas.gate_FC)))
            ups.append((row_P, self._products(z_up_PC * scale_PC, deltas.up_FC)))
        g_RF = _on_base(self._product(x_ND, network.gate_proj), gates, top_k)
        u_RF = _on_base(self._product(x_ND, network.up_proj), ups, top_k)
        h_RF = silu_(g_RF).mul_(u_RF)
        downs: list[_Rows] = []
        for deltas, row_P, scale_PC in chosen:
            z_PC = self._products(h_RF[row_P], deltas.down_CF)
            downs.append((row_P, self._products(z_PC.float() * scale_PC, deltas.out_DC)))
        h_NF = _weighted(h_RF, weight_NK)
        y_ND = self._product(h_NF, network.down_proj)
        if downs:
            nothing_ND = y_ND.new_zeros(1, 1).expand_as(y_ND)
            y_ND += _weighted(_on_base(nothing_ND, downs, top_k), weight_NK)
        return y_ND

    def _rows(self, layer: int, deltas: Deltas, expert_R: Tensor) -> Any:
        """Return the places of rows that such deltas are for; all, where nobody else has any."""
        if len(self._deltas[layer]) == 1:
            return slice(None)
        is_own_R = (expert_R >= deltas.first) & (expert_R < deltas.end)
        return is_own_R.nonzero().flatten()

    def _gathered(self, layers: int) -> list[list[Deltas]]:
        """Return by layer what the experts add to their base."""
        found: list[list[Deltas]] = []
        for layer in range(layers):
            groups: list[list[int]] = []
            most = 0
            total = 0
            for number, expert in enumerate(self._experts):
                if not isinstance(expert, LowRankExpert) or not expert.deltas(layer):
                    continue
                most = self.model.config.hidden_size // SHARE_OF_WIDTH
                if not groups or total + expert.rank > most:
                    groups.append([])
                    total = 0
                groups[-1].append(number)
                total += expert.rank
            found.append([self._joined(layer, numbers) for numbers in groups])
        return found

    def _joined(self, layer: int, numbers: Sequence[int]) -> Deltas:
        """Return the deltas of those experts beside each other."""
        members = []
        owners = []
        scales = []
        for number in numbers:
            expert: Any = self._experts[number]
            members.append(expert.factors(layer, DTYPE))
            owners += [number] * expert.rank
            scales += [expert.scale] * expert.rank
        gates_in = [member.a_gate for member in members]
        ups_in = [member.a_up for member in members]
        return Deltas(
            first=numbers[0],
            end=numbers[-1] + 1,
            owner_C=torch.tensor(owners, device=self.device),
            scale_C=torch.tensor(scales, dtype=torch.float32, device=self.device),
            in_CD=torch.cat([*gates_in, *ups_in]),
            gate_FC=torch.cat([member.b_gate for member in members], 1),
            up_FC=torch.cat([member.b_up for member in members], 1),
            down_CF=torch.cat([member.a_down for member in members]),
            out_DC=torch.cat([member.b_down for member in members], 1),
        )


# Rows of some experts, all or by their places, and what stands in them.
_Rows = tuple[Any, Tensor]


def _on_base(base_NF: Tensor, rows: Sequence[_Rows], top_k: int) -> Tensor:
    """Return in fp32 what is the base's of each token's routed rows, and what is added to some."""
    if len(rows) == 1 and isinstance(rows[0][0], slice):
        # all of them, which are written once so
        added_NKF = rows[0][1].unflatten(0, (-1, top_k))
        return (base_NF.unsqueeze(1) + added_NKF).flatten(0, 1)
    out_RF = base_NF.repeat_interleave(top_k, 0)
    for row_P, added_PF in rows:
        out_RF[row_P] += added_PF
    return out_RF


def _weighted(x_RD: Tensor, weight_NK: Tensor) -> Tensor:
    """Return per token the weighted sum of its rows, added up in their order."""
    top_k = weight_NK.shape[1]
    x_NKD = x_RD.unflatten(0, (-1, top_k))
    y_ND = x_NKD[:, 0] * weight_NK[:, :1]
    for at in range(1, top_k):
        y_ND += x_NKD[:, at] * weight_NK[:, at : at + 1]
    return y_ND
