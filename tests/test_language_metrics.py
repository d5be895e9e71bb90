"""The report's arithmetic against slow loops and numbers worked out by hand.

T tokens, E experts, L layers.
"""

import itertools
import math

import numpy as np
import pytest

from pipeline.metrics.bootstrap import LEAST_UNITS
from pipeline.metrics.language import (
    Documents,
    Scores,
    entropy,
    max_violation,
    oracle_gain,
    posterior_mix,
    routing,
    verdict,
)

A = Documents("a", np.array([0, 3, 7]), np.array([10, 20]))
B = Documents("b", np.array([0, 2, 4, 9]), np.array([5, 6, 9]))


MANY = tuple(
    Documents(name, np.arange(count + 1) * 3, np.random.default_rng(count).integers(5, 40, count))
    for name, count in (("a", LEAST_UNITS), ("b", 31))
)


def scores(resamples: int = 300) -> Scores:
    """Return scores with two rows over two domains."""
    table = Scores({"a": A, "b": B}, resamples, seed=1)
    table.add("one", {"a": np.array([4.0, 9.0]), "b": np.array([2.0, 3.0, 9.0])})
    table.add("two", {"a": np.array([5.0, 9.5]), "b": np.array([2.5, 3.0, 9.5])})
    return table


def test_documents_count_and_sum_without_their_leading_token():
    assert A.tokens == 5 and B.tokens == 6
    nats_T = np.array([0.0, 1, 2, 0, 3, 4, 5])
    assert A.sums(nats_T).tolist() == [3, 12]


def test_bits_per_byte_and_perplexity_by_hand():
    table, ln2 = scores(), math.log(2)
    assert table.bits_per_byte("one") == pytest.approx({"a": 13 / 30 / ln2, "b": 14 / 20 / ln2})
    assert table.mean("one") == pytest.approx((13 / 30 + 14 / 20) / 2 / ln2)
    assert table.perplexity("one") == pytest.approx({"a": math.exp(13 / 5), "b": math.exp(14 / 6)})
    assert table.nats_per_token("one") == pytest.approx((13 / 5 + 14 / 6) / 2)


def many(resamples: int = 300, seed: int = 1) -> Scores:
    """Return scores over as many documents as an interval needs and a few more."""
    draw = np.random.default_rng(7)
    table = Scores({each.domain: each for each in MANY}, resamples, seed)
    base = {each.domain: draw.gamma(3.0, 4.0, len(each.bytes_n)) for each in MANY}
    table.add("one", base)
    noisy = {name: nats + draw.normal(0.5, 0.3, len(nats)) for name, nats in base.items()}
    table.add("two", noisy)
    return table


def test_intervals_are_those_of_a_loop_over_resamples():
    """Documents are drawn within each domain, by the same generator in the same order."""
    draw, means = np.random.default_rng(1), []
    picked = {
        d.domain: draw.multinomial(len(d.bytes_n), [1 / len(d.bytes_n)] * len(d.bytes_n), 300)
        for d in MANY
    }
    table = many()
    for row in ("one", "two"):
        resampled = []
        for s in range(300):
            each = []
            for d in MANY:
                chosen = np.repeat(np.arange(len(d.bytes_n)), picked[d.domain][s])
                each.append(
                    table.nats[row][d.domain][chosen].sum() / d.bytes_n[chosen].sum() / math.log(2)
                )
            resampled.append(each)
        own = table.intervals(row)
        for d, spread in zip(MANY, np.transpose(resampled), strict=True):
            assert own[d.domain] == pytest.approx(np.percentile(spread, [2.5, 97.5]).tolist())
        resampled = np.mean(resampled, axis=1)
        means.append(resampled)
        assert table.interval(row) == pytest.approx(np.percentile(resampled, [2.5, 97.5]).tolist())
    difference, interval = table.difference("two", "one")
    assert difference == pytest.approx(table.mean("two") - table.mean("one"))
    assert interval == pytest.approx(
        np.percentile(means[1] - means[0], [2.5, 97.5]).tolist()
    )  # paired
    unpaired = np.percentile(np.random.default_rng(5).permutation(means[1]) - means[0], [2.5, 97.5])
    assert interval[1] - interval[0] < 0.6 * (unpaired[1] - unpaired[0])


def test_an_interval_covers_the_truth_as_often_as_it_says():
    """200 made-up test sets of 60 documents: a 95 % interval misses the mean they were drawn from
    about 10 times."""
    draw, hits = np.random.default_rng(0), 0
    for trial in range(200):
        documents = Documents("a", np.arange(61), np.full(60, 100))
        table = Scores({"a": documents}, 400, seed=trial)
        table.add("row", {"a": draw.gamma(4.0, 25.0, 60)})
        low, high = table.interval("row")
        hits += low <= 1 / math.log(2) <= high
    assert 180 <= hits <= 198


def test_the_same_seed_gives_the_same_interval():
    assert many().interval("one") == many().interval("one")
    assert many(seed=2).interval("one") != many().interval("one")


@pytest.mark.parametrize("few", [1, 2, 7, LEAST_UNITS - 1])
@pytest.mark.parametrize("others", [(), (500,), (LEAST_UNITS, 40)])
def test_too_few_documents_of_one_domain_leave_no_interval(few, others):
    counts = {"few": few} | {f"domain {i}": count for i, count in enumerate(others)}
    draw = np.random.default_rng(few)
    documents = {}
    for name, count in counts.items():
        documents[name] = Documents(name, np.arange(count + 1) * 9, np.full(count, 30))
    table = Scores(documents, 100, seed=0)
    for row, more in (("one", 0.0), ("two", 5.0)):
        table.add(row, {name: draw.random(count) + more for name, count in counts.items()})
    assert table.too_few == ("few",)
    assert table.interval("one") is None
    # The others have theirs
    assert list(table.intervals("one")) == list(counts)[1:]
    difference, interval = table.difference("two", "one")
    assert difference > 0 and interval is None and verdict(interval) == "undecided"


