"""The sparse mixture of SwiGLU networks that are low-rank deltas on one frozen network, whose own
products run once for all of a token's experts.

Gate and up products of the base are shared, each expert adds s B (A x) to them, and as the down
product is linear one of it is enough, for the weighted sum of what the experts' activations are:
y = W_down sum_k w_k h_k + sum_k w_k s B_k (A_k h_k).

N tokens, D model width, F feed-forward width, E experts, K experts per token, R = N*K routed rows,
P places: the rows sorted by expert, each expert's block filled up to a multiple of BLOCK_ROWS.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import Context
from .frozen import product_dtype

BLOCK_ROWS = 64  # as in experts.py, for the same reason
# Of a processor, in bf16; in fp32 half as many. With more what lies between products leaves its
# caches, with fewer the experts' small products and their starts cost more. SmolLM2-135M, top-2 of
# 8 of rank 64: 1.44, 1.37 and 1.56 times the dense model's forward with 1,024, 2,048 and 4,096
# tokens in bf16, 1.26 and 1.35 with 1,024 and 2,048 in fp32.
CHUNK_TOKENS = 2048


@dataclass(frozen=True)
class Factors:
    """The factors of one expert's deltas in one layer, and what B A is multiplied by."""

    scale: float
    a_gate: Tensor
    b_gate: Tensor
    a_up: Tensor
    b_up: Tensor
    a_down: Tensor
    b_down: Tensor


@dataclass(frozen=True)
class _Rows:
    """Which token stands in each place, where the rows of a token are, and each expert's places."""

    token_P: Tensor
    place_NK: Tensor
    blocks: list[int]

    @classmethod
    def sorted_by_expert(cls, index_NK: Tensor, experts: int, block_rows: int) -> "_Rows":
        """Return the places of routed rows, those of an expert beside each other."""
        expert_R = index_NK.flatten()
        order_R = expert_R.argsort(stable=True)
        rows_E = expert_R.bincount(minlength=experts)
        blocks_E = (rows_E + block_rows - 1) // block_rows * block_rows
        # how far filled blocks push the rows of each expert back
        pushed_E = (blocks_E - rows_E).cumsum(0) - (blocks_E - rows_E)
        sorted_R = torch.arange(len(expert_R), device=expert_R.device)
        sorted_R = sorted_R + pushed_E[expert_R[order_R]]
        blocks = blocks_E.tolist()
        # what fills a block is the first token, whose result nobody asks for
        token_P = torch.zeros(sum(blocks), dtype=torch.int64, device=expert_R.device)
        token_P[sorted_R] = order_R // index_NK.shape[1]
        place_R = torch.empty_like(sorted_R)
        place_R[order_R] = sorted_R
        return cls(token_P, place_R.view_as(index_NK), blocks)


class _MixtureContext(Context, Protocol):
    """The context of the mixture: what no tensor is, and tensors without a gradient."""

    rows: _Rows
    members: Sequence[Factors | None]


