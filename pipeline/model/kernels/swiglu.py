"""A SwiGLU network that keeps three tensors for its backward pass and never autocast's copies of
its weights.

y = W_down(silu(W_gate x) * (W_up x)), Shazeer, 2002.05202. Gradients are those of the plain
modules.

N tokens, D model width, F feed-forward width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autograd import Context


class _SwiGLU(torch.autograd.Function):
    """Keeps x, W_gate x and W_up x; what lies between is made again, elementwise."""

    @staticmethod
    def forward(
        ctx: Context,
        x_ND: Tensor,
        gate_FD: Tensor,
        up_FD: Tensor,
        down_DF: Tensor,
    ) -> Tensor:
        # weights are cast for each product and let go: autocast would keep all three casts
        dtype = x_ND.dtype
        g_NF = x_ND @ gate_FD.to(dtype).T
        u_NF = x_ND @ up_FD.to(dtype).T
        ctx.save_for_backward(x_ND, g_NF, u_NF, gate_FD, up_FD, down_DF)
        act_NF = F.silu(g_NF).mul_(u_NF)
        return act_NF @ down_DF.to(dtype).T

    @staticmethod
    def backward(
        ctx: Context, dy_ND: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        x_ND, g_NF, u_NF, gate_FD, up_FD, down_DF = ctx.saved_tensors
        needs_x, needs_gate, needs_up, needs_down = ctx.needs_input_grad
        dtype = x_ND.dtype
        # this order keeps the fewest N x F tensors alive; each name below takes over a buffer
        silu_NF = F.silu(g_NF)
        ddown_DF = _weight_grad(down_DF, dy_ND, silu_NF * u_NF) if needs_down else None
        dact_NF = dy_ND @ down_DF.to(dtype)
        du_NF = silu_NF.mul_(dact_NF)
        dsilu_NF = dact_NF.mul_(u_NF)
        dg_NF = torch.ops.aten.silu_backward(dsilu_NF, g_NF, grad_input=dsilu_NF)
        dup_FD = _weight_grad(up_FD, du_NF, x_ND) if needs_up else None
        dgate_FD = _weight_grad(gate_FD, dg_NF, x_ND) if needs_gate else None
        dx_ND = None
        if needs_x:
            dx_ND = torch.addmm(du_NF @ up_FD.to(dtype), dg_NF, gate_FD.to(dtype))
        return dx_ND, dgate_FD, dup_FD, ddown_DF


def _weight_grad(weight: Tensor, dout_NF: Tensor, in_ND: Tensor) -> Tensor | None:
    """Return the gradient of a weight, or add it to the sum that is there already, without a matrix
    in between."""
    if weight.grad is None or weight.grad.dtype != in_ND.dtype:
        return dout_NF.T @ in_ND
    weight.grad.addmm_(dout_NF.T, in_ND)
    return None


def is_swiglu(network: nn.Module) -> bool:
    """Whether a Hugging Face feed-forward network is a SwiGLU without biases."""
    for name in ("gate_proj", "up_proj", "down_proj"):
        linear = getattr(network, name, None)
        if not isinstance(linear, nn.Linear) or linear.bias is not None:
            return False
    config = getattr(network, "config", None)
    # two names of one function
    return getattr(config, "hidden_act", "") in ("silu", "swish")


def swiglu(network: Any, x: Tensor) -> Tensor:
    """Return y of such a network for x of any leading shape; products run in autocast's dtype, else
    in x's."""
    device_type = x.device.type
    dtype = x.dtype
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    with torch.autocast(device_type, enabled=False):
        y_ND = _SwiGLU.apply(
            x.flatten(0, -2).to(dtype),
            network.gate_proj.weight,
            network.up_proj.weight,
            network.down_proj.weight,
        )
    return y_ND.view(*x.shape[:-1], y_ND.shape[-1])
