"""Arithmetic of the report: bits per byte with intervals, routing figures, criteria. No model is
run here.

n documents, T tokens of a stream, S resamples, E experts, L layers.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy import ndarray
from scipy.special import entr, logsumexp

from .bootstrap import LEAST_UNITS, Interval, PairedBootstrap, interval

LN2 = math.log(2)
LEAST_GAIN = 1e-6  # nats a token below which the oracle's lead over the trunk is noise
ByDomain = dict[str, ndarray]
Distribution = Sequence[float] | ndarray
DEAD_SHARE = 1e-3  # of the tokens below which an expert counts as dead


@dataclass(frozen=True)
class Documents:
    """Held-out documents of one domain: how many bytes and tokens each has, and where each
    starts."""

    domain: str
    starts_n: ndarray  # token offsets of the documents, then the end
    bytes_n: ndarray
    lead: int = 1  # tokens before each document, which nobody has to guess

    @property
    def tokens(self) -> int:
        """Tokens that are predicted: all but those that lead a document."""
        span = self.starts_n[-1] - self.starts_n[0]
        return int(span) - self.lead * len(self.bytes_n)

    def sums(self, nats_T: ndarray) -> ndarray:
        """Return nats per document of nats_T, one value per token of the stream; leading tokens
        must be 0."""
        # reduceat adds up from each start to the next, and from the last one to the end
        return np.add.reduceat(nats_T, self.starts_n[:-1])


class Scores:
    """Nats per document of every row of a table, on the same documents."""

    def __init__(
        self,
        documents: Mapping[str, Documents],
        resamples: int,
        seed: int,
    ):
        self.documents = documents
        self.nats: dict[str, ByDomain] = {}
        sizes = [each.bytes_n for each in documents.values()]
        self._bootstrap = PairedBootstrap(sizes, resamples, seed)

    @property
    def too_few(self) -> tuple[str, ...]:
        """Domains with fewer than LEAST_UNITS documents: no interval counts them as sure."""
        documents = self.documents.items()
        return tuple(name for name, each in documents if len(each.bytes_n) < LEAST_UNITS)

    def add(self, row: str, nats: ByDomain) -> None:
        """Keep a row's nats per document, by domain."""
        self.nats[row] = nats

    def bits_per_byte(self, row: str) -> dict[str, float]:
        """Return bits per byte of a row, by domain."""
        out = {}
        for name, documents in self.documents.items():
            nats = self.nats[row][name].sum()
            size = documents.bytes_n.sum()
            out[name] = float(nats / size / LN2)
        return out

    def perplexity(self, row: str) -> dict[str, float]:
        """Return perplexity per token of a row, by domain."""
        out = {}
        for name, nats in self._nats_per_token(row).items():
            out[name] = math.exp(nats)
        return out

    def nats_per_token(self, row: str) -> float:
        """Return the mean over domains of a row's loss."""
        each = self._nats_per_token(row)
        return _mean(each.values())

    def _nats_per_token(self, row: str) -> dict[str, float]:
        out = {}
        for name, documents in self.documents.items():
            nats = self.nats[row][name].sum()
            out[name] = float(nats / documents.tokens)
        return out

    def mean(self, row: str) -> float:
        """Return the mean over domains of a row's bits per byte."""
        each = self.bits_per_byte(row)
        return _mean(each.values())

    def interval(self, row: str) -> Interval | None:
        """Return the 95 % interval of a row's mean, documents resampled within each domain; None
        where a domain has too few."""
        return interval(self._resampled(row)) if self._bootstrap.decides else None

    def intervals(self, row: str) -> dict[str, Interval]:
        """Return the 95 % interval of a row's bits per byte in each domain that has enough
        documents for one."""
        few = self.too_few
        found = {}
        for name, bits_S in zip(self.documents, self._resampled_by_domain(row), strict=True):
            if name not in few:
                found[name] = interval(bits_S)
        return found

    def difference(self, row: str, against: str) -> tuple[float, Interval | None]:
        """Return row minus against in bits per byte, and its 95 % interval over the same resamples
        (paired); None for that as in `interval`."""
        difference = self.mean(row) - self.mean(against)
        if not self._bootstrap.decides:
            return difference, None
        spread_S = self._resampled(row) - self._resampled(against)
        return difference, interval(spread_S)

    def _resampled(self, row: str) -> ndarray:
        """Return mean_S, the mean over domains in each resample, bits per byte."""
        return np.mean(self._resampled_by_domain(row), axis=0)

    def _resampled_by_domain(self, row: str) -> list[ndarray]:
        """Return bits_S of each domain in each resample, bits per byte."""
        nats = [self.nats[row][name] for name in self.documents]
        # Bits per byte of each domain are a ratio of sums: a long document weighs as it is long
        ratios = self._bootstrap.ratios(nats)
        return [ratio_S / LN2 for ratio_S in ratios]


