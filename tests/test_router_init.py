"""Sufficient statistics and closed-form gates against numpy and scikit-learn.

N tokens, D model width, E experts, L layers.
"""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from pipeline.model.router_init import (
    SQUARE_ROWS,
    FeatureStatistics,
    centroid,
    in_a_row,
    random,
    ridge,
    uniform,
)

L, D, E = 2, 6, 3


def inputs(tokens: int, seed: int) -> np.ndarray:
    """Return x_LND of one domain, with a mean of its own and correlated columns."""
    draw = np.random.default_rng(seed)
    return draw.normal(size=(L, tokens, D)) @ draw.normal(size=(D, D)) + draw.normal(size=D)


def summed(x_LND: np.ndarray, batches=(None,)) -> FeatureStatistics:
    """Return statistics of x_LND, seen through an observed network in batches of 2 sequences."""
    sums = FeatureStatistics.empty(L, D)
    ffn = sums.observe(lambda layer, x: x)
    for rows in np.array_split(np.arange(x_LND.shape[1]), len(batches)):
        for layer in range(L):
            ffn(layer, torch.tensor(x_LND[layer][rows], dtype=torch.float32).view(2, -1, D))
    return sums


TOKENS = (40, 90, 20)
TEXT = [inputs(n, seed) for seed, n in enumerate(TOKENS)]
PARTS = [summed(x) for x in TEXT]


def test_sums_are_those_of_numpy_whatever_the_batches():
    x_LND = inputs(24, 7)
    for batches in ((None,), (None,) * 3):
        found = summed(x_LND, batches)
        assert found.tokens == 24
        np.testing.assert_allclose(found.sum_LD, x_LND.sum(1), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            found.gram_LDD, np.einsum("lni,lnj->lij", x_LND, x_LND), rtol=1e-4, atol=1e-4
        )
        np.testing.assert_allclose(found.mean_LD, x_LND.mean(1), rtol=1e-5, atol=1e-5)


def test_watching_changes_nothing_and_stays_exact_under_autocast():
    x_LND = inputs(64, 5)
    sums = FeatureStatistics.empty(L, D)
    seen = []
    ffn = sums.observe(lambda layer, x: seen.append((layer, x)) or x * 2)
    x = torch.tensor(x_LND[0], dtype=torch.float32).view(2, -1, D).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = ffn(0, x)
    assert seen[0][0] == 0 and seen[0][1] is x and torch.equal(y, x * 2)
    exact = x_LND[0].T @ x_LND[0]
    assert (
        np.abs(sums.gram_LDD[0].numpy() - exact).max() < 1e-5 * np.abs(exact).max()
    )  # bf16 would leave 1e-3
    assert not sums.gram_LDD.requires_grad


