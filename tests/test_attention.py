"""Attention in blocks against torch's own, alone and inside Hugging Face's models.

B sequences, H heads, T tokens, K width of a head.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Qwen3Config

from pipeline.model.kernels import attention
from pipeline.model.kernels.attention import BLOCK_TOKENS, causal_attention, patch_attention

BF16, FP64 = torch.bfloat16, torch.float64


def drawn(tokens: int, dtype, batch=2, heads=3, width=16) -> list[torch.Tensor]:
    """Return q, k, v and the gradient of the result, laid out as Hugging Face's models have
    them."""
    generator = torch.Generator().manual_seed(tokens)
    made = torch.randn(4, batch, tokens, heads, width, generator=generator, dtype=FP64)
    return [part.transpose(1, 2).to(dtype) for part in made]


def result(attend, q, k, v, dout) -> list[torch.Tensor]:
    """Return out_BHTK and the gradients of q, k and v."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    out.backward(dout)
    return [out.detach(), *(x.grad for x in leaves)]


def torchs(q, k, v):
    """Return torch's causal attention."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def distance(one, other) -> float:
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


@pytest.mark.parametrize("tokens", [1, 5, BLOCK_TOKENS, BLOCK_TOKENS + 1, 3 * BLOCK_TOKENS - 7])
def test_it_is_torchs_attention_with_its_gradients(tokens):
    given = drawn(tokens, FP64)
    for ours, theirs in zip(result(causal_attention, *given), result(torchs, *given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_heads_that_share_keys_keep_these_once():
    q, k, v, dout = drawn(2 * BLOCK_TOKENS + 5, FP64, heads=6)
    k, v = k[:, ::3], v[:, ::3]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        ours = result(causal_attention, q, k, v, dout)
    theirs = result(
        lambda *x: F.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True),
        q,
        k,
        v,
        dout,
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
    assert sorted(kept) == [k.numel(), v.numel(), q.numel()]


def test_a_scale_may_be_given():
    q, k, v, dout = drawn(BLOCK_TOKENS + 3, FP64)
    ours = result(lambda *x: causal_attention(*x, scale=0.7), q, k, v, dout)
    theirs = result(
        lambda *x: F.scaled_dot_product_attention(*x, is_causal=True, scale=0.7), q, k, v, dout
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_bf16_is_about_as_near_to_the_exact_result_as_torchs_kernel():
    given = drawn(300, BF16, width=64)
    exact = result(torchs, *[x.double() for x in given])
    ours, theirs = result(causal_attention, *given), result(torchs, *given)
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == BF16
        assert distance(mine, true) < 2 * distance(
            other, true
        )  # scores are rounded to bf16 on the way


def test_autocast_decides_the_dtype_of_the_products():
    q, k, v, _ = drawn(9, torch.float32)
    with torch.autocast("cpu", BF16):
        assert attention._pays(q) and causal_attention(q, k, v).dtype == BF16
    assert not attention._pays(q) and causal_attention(q, k, v).dtype == torch.float32


def test_nothing_as_large_as_all_pairs_of_tokens_is_kept():
    q, k, v, _ = drawn(4 * BLOCK_TOKENS, BF16, batch=1, heads=1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        causal_attention(*(x.requires_grad_() for x in (q, k, v)))
    assert kept and max(kept) == q.numel()


@pytest.fixture
def network():
    """Return a small Qwen3 in bf16 with two query heads to a key head."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=BF16).eval()


@pytest.fixture
def calls(monkeypatch):
    """Return the token counts with which attention in blocks was called."""
    seen, real = [], attention.causal_attention
    spied = lambda q, *rest: seen.append(q.shape[2]) or real(q, *rest)  # noqa: E731
    monkeypatch.setattr(attention, "causal_attention", spied)
    return seen


def blocked(network):
    other = copy.deepcopy(network)
    patch_attention(other)
    return other


def test_a_model_with_grouped_heads_keeps_its_logits(network, calls):
    ids_BT = torch.randint(64, (2, BLOCK_TOKENS + 20), generator=torch.Generator().manual_seed(1))
    exact = copy.deepcopy(network).double()(ids_BT).logits
    ours, theirs = blocked(network)(ids_BT).logits, network(ids_BT).logits
    assert calls == [BLOCK_TOKENS + 20] * 2
    assert distance(ours, exact) < 2 * distance(theirs, exact)


def test_fp32_is_left_to_torch_bit_for_bit(network, calls):
    ids_BT = torch.arange(40)[None]
    network = network.float()
    assert torch.equal(blocked(network)(ids_BT).logits, network(ids_BT).logits)
    assert not calls


def test_padding_is_left_to_torch_bit_for_bit(network, calls):
    ids_BT, mask_BT = torch.arange(40).view(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask_BT[1, :7] = 0
    ours, theirs = (
        blocked(network)(ids_BT, attention_mask=mask_BT),
        network(ids_BT, attention_mask=mask_BT),
    )
    assert torch.equal(ours.logits, theirs.logits)
    assert not calls


def test_a_token_beside_its_cache_is_left_to_torch(network, calls):
    ids_BT = torch.arange(13)[None]
    ours, theirs = blocked(network), network
    first = ours(ids_BT[:, :12], use_cache=True)
    logits = ours(ids_BT[:, 12:], past_key_values=first.past_key_values, use_cache=True).logits[
        :, -1
    ]
    assert calls == [12, 12]  # the prompt, in both layers
    assert distance(logits, theirs(ids_BT).logits[:, -1]) < 0.03


def test_many_blocks_add_up_as_exactly_as_few(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK_TOKENS", 8)
    q, k, v, dout = drawn(1024, BF16, batch=1, heads=1)
    given = (q, k, v, dout + 1)  # all to one side, so that sums grow
    exact = result(torchs, *[x.double() for x in given])
    for mine, true in zip(result(causal_attention, *given), exact, strict=True):
        assert mine.dtype == BF16 and distance(mine, true) < 0.01
