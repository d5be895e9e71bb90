"""A frozen SwiGLU network with a low-rank delta on each of its matrices, which keeps no more for
its backward pass than the network alone.

W + s B A in the place of each W (2106.09685), so W x + s B (A x): the product W + s B A is never
made.

N tokens, D model width, F feed-forward width, I numbers in, O out, r rank.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autograd import Context
from .frozen import product_dtype


class _Scaled(Context, Protocol):
    """The context of a function that has a number beside its tensors."""

    scale: float


class _LowRankSwiGLU(torch.autograd.Function):
    """Keeps x, the gate's product and the up product; what lies between is made again."""

    @staticmethod
    def forward(
        ctx: _Scaled,
        x_ND: Tensor,
        scale: float,
        gate_FD: Tensor,
        up_FD: Tensor,
        down_DF: Tensor,
        *deltas: Tensor,
    ) -> Tensor:
        # of the gate, the up and the down projection, A before B
        a_gate_rD, b_gate_Fr, a_up_rD, b_up_Fr, a_down_rF, b_down_Dr = _cast(deltas, x_ND.dtype)
        g_NF = _with_delta(x_ND, gate_FD, a_gate_rD, b_gate_Fr, scale)
        u_NF = _with_delta(x_ND, up_FD, a_up_rD, b_up_Fr, scale)
        ctx.scale = scale
        # weights as they are stored: a cast copy kept for each layer would be a second model
        ctx.save_for_backward(x_ND, g_NF, u_NF, gate_FD, up_FD, down_DF, *deltas)
        act_NF = F.silu(g_NF).mul_(u_NF)
        return _with_delta(act_NF, down_DF, a_down_rF, b_down_Dr, scale)

    @staticmethod
    def backward(ctx: _Scaled, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, g_NF, u_NF, gate_FD, up_FD, down_DF, *deltas = ctx.saved_tensors
        scale = ctx.scale
        a_gate_rD, b_gate_Fr, a_up_rD, b_up_Fr, a_down_rF, b_down_Dr = _cast(deltas, x_ND.dtype)
        silu_NF = F.silu(g_NF)
        down_Nr = dy_ND @ b_down_Dr
        d_down = _delta_grads(silu_NF * u_NF, dy_ND, down_Nr, a_down_rF, scale)
        dact_NF = dy_ND @ down_DF.to(dy_ND.dtype)
        dact_NF.addmm_(down_Nr, a_down_rF, alpha=scale)
        # each name below takes over a buffer, as in the plain network's backward pass
        du_NF = silu_NF.mul_(dact_NF)
        dsilu_NF = dact_NF.mul_(u_NF)
        dg_NF = torch.ops.aten.silu_backward(dsilu_NF, g_NF, grad_input=dsilu_NF)
        up_Nr = du_NF @ b_up_Fr
        gate_Nr = dg_NF @ b_gate_Fr
        d_up = _delta_grads(x_ND, du_NF, up_Nr, a_up_rD, scale)
        d_gate = _delta_grads(x_ND, dg_NF, gate_Nr, a_gate_rD, scale)
        dx_ND = None
        if ctx.needs_input_grad[0]:
            dx_ND = du_NF @ up_FD.to(dy_ND.dtype)
            dx_ND.addmm_(dg_NF, gate_FD.to(dy_ND.dtype))
            dx_ND.addmm_(up_Nr, a_up_rD, alpha=scale)
            dx_ND.addmm_(gate_Nr, a_gate_rD, alpha=scale)
        found = []
        for delta, gradient in zip(deltas, (*d_gate, *d_up, *d_down), strict=True):
            found.append(gradient.to(delta.dtype))
        return dx_ND, None, None, None, None, *found


def _cast(deltas: Iterable[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [delta.to(dtype) for delta in deltas]


def _with_delta(
    x_NI: Tensor, weight_OI: Tensor, a_rI: Tensor, b_Or: Tensor, scale: float
) -> Tensor:
    """Return x W^T + s (x A^T) B^T, of I numbers in and O out."""
    y_NO = x_NI @ weight_OI.to(x_NI.dtype).T
    return y_NO.addmm_(x_NI @ a_rI.T, b_Or.T, alpha=scale)


def _delta_grads(
    x_NI: Tensor, dy_NO: Tensor, dy_b_Nr: Tensor, a_rI: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of A and B; dy_b_Nr is dy B."""
    da_rI = (dy_b_Nr.T @ x_NI).mul_(scale)
    # x A^T costs little and is not kept
    db_Or = (dy_NO.T @ (x_NI @ a_rI.T)).mul_(scale)
    return da_rI, db_Or


def low_rank_swiglu(network: Any, deltas: nn.Module, scale: float, x: Tensor) -> Tensor:
    """Return y of a frozen SwiGLU network with deltas, for x of any leading shape; products run in
    autocast's dtype, else in x's.

    deltas: modules gate_proj, up_proj and down_proj, each of lora_A and lora_B.
    """
    dtype = product_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        y_ND = _LowRankSwiGLU.apply(
            x.flatten(0, -2).to(dtype),
            scale,
            network.gate_proj.weight,
            network.up_proj.weight,
            network.down_proj.weight,
            *deltas.parameters(),
        )
    return y_ND.view(*x.shape[:-1], y_ND.shape[-1])
