"""What hides one document in statistics: how much a document can change them, and how much noise
that takes.

L layers, B documents, D model width.
"""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from pipeline.data.text.shards import Shards
from pipeline.families.ffn_moe.document_means import (
    Centre,
    all_documents,
    clipped,
    document_means,
    noised,
)
from pipeline.families.ffn_moe.parts import new_trunk
from pipeline.model.gaussian_mechanism import least_sigma
from pipeline.model.router_init import FeatureStatistics
from pipeline.protocols import quiet
from pipeline.store.expert_package import Noise
from tests import small

LAYERS = (0, 1)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0, 50.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_sigma_is_the_least_that_keeps_the_promise(epsilon, delta):
    """Theorem 8 of Balle and Wang, by another library's normal distribution."""

    def found(sigma):
        half, shift = 1 / (2 * sigma), epsilon * sigma
        below = math.exp(epsilon + stats.norm.logcdf(-half - shift))
        return stats.norm.cdf(half - shift) - below

    sigma = least_sigma(epsilon, delta)
    assert found(sigma) <= delta * (1 + 1e-6)
    assert found(sigma * 0.999) > delta


def test_sigma_is_less_than_the_classical_one_and_hides_what_it_says():
    classical = math.sqrt(2 * math.log(1.25 / 1e-5))
    assert 0.7 * classical < least_sigma(1.0, 1e-5) < 0.8 * classical
    # The test that tells the two sets apart best is right no more often than is promised
    sigma = least_sigma(1.0, 1e-2)
    draw = np.random.default_rng(0).normal(0, sigma, 10**6)
    for threshold in np.linspace(-3, 6, 19):
        with_it, without = (draw + 1 > threshold).mean(), (draw > threshold).mean()
        assert with_it <= math.e * without + 1e-2 + 2e-3


@pytest.mark.parametrize(("epsilon", "delta"), [(0, 0.1), (1, 0), (1, 1), (-1, 0.1), (101, 0.1)])
def test_what_promises_nothing_is_refused(epsilon, delta):
    with pytest.raises(ValueError, match="promise nothing"):
        least_sigma(epsilon, delta)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """Settings, trunk and its network, shards and the documents of one domain."""
    cfg = small.config()
    shards = Shards(*small.write_shards(tmp_path_factory.mktemp("means") / "shards"))
    torch.manual_seed(0)
    trunk, dummy = new_trunk(cfg, shards)
    return cfg, trunk, dummy, shards, all_documents(shards, "alpha")


def means(network, documents) -> torch.Tensor:
    cfg, trunk, dummy, _, _ = network
    return torch.cat(list(document_means(cfg, trunk, dummy, LAYERS, documents, quiet)))


def centre(scale: float) -> Centre:
    mean_LD = torch.randn(2, 16, generator=torch.Generator().manual_seed(1)).double()
    return Centre(mean_LD, torch.full((2,), scale).double())


def test_every_document_is_read_held_out_or_not(network):
    _, _, _, shards, documents = network
    wanted = sum(shards.count(split, "alpha").documents for split in ("train", "valid", "test"))
    assert len(documents) == wanted
    assert all(document[0] == shards.end_id for document in documents)


def test_a_documents_mean_is_of_it_alone_whatever_it_is_read_with(network):
    cfg, trunk, dummy, _, documents = network
    together_BLD = means(network, documents)
    for number in (0, 17, len(documents) - 1):
        (alone_LD,) = means(network, documents[number : number + 1])
        torch.testing.assert_close(alone_LD, together_BLD[number], rtol=1e-4, atol=1e-5)
        # The same by sums over tokens, as statistics are made
        sums = FeatureStatistics.empty(2, 16)
        ids_T = torch.from_numpy(documents[number].astype(np.int64))[: cfg.trunk.context_tokens]
        with torch.no_grad():
            trunk.hidden(ids_T[None], sums.observe(dummy))
        torch.testing.assert_close(alone_LD, sums.mean_LD, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 0.1, 100.0])
def test_no_document_moves_what_is_given_by_more_than_the_sensitivity(network, scale):
    _, _, _, _, documents = network
    v_BLD = clipped(means(network, documents), centre(scale), clip=0.5)
    lengths_BL = v_BLD.norm(dim=-1)
    assert (lengths_BL <= 1 + 1e-12).all()
    count_B1 = torch.ones(len(documents), 1)
    all_of_it = torch.cat([v_BLD.flatten(1), count_B1], 1).norm(dim=1)
    assert (all_of_it <= math.sqrt(2 + 1) + 1e-12).all()
    # Documents near the centre count as far as they are from it
    assert (lengths_BL.max() < 0.9) == (scale == 100.0)


def test_noise_has_the_size_that_is_promised_and_the_means_stay_theirs():
    noise, documents = Noise(8.0, 1e-5, 0.5), 10_000
    place = centre(2.0)
    wanted_LD = place.mean_LD + 0.25
    sum_LD = clipped(wanted_LD[None].repeat(1, 1, 1), place, noise.clip)[0] * documents
    found = []
    for seed in range(300):
        made = noised(sum_LD, documents, place, noise, np.random.default_rng(seed))
        found.append(made["sum"] / made["tokens"])
    found_NLD = torch.stack(found)
    inside_LD = place.mean_LD + sum_LD / documents * noise.clip * 2.0
    torch.testing.assert_close(found_NLD.mean(0).double(), inside_LD, rtol=0, atol=2e-4)
    sigma = least_sigma(8.0, 1e-5) * math.sqrt(3) * noise.clip * 2.0 / documents
    assert found_NLD.std(0).mean().item() == pytest.approx(sigma, rel=0.05)


def test_second_moments_that_were_left_out_are_the_publics_around_the_own_mean():
    draw = torch.Generator().manual_seed(2)
    spread_DD = torch.randn(16, 16, generator=draw).double()
    statistics = []
    for shift in (0.0, 3.0):
        x_ND = torch.randn(20_000, 16, generator=draw).double() @ spread_DD + shift
        gram_LDD = (x_ND.T @ x_ND)[None]
        statistics.append(FeatureStatistics(x_ND.sum(0)[None], gram_LDD, len(x_ND)))
    public, own = statistics
    found = public.around(own.sum_LD, own.tokens)
    assert found.tokens == own.tokens
    error = (found.mean_gram_DD(0) - own.mean_gram_DD(0)).norm() / own.mean_gram_DD(0).norm()
    assert error < 0.02
    assert (public.mean_gram_DD(0) - own.mean_gram_DD(0)).norm() > 10 * error
    assert public.is_possible()
    assert not FeatureStatistics(own.sum_LD * 50, own.gram_LDD, own.tokens).is_possible()
    # Lengths are those of text, and no inputs have these products
    for forged in (-own.gram_LDD, own.gram_LDD.triu() * 2):
        diagonal = torch.eye(16, dtype=torch.bool)
        gram_LDD = torch.where(diagonal, own.gram_LDD, forged)
        assert not FeatureStatistics(own.sum_LD * 0, gram_LDD, own.tokens).is_possible()