def test_stored_statistics_come_back():
    back = FeatureStatistics.from_tensors(PARTS[0].tensors())
    assert back.tokens == PARTS[0].tokens
    # squares stay as they are stored and mapped; what is computed of them is in fp64
    assert back.gram_LDD.dtype == torch.float32
    assert back.mean_gram_DD(0).dtype == torch.float64
    torch.testing.assert_close(back.gram_LDD.double(), PARTS[0].gram_LDD, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(back.sum_LD, PARTS[0].sum_LD, rtol=1e-6, atol=1e-5)
    assert {str(t.dtype) for t in PARTS[0].tensors().values()} == {"torch.float32", "torch.int64"}


def test_a_mixture_without_some_of_its_domains_has_the_mean_of_the_others():
    parts = [inputs(5 * 7, seed) for seed in range(3)]
    mixed = FeatureStatistics.empty(L, D, domains=3)
    ffn = mixed.observe(lambda layer, x: x)
    # Rows of the domains in turn, 15 of 7 tokens, in batches that end anywhere
    rows = [(m, parts[m][:, 7 * i : 7 * i + 7]) for i in range(5) for m in range(3)]
    for batch in (rows[:4], rows[4:8], rows[8:]):
        for layer in range(L):
            ffn(layer, torch.tensor(np.stack([x[layer] for _, x in batch]), dtype=torch.float32))
    back = FeatureStatistics.from_tensors(mixed.tensors())
    for gone in ((1,), (0, 2)):
        wanted = np.concatenate([parts[m] for m in range(3) if m not in gone], 1)
        found = back.without(gone)
        assert found.tokens == wanted.shape[1]
        np.testing.assert_allclose(found.mean_LD, wanted.mean(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.mean_gram_DD(1), back.mean_gram_DD(1))
    assert back.without((0, 1, 2)) is back and PARTS[0].without((0,)) is PARTS[0]
    last = back.of_layers([1]).without((1,))
    torch.testing.assert_close(last.sum_LD[0], back.without((1,)).sum_LD[1])
    np.testing.assert_allclose(mixed.sum_LD, np.concatenate(parts, 1).sum(1), rtol=1e-5, atol=1e-4)


def lead(weight_LED: torch.Tensor) -> np.ndarray:
    """Return by how much a domain's mean input favours its own expert over the mean of the others,
    per layer."""
    mean_LED = np.stack([x.mean(1) for x in TEXT], 1)
    score_LEE = np.einsum("led,lfd->lef", mean_LED, weight_LED.double().numpy())
    off = ~np.eye(E, dtype=bool)
    return np.array([np.diagonal(s).mean() - s[off].mean() for s in score_LEE])


@pytest.mark.parametrize("margin", [1.0, 4.0])
def test_both_closed_forms_have_the_margin_they_are_asked_for(margin):
    for weight_LED in (centroid(PARTS, margin), ridge(PARTS, 1e-2, margin)):
        np.testing.assert_allclose(lead(weight_LED), margin, rtol=1e-4)
        assert weight_LED.dtype == torch.float32 and weight_LED.shape == (L, E, D)


def directions(weight_LED) -> np.ndarray:
    """Return weight_LED with rows of length 1."""
    weight_LED = np.asarray(weight_LED, dtype=np.float64)
    return weight_LED / np.linalg.norm(weight_LED, axis=-1, keepdims=True)


@pytest.mark.parametrize("penalty", [1e-2, 1.0, 30.0])
def test_ridge_is_scikit_learns_over_all_tokens_each_domain_weighing_the_same(penalty):
    weight_LED = ridge(PARTS, penalty, 1.0)
    for layer in range(L):
        x_ND = np.concatenate([x[layer] for x in TEXT])
        own_NE = np.repeat(np.eye(E), TOKENS, axis=0)
        weight_N = np.repeat([1 / n / E for n in TOKENS], TOKENS)
        power = (weight_N[:, None] * x_ND**2).sum() / D
        model = Ridge(alpha=penalty * power, fit_intercept=False).fit(
            x_ND, own_NE, sample_weight=weight_N
        )
        np.testing.assert_allclose(
            directions(weight_LED)[layer], directions(model.coef_), atol=2e-4
        )


def test_a_ridge_solves_the_mean_of_all_domains_whatever_their_number_and_width():
    width, domains = 2 * SQUARE_ROWS + 7, 17
    torch.manual_seed(0)
    parts = []
    for _ in range(domains):
        x_ND = torch.randn(40, width) + torch.randn(width)
        gram_DD = x_ND.T @ x_ND
        parts.append(FeatureStatistics(x_ND.double().sum(0)[None], gram_DD[None], 40))
    mean_DD = torch.stack([part.gram_LDD[0].double() / 40 for part in parts]).mean(0)
    mean_DD += 0.1 * mean_DD.diagonal().mean() * torch.eye(width)
    means_ED = torch.cat([part.mean_LD for part in parts])
    wanted = torch.linalg.solve(mean_DD, means_ED.mT).mT
    np.testing.assert_allclose(
        directions(ridge(parts, 0.1, 1.0)[0]), directions(wanted), rtol=0, atol=1e-7
    )


def test_statistics_of_layers_in_a_row_are_not_copied():
    whole = FeatureStatistics(torch.randn(3, 4), torch.randn(3, 4, 4), 7)
    for layers in ([0, 1, 2], [1, 2], [2]):
        assert in_a_row(layers)
        chosen = whole.of_layers(layers).gram_LDD
        assert torch.equal(chosen, whole.gram_LDD[layers])
        assert chosen.data_ptr() == whole.gram_LDD[layers[0]].data_ptr()
    assert not in_a_row([0, 2]) and not in_a_row([])
    apart = whole.of_layers([0, 2])
    assert torch.equal(apart.gram_LDD, whole.gram_LDD[[0, 2]])
    assert torch.equal(apart.sum_LD, whole.sum_LD[[0, 2]])


def test_rows_of_a_ridge_have_one_length():
    lengths = ridge(PARTS, 1e-2, 4.0).norm(dim=-1)
    torch.testing.assert_close(lengths, lengths[:, :1].expand(L, E))


def test_centroid_rows_point_at_the_domains_means():
    mean_LED = np.stack([x.mean(1) for x in TEXT], 1)
    centred = mean_LED - mean_LED.mean(1, keepdims=True)
    np.testing.assert_allclose(directions(centroid(PARTS, 2.0)), directions(centred), atol=1e-4)


def test_uniform_is_zero_and_random_follows_the_generator():
    assert torch.equal(uniform(PARTS), torch.zeros(L, E, D))
    torch.manual_seed(0)
    first = random(PARTS, std=0.5)
    torch.manual_seed(0)
    assert torch.equal(first, random(PARTS, std=0.5)) and not torch.equal(
        first, random(PARTS, std=0.5)
    )
    assert random([FeatureStatistics.empty(L, 4000)] * E).std().item() == pytest.approx(
        0.02, rel=0.03
    )


@pytest.mark.parametrize("same", ["one expert", "twins"])
def test_domains_that_cannot_be_told_apart_give_finite_gates(same):
    parts = PARTS[:1] if same == "one expert" else [PARTS[0], PARTS[0]]
    for weight_LED in (centroid(parts, 4.0), ridge(parts, 1e-2, 4.0)):
        assert weight_LED.isfinite().all() and weight_LED.abs().max() < 1e3
