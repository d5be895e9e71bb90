"""RMS norm that keeps its input and one number per row for the backward pass (1910.07467).

y = w * x / sqrt(mean(x^2) + eps) in fp32; values and gradients are those of Hugging Face's modules,
which keep several fp32 copies of the input.

N rows, D width.
"""

import torch
from torch import nn


class RMSNorm(nn.Module):
    """Takes the place of a Hugging Face RMS norm, with its parameter."""

    def __init__(self, like: nn.Module):
        super().__init__()
        self.weight, self.variance_epsilon = like.weight, like.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return y of x's shape, in the wider dtype of weight and x."""
        return _RMSNorm.apply(x, self.weight, self.variance_epsilon)


def patch_norm(network: nn.Module) -> None:
    """Replace every RMS norm of a Hugging Face model; parameters keep their names."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if type(child).__name__.endswith("RMSNorm") and hasattr(child, "variance_epsilon"):
                setattr(parent, name, RMSNorm(child))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, weight_D, eps):
        norm_ND = x_ND.to(torch.float32, copy=True)
        mean_N1 = (
            torch.linalg.vector_norm(norm_ND, dim=-1, keepdim=True).square_().div_(x_ND.shape[-1])
        )
        scale_N1 = mean_N1.add_(eps).rsqrt_()
        ctx.save_for_backward(x_ND, scale_N1, weight_D)
        return weight_D * norm_ND.mul_(scale_N1).to(x_ND.dtype)

    @staticmethod
    def backward(ctx, dy_ND):
        x_ND, scale_N1, weight_D = ctx.saved_tensors
        norm_ND = x_ND.to(torch.float32, copy=True).mul_(scale_N1)
        d_ND = dy_ND.to(torch.float32, copy=True)
        d_weight = (
            (d_ND * norm_ND).flatten(0, -2).sum(0).to(weight_D.dtype)
            if ctx.needs_input_grad[1]
            else None
        )
        if not ctx.needs_input_grad[0]:
            return None, d_weight, None
        d_ND.mul_(weight_D)
        slope_N1 = torch.linalg.vecdot(d_ND, norm_ND).unsqueeze(-1).div_(x_ND.shape[-1])
        return (
            d_ND.addcmul_(norm_ND, slope_N1, value=-1).mul_(scale_N1).to(x_ND.dtype),
            d_weight,
            None,
        )