class _SharedBase(torch.autograd.Function):
    """Keeps x, the base's gate and up products, and the weights; every expert's own part is made
    again. Factors and the base get no gradient."""

    @staticmethod
    def forward(
        ctx: _MixtureContext,
        x_ND: Tensor,
        weight_NK: Tensor,
        rows: _Rows,
        members: Sequence[Factors | None],
        gate_FD: Tensor,
        up_FD: Tensor,
        down_DF: Tensor,
    ) -> Tensor:
        dtype = x_ND.dtype
        g_NF = x_ND @ gate_FD.to(dtype).T
        u_NF = x_ND @ up_FD.to(dtype).T
        ctx.rows = rows
        ctx.members = members
        ctx.save_for_backward(x_ND, g_NF, u_NF, weight_NK, gate_FD, up_FD, down_DF)
        h_PF = x_ND.new_empty(len(rows.token_P), g_NF.shape[1])
        small_PD = x_ND.new_zeros(len(rows.token_P), x_ND.shape[1])
        tokens = rows.token_P.split(rows.blocks)
        outputs = h_PF.split(rows.blocks)
        smalls = small_PD.split(rows.blocks)
        for factors, token_P, out_PF, out_PD in zip(members, tokens, outputs, smalls, strict=True):
            if not len(token_P):
                continue
            torch.index_select(g_NF, 0, token_P, out=out_PF)
            own_u_PF = u_NF.index_select(0, token_P)
            if factors is not None:
                scale = factors.scale
                own_x_PD = x_ND.index_select(0, token_P)
                out_PF.addmm_(own_x_PD @ factors.a_gate.T, factors.b_gate.T, alpha=scale)
                own_u_PF.addmm_(own_x_PD @ factors.a_up.T, factors.b_up.T, alpha=scale)
            F.silu(out_PF, inplace=True).mul_(own_u_PF)
            if factors is not None:
                out_PD.addmm_(out_PF @ factors.a_down.T, factors.b_down.T, alpha=factors.scale)
        y_ND = _weighted(small_PD, rows.place_NK, weight_NK)
        h_NF = _weighted(h_PF, rows.place_NK, weight_NK)
        return y_ND.addmm_(h_NF, down_DF.to(dtype).T)

    @staticmethod
    def backward(ctx: _MixtureContext, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, g_NF, u_NF, weight_NK, gate_FD, up_FD, down_DF = ctx.saved_tensors
        rows = ctx.rows
        dtype = dy_ND.dtype
        weight_P = weight_NK.new_zeros(len(rows.token_P))
        weight_P[rows.place_NK.flatten()] = weight_NK.flatten()
        dweight_P = torch.zeros_like(weight_P)
        dh_NF = dy_ND @ down_DF.to(dtype)
        dg_PF = x_ND.new_empty(len(rows.token_P), g_NF.shape[1])
        du_PF = torch.empty_like(dg_PF)
        dx_PD = x_ND.new_zeros(len(rows.token_P), x_ND.shape[1])
        end = 0
        for factors, size in zip(ctx.members, rows.blocks, strict=True):
            block = slice(end, end + size)
            end += size
            if not size:
                continue
            token_P = rows.token_P[block]
            own_g_PF = g_NF.index_select(0, token_P)
            own_u_PF = u_NF.index_select(0, token_P)
            dact_PF = dh_NF.index_select(0, token_P)
            if factors is not None:
                scale = factors.scale
                own_x_PD = x_ND.index_select(0, token_P)
                own_g_PF.addmm_(own_x_PD @ factors.a_gate.T, factors.b_gate.T, alpha=scale)
                own_u_PF.addmm_(own_x_PD @ factors.a_up.T, factors.b_up.T, alpha=scale)
                own_dy_PD = dy_ND.index_select(0, token_P)
                dact_PF.addmm_(own_dy_PD @ factors.b_down, factors.a_down, alpha=scale)
            silu_PF = F.silu(own_g_PF)
            dweight_P[block] = (dact_PF * silu_PF * own_u_PF).sum(1)
            dact_PF.mul_(weight_P[block, None])
            du_PF[block] = silu_PF.mul_(dact_PF)
            dsilu_PF = dact_PF.mul_(own_u_PF)
            torch.ops.aten.silu_backward(dsilu_PF, own_g_PF, grad_input=dg_PF[block])
            if factors is not None:
                own_dx_PD = dx_PD[block]
                own_dx_PD.addmm_(dg_PF[block] @ factors.b_gate, factors.a_gate, alpha=scale)
                own_dx_PD.addmm_(du_PF[block] @ factors.b_up, factors.a_up, alpha=scale)
        ones_NK = torch.ones_like(weight_NK)
        dx_ND = _weighted(dx_PD, rows.place_NK, ones_NK)
        dx_ND.addmm_(_weighted(dg_PF, rows.place_NK, ones_NK), gate_FD.to(dtype))
        dx_ND.addmm_(_weighted(du_PF, rows.place_NK, ones_NK), up_FD.to(dtype))
        dweight_NK = dweight_P[rows.place_NK]
        return dx_ND, dweight_NK, None, None, None, None, None


def _weighted(rows_PD: Tensor, place_NK: Tensor, weight_NK: Tensor) -> Tensor:
    """Return per token the weighted sum of its rows, without them beside each other in between."""
    return F.embedding_bag(place_NK, rows_PD, per_sample_weights=weight_NK, mode="sum")


def shared_base_mix(
    network: Any,
    members: Sequence[Factors | None],
    x_ND: Tensor,
    index_NK: Tensor,
    weight_NK: Tensor,
    block_rows: int = BLOCK_ROWS,
) -> Tensor:
    """Return y_ND, each token's weighted sum over its chosen experts on one SwiGLU network. They
    run in autocast's dtype, else in that of x; index -1 drops a choice.

    members: each expert's factors in that dtype, None for the network itself; no gradient reaches
    them. block_rows: what each expert's block is filled up to a multiple of.
    """
    device_type = x_ND.device.type
    dtype = product_dtype(x_ND)
    # a dropped choice runs with the first expert and counts for nothing
    weight_NK = weight_NK.masked_fill(index_NK < 0, 0.0)
    index_NK = index_NK.clamp(min=0)
    with torch.autocast(device_type, enabled=False):
        size = len(x_ND)
        if device_type == "cpu":
            size = max(1, CHUNK_TOKENS * torch.bfloat16.itemsize // dtype.itemsize)
        outputs = []
        for start in range(0, len(x_ND), size):
            chunk = slice(start, start + size)
            y_ND = _SharedBase.apply(
                x_ND[chunk].to(dtype),
                weight_NK[chunk].to(dtype),
                _Rows.sorted_by_expert(index_NK[chunk], len(members), block_rows),
                members,
                network.gate_proj.weight,
                network.up_proj.weight,
                network.down_proj.weight,
            )
            outputs.append(y_ND)
        return torch.cat(outputs).to(x_ND.dtype)