def _mean(values: Iterable[float]) -> float:
    each = list(values)
    return float(np.mean(each))


def posterior_mix(nats_ET: ndarray, starts_n: ndarray) -> ndarray:
    """Return nats_T of the experts weighted by the causal posterior over domains
    (Branch-Train-Merge, 2208.03306).

    Within a document the weight of an expert is its likelihood of the tokens so far, from an even
    prior.
    """
    out_T = np.empty(nats_ET.shape[1])
    for start, end in pairwise(starts_n):
        # All in logarithms: the likelihood of a long document is below the least fp64 number
        own_ET = nats_ET[:, start:end].astype(np.float64)
        total_ET = np.cumsum(own_ET, axis=1)
        before_ET = total_ET - own_ET
        normaliser_T = logsumexp(-before_ET, axis=0)
        log_weight_ET = -before_ET - normaliser_T
        mixed_T = logsumexp(log_weight_ET - own_ET, axis=0)
        out_T[start:end] = -mixed_T
        out_T[start] = 0.0  # the leading end-of-text is given, not predicted
    return out_T


def oracle_gain(
    nats: float,
    trunk: float,
    oracle: float,
) -> float | None:
    """Return the share of the oracle expert's gain over the trunk; None when the oracle gains
    nothing."""
    gain = trunk - oracle
    if gain <= LEAST_GAIN:
        return None
    return (trunk - nats) / gain


def entropy(share_E: Distribution) -> float:
    """Return the entropy of a distribution, nats."""
    terms_E = entr(share_E)  # -p log p, 0 where p is 0
    return float(terms_E.sum())


def max_violation(share_E: Distribution) -> float:
    """Return (largest load - mean load) / mean load (MaxVio, 2408.15664)."""
    relative = max(share_E) * len(share_E)
    return float(relative - 1)


def routing(
    counts: Mapping[str, ndarray],
    first: Mapping[str, ndarray],
    experts: Sequence[str],
    numbers: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Return the token routing table from counts_LE per domain: all assignments, and first choices
    for the agreement. numbers: of the layers counted, where they are not all.

    Domains weigh the same. Agreement is the share of tokens whose first choice is their own
    domain's expert.
    """
    share_LE = {domain: _shares(count_LE) for domain, count_LE in counts.items()}
    shares = list(share_LE.values())
    mean_LE = np.mean(shares, axis=0)
    mean_E = mean_LE.mean(0)
    # A domain without an expert of its own has no agreement
    agreement_L = {}
    for domain in counts:
        if domain in experts:
            own = experts.index(domain)
            chosen_LE = _shares(first[domain])
            agreement_L[domain] = chosen_LE[:, own]
    layers = []
    for place, row_E in enumerate(mean_LE):
        agreed = [each_L[place] for each_L in agreement_L.values()]
        share = {}
        for domain, each_LE in share_LE.items():
            share[domain] = each_LE[place].tolist()
        layers.append(
            {
                "layer": place if numbers is None else numbers[place],
                "share": share,
                "agreement": _mean(agreed) if agreed else None,
                "entropy": entropy(row_E),
                "max_violation": max_violation(row_E),
            }
        )
    agreement = {}
    for domain, each_L in agreement_L.items():
        agreement[domain] = float(each_L.mean())
    mean_share = {}
    for domain, each_LE in share_LE.items():
        mean_share[domain] = each_LE.mean(0).tolist()
    # Two that are equal: the first one in the stack's order
    least = int(mean_E.argmin())
    most = int(mean_E.argmax())
    dead = []
    for name, its_share in zip(experts, mean_E, strict=True):
        if its_share < DEAD_SHARE:
            dead.append(name)
    return {
        "layers": layers,
        "share": mean_share,
        "agreement": _mean(agreement.values()) if agreement else None,
        "agreement_by_domain": agreement,
        "entropy": entropy(mean_E),
        "max_entropy": math.log(len(experts)),
        "max_violation": max_violation(mean_E),
        "least": [experts[least], float(mean_E[least])],
        "most": [experts[most], float(mean_E[most])],
        "dead": dead,
    }


def _shares(count_LE: ndarray) -> ndarray:
    total_L1 = count_LE.sum(1, keepdims=True)
    return count_LE / total_L1


def verdict(interval: Interval | None) -> Literal["better", "worse", "tie", "undecided"]:
    """Return better, worse or tie for the stack, from the 95 % interval of another row minus the
    stack; undecided without one."""
    if interval is None:
        return "undecided"
    low, high = interval
    if low > 0:
        return "better"
    return "worse" if high < 0 else "tie"
