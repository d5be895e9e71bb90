"""Causal attention in blocks of queries: each block sees only the keys before its end, and nothing
T x T is kept.

FlashAttention's way to save memory (2205.14135) without a kernel: in bf16 on processors torch's own
spends most of its time outside the products. Elsewhere, and with a mask, a cache or dropout,
torch's is called.

B sequences, H heads of queries, M heads of keys and values, G = H/M heads of queries to one of
these, T tokens, C tokens of a block, R = G*C, S tokens up to a block's end, K width of a head.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..autograd import Context

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "moleforge_blocks"
# Queries of a block: of 64 to 512 the fastest where it was measured.
BLOCK_TOKENS = 128
# Blocks whose gradients are added up in bf16. More of them go to fp32: a longer sum in bf16 stops
# growing, as what comes is rounded away.
MAX_BF16_SUMS = 16


def patch_attention(network: "PreTrainedModel") -> None:
    """Let a Hugging Face model attend in blocks wherever that gives the same result."""
    attend_by(network, NAME, _forward)


def attend_by(network: "PreTrainedModel", name: str, forward: Callable) -> None:
    """Have a Hugging Face model attend by a function of ours, which is called `name` there."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, forward)
    # masks come as for torch's own: none where causal says it all, else T x T
    AttentionMaskInterface.register(name, sdpa_mask)
    network.set_attn_implementation(name)


def _forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return out_BTHK and no weights, as Hugging Face's attention functions do."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = module.is_causal if is_causal is None else is_causal
    plain = causal and attention_mask is None and not dropout
    # with a cache there are more keys than queries
    cached = query.shape[2] != key.shape[2]
    if not plain or cached or not _pays(query):
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    return causal_attention(query, key, value, scaling).transpose(1, 2), None


def _pays(x: Tensor) -> bool:
    """Whether blocks are faster than torch's attention: on a processor with products in bf16; fp32
    was slower."""
    return x.device.type == "cpu" and _product_dtype(x) == torch.bfloat16


def _product_dtype(x: Tensor) -> torch.dtype:
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def causal_attention(
    q_BHTK: Tensor, k_BMTK: Tensor, v_BMTK: Tensor, scale: float | None = None
) -> Tensor:
    """Return out_BHTK = softmax(scale * q k^T) v, each token over itself and those before; scale
    1/sqrt(K) by default. M may be a part of H: then G heads of queries in a row share one of keys.

    Products run in autocast's dtype, else in that of q; the softmax in fp32.
    """
    dtype = _product_dtype(q_BHTK)
    if scale is None:
        scale = q_BHTK.shape[-1] ** -0.5
    with torch.autocast(q_BHTK.device.type, enabled=False):
        return _BlockAttention.apply(q_BHTK.to(dtype), k_BMTK.to(dtype), v_BMTK.to(dtype), scale)


class _AttentionContext(Context, Protocol):
    scale: float


