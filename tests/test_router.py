"""The router against formulas written out, transformers' own balance loss and loops over tokens.

N tokens, D model width, E experts, K experts per token, L layers.
"""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from pipeline.model.experts import Expert
from pipeline.model.router import (
    CoordinatedExpert,
    Gating,
    Mixture,
    Router,
    UniformMixture,
    gate_name,
    within_capacity,
)

L, D, E, N = 2, 8, 4, 40


class Scale(torch.nn.Module):
    """A feed-forward network that multiplies, so that outputs name the expert."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def forward(self, x):
        """Return the input times the factor."""
        return x * self.factor


def experts(count: int = E) -> list[Expert]:
    """Return experts that multiply by 1, 10, 100, ..."""
    return [Expert([Scale(10.0**i) for _ in range(L)]) for i in range(count)]


def a_router(top_k: int = 2, seed: int = 0, **gating) -> Router:
    """Return a router in training mode with random gates."""
    weight_LED = torch.randn(L, E, D, generator=torch.Generator().manual_seed(seed))
    return Router(weight_LED, Gating(top_k, **gating)).train()


def tokens(seed: int = 1, count: int = N) -> torch.Tensor:
    """Return x_ND."""
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_weights_are_the_softmax_over_the_picked_logits(top_k):
    router, x_ND = a_router(top_k), tokens()
    index_NK, weight_NK = router.route(1, x_ND)
    p_NE = (x_ND @ router.gates[1].T).softmax(-1)
    top = p_NE.topk(top_k)
    assert torch.equal(index_NK, top.indices)
    torch.testing.assert_close(weight_NK, top.values / top.values.sum(-1, keepdim=True))


def test_gates_are_exact_under_autocast():
    router, x_ND = a_router(), tokens(count=4000)
    plain = router.route(0, x_ND)
    with torch.autocast("cpu", torch.bfloat16):
        index_NK, weight_NK = router.route(0, x_ND)
    assert torch.equal(index_NK, plain[0]) and torch.equal(weight_NK, plain[1])


@pytest.mark.parametrize("train", [True, False])
def test_temperature_divides_the_logits_and_is_folded_into_the_export(train):
    router, x_ND = a_router(), tokens()
    cold = router.route(0, x_ND)
    router.temperature = 2.5
    router.train(train)
    hot = router.route(0, x_ND)
    assert torch.equal(hot[0], cold[0]) and (hot[1].max(1).values < cold[1].max(1).values).all()
    exported = router.exported()
    assert (
        list(exported)
        == [gate_name(0), gate_name(1)]
        == [f"model.layers.{i}.mlp.gate.weight" for i in range(L)]
    )
    again = Router(torch.stack(list(exported.values())), Gating(2)).eval().route(0, x_ND)
    assert torch.equal(again[0], hot[0])
    torch.testing.assert_close(again[1], hot[1])


def test_a_lone_expert_gets_a_gradient_straight_through_where_plain_renormalised_top_1_has_none():
    router, x_ND = a_router(top_k=1), tokens()
    value_E = torch.tensor([1.0, -2.0, 3.0, 0.5])
    index_NK, weight_NK = router.route(0, x_ND)
    assert torch.equal(weight_NK.detach(), torch.ones(N, 1))
    (weight_NK * value_E[index_NK]).sum().backward()
    probability = a_router(top_k=1)
    p_N1 = (x_ND @ probability.gates[0].T).softmax(-1).gather(1, index_NK)
    (p_N1 * value_E[index_NK]).sum().backward()
    torch.testing.assert_close(router.gates[0].grad, probability.gates[0].grad)
    assert router.gates[0].grad.abs().max() > 0.1
    plain = a_router(top_k=1)
    renormalised_N1 = (x_ND @ plain.gates[0].T).gather(1, index_NK).softmax(-1)
    (renormalised_N1 * value_E[index_NK]).sum().backward()
    assert plain.gates[0].grad.abs().max() == 0


def test_balance_loss_is_transformers_divided_by_k_and_1_at_an_even_load():
    for top_k in (1, 2, 3):
        router, x_ND = a_router(top_k), tokens()
        router.route(1, x_ND)
        theirs = load_balancing_loss_func((x_ND @ router.gates[1].T,), E, top_k)
        torch.testing.assert_close(router.balance_loss(), theirs / top_k)
    even = Router(torch.eye(E).repeat(L, 1, 1), Gating(1)).train()
    even.route(0, 9 * torch.eye(E).repeat(5, 1))
    assert even.balance_loss().item() == pytest.approx(1)
    even.route(0, 9 * torch.eye(E)[:1].repeat(5, 1))
    assert even.balance_loss().item() == pytest.approx(E, rel=1e-2)  # all on one expert


def test_following_the_balance_gradient_evens_the_load():
    x_ND = tokens(count=400) + 1.0
    router = Router(
        torch.randn(1, E, D, generator=torch.Generator().manual_seed(3)) + torch.eye(E, D),
        Gating(2),
    ).train()
    shares = []
    for _ in range(60):
        router.route(0, x_ND)
        loss = router.balance_loss()
        shares.append(router.end_step(0.0)[0].max().item())
        loss.backward()
        with torch.no_grad():
            router.gates[0] -= 0.5 * router.gates[0].grad
        router.gates[0].grad = None
    assert shares[0] > 0.4 and shares[-1] < 0.3


def test_z_loss_is_the_mean_squared_logsumexp():
    router = a_router()
    for layer in range(L):
        router.route(layer, tokens())
    wanted = torch.stack(
        [(tokens() @ g.T).exp().sum(-1).log().square().mean() for g in router.gates]
    ).mean()
    torch.testing.assert_close(router.z_loss(), wanted)
    router.z_loss().backward()
    assert all(g.grad.abs().sum() > 0 for g in router.gates)


def test_the_selection_bias_moves_choices_while_training_but_no_weight():
    router, x_ND = a_router(balance="bias"), tokens()
    before = router.route(0, x_ND)[0]
    router.bias_LE[0, 3] = 50.0
    index_NK, weight_NK = router.route(0, x_ND)
    assert (index_NK == 3).any(1).all() and not (before == 3).any(1).all()
    logits_NE = x_ND @ router.gates[0].T
    torch.testing.assert_close(weight_NK, logits_NE.gather(1, index_NK).softmax(-1))
    assert torch.equal(router.eval().route(0, x_ND)[0], before)
    assert torch.equal(router.exported()[gate_name(0)], router.gates[0])


def test_the_selection_bias_steps_towards_the_underused():
    router = a_router(balance="bias")
    router.route(0, tokens(count=7))
    router.route(0, tokens(seed=5, count=13))  # micro-batches of one step
    chosen = torch.cat(
        [(tokens(s, n) @ router.gates[0].T).topk(2).indices for s, n in ((1, 7), (5, 13))]
    )
    count_E = chosen.flatten().bincount(minlength=E)
    share_LE = router.end_step(0.01)
    torch.testing.assert_close(share_LE[0], count_E / 40)
    torch.testing.assert_close(router.bias_LE[0], 0.01 * torch.sign(0.25 - share_LE[0]))
    assert not router.count_LE.any()
    assert not a_router(balance="aux").bias_LE.any()
    other = a_router(balance="aux")
    other.route(0, tokens())
    other.end_step(0.01)
    assert not other.bias_LE.any()


def test_many_bias_steps_even_the_load():
    x_ND = tokens(count=400) + 1.0
    router = a_router(balance="bias", seed=3)
    shares = []
    for _ in range(300):
        router.route(0, x_ND)
        shares.append(router.end_step(0.05)[0].max().item())
    assert shares[0] > 0.4 and shares[-1] < 0.3


def test_noise_is_drawn_while_training_only_and_follows_the_seed():
    router, x_ND = a_router(noise=1.0), tokens()
    torch.manual_seed(0)
    first = router.route(0, x_ND)[1]
    torch.manual_seed(0)
    assert torch.equal(first, router.route(0, x_ND)[1])
    assert not torch.equal(first, router.route(0, x_ND)[1])
    quiet = a_router().route(0, x_ND)[1]
    assert torch.equal(router.eval().route(0, x_ND)[1], quiet)


def test_noise_has_the_standard_deviation_it_is_given():
    router = Router(torch.zeros(1, 2, D), Gating(2, noise=0.7)).train()
    torch.manual_seed(0)
    index_NK, weight_NK = router.route(0, torch.ones(20_000, D))
    difference_N = weight_NK.detach().logit()[:, 0] * (1 - 2 * index_NK[:, 0])  # of two draws
    assert difference_N.std().item() == pytest.approx(0.7 * 2**0.5, rel=0.03)


def overflow(index_NK, n_experts, slots):
    """Return index_NK after a loop over tokens: all first choices, then all second ones."""
    kept, used = index_NK.clone(), [0] * n_experts
    for k in range(index_NK.shape[1]):
        for n in range(index_NK.shape[0]):
            e = index_NK[n, k].item()
            used[e] += 1
            kept[n, k] = e if used[e] <= slots else -1
    return kept


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("factor", [0.01, 0.5, 1.0, 1.25, 4.0])
def test_capacity_drops_the_overflow_first_choices_first(top_k, factor):
    logits_NE = torch.randn(30, E, generator=torch.Generator().manual_seed(top_k)) + torch.tensor(
        [1.0, 0.5, 0, 0]
    )
    index_NK = logits_NE.topk(top_k).indices
    slots = max(1, int(factor * 30 * top_k / E))
    found = within_capacity(index_NK, E, factor)
    assert torch.equal(found, overflow(index_NK, E, slots))
    assert within_capacity(index_NK, E, None) is index_NK


def test_the_dropped_share_is_reported_and_only_training_drops():
    router, x_ND = a_router(capacity_factor=0.5), tokens()
    index_NK, _ = router.route(0, x_ND)
    assert router.stats[0].dropped == pytest.approx((index_NK < 0).float().mean().item())
    assert 0.4 < router.stats[0].dropped < 0.8
    assert (router.eval().route(0, x_ND)[0] >= 0).all()
    dropless = a_router()
    assert (dropless.route(0, x_ND)[0] >= 0).all() and dropless.stats[0].dropped == 0


def test_a_mixture_weighs_its_experts():
    router, x_BTD = a_router(), tokens().view(4, 10, D)
    y_BTD = Mixture(experts(), router).eval()(1, x_BTD)
    p_NE = (tokens() @ router.gates[1].T).softmax(-1)
    keep_NE = torch.zeros(N, E).scatter(1, p_NE.topk(2).indices, 1.0) * p_NE
    factor_N = (keep_NE / keep_NE.sum(1, keepdim=True)) @ torch.tensor([1.0, 10.0, 100.0, 1000.0])
    torch.testing.assert_close(y_BTD, x_BTD * factor_N.view(4, 10, 1))


def test_uniform_is_the_mean_of_all():
    x_BTD = tokens().view(4, 10, D)
    torch.testing.assert_close(UniformMixture(experts())(0, x_BTD), x_BTD * 1111 / 4)


@pytest.mark.parametrize("bias", [-2.0, 0.0, 3.0])
def test_a_pair_is_a_two_way_softmax_whose_bias_never_favours_the_expert(bias):
    anchor, own = experts(2)
    row_LD = torch.randn(L, D, generator=torch.Generator().manual_seed(0))
    pair, x_BTD = CoordinatedExpert(anchor, own, row_LD, bias), tokens().view(4, 10, D)
    with torch.no_grad():
        pair.bias_L[0] -= 1.0
    for layer in range(L):
        y_BTD = pair(layer, x_BTD)
        logit_BT = x_BTD @ row_LD[layer] + min(bias - (layer == 0), 0.0)
        two_BT2 = torch.stack([torch.zeros_like(logit_BT), logit_BT], -1)
        share_BT2 = two_BT2.softmax(-1)
        torch.testing.assert_close(
            y_BTD, x_BTD * (share_BT2 @ torch.tensor([1.0, 10.0])).unsqueeze(-1)
        )
        torch.testing.assert_close(pair.z[layer], two_BT2.logsumexp(-1).square().mean())
    assert pair.row_LD.requires_grad and torch.equal(pair.row_LD, row_LD)


def test_a_pairs_gate_is_exact_under_autocast():
    anchor, own = experts(2)
    pair, x_BTD = (
        CoordinatedExpert(anchor, own, torch.full((L, D), 0.123), -0.5),
        tokens().view(4, 10, D),
    )
    pair(0, x_BTD)
    exact = pair.z[0].item()
    with torch.autocast("cpu", torch.bfloat16):
        pair(0, x_BTD)
    assert pair.z[0].item() == exact


def test_logits_of_a_gate_are_those_of_a_linear_layer_whatever_the_batch():
    router, x_ND = a_router(), tokens()
    whole = router.eval().route(0, x_ND)
    parts = [router.route(0, x) for x in x_ND.split(7)]
    assert torch.equal(whole[0], torch.cat([p[0] for p in parts]))
    torch.testing.assert_close(F.linear(x_ND, router.gates[0]).topk(2).indices, whole[0])
