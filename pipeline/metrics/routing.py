"""Arithmetic of the report on whole requests: a router's choices, its baselines, intervals. No
model of ours runs here.

N requests, C choices (the experts, and none where there is one), S resamples, G groups of requests
that are drawn together, K choices that count, F features of a request.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray
from scipy import special

from .bootstrap import Interval, PairedBootstrap, interval

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

BINS = 15
# One request given no chance at all would make the mean infinite. Kept where it is: scikit-learn's
# log_loss clips at 2e-16, which would count such a request as 36 instead of 28 nats
LEAST_PROBABILITY = 1e-12
CENTROID_TEMPERATURE = 0.1  # of cosines, which differ by less than logits do


class GroupBootstrap:
    """Intervals of means over requests, by the same draws of whole groups for every row of a table:
    requests on one image are not independent of each other."""

    def __init__(
        self,
        groups: Sequence[str],
        resamples: int,
        seed: int,
    ):
        """Draw groups; groups names that of each request."""
        number: dict[str, int] = {}
        for name in groups:
            number.setdefault(name, len(number))
        numbers = [number[name] for name in groups]
        self._group_N = np.array(numbers, dtype=np.int64)
        # No requests at all are one empty group: nothing is drawn from it, but arrays have a shape
        self._groups = max(1, len(number))
        size_G = np.bincount(self._group_N, minlength=self._groups)
        self._bootstrap = PairedBootstrap([size_G], resamples, seed)
        self.decides = self._bootstrap.decides

    def interval(self, score_N: ndarray) -> Interval | None:
        """Return the 95 % interval of the mean of score_N; None over fewer than LEAST_UNITS
        groups."""
        if not self.decides:
            return None
        return interval(self._means(score_N))

    def difference(self, score_N: ndarray, against_N: ndarray) -> dict[str, Any] | None:
        """Return mean(score_N) - mean(against_N) and its 95 % interval over the same resamples;
        None without requests."""
        if not len(score_N):
            return None
        # Booleans cannot be subtracted
        spread_N = np.subtract(score_N, against_N, dtype=np.float64)
        return {
            "difference": float(spread_N.mean()),
            "interval": self.interval(spread_N),
        }

    def _means(self, score_N: ndarray) -> ndarray:
        """Return mean_S."""
        sum_G = np.bincount(self._group_N, score_N, minlength=self._groups)
        (mean_S,) = self._bootstrap.ratios([sum_G])
        return mean_S


def softmax(logit_NC: ndarray, temperature: float) -> ndarray:
    """Return prob_NC = softmax(logit_NC / temperature)."""
    scaled_NC = logit_NC.astype(np.float64) / temperature
    return special.softmax(scaled_NC, axis=1)


def hits(prob_NC: ndarray, own_N: ndarray, k: int = 1) -> ndarray:
    """Return hit_N: whether a request's own choice is among its k most probable ones."""
    # stable: of equally probable choices the first one is taken, as argmax takes it
    order_NC = np.argsort(-prob_NC, axis=1, kind="stable")
    hit_NK = order_NC[:, :k] == own_N[:, None]
    return hit_NK.any(1)


def confusion(prob_NC: ndarray, own_N: ndarray) -> ndarray:
    """Return count_CC: requests by their own choice (row) and the most probable one (column)."""
    # scikit-learn's refuses to count no requests at all, and warns of a single choice
    width = prob_NC.shape[1]
    pair_N = own_N * width + prob_NC.argmax(1)
    counts = np.bincount(pair_N, minlength=width * width)
    return counts.reshape(width, width)


def recall(count_CC: ndarray) -> list[float | None]:
    """Return per choice the share of its own requests that reached it, from a confusion; None
    without requests."""
    out: list[float | None] = []
    for choice, count_C in enumerate(count_CC):
        total = count_C.sum()
        right = count_C[choice]
        out.append(float(right / total) if total else None)
    return out


def negative_log_likelihood(prob_NC: ndarray, own_N: ndarray) -> float | None:
    """Return the mean negative log-likelihood of the own choices, nats."""
    if not len(own_N):
        return None
    row_N = np.arange(len(own_N))
    own_prob_N = prob_NC[row_N, own_N]
    clipped_N = np.maximum(own_prob_N, LEAST_PROBABILITY)
    nats_N = -np.log(clipped_N)
    return float(nats_N.mean())


def calibration_error(prob_NC: ndarray, own_N: ndarray, bins: int = BINS) -> float | None:
    """Return the expected calibration error of the most probable choice, over equal bins of
    confidence (Guo et al. 2017)."""
    if not len(own_N):
        return None
    error = 0.0
    for filled in reliability(prob_NC, own_N, bins):
        gap = filled["confidence"] - filled["accuracy"]
        error += filled["share"] * abs(gap)
    return error


