"""Low-rank experts against PEFT's own LoRA on the same network, and what becomes of them: merged,
averaged, made from a full expert.

N tokens, D model width, F feed-forward width, r rank.
"""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from pipeline.model.experts import Expert, clone, in_layers, mix
from pipeline.model.kernels import shared_base
from pipeline.model.low_rank import (
    PROJECTIONS,
    DeltaSoup,
    LowRankExpert,
    average,
    compress,
    from_tensors,
    mix_on_base,
)
from pipeline.model.router import Gating, Mixture, Router

D, F, N, RANK, SCALE, LAYERS = 24, 40, 30, 4, 1.5, 3
SIZES = {"hidden_size": D, "intermediate_size": F, "num_attention_heads": 2}
KINDS = {
    "swiglu": (Qwen3MLP, Qwen3Config(**SIZES)),
    "biases": (LlamaMLP, LlamaConfig(**SIZES, mlp_bias=True)),
    "gelu": (LlamaMLP, LlamaConfig(**SIZES, hidden_act="gelu")),
}


def a_base(kind: str = "swiglu", dtype: torch.dtype = torch.float32) -> Expert:
    """Return random frozen networks; the same each time."""
    torch.manual_seed(0)
    made, config = KINDS[kind]
    base = Expert([made(config) for _ in range(LAYERS)])
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.2)
    return base.to(dtype).requires_grad_(False).eval()


def an_expert(base: Expert, seed: int = 0, layers=None) -> LowRankExpert:
    """Return a low-rank expert whose deltas are all random."""
    torch.manual_seed(seed)
    expert = LowRankExpert(base, RANK, SCALE, layers)
    for parameter in expert.parameters():
        nn.init.normal_(parameter, std=0.3)
    return expert


def in_peft(expert: LowRankExpert, layer: int) -> nn.Module:
    """Return one layer's network with PEFT's LoRA around its linears, filled from the expert."""
    network = copy.deepcopy(expert.base.layers[layer])
    options = LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules=list(PROJECTIONS))
    network = inject_adapter_in_model(options, network)
    for name, delta in expert.deltas(layer).items():
        linear = getattr(network, name)
        linear.lora_A["default"].weight.data = delta.lora_A.weight.detach().clone()
        linear.lora_B["default"].weight.data = delta.lora_B.weight.detach().clone()
    return network


