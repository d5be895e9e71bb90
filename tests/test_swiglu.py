"""The SwiGLU that keeps little against Hugging Face's own module: the same value, the same
gradients.

N tokens, D model width, F feed-forward width.
"""

import contextlib
import copy

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from pipeline.model import experts
from pipeline.model.experts import Expert
from pipeline.model.kernels.swiglu import is_swiglu, swiglu
from pipeline.train.optimizer import gradients_in

D, F, N = 24, 40, 30
FP32, BF16 = torch.float32, torch.bfloat16


def network(dtype=FP32) -> Qwen3MLP:
    """Return a random network; the same each time."""
    torch.manual_seed(0)
    net = Qwen3MLP(Qwen3Config(hidden_size=D, intermediate_size=F))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net.to(dtype)


def drawn(seed: int, dtype=FP32) -> torch.Tensor:
    """Return random x_ND."""
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def result(net, compute, x_ND, around=contextlib.nullcontext) -> list[torch.Tensor]:
    """Return y, dx and the gradients of gate, up and down."""
    net, x_ND = copy.deepcopy(net), x_ND.clone().requires_grad_()
    with around():
        y_ND = compute(net, x_ND)
    y_ND.backward(drawn(1, y_ND.dtype))
    return [y_ND.detach(), x_ND.grad, *(p.grad for p in net.parameters())]


def plain(net, x_ND):
    """Run the modules themselves."""
    return net(x_ND)


def autocast():
    """Return the context of a bf16 evaluation."""
    return torch.autocast("cpu", BF16)


def distance(one, other) -> float:
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


def test_fp32_value_and_gradients_are_those_of_the_modules():
    ours, wanted = (result(network(), compute, drawn(0)) for compute in (swiglu, plain))
    assert len(ours) == 5
    for a, b in zip(ours, wanted, strict=True):
        assert a.dtype == FP32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gradients_agree_with_finite_differences_in_double():
    net = network(torch.float64)
    x_ND = drawn(0, torch.float64)[:4].requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: swiglu(net, x), (x_ND, *net.parameters()))


@pytest.mark.parametrize(
    ("dtype", "around"),
    [(BF16, contextlib.nullcontext), (FP32, autocast)],
    ids=["bf16", "autocast"],
)
def test_bf16_is_as_near_to_the_exact_result_as_the_modules_are(dtype, around):
    exact = result(network(dtype).float(), plain, drawn(0, dtype).float())
    ours, modules = (result(network(dtype), c, drawn(0, dtype), around) for c in (swiglu, plain))
    for a, b, true in zip(ours, modules, exact, strict=True):
        assert a.dtype == b.dtype
        assert 0 < distance(a, true) < max(1.5 * distance(b, true), 2**-8)
    assert ours[0].dtype == BF16


@pytest.mark.parametrize("shape", [(0, D), (3, D), (2, 0, D), (2, 5, 3, D)])
def test_any_leading_shape_is_kept_also_an_empty_one(shape):
    net, x = network(), torch.randn(shape)
    y = swiglu(net, x)
    assert y.shape == shape
    torch.testing.assert_close(y, net(x))


def accumulated(compute, dtype, buffers) -> list[torch.Tensor]:
    """Return the gradients of three passes, summed in buffers of a dtype as fit sums them; and that
    they stayed."""
    net = network(dtype)
    kept = []
    with gradients_in(net.parameters(), buffers, fused=False):
        places = [p.grad.data_ptr() for p in net.parameters()]
        for seed in range(3):
            compute(net, drawn(seed, dtype)).backward(drawn(10 + seed, dtype))
        for parameter, where in zip(net.parameters(), places, strict=True):
            assert parameter.grad.dtype == buffers and parameter.grad.data_ptr() == where
            kept.append(parameter.grad.clone())
    return kept


@pytest.mark.parametrize(
    ("dtype", "buffers", "close"),
    [(FP32, FP32, 1e-6), (BF16, BF16, 2**-7), (BF16, FP32, 2**-7), (FP32, BF16, 2**-7)],
)
def test_gradients_add_up_in_buffers_of_any_dtype(dtype, buffers, close):
    exact = accumulated(plain, FP32, FP32)
    for a, b, true in zip(
        accumulated(swiglu, dtype, buffers), accumulated(plain, dtype, buffers), exact, strict=True
    ):
        assert distance(a, b) < close and distance(a, true) < 2 * close


def test_sums_in_the_products_dtype_need_no_matrix_in_between(monkeypatch):
    seen = []
    real = torch.Tensor.addmm_
    monkeypatch.setattr(
        torch.Tensor, "addmm_", lambda self, *a, **k: seen.append(self.data_ptr()) or real(self, *a)
    )
    net = network()
    with gradients_in(net.parameters(), FP32, fused=False):
        swiglu(net, drawn(0)).sum().backward()
        assert sorted(seen) == sorted(p.grad.data_ptr() for p in net.parameters())
    seen.clear()
    swiglu(net, drawn(0)).sum().backward()
    assert seen == [] and all(p.grad.any() for p in net.parameters())


@pytest.mark.parametrize(
    "trained", [(), ("gate_proj",), ("up_proj",), ("down_proj",), ("gate_proj", "down_proj")]
)
@pytest.mark.parametrize("asked", [True, False])
def test_frozen_weights_get_no_gradient_and_the_others_their_own(trained, asked):
    got = []
    for compute in (swiglu, plain):
        net, x_ND = network().requires_grad_(False), drawn(0).requires_grad_(asked)
        for name in trained:
            getattr(net, name).requires_grad_(True)
        y_ND = compute(net, x_ND)
        assert y_ND.requires_grad == bool(trained or asked)
        if y_ND.requires_grad:
            y_ND.backward(drawn(1))
        got.append([x_ND.grad, *(p.grad for p in net.parameters())])
    for a, b in zip(*got, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def kept_for_backward(compute) -> int:
    """Return the bytes that a pass keeps besides the weights and its input."""
    net, x_ND = network(), drawn(0).requires_grad_()
    known = {t.untyped_storage().data_ptr() for t in (*net.parameters(), x_ND)}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y_ND = compute(net, x_ND)  # noqa: F841
    return sum(kept.values())


def test_two_tensors_are_kept_where_the_modules_keep_four():
    assert kept_for_backward(swiglu) == 2 * N * F * 4
    assert kept_for_backward(plain) == 4 * N * F * 4


def test_only_swiglus_without_biases_are_taken_for_one():
    sizes = {"hidden_size": D, "intermediate_size": F, "num_attention_heads": 2}
    assert is_swiglu(network()) and is_swiglu(LlamaMLP(LlamaConfig(**sizes)))
    assert not is_swiglu(LlamaMLP(LlamaConfig(**sizes, mlp_bias=True)))
    assert not is_swiglu(Qwen3MLP(Qwen3Config(**sizes, hidden_act="gelu")))
    assert not is_swiglu(torch.nn.Linear(D, D))


@pytest.mark.parametrize("changes", [{}, {"mlp_bias": True}, {"hidden_act": "gelu"}])
def test_an_expert_computes_what_its_modules_do_and_with_it_where_it_can(monkeypatch, changes):
    seen = []
    monkeypatch.setattr(experts, "swiglu", lambda net, x: seen.append(net) or swiglu(net, x))
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=D, intermediate_size=F, num_attention_heads=2, **changes)
    expert = Expert([LlamaMLP(config) for _ in range(2)])
    x_BTD = torch.randn(2, 5, D)
    torch.testing.assert_close(expert(1, x_BTD), expert.layers[1](x_BTD))
    assert seen == ([] if changes else [expert.layers[1]])