class _BlockAttention(torch.autograd.Function):
    """Keeps scaled q, k and v; the weights of a block are made again in the backward pass.

    Keys are never repeated for the heads of queries that share them: these stand below each other,
    as more rows of one product.
    """

    @staticmethod
    def forward(
        ctx: _AttentionContext,
        q_BHTK: Tensor,
        k_BMTK: Tensor,
        v_BMTK: Tensor,
        scale: float,
    ) -> Tensor:
        # contiguous once here, or else every product copies what it is given
        q_BHTK = (q_BHTK * scale).contiguous()
        k_BMTK = k_BMTK.contiguous()
        v_BMTK = v_BMTK.contiguous()
        ctx.save_for_backward(q_BHTK, k_BMTK, v_BMTK)
        ctx.scale = scale
        out_BHTK = torch.empty_like(q_BHTK)
        q_BMGTK = _in_groups(q_BHTK, k_BMTK)
        out_BMGTK = _in_groups(out_BHTK, k_BMTK)
        for block, seen in _blocks(q_BHTK.shape[2]):
            p_BMRS = _weights(q_BMGTK[:, :, :, block], k_BMTK[:, :, seen])
            out_BMRK = p_BMRS @ v_BMTK[:, :, seen]
            out_BMGCK = out_BMGTK[:, :, :, block]
            out_BMGCK.copy_(out_BMRK.view_as(out_BMGCK))
        return out_BHTK

    @staticmethod
    def backward(ctx: _AttentionContext, dout_BHTK: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_BHTK, k_BMTK, v_BMTK = ctx.saved_tensors
        dtype = q_BHTK.dtype
        tokens = q_BHTK.shape[2]
        sum_dtype = dtype
        if tokens > MAX_BF16_SUMS * BLOCK_TOKENS:
            sum_dtype = torch.promote_types(dtype, torch.float32)
        dq_BHTK = torch.empty_like(q_BHTK)
        dk_BMTK = torch.zeros_like(k_BMTK, dtype=sum_dtype)
        dv_BMTK = torch.zeros_like(v_BMTK, dtype=sum_dtype)
        q_BMGTK = _in_groups(q_BHTK, k_BMTK)
        dq_BMGTK = _in_groups(dq_BHTK, k_BMTK)
        dout_BMGTK = _in_groups(dout_BHTK.contiguous(), k_BMTK)
        for block, seen in _blocks(tokens):
            q_BMRK = q_BMGTK[:, :, :, block].flatten(2, 3)
            dout_BMRK = dout_BMGTK[:, :, :, block].flatten(2, 3)
            p_BMRS = _weights(q_BMGTK[:, :, :, block], k_BMTK[:, :, seen])
            dv_BMTK[:, :, seen] += p_BMRS.mT @ dout_BMRK
            dp_BMRS = dout_BMRK @ v_BMTK[:, :, seen].mT
            ds_BMRS = torch._softmax_backward_data(dp_BMRS, p_BMRS, -1, p_BMRS.dtype)
            dq_BMGCK = dq_BMGTK[:, :, :, block]
            dq_BMGCK.copy_((ds_BMRS @ k_BMTK[:, :, seen]).view_as(dq_BMGCK))
            dk_BMTK[:, :, seen] += ds_BMRS.mT @ q_BMRK
        # k met the scaled q, so only dq still lacks the scale
        return dq_BHTK.mul_(ctx.scale), dk_BMTK.to(dtype), dv_BMTK.to(dtype), None


def _in_groups(x_BHTK: Tensor, k_BMTK: Tensor) -> Tensor:
    """Return the same numbers with the heads that share one of keys in a dimension of their
    own."""
    return x_BHTK.unflatten(1, (k_BMTK.shape[1], -1))


def _blocks(tokens: int) -> Iterator[tuple[slice, slice]]:
    """Yield the slice of each block of queries, and of the keys it sees."""
    for start in range(0, tokens, BLOCK_TOKENS):
        end = min(start + BLOCK_TOKENS, tokens)
        yield slice(start, end), slice(0, end)


def _weights(q_BMGCK: Tensor, k_BMSK: Tensor) -> Tensor:
    """Return p_BMRS, the attention of a block of scaled queries, the last of which sees all S
    keys."""
    heads, block_tokens = q_BMGCK.shape[2:4]
    s_BMRS = q_BMGCK.flatten(2, 3) @ k_BMSK.mT
    s_BMGCS = s_BMRS.unflatten(2, (heads, block_tokens))
    # every query sees all keys before its block: only the last C x C square needs a mask
    ones_CC = torch.ones(block_tokens, block_tokens, dtype=torch.bool, device=s_BMRS.device)
    later_CC = ones_CC.triu_(1)
    s_BMGCS[..., -block_tokens:].masked_fill_(later_CC, float("-inf"))
    # torch's kernel computes in fp32 whatever goes in
    return torch.softmax(s_BMRS, -1)
