"""A SwiGLU network that keeps three tensors for its backward pass and never autocast's copies of
its weights.

y = W_down(silu(W_gate x) * (W_up x)), Shazeer, 2002.05202. Gradients are those of the plain
modules.

N tokens, D model width, F feed-forward width.
"""

import torch
import torch.nn.functional as F
from torch import nn


class _SwiGLU(torch.autograd.Function):
    """Keeps x, W_gate x and W_up x; what lies between is made again, elementwise."""

    @staticmethod
    def forward(ctx, x_ND, gate_FD, up_FD, down_DF):
        g_NF, u_NF = x_ND @ gate_FD.to(x_ND.dtype).T, x_ND @ up_FD.to(x_ND.dtype).T
        ctx.save_for_backward(x_ND, g_NF, u_NF, gate_FD, up_FD, down_DF)
        return (F.silu(g_NF).mul_(u_NF)) @ down_DF.to(x_ND.dtype).T

    @staticmethod
    def backward(ctx, dy_ND):
        x_ND, g_NF, u_NF, gate_FD, up_FD, down_DF = ctx.saved_tensors
        dtype = x_ND.dtype
        needs_x, *needs = ctx.needs_input_grad
        act_NF = F.silu(g_NF)
        d_down = _product(down_DF, dy_ND, act_NF * u_NF) if needs[2] else None
        d_NF = dy_ND @ down_DF.to(dtype)
        du_NF = act_NF.mul_(d_NF)
        dg_NF = torch.ops.aten.silu_backward(d_NF.mul_(u_NF), g_NF, grad_input=d_NF)
        d_up = _product(up_FD, du_NF, x_ND) if needs[1] else None
        d_gate = _product(gate_FD, dg_NF, x_ND) if needs[0] else None
        dx_ND = None
        if needs_x:
            dx_ND = torch.addmm(du_NF @ up_FD.to(dtype), dg_NF, gate_FD.to(dtype))
        return dx_ND, d_gate, d_up, d_down


def _product(
    weight: torch.Tensor, out_NF: torch.Tensor, in_ND: torch.Tensor
) -> torch.Tensor | None:
    """Return the gradient of a weight, or add it to the sum that is there already, without a matrix
    in between."""
    if weight.grad is None or weight.grad.dtype != in_ND.dtype:
        return out_NF.T @ in_ND
    weight.grad.addmm_(out_NF.T, in_ND)
    return None


def is_swiglu(net: nn.Module) -> bool:
    """Whether a Hugging Face feed-forward network is a SwiGLU without biases."""
    linear = [getattr(net, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    plain = all(isinstance(x, nn.Linear) and x.bias is None for x in linear)
    return plain and getattr(getattr(net, "config", None), "hidden_act", "") in ("silu", "swish")


def swiglu(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return y of such a network for x of any leading shape; products run in autocast's dtype, else
    in x's."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    with torch.autocast(kind, enabled=False):
        y_ND = _SwiGLU.apply(
            x.flatten(0, -2).to(dtype),
            net.gate_proj.weight,
            net.up_proj.weight,
            net.down_proj.weight,
        )
    return y_ND.view(*x.shape[:-1], y_ND.shape[-1])
