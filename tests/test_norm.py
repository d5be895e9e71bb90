"""The RMS norm that keeps little against Hugging Face's own: the same value, the same gradients.

N rows, D width.
"""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from pipeline.model import trunk as trunks
from pipeline.model.kernels.norm import RMSNorm, fused_norm, patch_norm

D = 24
FP32, BF16 = torch.float32, torch.bfloat16


def norm(kind=Qwen3RMSNorm, dtype=FP32):
    """Return a norm with random weights."""
    made = kind(D, eps=1e-5)
    torch.nn.init.normal_(made.weight, 1.0, 0.3, generator=torch.Generator().manual_seed(0))
    return made.to(dtype)


def result(module, x) -> list[torch.Tensor]:
    """Return y, dx and dw."""
    x = x.clone().requires_grad_()
    module.weight.grad = None
    y = module(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype))
    return [y.detach(), x.grad, module.weight.grad]


def drawn(dtype=FP32) -> torch.Tensor:
    """Return x of shape (2, 5, 3, D), as the norms of queries get it, with one row of zeros."""
    x = 3 * torch.randn(2, 5, 3, D, generator=torch.Generator().manual_seed(1))
    x[0, 0, 0] = 0
    return x.to(dtype)


@pytest.mark.parametrize("kind", [Qwen3RMSNorm, LlamaRMSNorm, MistralRMSNorm])
def test_it_is_hugging_faces_norm_with_its_gradients(kind):
    theirs = norm(kind)
    for mine, other in zip(result(RMSNorm(theirs), drawn()), result(theirs, drawn()), strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("x_dtype", [FP32, BF16])
@pytest.mark.parametrize("w_dtype", [FP32, BF16])
def test_mixed_dtypes_give_the_dtypes_and_values_of_the_original(x_dtype, w_dtype):
    theirs = norm(dtype=w_dtype)
    ours, others = result(RMSNorm(theirs), drawn(x_dtype)), result(theirs, drawn(x_dtype))
    assert [x.dtype for x in ours] == [x.dtype for x in others]
    for mine, other in zip(ours, others, strict=True):
        assert (mine.double() - other.double()).norm() < 0.01 * other.double().norm()


def test_a_frozen_weight_gets_no_gradient_and_a_frozen_input_none_either():
    theirs = norm()
    theirs.weight.requires_grad_(False)
    x = drawn().requires_grad_()
    RMSNorm(theirs)(x).sum().backward()
    assert x.grad is not None and theirs.weight.grad is None
    theirs.weight.requires_grad_(True)
    RMSNorm(theirs)(drawn()).sum().backward()
    assert theirs.weight.grad is not None


def test_it_keeps_its_input_and_one_number_a_row():
    kept, x = [], drawn(BF16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append((t.dtype, t.numel())) or t, lambda t: t
    ):
        RMSNorm(norm())(x)
    assert sorted(n for _, n in kept) == [D, x.numel() // D, x.numel()]
    assert (BF16, x.numel()) in kept


def test_a_trunk_has_it_everywhere_under_the_same_names():
    settings = {
        "model_type": "qwen3",
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    trunk, _ = trunks.build(settings)
    norms = [m for m in trunk.modules() if "RMSNorm" in type(m).__name__]
    assert len(norms) == 2 * 4 + 1 and all(isinstance(m, RMSNorm) for m in norms)
    assert {"model.layers.0.self_attn.q_norm.weight", "model.norm.weight"} <= trunk.named().keys()


def test_a_norm_of_another_form_is_left_alone():
    net = torch.nn.Sequential(torch.nn.RMSNorm(D), torch.nn.LayerNorm(D))
    patch_norm(net)
    assert [type(m) for m in net] == [torch.nn.RMSNorm, torch.nn.LayerNorm]


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_kernel_of_a_gpu_gives_the_same(dtype):
    mine = RMSNorm(norm(dtype=dtype))
    other = RMSNorm(norm(dtype=dtype))
    other.forward = lambda x: fused_norm(x, other.weight, other.variance_epsilon)
    # It rounds once where ours, as Hugging Face's, rounds before and after the weight
    limit = 2e-5 if dtype is FP32 else 2e-2
    for a, b in zip(result(mine, drawn(dtype)), result(other, drawn(dtype)), strict=True):
        torch.testing.assert_close(a, b, rtol=limit, atol=limit)
