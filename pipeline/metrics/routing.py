"""Arithmetic of the report on whole requests: a router's choices, its baselines, intervals. No
model of ours runs here.

N requests, C choices (the experts, and none where there is one), S resamples, G groups of requests
that are drawn together, K choices that count, F features of a request.
"""

from collections.abc import Sequence

import numpy as np

CONFIDENCE = (2.5, 97.5)  # percentiles of a 95 % interval
BINS = 15


class Resamples:
    """Paired bootstrap: the same draws of groups for every row of a table, so differences are taken
    within a draw."""

    def __init__(self, groups: Sequence[str], resamples: int, seed: int):
        """Draw whole groups, as requests on one image are not independent of each other."""
        names = {name: i for i, name in enumerate(dict.fromkeys(groups))}
        self._group_N = np.array([names[g] for g in groups], dtype=np.int64)
        count = max(1, len(names))
        draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)
        self._weight_SG = draws.astype(np.float32)
        self._size_G = np.bincount(self._group_N, minlength=count).astype(np.float64)

    def interval(self, score_N: np.ndarray) -> list[float] | None:
        """Return the 95 % interval of the mean of score_N; None where there is nothing to draw
        from."""
        return self._ends(self._means(score_N)) if len(score_N) else None

    def difference(self, score_N: np.ndarray, against_N: np.ndarray) -> dict | None:
        """Return mean(score_N) - mean(against_N) and its 95 % interval over the same resamples."""
        if not len(score_N):
            return None
        spread_N = np.asarray(score_N, dtype=np.float64) - np.asarray(against_N, dtype=np.float64)
        return {"difference": float(spread_N.mean()), "interval": self._ends(self._means(spread_N))}

    def _means(self, score_N: np.ndarray) -> np.ndarray:
        """Return mean_S."""
        sum_G = np.bincount(
            self._group_N, np.asarray(score_N, dtype=np.float64), minlength=len(self._size_G)
        )
        return (self._weight_SG @ sum_G) / (self._weight_SG @ self._size_G)

    @staticmethod
    def _ends(mean_S: np.ndarray) -> list[float]:
        return [float(x) for x in np.percentile(mean_S, CONFIDENCE)]


def softmax(logit_NC: np.ndarray, temperature: float) -> np.ndarray:
    """Return prob_NC = softmax(logit_NC / temperature)."""
    scaled_NC = logit_NC.astype(np.float64) / temperature
    weight_NC = np.exp(scaled_NC - scaled_NC.max(1, keepdims=True, initial=-np.inf))
    return weight_NC / weight_NC.sum(1, keepdims=True)


def hits(prob_NC: np.ndarray, own_N: np.ndarray, k: int = 1) -> np.ndarray:
    """Return hit_N: whether a request's own choice is among its k most probable ones."""
    first_NK = np.argsort(-prob_NC, axis=1, kind="stable")[:, :k]
    return (first_NK == own_N[:, None]).any(1)


def confusion(prob_NC: np.ndarray, own_N: np.ndarray) -> np.ndarray:
    """Return count_CC: requests by their own choice (row) and the most probable one (column)."""
    width = prob_NC.shape[1]
    pair_N = own_N * width + prob_NC.argmax(1)
    return np.bincount(pair_N, minlength=width * width).reshape(width, width)


def recall(count_CC: np.ndarray) -> list[float | None]:
    """Return per choice the share of its own requests that reached it, from a confusion; None
    without requests."""
    return [float(row[i] / row.sum()) if row.sum() else None for i, row in enumerate(count_CC)]


def nats(prob_NC: np.ndarray, own_N: np.ndarray) -> float | None:
    """Return the mean negative log-likelihood of the own choices, nats."""
    if not len(own_N):
        return None
    return float(-np.log(np.maximum(prob_NC[np.arange(len(own_N)), own_N], 1e-12)).mean())


def calibration_error(prob_NC: np.ndarray, own_N: np.ndarray, bins: int = BINS) -> float | None:
    """Return the expected calibration error of the most probable choice, over equal bins of
    confidence."""
    return sum(
        b["share"] * abs(b["confidence"] - b["accuracy"]) for b in reliability(prob_NC, own_N, bins)
    ) or (0.0 if len(own_N) else None)


