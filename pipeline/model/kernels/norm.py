"""RMS norm that keeps its input and one number per row for the backward pass (1910.07467).

y = w * x / sqrt(mean(x^2) + eps) in fp32; values and gradients are those of Hugging Face's modules,
which keep several fp32 copies of the input.

N rows, D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autograd import Context


class RMSNorm(nn.Module):
    """Takes the place of a Hugging Face RMS norm, with its parameter."""

    def __init__(self, like: Any):
        super().__init__()
        self.weight: nn.Parameter = like.weight
        self.variance_epsilon: float = like.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Return y of x's shape, in the wider dtype of weight and x."""
        if x.device.type == "cuda" and x.dtype == self.weight.dtype:
            return fused_norm(x, self.weight, self.variance_epsilon)
        return _RMSNorm.apply(x, self.weight, self.variance_epsilon)


def fused_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return the same, of the shape of x, from torch's one kernel: a GPU starts seven for what
    stands below, and each reads and writes all rows."""
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, weight_D.shape, weight_D, eps)


def patch_norm(network: nn.Module) -> None:
    """Replace every RMS norm of a Hugging Face model; parameters keep their names."""
    # a list, as the network changes on the way
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            # each architecture has a class of its own, alike in all but the name's beginning
            named_so = type(child).__name__.endswith("RMSNorm")
            if named_so and hasattr(child, "variance_epsilon"):
                setattr(parent, name, RMSNorm(child))


def cast_norms(network: nn.Module, dtype: torch.dtype) -> None:
    """Give every such norm below a module its weight in a dtype; one that has it is left alone."""
    for module in network.modules():
        if isinstance(module, RMSNorm) and module.weight.dtype != dtype:
            weight = module.weight.detach().to(dtype)
            module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        # one fp32 copy, which every step below changes in place
        norm_ND = x_ND.to(torch.float32, copy=True)
        width = x_ND.shape[-1]
        length_N1 = torch.linalg.vector_norm(norm_ND, dim=-1, keepdim=True)
        mean_square_N1 = length_N1.square_().div_(width)
        scale_N1 = mean_square_N1.add_(eps).rsqrt_()
        ctx.save_for_backward(x_ND, scale_N1, weight_D)
        return weight_D * norm_ND.mul_(scale_N1).to(x_ND.dtype)

    @staticmethod
    def backward(ctx: Context, dy_ND: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_ND, scale_N1, weight_D = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        norm_ND = x_ND.to(torch.float32, copy=True).mul_(scale_N1)
        d_ND = dy_ND.to(torch.float32, copy=True)
        dweight_D = None
        if needs_weight:
            by_row_ND = (d_ND * norm_ND).flatten(0, -2)
            dweight_D = by_row_ND.sum(0).to(weight_D.dtype)
        if not needs_x:
            return None, dweight_D, None
        d_ND.mul_(weight_D)
        # the part of the gradient along x: a norm does not change when its input grows
        along_N1 = torch.linalg.vecdot(d_ND, norm_ND).unsqueeze(-1)
        along_N1.div_(x_ND.shape[-1])
        dx_ND = d_ND.addcmul_(norm_ND, along_N1, value=-1)
        dx_ND.mul_(scale_N1)
        return dx_ND.to(x_ND.dtype), dweight_D, None
