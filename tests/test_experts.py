"""Experts and the sparse mixture against a dense reference that runs every expert on every token.

N tokens, D model width, E experts, K experts per token.
"""

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from pipeline.model.experts import (
    BLOCK_ROWS,
    Expert,
    Soup,
    average,
    clone,
    from_tensors,
    in_layers,
    mix,
    reinit_like,
)

D, F, LAYERS = 12, 20, 2
KINDS = ((Qwen3Config, Qwen3MLP), (LlamaConfig, LlamaMLP), (MistralConfig, MistralMLP))


def an_expert(seed: int = 0, kind=KINDS[0]) -> Expert:
    """Return a random expert with weights large enough that outputs differ clearly."""
    torch.manual_seed(seed)
    config, network = kind
    expert = Expert(
        [
            network(config(hidden_size=D, intermediate_size=F, num_attention_heads=2))
            for _ in range(LAYERS)
        ]
    )
    for parameter in expert.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return expert


def dense(experts, layer, x_ND, index_NK, weight_NK):
    """Return y_ND with every expert run on every token, one token and one choice at a time."""
    every_END = torch.stack([e(layer, x_ND) for e in experts])
    rows = []
    for n in range(len(x_ND)):
        chosen = zip(index_NK[n].tolist(), weight_NK[n], strict=True)
        rows.append(sum((w * every_END[e, n] for e, w in chosen if e >= 0), torch.zeros(D)))
    return torch.stack(rows)


CHOICES = {
    "mixed": [[0, 1], [2, 1], [1, 0], [3, 2], [2, 3]],
    "some experts without a token": [[2, 0], [0, 2], [2, 0], [0, 2], [2, 0]],
    "second choices dropped": [[0, -1], [2, 1], [1, -1], [-1, 2], [2, 3]],
    "a token that lost both": [[0, 1], [-1, -1], [1, 0], [3, 2], [2, 3]],
    "nothing left": [[-1, -1]] * 5,
    "one each": [[3], [1], [0], [2], [3]],
    "all four": [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1], [0, 2, 1, 3]],
}


@pytest.mark.parametrize("choice", CHOICES)
def test_mix_is_the_dense_sum_in_value_and_every_gradient(choice):
    experts = [an_expert(i) for i in range(4)]
    index_NK = torch.tensor(CHOICES[choice])
    x_ND, weight_NK = torch.randn(5, D), torch.rand(index_NK.shape)
    dy_ND = torch.randn(5, D)
    results = []
    for compute in (mix, dense):
        x, w = x_ND.clone().requires_grad_(), weight_NK.clone().requires_grad_()
        y_ND = compute(experts, 1, x, index_NK, w)
        inputs = [x, w, *(p for e in experts for p in e.layers[1].parameters())]
        gradients = [torch.zeros_like(p) for p in inputs]
        if y_ND.requires_grad:
            found = torch.autograd.grad((y_ND * dy_ND).sum(), inputs, allow_unused=True)
            gradients = [z if g is None else g for z, g in zip(gradients, found, strict=True)]
        results.append([y_ND, *gradients])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


def test_mix_under_bf16_autocast_stays_within_its_rounding():
    experts = [an_expert(i) for i in range(3)]
    x_ND, weight_NK = torch.randn(64, D), torch.rand(64, 2)
    index_NK = torch.rand(64, 3).topk(2).indices
    exact = mix(experts, 0, x_ND, index_NK, weight_NK)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = mix(experts, 0, x_ND, index_NK, weight_NK)
    assert 0 < (rounded - exact).abs().max() < 0.03 * exact.abs().max()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind[1].__name__)
def test_copies_of_a_frozen_expert_are_trainable_and_independent(kind):
    frozen = an_expert(kind=kind).requires_grad_(False)
    for copy in (clone(frozen), reinit_like(frozen)):
        assert all(p.requires_grad for p in copy.parameters())
        copy(0, torch.randn(3, D)).square().sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in copy.layers[0].parameters())
        before = {n: p.clone() for n, p in frozen.named().items()}
        with torch.no_grad():
            for parameter in copy.parameters():
                parameter.add_(1)
        assert all(torch.equal(p, before[n]) for n, p in frozen.named().items())
    assert not any(p.requires_grad for p in frozen.parameters())


