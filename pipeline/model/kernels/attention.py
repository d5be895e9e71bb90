"""Causal attention in blocks of queries: each block sees only the keys before its end, and nothing
T x T is kept.

FlashAttention's way to save memory (2205.14135) without a kernel: in bf16 on processors torch's own
spends most of its time outside the products. Elsewhere, and with a mask, a cache or dropout,
torch's is called.

B sequences, H heads, T tokens, C tokens of a block, S tokens up to a block's end, K width of a
head.
"""

import torch

NAME = "moleforge_blocks"
BLOCK_TOKENS = 128  # of 64 to 512 the fastest where it was measured
# blocks whose gradients are added up in bf16; more of them in fp32, or what comes is rounded away
MOST_SUMS = 16


def patch_attention(network: torch.nn.Module) -> None:
    """Let a Hugging Face model attend in blocks wherever that gives the same result."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    network.set_attn_implementation(NAME)


def _forward(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs
):
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    plain = (
        (module.is_causal if is_causal is None else is_causal)
        and attention_mask is None
        and not dropout
    )
    if not plain or query.shape[2] != key.shape[2] or not _pays(query):
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


def _pays(x: torch.Tensor) -> bool:
    """Whether blocks are faster than torch's attention: on a processor with products in bf16; fp32
    was slower."""
    return x.device.type == "cpu" and _dtype(x) == torch.bfloat16


def _dtype(x: torch.Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def causal_attention(
    q_BHTK: torch.Tensor, k_BHTK: torch.Tensor, v_BHTK: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Return out_BHTK = softmax(scale * q k^T) v, each token over itself and those before; scale
    1/sqrt(K) by default.

    Products run in autocast's dtype, else in that of q; the softmax in fp32.
    """
    dtype = _dtype(q_BHTK)
    scale = q_BHTK.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q_BHTK.device.type, enabled=False):
        return _Blocks.apply(q_BHTK.to(dtype), k_BHTK.to(dtype), v_BHTK.to(dtype), scale)


class _Blocks(torch.autograd.Function):
    """Keeps scaled q, k and v; the weights of a block are made again in the backward pass."""

    @staticmethod
    def forward(ctx, q_BHTK, k_BHTK, v_BHTK, scale):
        q_BHTK = (q_BHTK * scale).contiguous()  # else every product copies what it is given
        k_BHTK, v_BHTK = k_BHTK.contiguous(), v_BHTK.contiguous()
        ctx.save_for_backward(q_BHTK, k_BHTK, v_BHTK)
        ctx.scale = scale
        out_BHTK = torch.empty_like(q_BHTK)
        for block, seen in _blocks(q_BHTK.shape[2]):
            p_BHCS = _weights(q_BHTK[:, :, block], k_BHTK[:, :, seen])
            out_BHTK[:, :, block] = p_BHCS @ v_BHTK[:, :, seen]
        return out_BHTK

    @staticmethod
    def backward(ctx, dout_BHTK):
        (q_BHTK, k_BHTK, v_BHTK), dout_BHTK = ctx.saved_tensors, dout_BHTK.contiguous()
        dtype, long = q_BHTK.dtype, q_BHTK.shape[2] > MOST_SUMS * BLOCK_TOKENS
        sums = torch.promote_types(dtype, torch.float32) if long else dtype
        dq_BHTK = torch.empty_like(q_BHTK)
        dk_BHTK, dv_BHTK = (
            torch.zeros_like(k_BHTK, dtype=sums),
            torch.zeros_like(v_BHTK, dtype=sums),
        )
        for block, seen in _blocks(q_BHTK.shape[2]):
            q_BHCK, dout_BHCK = q_BHTK[:, :, block], dout_BHTK[:, :, block]
            p_BHCS = _weights(q_BHCK, k_BHTK[:, :, seen])
            dv_BHTK[:, :, seen] += p_BHCS.mT @ dout_BHCK
            dp_BHCS = dout_BHCK @ v_BHTK[:, :, seen].mT
            ds_BHCS = torch._softmax_backward_data(dp_BHCS, p_BHCS, -1, p_BHCS.dtype)
            dq_BHTK[:, :, block] = ds_BHCS @ k_BHTK[:, :, seen]
            dk_BHTK[:, :, seen] += ds_BHCS.mT @ q_BHCK
        return dq_BHTK.mul_(ctx.scale), dk_BHTK.to(dtype), dv_BHTK.to(dtype), None


def _blocks(tokens: int):
    """Yield the slice of each block of queries, and of the keys it sees."""
    for start in range(0, tokens, BLOCK_TOKENS):
        end = min(start + BLOCK_TOKENS, tokens)
        yield slice(start, end), slice(0, end)


def _weights(q_BHCK: torch.Tensor, k_BHSK: torch.Tensor) -> torch.Tensor:
    """Return p_BHCS, the attention of a block of scaled queries, the last of which sees all S keys."""
    s_BHCS = q_BHCK @ k_BHSK.mT
    rows = s_BHCS.shape[2]
    later_CC = torch.ones(rows, rows, dtype=torch.bool, device=s_BHCS.device).triu_(1)
    s_BHCS[..., -rows:].masked_fill_(later_CC, float("-inf"))
    return torch.softmax(s_BHCS, -1)  # torch's kernel computes in fp32 whatever goes in
