"""What a figure over a few seeds tells of other seeds."""

import statistics
from collections.abc import Sequence

from scipy.special import stdtrit

from .bootstrap import Interval

LEVEL = 0.95


def interval_of_mean(values: Sequence[float]) -> Interval | None:
    """Return the 95 % interval of the mean of a figure that was measured once with each seed, by
    Student's t; None of fewer than two. Too few are there to be resampled."""
    count = len(values)
    if count < 2:
        return None
    mean = statistics.fmean(values)
    half = stdtrit(count - 1, (1 + LEVEL) / 2) * statistics.stdev(values) / count**0.5
    return mean - float(half), mean + float(half)