def test_clone_copies_weights_and_fresh_draws_them_at_the_models_own_scale():
    original = an_expert()
    x_ND = torch.randn(4, D)
    assert torch.equal(clone(original)(1, x_ND), original(1, x_ND))
    torch.manual_seed(1)
    new, wide = reinit_like(original), reinit_like(original, d_ff=4096)
    assert {n: p.shape for n, p in new.named().items()} == {
        n: p.shape for n, p in original.named().items()
    }
    assert not torch.equal(new(1, x_ND), original(1, x_ND))
    assert wide.layers[0].up_proj.weight.shape == (4096, D) and wide.layers[
        0
    ].down_proj.weight.shape == (D, 4096)
    assert wide.layers[1].up_proj.weight.std().item() == pytest.approx(
        0.02, rel=0.03
    )  # Qwen3's initializer_range
    assert original.layers[0].config.intermediate_size == F
    torch.manual_seed(1)
    assert torch.equal(reinit_like(original)(0, x_ND), new(0, x_ND))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind[1].__name__)
def test_an_expert_around_stored_tensors_copies_nothing_and_is_frozen(kind):
    original = an_expert(kind=kind)
    tensors = {n: p.detach().clone() for n, p in original.named().items()}
    expert, x_ND = from_tensors(an_expert(7, kind), tensors), torch.randn(4, D)
    assert all(torch.equal(expert(i, x_ND), original(i, x_ND)) for i in range(LAYERS))
    assert {n: p.data_ptr() for n, p in expert.named().items()} == {
        n: t.data_ptr() for n, t in tensors.items()
    }
    assert not any(p.requires_grad for p in expert.parameters()) and not expert.training
    copy = clone(expert)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensors[n], p) for n, p in original.named().items())
    rounded = from_tensors(original, {n: t.bfloat16() for n, t in tensors.items()})
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    with pytest.raises(RuntimeError, match='Unexpected key.*"extra"'):
        from_tensors(original, tensors | {"extra": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"layers\.0\.up_proj\.weight.*\[2\].*\[20, 12\]"):
        from_tensors(original, tensors | {"model.layers.0.mlp.up_proj.weight": torch.zeros(2)})


@pytest.mark.parametrize("tokens", [1, BLOCK_ROWS - 1, BLOCK_ROWS, 3 * BLOCK_ROWS + 1])
def test_blocks_of_any_length_reach_the_networks_as_whole_blocks(tokens):
    experts, seen = [an_expert(i) for i in range(2)], []
    index_NK, weight_NK, x_ND = (
        torch.randint(2, (tokens, 1)),
        torch.ones(tokens, 1),
        torch.randn(tokens, D),
    )
    wanted = dense(experts, 0, x_ND, index_NK, weight_NK)
    for expert in experts:
        expert.register_forward_pre_hook(lambda _module, args: seen.append(len(args[1])))
    torch.testing.assert_close(
        mix(experts, 0, x_ND, index_NK, weight_NK), wanted, rtol=1e-5, atol=1e-5
    )
    assert len(seen) == 2 and all(rows % BLOCK_ROWS == 0 for rows in seen)


def test_average_is_the_mean_of_the_weights_and_leaves_the_experts_alone():
    experts = [an_expert(i) for i in range(3)]
    soup = average(experts)
    for name, parameter in soup.named().items():
        mean = sum(e.named()[name].detach() for e in experts) / 3
        torch.testing.assert_close(parameter, mean)
        assert not parameter.requires_grad
    assert all(p.requires_grad for e in experts for p in e.parameters())


def test_a_soup_computes_what_the_mean_of_the_weights_does():
    experts = [an_expert(i) for i in range(3)]
    x_BTD = torch.randn(2, 3, D)
    base = an_expert(7)
    chosen = [in_layers(expert, base, (1,)) for expert in experts]
    for members in (experts, chosen):
        mean = average(members)
        for layer in range(LAYERS):
            assert torch.equal(Soup(members)(layer, x_BTD), mean(layer, x_BTD))


def test_names_are_those_of_a_dense_checkpoint():
    assert sorted(an_expert().named()) == sorted(
        f"model.layers.{i}.mlp.{p}_proj.weight"
        for i in range(LAYERS)
        for p in ("gate", "up", "down")
    )
