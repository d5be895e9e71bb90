"""Causal attention in blocks of queries: each block sees only the keys before its end, and nothing
T x T is kept.

FlashAttention's way to save memory (2205.14135) without a kernel: in bf16 on processors torch's own
spends most of its time outside the products. Elsewhere, and with a mask, a cache or dropout,
torch's is called.

B sequences, H heads, T tokens, C tokens of a block, S tokens up to a block's end, K width of a
head.
"""

from collections.abc import Iterator
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
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _forward)
    # without a mask function of the same name every pass would be given a mask, T x T
    AttentionMaskInterface.register(NAME, sdpa_mask)
    network.set_attn_implementation(NAME)


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
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

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
    groups = query.shape[1] // key.shape[1]
    out_BHTK = causal_attention(query, repeat_kv(key, groups), repeat_kv(value, groups), scaling)
    return out_BHTK.transpose(1, 2), None


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
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, scale: float | None = None
) -> Tensor:
    """Return out_BHTK = softmax(scale * q k^T) v, each token over itself and those before; scale
    1/sqrt(K) by default.

    Products run in autocast's dtype, else in that of q; the softmax in fp32.
    """
    dtype = _product_dtype(q_BHTK)
    if scale is None:
        scale = q_BHTK.shape[-1] ** -0.5
    with torch.autocast(q_BHTK.device.type, enabled=False):
        return _BlockAttention.apply(q_BHTK.to(dtype), k_BHTK.to(dtype), v_BHTK.to(dtype), scale)


class _AttentionContext(Context, Protocol):
    scale: float


class _BlockAttention(torch.autograd.Function):
    """Keeps scaled q, k and v; the weights of a block are made again in the backward pass."""

    @staticmethod
    def forward(
        ctx: _AttentionContext,
        q_BHTK: Tensor,
        k_BHTK: Tensor,
        v_BHTK: Tensor,
        scale: float,
    ) -> Tensor:
        # contiguous once here, or else every product copies what it is given
        q_BHTK = (q_BHTK * scale).contiguous()
        k_BHTK = k_BHTK.contiguous()
        v_BHTK = v_BHTK.contiguous()
        ctx.save_for_backward(q_BHTK, k_BHTK, v_BHTK)
        ctx.scale = scale
        out_BHTK = torch.empty_like(q_BHTK)
        for block, seen in _blocks(q_BHTK.shape[2]):
            p_BHCS = _weights(q_BHTK[:, :, block], k_BHTK[:, :, seen])
            out_BHTK[:, :, block] = p_BHCS @ v_BHTK[:, :, seen]
        return out_BHTK

    @staticmethod
    def backward(ctx: _AttentionContext, dout_BHTK: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_BHTK, k_BHTK, v_BHTK = ctx.saved_tensors
        dout_BHTK = dout_BHTK.contiguous()
        dtype = q_BHTK.dtype
        tokens = q_BHTK.shape[2]
        sum_dtype = dtype
        if tokens > MAX_BF16_SUMS * BLOCK_TOKENS:
            sum_dtype = torch.promote_types(dtype, torch.float32)
        dq_BHTK = torch.empty_like(q_BHTK)
        dk_BHTK = torch.zeros_like(k_BHTK, dtype=sum_dtype)
        dv_BHTK = torch.zeros_like(v_BHTK, dtype=sum_dtype)
        for block, seen in _blocks(tokens):
            q_BHCK = q_BHTK[:, :, block]
            dout_BHCK = dout_BHTK[:, :, block]
            p_BHCS = _weights(q_BHCK, k_BHTK[:, :, seen])
            dv_BHTK[:, :, seen] += p_BHCS.mT @ dout_BHCK
            dp_BHCS = dout_BHCK @ v_BHTK[:, :, seen].mT
            ds_BHCS = torch._softmax_backward_data(dp_BHCS, p_BHCS, -1, p_BHCS.dtype)
            dq_BHTK[:, :, block] = ds_BHCS @ k_BHTK[:, :, seen]
            dk_BHTK[:, :, seen] += ds_BHCS.mT @ q_BHCK
        # k met the scaled q, so only dq still lacks the scale
        return dq_BHTK.mul_(ctx.scale), dk_BHTK.to(dtype), dv_BHTK.to(dtype), None


def _blocks(tokens: int) -> Iterator[tuple[slice, slice]]:
    """Yield the slice of each block of queries, and of the keys it sees."""
    for start in range(0, tokens, BLOCK_TOKENS):
        end = min(start + BLOCK_TOKENS, tokens)
        yield slice(start, end), slice(0, end)


def _weights(q_BHCK: Tensor, k_BHSK: Tensor) -> Tensor:
    """Return p_BHCS, the attention of a block of scaled queries, the last of which sees all S
    keys."""
    s_BHCS = q_BHCK @ k_BHSK.mT
    block_tokens = s_BHCS.shape[2]
    # every query sees all keys before its block: only the last C x C square needs a mask
    ones_CC = torch.ones(block_tokens, block_tokens, dtype=torch.bool, device=s_BHCS.device)
    later_CC = ones_CC.triu_(1)
    s_BHCS[..., -block_tokens:].masked_fill_(later_CC, float("-inf"))
    # torch's kernel computes in fp32 whatever goes in
    return torch.softmax(s_BHCS, -1)
