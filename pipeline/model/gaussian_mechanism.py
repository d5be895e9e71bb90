"""How much Gaussian noise hides one document of a set: the analytic Gaussian mechanism (Balle and
Wang 2018, Improving the Gaussian Mechanism for Differential Privacy, 1805.06530).
"""

import math

# Halvings of an interval that a factor of two wide one needs to the last bit of a float
_HALVINGS = 60
MOST_EPSILON = 100.0


def least_sigma(epsilon: float, delta: float) -> float:
    """Return the least standard deviation of Gaussian noise that makes a sum (epsilon, delta)
    private whose sensitivity is 1: its length changes by no more when one document is added or
    taken away.

    Raises ValueError for an epsilon that is not in (0, 100] or a delta that is not in (0, 1).
    """
    if not 0 < epsilon <= MOST_EPSILON or not 0 < delta < 1:
        raise ValueError(f"epsilon {epsilon:g} and delta {delta:g} promise nothing")
    high = 1.0
    while _delta(high, epsilon) > delta:
        high *= 2
    low = high / 2
    while _delta(low, epsilon) <= delta:
        low /= 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _delta(middle, epsilon) > delta:
            low = middle
        else:
            high = middle
    return high


def _delta(sigma: float, epsilon: float) -> float:
    """Return the delta of noise of a standard deviation at an epsilon (their theorem 8)."""
    half = 1 / (2 * sigma)
    shift = epsilon * sigma
    return _below(half - shift) - math.exp(epsilon) * _below(-half - shift)


def _below(x: float) -> float:
    """Return the share of a standard normal distribution below x."""
    return math.erfc(-x / math.sqrt(2)) / 2
