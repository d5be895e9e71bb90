"""Numbers as a reader wants them."""

import math
from itertools import pairwise

import pytest

from pipeline.report.format import (
    DASH,
    count,
    figures,
    fixed,
    interval,
    megabytes,
    percent_interval,
    seconds,
    share,
    signed,
    ticks,
)


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        (fixed(-0.0004), "0.000"),
        (signed(0.0123), "+0.012"),
        (signed(-0.0004), "0.000"),
        (fixed(1234.5, 1), "1,234.5"),
        (figures(8.412), "8.41"),
        (figures(52.31), "52.3"),
        (figures(1234.4), "1,234"),
        (figures(0), "0.00"),
        (count(999), "999"),
        (count(999_600), "1 M"),
        (count(33_600_000), "33.6 M"),
        (count(0.25), "0.25"),
        (share(0.745), "74 %"),
        (share(-0.4), "−40 %"),
        (seconds(59.99), "1 min 00 s"),
        (seconds(7500), "2 h 05 min"),
        (megabytes(812.4), "812 MB"),
        (megabytes(12_345), "12.3 GB"),
        (interval((0.1, 0.25)), "[0.100, 0.250]"),
        (percent_interval((0.1, 0.25)), "[10, 25]"),
        (interval((0.1, math.nan)), ""),
        (percent_interval(None), ""),
        (count(None), DASH),
        (fixed("1"), DASH),
        (fixed(True), DASH),
        (share(math.inf), DASH),
        (figures(math.nan), DASH),
        (seconds(None), DASH),
    ],
)
def test_numbers_have_sensible_digits(written, wanted):
    assert written == wanted


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (2.9, 9.1), (0, 1e-8), (-3, 4), (5, 5), (0, 0), (1e6, 1.1e6)]
)
def test_ticks_enclose_the_range_in_even_steps(low, high):
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 8
    gaps = [b - a for a, b in pairwise(found)]
    assert max(gaps) == pytest.approx(min(gaps))
