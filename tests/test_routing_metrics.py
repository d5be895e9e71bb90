"""The arithmetic of routing against scikit-learn, slow loops, and numbers worked out by hand.

N requests, C choices.
"""

import numpy as np
import pytest
from sklearn.metrics import (
    confusion_matrix,
    log_loss,
    recall_score,
    roc_auc_score,
    top_k_accuracy_score,
)

from pipeline.metrics.routing import (
    GroupBootstrap,
    auroc,
    calibration_error,
    confusion,
    consistency,
    coverage,
    hits,
    linear_probe,
    majority,
    nearest_centroid,
    negative_log_likelihood,
    recall,
    reliability,
    softmax,
    text_only,
)

DRAW = np.random.default_rng(0)
OWN_N = DRAW.integers(0, 4, 300)
LOGIT_NC = DRAW.normal(size=(300, 4)) + 2.0 * np.eye(4)[OWN_N]
PROB_NC = softmax(LOGIT_NC, 1.0)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_accuracy_among_the_first_k_is_scikit_learns(k):
    assert hits(PROB_NC, OWN_N, k).mean() == pytest.approx(
        top_k_accuracy_score(OWN_N, PROB_NC, k=k)
    )


def test_confusion_recall_and_likelihood_are_scikit_learns():
    count_CC = confusion(PROB_NC, OWN_N)
    assert (count_CC == confusion_matrix(OWN_N, PROB_NC.argmax(1), labels=range(4))).all()
    assert recall(count_CC) == pytest.approx(
        recall_score(OWN_N, PROB_NC.argmax(1), average=None).tolist()
    )
    assert negative_log_likelihood(PROB_NC, OWN_N) == pytest.approx(log_loss(OWN_N, PROB_NC))


def test_a_choice_without_requests_has_no_recall():
    assert recall(confusion(PROB_NC[OWN_N < 3], OWN_N[OWN_N < 3]))[3] is None


def test_temperature_softens_and_never_overflows():
    assert softmax(np.array([[1000.0, 0.0]]), 1.0).tolist() == [[1.0, 0.0]]
    warm = softmax(LOGIT_NC, 10.0)
    assert (warm.argmax(1) == PROB_NC.argmax(1)).all() and warm.max() < PROB_NC.max()
    assert np.allclose(warm.sum(1), 1)


def test_calibration_error_by_a_loop_over_bins():
    confidence_N, hit_N = PROB_NC.max(1), PROB_NC.argmax(1) == OWN_N
    wanted = 0.0
    for i in range(15):
        inside = [n for n in range(300) if i / 15 < confidence_N[n] <= (i + 1) / 15]
        if inside:
            wanted += len(inside) / 300 * abs(confidence_N[inside].mean() - hit_N[inside].mean())
    assert calibration_error(PROB_NC, OWN_N) == pytest.approx(wanted)
    assert sum(b["share"] for b in reliability(PROB_NC, OWN_N)) == pytest.approx(1)


def test_calibration_error_of_a_sure_and_wrong_router_is_one_and_of_a_right_one_zero():
    sure = np.eye(2)[[0, 0, 1]]
    assert calibration_error(sure, np.array([1, 1, 0])) == 1.0
    assert calibration_error(sure, np.array([0, 0, 1])) == 0.0


def test_probabilities_that_are_true_have_little_calibration_error():
    """Requests drawn from the probabilities themselves; overstated ones have more."""
    draw = np.random.default_rng(1)
    prob_NC = softmax(draw.normal(size=(20_000, 3)) * 2, 1.0)
    own_N = (draw.random(20_000)[:, None] > prob_NC.cumsum(1)).sum(1)
    assert calibration_error(prob_NC, own_N) < 0.015
    assert calibration_error(softmax(np.log(prob_NC), 0.5), own_N) > 0.05


def test_coverage_keeps_the_sure_requests():
    confidence, hit = np.array([0.9, 0.8, 0.4, 0.3]), np.array([True, True, False, True])
    assert coverage(confidence, hit, (0.0, 0.4, 0.95)) == [
        {"threshold": 0.0, "coverage": 1.0, "accuracy": 0.75},
        {"threshold": 0.4, "coverage": 0.75, "accuracy": pytest.approx(2 / 3)},
        {"threshold": 0.95, "coverage": 0.0, "accuracy": None},
    ]


