"""Products with weights that stay as a file has them: mapped, of whatever dtype, and cast for one
product at a time.

A frozen layer that torch itself casts keeps the cast copy for its backward pass; all layers of a
model together are then a second model in memory.

N rows, D width in, F width out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autograd import Context


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return y_NF of x_ND of any leading shape: the product runs in autocast's dtype, else in x's,
    whatever dtype the weight is stored in.

    Gradients reach x and a bias that is trained; the backward pass keeps the stored weight alone.
    A weight that is trained itself takes torch's own way.
    """
    dtype = product_dtype(x)
    if weight.requires_grad or weight.dtype == dtype == x.dtype:
        # torch keeps what it was given, and here that is the stored weight itself
        return F.linear(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = _FrozenLinear.apply(x.to(dtype), weight, bias)
    return y


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that products of x, of any shape, run in: autocast's, else its own."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


class _FrozenLinear(torch.autograd.Function):
    """Casts the weight for each of its two products and lets the copy go."""

    @staticmethod
    def forward(ctx: Context, x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_FD, bias_F)
        dtype = x_ND.dtype
        bias = None if bias_F is None else bias_F.to(dtype)
        return F.linear(x_ND, weight_FD.to(dtype), bias)

    @staticmethod
    def backward(ctx: Context, dy_NF: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        weight_FD, bias_F = ctx.saved_tensors
        needs_x, _, needs_bias = ctx.needs_input_grad
        dx_ND = dy_NF @ weight_FD.to(dy_NF.dtype) if needs_x else None
        dbias_F = None
        if needs_bias:
            dbias_F = dy_NF.flatten(0, -2).sum(0).to(bias_F.dtype)
        return dx_ND, None, dbias_F


class FrozenLinear(nn.Linear):
    """A linear layer whose frozen weight may have another dtype than what it computes in.

    Where the weight is trained it is torch's own layer, and a subclass of it everywhere: PEFT wraps
    it as it wraps that.
    """

    @classmethod
    def around(cls, linear: nn.Linear) -> "FrozenLinear":
        """Return such a layer with the parameters of another, which are not copied."""
        features = linear.in_features, linear.out_features
        # On the meta device: its own parameters are never used
        layer = cls(*features, bias=linear.bias is not None, device="meta")
        layer.weight = linear.weight
        layer.bias = linear.bias
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return y of x of any leading shape, in the dtype that the product runs in."""
        return frozen_linear(x, self.weight, self.bias)


class FrozenEmbedding(nn.Embedding):
    """An embedding whose rows are looked up in the stored dtype and then cast to `dtype`, so that
    the table itself is never cast. None: the rows stay as they are stored."""

    dtype: torch.dtype | None = None

    @classmethod
    def around(cls, table: nn.Embedding) -> "FrozenEmbedding":
        """Return such an embedding with the table of another, which is not copied."""
        size = table.num_embeddings, table.embedding_dim
        made = cls(*size, padding_idx=table.padding_idx, device="meta")
        made.weight = table.weight
        return made.train(table.training)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of ids, of any leading shape."""
        rows = super().forward(ids)
        return rows if self.dtype is None else rows.to(self.dtype)


def patch_linear(network: nn.Module) -> None:
    """Replace every plain linear layer and embedding below a module; parameters keep their
    names."""
    # a list, as the network changes on the way
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            # subclasses compute something else
            if type(child) is nn.Linear:
                setattr(parent, name, FrozenLinear.around(child))
            elif type(child) is nn.Embedding:
                setattr(parent, name, FrozenEmbedding.around(child))