def factors_of(network: nn.Module) -> list[nn.Parameter]:
    """Return A and B of each of PEFT's projections."""
    found = []
    for name in PROJECTIONS:
        linear = getattr(network, name)
        found += [linear.lora_A["default"].weight, linear.lora_B["default"].weight]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_peft_computes_with_every_gradient(kind):
    expert = an_expert(a_base(kind))
    peft = in_peft(expert, 1)
    results = []
    for compute, factors in (
        (lambda x: expert(1, x), list(expert.layers[1].parameters())),
        (peft, factors_of(peft)),
    ):
        x_ND = torch.randn(N, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y_ND = compute(x_ND)
        dy_ND = torch.randn(N, D, generator=torch.Generator().manual_seed(2))
        results.append([y_ND, *torch.autograd.grad(y_ND, [x_ND, *factors], dy_ND)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_its_backward_pass_keeps_what_the_network_alone_keeps():
    base = a_base()
    x_ND = torch.randn(N, D)
    kept = []
    full = clone(base)
    for compute in (lambda: an_expert(base)(0, x_ND), lambda: full(0, x_ND)):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel() * (t.shape[0] == N)) or t, lambda t: t
        ):
            compute()
        kept.append(sum(sizes))
    assert kept[0] == kept[1] == N * (D + 2 * F)


def test_under_bf16_it_stays_within_its_rounding_over_a_base_of_either_dtype():
    exact = an_expert(a_base())
    rounded = an_expert(a_base(dtype=torch.bfloat16))
    x_ND = torch.randn(N, D)
    wanted = exact(0, x_ND)
    with torch.autocast("cpu", torch.bfloat16):
        found = exact(0, x_ND)
    for other in (found, rounded(0, x_ND.bfloat16()), rounded(0, x_ND)):
        far = (other.float() - wanted).norm() / wanted.norm()
        assert 0 < far < 0.02
    assert all(p.dtype == torch.float32 for p in rounded.parameters())


def test_a_new_one_is_its_base_and_only_deltas_move():
    base = a_base(dtype=torch.bfloat16)
    expert = LowRankExpert(base, RANK, SCALE, [0, 2])
    x_ND = torch.randn(N, D)
    for layer in range(LAYERS):
        torch.testing.assert_close(expert(layer, x_ND), base(layer, x_ND), rtol=0, atol=0)
    assert expert.own_layers == (0, 2)
    assert sorted(expert.named()) == sorted(
        f"model.layers.{i}.mlp.{p}.lora_{ab}.weight"
        for i in (0, 2)
        for p in PROJECTIONS
        for ab in "AB"
    )
    # neither trained, nor moved, nor stored with it
    assert len(list(expert.parameters())) == len(expert.named()) == 12
    assert not any(p.requires_grad for p in base.parameters())


def test_merged_it_is_the_full_expert_that_computes_the_same():
    base = a_base()
    expert = an_expert(base, layers=[1, 2])
    merged = expert.merged()
    x_ND = torch.randn(N, D)
    for layer in range(LAYERS):
        torch.testing.assert_close(merged(layer, x_ND), expert(layer, x_ND), rtol=1e-5, atol=1e-5)
    assert merged.own_layers == (1, 2) and type(merged) is Expert
    assert (merged(1, x_ND) - base(1, x_ND)).abs().max() > 0.1


def test_stored_tensors_say_rank_and_layers_and_are_not_copied():
    base = a_base()
    expert = an_expert(base, layers=[2])
    tensors = {name: p.detach() for name, p in expert.named().items()}
    again = from_tensors(base, tensors, SCALE)
    x_ND = torch.randn(N, D)
    assert torch.equal(again(2, x_ND), expert(2, x_ND))
    assert again.rank == RANK and again.own_layers == (2,)
    assert {p.data_ptr() for p in again.parameters()} == {t.data_ptr() for t in tensors.values()}
    assert not any(p.requires_grad for p in again.parameters())
    with pytest.raises(RuntimeError, match=r"Missing key.*up_proj\.lora_A"):
        from_tensors(base, {n: t for n, t in tensors.items() if "up_proj" not in n}, SCALE)
    with pytest.raises(ValueError, match="no low-rank delta"):
        from_tensors(base, {}, SCALE)


def test_the_soup_of_deltas_is_the_mean_of_the_merged_experts():
    base = a_base()
    members = [an_expert(base, seed, layers=[0, 1]) for seed in range(3)]
    soup = average(members)
    wanted = average([each.merged() for each in members])
    x_ND = torch.randn(N, D)
    for layer in range(LAYERS):
        torch.testing.assert_close(soup(layer, x_ND), wanted(layer, x_ND), rtol=1e-5, atol=1e-5)
    assert isinstance(soup, LowRankExpert) and soup.rank == 3 * RANK


@pytest.mark.parametrize("layers", [[0, 1], [1]])
def test_a_soup_of_deltas_is_made_of_each_layer_when_it_runs(layers):
    base = a_base()
    members = [an_expert(base, seed, layers=layers) for seed in range(3)]
    whole, soup = average(members), DeltaSoup(members)
    x_ND = torch.randn(N, D)
    for layer in range(LAYERS):
        assert torch.equal(soup(layer, x_ND), whole(layer, x_ND))
    # what it holds is the experts', and stays so
    own = {p.data_ptr() for member in members for p in member.parameters()}
    assert {p.data_ptr() for p in soup.parameters()} == own


def test_a_compressed_expert_is_the_nearest_of_its_rank():
    base = a_base()
    # a full expert whose change is of rank RANK is kept whole by that rank
    exact = an_expert(base).merged()
    x_ND = torch.randn(N, D)
    torch.testing.assert_close(
        compress(exact, base, RANK).expert(1, x_ND), exact(1, x_ND), rtol=1e-4, atol=1e-4
    )
    full = clone(base)
    with torch.no_grad():
        for parameter in full.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    made = compress(full, base, RANK)
    small = made.expert
    for name, delta in small.deltas(1).items():
        change_OI = getattr(full.layers[1], name).weight - getattr(base.layers[1], name).weight
        lost = (change_OI - delta.product_OI).norm()
        # Eckart and Young: what no matrix of that rank can do better
        least = torch.linalg.svdvals(change_OI)[RANK:].norm()
        torch.testing.assert_close(lost, least, rtol=1e-4, atol=1e-5)
    # more rank than a matrix has is no more than the whole matrix
    whole = compress(full, base, D + 8)
    assert whole.kept == whole.whole > made.kept > 0
    torch.testing.assert_close(whole.expert(0, x_ND), full(0, x_ND), rtol=1e-4, atol=1e-4)
    chosen = compress(in_layers(full, base, [1]), base, RANK).expert
    assert chosen.own_layers == (1,)


def routed(tokens: int, experts: int, top_k: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random index_NK and weight_NK, some choices dropped."""
    draw = torch.Generator().manual_seed(tokens)
    index_NK = torch.rand(tokens, experts, generator=draw).topk(top_k).indices
    index_NK[::7, -1] = -1
    return index_NK, torch.rand(tokens, top_k, generator=draw)


@pytest.mark.parametrize("tokens", [1, 63, 300])
@pytest.mark.parametrize("chunk", [1024, 100])
def test_experts_on_one_base_are_the_mixture_of_the_merged_ones(tokens, chunk, monkeypatch):
    """In value, and in the gradients that gates and layers below need; the base is one of them."""
    monkeypatch.setattr(shared_base, "CHUNK_TOKENS", chunk)
    base = a_base()
    deltas = [an_expert(base, seed).requires_grad_(False) for seed in range(3)]
    merged = [base, *(each.merged() for each in deltas)]
    # one expert without any token
    index_NK, weight_NK = routed(tokens, len(merged) - 1)
    results = []
    for join in (
        lambda *given: mix_on_base(base, [base, *deltas], 1, *given),
        lambda *given: mix(merged, 1, *given),
    ):
        x_ND = torch.randn(tokens, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
        weight = weight_NK.clone().requires_grad_()
        y_ND = join(x_ND, index_NK, weight)
        dy_ND = torch.randn(tokens, D, generator=torch.Generator().manual_seed(2))
        results.append([y_ND, *torch.autograd.grad(y_ND, [x_ND, weight], dy_ND)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def test_the_base_runs_once_whatever_the_number_of_experts(monkeypatch):
    base = a_base()
    deltas = [an_expert(base, seed).requires_grad_(False) for seed in range(6)]
    seen = {}

    class Counted(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            for given in args:
                if isinstance(given, torch.Tensor) and set(given.shape) == {D, F}:
                    seen[str(func)] = seen.get(str(func), 0) + 1
            return func(*args, **(kwargs or {}))

    mixture = Mixture(deltas, Router(torch.randn(LAYERS, 6, D), Gating(3))).eval()
    assert mixture.base is base and base not in list(mixture.modules())
    with torch.no_grad(), Counted():
        mixture(1, torch.randn(2, 40, D))
    assert sum(count for name, count in seen.items() if "mm" in name) == 3
    others = [base, a_base()]
    assert Mixture(others, mixture.router).base is None
    assert Mixture([an_expert(each) for each in others], mixture.router).base is None


def test_under_bf16_the_shared_base_stays_within_its_rounding():
    base = a_base()
    deltas = [an_expert(base, seed).requires_grad_(False) for seed in range(3)]
    index_NK, weight_NK = routed(200, 3)
    x_ND = torch.randn(200, D)
    exact = mix_on_base(base, deltas, 1, x_ND, index_NK, weight_NK)
    rounded = []
    with torch.autocast("cpu", torch.bfloat16):
        rounded.append(mix_on_base(base, deltas, 1, x_ND, index_NK, weight_NK))
        # what was cast is cast again after a change
        with torch.no_grad():
            deltas[0].layers[1].up_proj.lora_B.weight.mul_(2)
        rounded.append(mix_on_base(base, deltas, 1, x_ND, index_NK, weight_NK))
    changed = mix_on_base(base, deltas, 1, x_ND, index_NK, weight_NK)
    for found, wanted in zip(rounded, (exact, changed), strict=True):
        assert 0 < (found - wanted).norm() / wanted.norm() < 0.02
    assert (changed - exact).norm() / exact.norm() > 0.05
