"""Products with stored weights of another dtype, against a weight that is cast first.

N rows, D width in, F width out.
"""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from pipeline.model.kernels.frozen import FrozenEmbedding, FrozenLinear, frozen_linear, patch_linear

N, D, F = 6, 16, 24
FP32, BF16 = torch.float32, torch.bfloat16


def drawn(*shape: int, dtype=FP32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def autocast():
    return torch.autocast("cpu", BF16)


@pytest.mark.parametrize("stored", [FP32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("around", "dtype"), [(nullcontext, FP32), (autocast, BF16)], ids=["fp32", "autocast"]
)
def test_values_and_gradients_are_those_of_a_weight_that_was_cast_first(stored, around, dtype):
    weight_FD = drawn(F, D, dtype=stored)
    bias_F = drawn(F, dtype=FP32).requires_grad_()
    other_F = bias_F.detach().clone().requires_grad_()
    x_ND = drawn(2, N, D).requires_grad_()
    twin_ND = x_ND.detach().clone().requires_grad_()
    with around():
        y_NF = frozen_linear(x_ND, weight_FD, bias_F)
    # the reference casts by hand, with no autocast around
    wanted_NF = nn.functional.linear(twin_ND.to(dtype), weight_FD.to(dtype), other_F.to(dtype))
    assert y_NF.dtype == wanted_NF.dtype == dtype
    assert torch.equal(y_NF, wanted_NF)
    for y in (y_NF, wanted_NF):
        y.backward(drawn(2, N, F, dtype=dtype))
    assert torch.equal(x_ND.grad, twin_ND.grad)
    tolerance = 1e-6 if dtype == FP32 else 2e-2
    torch.testing.assert_close(bias_F.grad, other_F.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("around", [nullcontext, autocast], ids=["fp32", "autocast"])
@pytest.mark.parametrize("stored", [FP32, BF16], ids=str)
def test_a_backward_pass_keeps_the_stored_weight_and_no_copy_of_it(stored, around):
    layer = FrozenLinear(D, F, bias=False).to(stored).requires_grad_(False)
    kept = []
    x_ND = drawn(N, D).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda each: each), around():
        layer(x_ND)
    assert {each.data_ptr() for each in kept} == {layer.weight.data_ptr()}


def test_a_trained_weight_takes_torchs_own_way():
    layer = FrozenLinear(D, F)
    x_ND = drawn(N, D)
    layer(x_ND).square().mean().backward()
    twin = nn.Linear(D, F)
    twin.load_state_dict(layer.state_dict())
    twin(x_ND).square().mean().backward()
    assert torch.equal(layer.weight.grad, twin.weight.grad)


def test_patched_layers_keep_their_parameters_and_their_names():
    network = nn.Sequential(nn.Embedding(N, D), nn.Sequential(nn.Linear(D, F), nn.SiLU()))
    before = dict(network.named_parameters())
    patch_linear(network)
    after = dict(network.named_parameters())
    assert list(before) == list(after)
    for name, parameter in before.items():
        assert after[name] is parameter
    assert isinstance(network[0], FrozenEmbedding)
    assert isinstance(network[1][0], FrozenLinear)


def test_an_embedding_casts_the_rows_it_looked_up():
    network = nn.Sequential(nn.Embedding(N, D, dtype=BF16)).requires_grad_(False)
    patch_linear(network)
    ids = torch.tensor([[1, 3], [0, 1]])
    assert torch.equal(network(ids), network[0].weight[ids])
    network[0].dtype = FP32
    assert torch.equal(network(ids), network[0].weight[ids].float())
