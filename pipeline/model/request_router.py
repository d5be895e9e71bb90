"""Who reads a text: one expert for all of it, chosen by what its first tokens are on average.

The rows are a closed form of statistics, as the gates of token routing are; how sure they are, and
below what the base answers, is fitted to held-out texts.

B texts, S layers that are read, C classes, E experts, D model width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

# Temperatures that are sought between
LOWEST = 0.05
HIGHEST = 20.0
# each halving step keeps .618 of the range: after 60 what is left is far below what float32 tells
SEARCH_STEPS = 60
# Thresholds that are tried, from none at all to only the surest
THRESHOLDS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class RequestRouter:
    """One row for each class and layer that is read: the experts', then the base's where it has
    one."""

    weight_SCD: Tensor
    experts: int
    temperature: float = 1.0
    threshold: float = 0.0

    def logits(self, x_BSD: Tensor) -> Tensor:
        """Return logit_BC, before calibration: those of the layers added up."""
        return torch.einsum("bsd,scd->bc", x_BSD.double(), self.weight_SCD.double())

    def probabilities(self, x_BSD: Tensor) -> Tensor:
        """Return p_BC of the classes."""
        return (self.logits(x_BSD) / self.temperature).softmax(-1)

    def choose(self, x_BSD: Tensor) -> Tensor:
        """Return index_B: an expert's number, or their number where the base reads the text."""
        return self.decide(self.probabilities(x_BSD))

    def decide(self, p_BC: Tensor) -> Tensor:
        """Return what `choose` does, from probabilities."""
        best_B, index_B = p_BC[:, : self.experts].max(-1)
        # where the base has a class of its own, it may be the likeliest
        likeliest_B = p_BC.max(-1).values
        is_sure_B = (best_B >= self.threshold) & (best_B >= likeliest_B)
        return torch.where(is_sure_B, index_B, self.experts)

    def without(self, expert: int) -> "RequestRouter":
        """Return the same router with one expert gone."""
        keep = [row for row in range(self.weight_SCD.shape[1]) if row != expert]
        return replace(self, weight_SCD=self.weight_SCD[:, keep], experts=self.experts - 1)


def fit_temperature(logit_BC: Tensor, class_B: Tensor, lowest: float = LOWEST) -> float:
    """Return the temperature, at least `lowest`, with the least nats of the right classes, by
    golden section over its logarithm.

    The nats are convex in 1 / temperature, so there is one lowest place; at an end of the range the
    end is returned.
    """
    low = math.log(lowest)
    high = math.log(HIGHEST)
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(SEARCH_STEPS):
        left = high - ratio * (high - low)
        right = low + ratio * (high - low)
        if nats(logit_BC, class_B, math.exp(left)) < nats(logit_BC, class_B, math.exp(right)):
            high = right
        else:
            low = left
    return math.exp((low + high) / 2)


def nats(logit_BC: Tensor, class_B: Tensor, temperature: float = 1.0) -> float:
    """Return the mean nats of the right classes."""
    return F.cross_entropy(logit_BC.double() / temperature, class_B).item()


def fit_threshold(router: RequestRouter, p_BC: Tensor, loss_BE: Tensor) -> float:
    """Return the threshold whose choices have the least loss on held-out texts; of equal ones the
    lowest.

    loss_BE: of each text under each expert, then under the base; texts weigh what is in them.
    """
    losses = []
    for threshold in THRESHOLDS:
        index_B = replace(router, threshold=threshold).decide(p_BC)
        losses.append(loss_BE.gather(1, index_B[:, None]).sum().item())
    return THRESHOLDS[_first_least(losses)]


def _first_least(values: Sequence[float]) -> int:
    return min(range(len(values)), key=values.__getitem__)