def reliability(prob_NC: np.ndarray, own_N: np.ndarray, bins: int = BINS) -> list[dict]:
    """Return per filled bin of confidence its share of requests, mean confidence and accuracy."""
    confidence_N, hit_N = prob_NC.max(1, initial=0.0), hits(prob_NC, own_N)
    bin_N = np.clip(np.ceil(confidence_N * bins).astype(int) - 1, 0, bins - 1)
    out = []
    for i in range(bins):
        inside_N = bin_N == i
        if inside_N.any():
            share, confidence = float(inside_N.mean()), float(confidence_N[inside_N].mean())
            out.append(
                {
                    "share": share,
                    "confidence": confidence,
                    "accuracy": float(hit_N[inside_N].mean()),
                }
            )
    return out


def coverage(
    confidence_N: np.ndarray, hit_N: np.ndarray, thresholds: Sequence[float]
) -> list[dict]:
    """Return per threshold the share of requests at or above it, and the accuracy on those (None
    for no request)."""
    out = []
    for threshold in thresholds:
        kept_N = confidence_N >= threshold
        accuracy = float(hit_N[kept_N].mean()) if kept_N.any() else None
        share = float(kept_N.mean()) if len(kept_N) else None
        out.append({"threshold": float(threshold), "coverage": share, "accuracy": accuracy})
    return out


def auroc(score_N: np.ndarray, positive_N: np.ndarray) -> float | None:
    """Return how often a positive has a higher score than a negative, ties by half; None when one
    kind is absent."""
    positives, negatives = score_N[positive_N], np.sort(score_N[~positive_N])
    if not len(positives) or not len(negatives):
        return None
    below = np.searchsorted(negatives, positives, "left") + np.searchsorted(
        negatives, positives, "right"
    )
    return float(below.mean() / 2 / len(negatives))


def majority(train_N: np.ndarray, width: int, count: int) -> np.ndarray:
    """Return prob_NC of count requests that all get the shares of the training requests' choices
    train_N."""
    share_C = np.bincount(train_N, minlength=width) / max(1, len(train_N))
    return np.tile(share_C, (count, 1))


def text_only(
    train: Sequence[str], train_N: np.ndarray, texts: Sequence[str], width: int
) -> np.ndarray:
    """Return prob_NC of a router that sees no image: TF-IDF of words and pairs of words, logistic
    regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = {
        "token_pattern": r"\S+"
    }  # single characters too: a prompt of digits or signs is a prompt
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, **words)
    return _regression(vectors.fit_transform(train), train_N, vectors.transform(texts), width)


def linear(train_NF: np.ndarray, train_N: np.ndarray, x_NF: np.ndarray, width: int) -> np.ndarray:
    """Return prob_NC of a logistic regression on standardised features of frozen networks, train_NF
    and x_NF."""
    mean_F, scale_F = train_NF.mean(0), train_NF.std(0) + 1e-6
    return _regression((train_NF - mean_F) / scale_F, train_N, (x_NF - mean_F) / scale_F, width)


def centroid(train_NF: np.ndarray, train_N: np.ndarray, x_NF: np.ndarray, width: int) -> np.ndarray:
    """Return prob_NC from the cosine of x_NF with the mean feature of each choice, both less the
    overall mean."""
    mean_F = train_NF.mean(0)
    rows = [
        train_NF[train_N == c].mean(0) - mean_F if (train_N == c).any() else np.zeros_like(mean_F)
        for c in range(width)
    ]
    cosine_NC = _unit(x_NF - mean_F) @ _unit(np.stack(rows)).T
    cosine_NC[:, [c for c in range(width) if not (train_N == c).any()]] = -1.0
    return softmax(cosine_NC, 0.1)


def _unit(x_NF: np.ndarray) -> np.ndarray:
    return x_NF / np.maximum(np.linalg.norm(x_NF, axis=1, keepdims=True), 1e-12)


def _regression(train, train_N: np.ndarray, x, width: int) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression

    prob_NC = np.zeros((x.shape[0], width))
    present = np.unique(train_N)
    if len(present) == 1 or not x.shape[0]:
        prob_NC[:, present] = 1.0
        return prob_NC
    prob_NC[:, present] = (
        LogisticRegression(max_iter=1000, C=10.0).fit(train, train_N).predict_proba(x)
    )
    return prob_NC


def same(choice_N: np.ndarray, other_N: np.ndarray) -> float | None:
    """Return the share of requests whose choice stays the same."""
    return float((choice_N == other_N).mean()) if len(choice_N) else None