def reliability(
    prob_NC: ndarray,
    own_N: ndarray,
    bins: int = BINS,
) -> list[dict[str, float]]:
    """Return per filled bin of confidence its share of requests, mean confidence and accuracy."""
    confidence_N = prob_NC.max(1, initial=0.0)
    hit_N = hits(prob_NC, own_N)
    # Bins are closed above, so that a confidence of 1 falls into the last one
    upper_N = np.ceil(confidence_N * bins).astype(int)
    bin_N = np.clip(upper_N - 1, 0, bins - 1)
    out = []
    for i in range(bins):
        inside_N = bin_N == i
        if inside_N.any():
            out.append(
                {
                    "share": float(inside_N.mean()),
                    "confidence": float(confidence_N[inside_N].mean()),
                    "accuracy": float(hit_N[inside_N].mean()),
                }
            )
    return out


def coverage(
    confidence_N: ndarray, hit_N: ndarray, thresholds: Sequence[float]
) -> list[dict[str, float | None]]:
    """Return per threshold the share of requests at or above it, and the accuracy on those (None
    for no request)."""
    out: list[dict[str, float | None]] = []
    for threshold in thresholds:
        kept_N = confidence_N >= threshold
        kept_hit_N = hit_N[kept_N]
        out.append(
            {
                "threshold": float(threshold),
                "coverage": _mean(kept_N),
                "accuracy": _mean(kept_hit_N),
            }
        )
    return out


def auroc(score_N: ndarray, positive_N: ndarray) -> float | None:
    """Return how often a positive has a higher score than a negative, ties by half; None when one
    kind is absent."""
    if positive_N.all() or not positive_N.any():
        return None
    # scikit-learn takes a second to import, which serving a stack need not wait for
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(positive_N, score_N))


def majority(
    train_N: ndarray,
    width: int,
    count: int,
) -> ndarray:
    """Return prob_NC of count requests that all get the shares of the training requests' choices
    train_N."""
    count_C = np.bincount(train_N, minlength=width)
    share_C = count_C / max(1, len(train_N))
    return np.tile(share_C, (count, 1))


def text_only(
    train: Sequence[str],
    train_N: ndarray,
    texts: Sequence[str],
    width: int,
) -> ndarray:
    """Return prob_NC of a router that sees no image: TF-IDF of words and pairs of words, logistic
    regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    # Single characters are words too, as they are not by default: a prompt of digits or signs is a
    # prompt
    word = r"\S+"
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=word)
    # Fitted on the training prompts alone: what only the test asks for has no weight
    train_NF = vectors.fit_transform(train)
    x_NF = vectors.transform(texts)
    return _regression(train_NF, train_N, x_NF, width)


def linear_probe(
    train_NF: ndarray,
    train_N: ndarray,
    x_NF: ndarray,
    width: int,
) -> ndarray:
    """Return prob_NC of a logistic regression on standardised features of frozen networks, train_NF
    and x_NF."""
    mean_F = train_NF.mean(0)
    scale_F = train_NF.std(0) + 1e-6  # a feature that never changes is divided by that
    standard_train_NF = (train_NF - mean_F) / scale_F
    standard_NF = (x_NF - mean_F) / scale_F
    return _regression(standard_train_NF, train_N, standard_NF, width)


def nearest_centroid(
    train_NF: ndarray,
    train_N: ndarray,
    x_NF: ndarray,
    width: int,
) -> ndarray:
    """Return prob_NC from the cosine of x_NF with the mean feature of each choice, both less the
    overall mean."""
    mean_F = train_NF.mean(0)
    present_C = np.isin(np.arange(width), train_N)
    centre_CF = np.zeros((width, len(mean_F)), dtype=mean_F.dtype)
    for choice in np.flatnonzero(present_C):
        own_NF = train_NF[train_N == choice]
        centre_CF[choice] = own_NF.mean(0) - mean_F
    cosine_NC = _unit(x_NF - mean_F) @ _unit(centre_CF).T
    cosine_NC[:, ~present_C] = -1.0  # as far away as can be
    return softmax(cosine_NC, CENTROID_TEMPERATURE)


def _unit(x_NF: ndarray) -> ndarray:
    length_N1 = np.linalg.norm(x_NF, axis=1, keepdims=True)
    return x_NF / np.maximum(length_N1, 1e-12)


def _regression(
    train_NF: "ndarray | csr_matrix",
    train_N: ndarray,
    x_NF: "ndarray | csr_matrix",
    width: int,
) -> ndarray:
    from sklearn.linear_model import LogisticRegression

    prob_NC = np.zeros((x_NF.shape[0], width))
    present = np.unique(train_N)
    # scikit-learn fits no fewer than two choices, and predicts nothing for no requests
    if len(present) == 1 or not x_NF.shape[0]:
        prob_NC[:, present] = 1.0
        return prob_NC
    # Ten times less regularised than by default: prompts are short, and a rival must not be weak
    model = LogisticRegression(max_iter=1000, C=10.0)
    model.fit(train_NF, train_N)
    prob_NC[:, present] = model.predict_proba(x_NF)
    return prob_NC


def consistency(choice_N: ndarray, other_N: ndarray) -> float | None:
    """Return the share of requests whose choice stays the same."""
    return _mean(choice_N == other_N)


def _mean(value_N: ndarray) -> float | None:
    return float(value_N.mean()) if len(value_N) else None
