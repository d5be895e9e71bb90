"""Arithmetic of the report: bits per byte with intervals, routing figures, criteria. No model is
run here.

n documents, T tokens of a stream, S resamples, E experts, L layers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

LN2 = math.log(2)
CONFIDENCE = (2.5, 97.5)  # percentiles of a 95 % interval


@dataclass(frozen=True)
class Documents:
    """Held-out documents of one domain: how many bytes and tokens each has, and where each starts."""

    domain: str
    starts_n: np.ndarray  # token offsets of the documents, then the end
    bytes_n: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens that are predicted: all but each document's leading end-of-text."""
        return int(self.starts_n[-1] - self.starts_n[0]) - len(self.bytes_n)

    def sums(self, nats_T: np.ndarray) -> np.ndarray:
        """Return nats per document of nats_T, one value per token of the stream; leading tokens
        must be 0."""
        return np.add.reduceat(nats_T, self.starts_n[:-1])


class Scores:
    """Nats per document of every row of a table, on the same documents."""

    def __init__(self, documents: Mapping[str, Documents], resamples: int, seed: int):
        self.documents = documents
        self.nats: dict[str, dict[str, np.ndarray]] = {}
        generator = np.random.default_rng(seed)
        self._weights = {
            name: generator.multinomial(
                len(d.bytes_n), np.full(len(d.bytes_n), 1 / len(d.bytes_n)), resamples
            )
            for name, d in documents.items()
        }

    def add(self, row: str, nats: Mapping[str, np.ndarray]) -> None:
        """Keep a row's nats per document, by domain."""
        self.nats[row] = dict(nats)

    def bits_per_byte(self, row: str) -> dict[str, float]:
        """Return bits per byte of a row, by domain."""
        return {
            name: float(self.nats[row][name].sum() / d.bytes_n.sum() / LN2)
            for name, d in self.documents.items()
        }

    def perplexity(self, row: str) -> dict[str, float]:
        """Return perplexity per token of a row, by domain."""
        return {
            name: math.exp(self.nats[row][name].sum() / d.tokens)
            for name, d in self.documents.items()
        }

    def nats_per_token(self, row: str) -> float:
        """Return the mean over domains of a row's loss."""
        return float(
            np.mean([self.nats[row][name].sum() / d.tokens for name, d in self.documents.items()])
        )

    def mean(self, row: str) -> float:
        """Return the mean over domains of a row's bits per byte."""
        return float(np.mean(list(self.bits_per_byte(row).values())))

    def interval(self, row: str) -> list[float]:
        """Return the 95 % interval of a row's mean, documents resampled within each domain."""
        return [float(x) for x in np.percentile(self._resampled(row), CONFIDENCE)]

    def difference(self, row: str, against: str) -> tuple[float, list[float]]:
        """Return row minus against in bits per byte, and its 95 % interval over the same resamples
        (paired)."""
        spread = self._resampled(row) - self._resampled(against)
        return self.mean(row) - self.mean(against), [
            float(x) for x in np.percentile(spread, CONFIDENCE)
        ]

    def _resampled(self, row: str) -> np.ndarray:
        """Return mean_S, the mean over domains in each resample."""
        each = [
            (self._weights[name] @ self.nats[row][name]) / (self._weights[name] @ d.bytes_n) / LN2
            for name, d in self.documents.items()
        ]
        return np.mean(each, axis=0)


def posterior_mix(nats_ET: np.ndarray, starts_n: np.ndarray) -> np.ndarray:
    """Return nats_T of the experts weighted by the causal posterior over domains
    (Branch-Train-Merge, 2208.03306).

    Within a document the weight of an expert is its likelihood of the tokens so far, from an even
    prior.
    """
    out_T = np.empty(nats_ET.shape[1])
    for start, end in pairwise(starts_n):
        own_ET = nats_ET[:, start:end].astype(np.float64)
        before_ET = np.cumsum(own_ET, axis=1) - own_ET
        log_ET = -before_ET - _logsumexp(-before_ET)
        out_T[start:end] = -_logsumexp(log_ET - own_ET)
        out_T[start] = 0.0  # the leading end-of-text is given, not predicted
    return out_T


def _logsumexp(x_ET: np.ndarray) -> np.ndarray:
    top_T = x_ET.max(axis=0)
    return top_T + np.log(np.exp(x_ET - top_T).sum(axis=0))


def oracle_gain(nats: float, trunk: float, oracle: float) -> float | None:
    """Return the share of the oracle expert's gain over the trunk; None when the oracle gains
    nothing."""
    gain = trunk - oracle
    return (trunk - nats) / gain if gain > 1e-6 else None


def entropy(share_E: Sequence[float]) -> float:
    """Return the entropy of a distribution, nats."""
    return -sum(p * math.log(p) for p in share_E if p > 0)


def max_violation(share_E: Sequence[float]) -> float:
    """Return (largest load - mean load) / mean load (MaxVio, 2408.15664)."""
    return max(share_E) * len(share_E) - 1


def routing(
    counts: Mapping[str, np.ndarray], first: Mapping[str, np.ndarray], experts: Sequence[str]
) -> dict:
    """Return table T5 from counts_LE per domain: all assignments, and first choices for the
    agreement.

    Domains weigh the same. Agreement is the share of tokens whose first choice is their own
    domain's expert.
    """
    share = {d: c / c.sum(1, keepdims=True) for d, c in counts.items()}
    chosen = {d: c / c.sum(1, keepdims=True) for d, c in first.items()}
    own = {d: experts.index(d) for d in counts if d in experts}
    agreement = {d: float(chosen[d][:, e].mean()) for d, e in own.items()}
    mean_LE = np.mean(list(share.values()), axis=0)
    mean_E = mean_LE.mean(0)
    layers = [
        {
            "layer": i,
            "share": {d: [float(x) for x in s[i]] for d, s in share.items()},
            "agreement": float(np.mean([chosen[d][i, e] for d, e in own.items()])) if own else None,
            "entropy": entropy(row_E),
            "max_violation": float(max_violation(row_E)),
        }
        for i, row_E in enumerate(mean_LE)
    ]
    return {
        "layers": layers,
        "share": {d: [float(x) for x in s.mean(0)] for d, s in share.items()},
        "agreement": float(np.mean(list(agreement.values()))) if agreement else None,
        "agreement_by_domain": agreement,
        "entropy": entropy(mean_E),
        "max_entropy": math.log(len(experts)),
        "max_violation": float(max_violation(mean_E)),
        "least": [experts[int(mean_E.argmin())], float(mean_E.min())],
        "most": [experts[int(mean_E.argmax())], float(mean_E.max())],
        "dead": [name for i, name in enumerate(experts) if mean_E[i] < 1e-3],
    }


def verdict(difference: float, interval: Sequence[float]) -> str:
    """Return better, worse or tie for the stack, from another row minus the stack and its 95 %
    interval.

    An interval without width comes from one document per domain, which decides nothing.
    """
    if interval[0] == interval[1]:
        return "tie"
    if interval[0] > 0:
        return "better"
    return "worse" if interval[1] < 0 else "tie"