def test_the_posterior_ensemble_is_bayes_rule_token_by_token():
    draw = np.random.default_rng(0)
    starts_n, nats_ET = np.array([0, 4, 5, 12]), draw.gamma(2.0, 1.5, (3, 12))
    nats_ET[:, starts_n[:-1]] = 0.0
    wanted = np.zeros(12)
    for start, end in itertools.pairwise(starts_n):
        belief = [1 / 3] * 3
        for t in range(start + 1, end):
            likelihood = [math.exp(-nats_ET[e, t]) for e in range(3)]
            total = sum(b * p for b, p in zip(belief, likelihood, strict=True))
            wanted[t] = -math.log(total)
            belief = [b * p / total for b, p in zip(belief, likelihood, strict=True)]
    np.testing.assert_allclose(posterior_mix(nats_ET, starts_n), wanted, rtol=1e-10, atol=1e-12)


def test_the_posterior_ensemble_survives_long_documents():
    nats_ET = np.array([[0.0] + [1.0] * 5000, [0.0] + [9.0] * 5000])
    found = posterior_mix(nats_ET, np.array([0, 5001]))
    assert np.isfinite(found).all() and found.sum() == pytest.approx(5000 + math.log(2))


@pytest.mark.parametrize(
    ("nats", "gain"), [(3.0, 0.0), (2.0, 1.0), (2.5, 0.5), (3.5, -0.5), (1.5, 1.5)]
)
def test_oracle_gain_is_a_share_of_the_way(nats, gain):
    assert oracle_gain(nats, trunk=3.0, oracle=2.0) == pytest.approx(gain)
    assert (
        oracle_gain(nats, trunk=2.0, oracle=2.0) is None
        and oracle_gain(nats, trunk=2.0, oracle=2.5) is None
    )


def test_entropy_and_violation():
    assert entropy([0.25] * 4) == pytest.approx(math.log(4)) and entropy([1.0, 0.0]) == 0
    assert entropy([0.5, 0.25, 0.25]) == pytest.approx(1.5 * math.log(2))
    assert max_violation([0.25] * 4) == 0 and max_violation([1.0, 0, 0, 0]) == 3
    assert max_violation([0.5, 0.3, 0.2]) == pytest.approx((0.5 - 1 / 3) / (1 / 3))


def test_the_routing_table_by_hand():
    names = ["anchor", "a", "b", "idle"]
    counts = {
        "a": np.array([[10, 80, 10, 0], [0, 50, 50, 0]]),
        "b": np.array([[0, 20, 20, 0], [20, 0, 20, 0]]),  # fewer tokens weigh the same
        "stranger": np.array([[50, 25, 25, 0], [50, 25, 25, 0]]),
    }
    first = {
        "a": np.array([[0, 45, 5, 0], [0, 25, 25, 0]]),
        "b": np.array([[0, 5, 15, 0], [4, 0, 16, 0]]),
        "stranger": np.array([[50, 0, 0, 0], [50, 0, 0, 0]]),
    }
    found = routing(counts, first, names)
    share = {"a": [0.05, 0.65, 0.3, 0], "b": [0.25, 0.25, 0.5, 0], "stranger": [0.5, 0.25, 0.25, 0]}
    assert {d: pytest.approx(s) for d, s in found["share"].items()} == share
    mean = [0.8 / 3, 1.15 / 3, 1.05 / 3, 0]
    assert found["agreement_by_domain"] == pytest.approx(
        {"a": 0.7, "b": 0.775}
    )  # nobody is the stranger's own
    assert found["agreement"] == pytest.approx(0.7375)
    assert found["entropy"] == pytest.approx(-sum(p * math.log(p) for p in mean[:3]))
    assert found["max_entropy"] == pytest.approx(math.log(4))
    assert found["max_violation"] == pytest.approx(1.15 / 3 * 4 - 1)
    assert found["least"] == ["idle", 0.0] and found["most"] == ["a", pytest.approx(1.15 / 3)]
    assert found["dead"] == ["idle"]
    layer = found["layers"][1]
    assert layer["layer"] == 1 and layer["agreement"] == pytest.approx((0.5 + 0.8) / 2)
    assert layer["share"]["b"] == [0.5, 0.0, 0.5, 0.0]
    assert layer["max_violation"] == pytest.approx(
        max(0.0 + 0.5 + 0.5, 0.75, 0.5 + 0.5 + 0.25) / 3 * 4 - 1
    )


def test_routing_without_any_own_expert_has_no_agreement():
    found = routing({"x": np.array([[3, 1]])}, {"x": np.array([[2, 0]])}, ["a", "b"])
    assert found["agreement"] is None and found["layers"][0]["agreement"] is None


@pytest.mark.parametrize(
    ("interval", "word"),
    [
        ((0.01, 0.2), "better"),
        ((-0.2, -0.01), "worse"),
        ((-0.1, 0.1), "tie"),
        ((0.0, 0.1), "tie"),
        ((-0.1, 0.0), "tie"),
        ((0.0, 0.0), "tie"),
        (None, "undecided"),
    ],
)
def test_a_verdict_needs_an_interval_that_leaves_out_zero(interval, word):
    """Another row minus the stack, in bits per byte: above zero the stack is the better one."""
    assert verdict(interval) == word