def test_auroc_is_scikit_learns_with_ties():
    score, positive = DRAW.integers(0, 6, 200).astype(float), DRAW.random(200) < 0.3
    assert auroc(score, positive) == pytest.approx(roc_auc_score(positive, score))
    assert auroc(score, np.zeros(200, bool)) is None


def test_intervals_cover_the_truth_and_differences_are_paired():
    """200 made-up sets of 80 requests; the two rows share most of their luck."""
    draw, inside, widths = np.random.default_rng(3), 0, []
    for trial in range(200):
        score = (draw.random(80) < 0.7).astype(float)
        worse = np.where(draw.random(80) < 0.05, 0.0, score)
        table = GroupBootstrap([str(i) for i in range(80)], 400, trial)
        low, high = table.interval(score)
        inside += low <= 0.7 <= high
        found = table.difference(score, worse)
        assert found["difference"] == pytest.approx(score.mean() - worse.mean())
        widths.append((found["interval"][1] - found["interval"][0]) / (high - low))
    assert 180 <= inside <= 198 and np.mean(widths) < 0.7


def test_requests_on_one_picture_are_drawn_together():
    """Eight copies of each request say no more than one does."""
    score = (np.random.default_rng(4).random(40) < 0.5).astype(float)
    alone = GroupBootstrap([str(i) for i in range(40)], 2000, 0).interval(score)
    copies = GroupBootstrap([str(i) for i in range(40) for _ in range(8)], 2000, 0).interval(
        score.repeat(8)
    )
    assert copies == pytest.approx(alone)
    apart = GroupBootstrap([str(i) for i in range(320)], 2000, 0).interval(score.repeat(8))
    assert apart[1] - apart[0] < 0.5 * (alone[1] - alone[0])


def test_the_baselines_learn_what_they_see_and_nothing_else():
    texts = ["read the text", "what does it say", "count the dots", "how many dots"] * 10
    own_N = np.array([0, 0, 1, 1] * 10)
    prob_NC = text_only(texts, own_N, ["read what it says", "how many are there", "look"], 3)
    assert (
        prob_NC.argmax(1)[:2].tolist() == [0, 1]
        and np.allclose(prob_NC.sum(1), 1)
        and (prob_NC[:, 2] == 0).all()
    )
    assert abs(prob_NC[2, 0] - 0.5) < 0.05  # a prompt of unknown words tells nothing
    assert majority(own_N[:3], 3, 2).tolist() == [[2 / 3, 1 / 3, 0]] * 2


@pytest.mark.parametrize("router", [nearest_centroid, linear_probe])
def test_features_that_tell_the_choices_apart_route(router):
    draw = np.random.default_rng(5)
    middle_CF = draw.normal(size=(3, 16)) * 3 + 10
    own_N, test_N = draw.integers(0, 3, 90), draw.integers(0, 3, 60)
    train, x = (middle_CF[n] + draw.normal(size=(len(n), 16)) for n in (own_N, test_N))
    prob_NC = router(train, own_N, x, 4)
    assert (prob_NC.argmax(1) == test_N).mean() > 0.95 and prob_NC[:, 3].max() < 0.05
    assert np.allclose(prob_NC.sum(1), 1)


def test_baselines_that_saw_one_choice_only_take_it():
    assert text_only(["a b", "c"], np.array([1, 1]), ["x"], 2).tolist() == [[0.0, 1.0]]


def test_consistency_is_the_share_of_equal_choices():
    assert consistency(np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2])) == 0.75
    assert consistency(np.array([]), np.array([])) is None


def test_no_requests_give_no_numbers():
    none_NC, none_N = np.empty((0, 3)), np.empty(0, dtype=int)
    assert (
        negative_log_likelihood(none_NC, none_N) is None
        and calibration_error(none_NC, none_N) is None
    )
    assert coverage(np.empty(0), np.empty(0, bool), (0.5,))[0]["coverage"] is None
    assert GroupBootstrap([], 10, 0).interval(np.empty(0)) is None
    assert GroupBootstrap([], 10, 0).difference(np.empty(0), np.empty(0)) is None
