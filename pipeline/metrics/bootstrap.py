"""The paired bootstrap behind every interval of a report.

S resamples, U units of a stratum: what is drawn as a whole (a document, the requests on one image).
"""

from collections.abc import Sequence

import numpy as np
from numpy import ndarray

CONFIDENCE = (2.5, 97.5)  # percentiles of a 95 % interval
# Units of a stratum below which there is no interval: resamples of few vary less than new ones
# would, and those of a single unit not at all
LEAST_UNITS = 20
Interval = tuple[float, float]


class PairedBootstrap:
    """The same draws of units for every row of a table, so that differences are taken within a draw
    (Efron & Tibshirani 1993, ch. 16).

    Units are drawn within each stratum (a domain), and what is resampled is a ratio of sums: so
    much of a figure (nats, correct answers) for so much size (bytes, requests).
    """

    def __init__(self, sizes: Sequence[ndarray], resamples: int, seed: int):
        """Draw units; sizes holds size_U of each stratum."""
        # One generator through all strata: their draws are independent, and depend on their order
        generator = np.random.default_rng(seed)
        self.decides = all(len(size) >= LEAST_UNITS for size in sizes)
        self._sizes = sizes
        self._weights = []
        for size_U in sizes:
            units = len(size_U)
            even_U = np.full(units, 1 / units)
            # A document drawn twice counts twice: how often is all that a draw has to say
            count_SU = generator.multinomial(units, even_U, resamples)
            # Counts are exact in fp32, at half the memory
            weight_SU = count_SU.astype(np.float32)
            self._weights.append(weight_SU)

    def ratios(self, sums: Sequence[ndarray]) -> list[ndarray]:
        """Return ratio_S of each stratum from its sum_U: a figure's sum over the drawn units, by
        their size."""
        out = []
        for weight_SU, sum_U, size_U in zip(self._weights, sums, self._sizes, strict=True):
            sum_S = weight_SU @ sum_U
            size_S = weight_SU @ size_U
            out.append(sum_S / size_S)
        return out


def interval(value_S: ndarray) -> Interval:
    """Return the 95 % interval of a figure or of a difference from its resamples."""
    ends = np.percentile(value_S, CONFIDENCE)
    low, high = ends.tolist()
    return low, high
