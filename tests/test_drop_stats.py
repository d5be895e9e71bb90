"""What is dropped: counted, shown by example, and an error where it is too much."""

import pytest

from pipeline.data.drop_stats import DropStats
from pipeline.errors import DataError


def filled(harmless=(), **counts):
    """Return statistics with so many drops of each reason, out of 100."""
    stats = DropStats(harmless, seen=100)
    for reason, count in counts.items():
        for number in range(count):
            stats.drop(reason, f"{reason}:{number}")
    return stats


def test_examples_are_the_first_few():
    stats = filled(torn=10)
    stats.drop("odd", "file:7", "is [1]")
    assert stats.counts == {"torn": 10, "odd": 1} and stats.total == 11
    assert stats.examples == {"torn": ["torn:0", "torn:1", "torn:2"], "odd": ["file:7: is [1]"]}
    assert stats.explain() == "10 torn (torn:0, torn:1, torn:2); 1 odd (file:7: is [1])"
    assert filled().explain() == "none dropped"


def test_only_bad_ones_count_against_the_share():
    stats = filled(harmless={"twice"}, twice=60, torn=5)
    assert (stats.bad, stats.total) == (5, 65)
    stats.check(0.05, "rows are bad", "max_share", "Mend them")
    wanted = (
        r"5 of 100 rows are bad, more than max_share \(0\.04\) allows: 5 torn \(.*\)\. Mend them"
    )
    with pytest.raises(DataError, match=wanted) as caught:
        stats.check(0.04, "rows are bad", "max_share", "Mend them")
    assert "twice" not in str(caught.value)


def test_a_later_step_adds_to_an_earlier_one():
    first, second = filled(torn=2, odd=1), filled(torn=2, leak=1)
    first.merge(second)
    assert first.counts == {"torn": 4, "odd": 1, "leak": 1} and first.seen == 100
    assert first.examples["torn"] == ["torn:0", "torn:1", "torn:0"]


def test_what_is_written_is_read_again():
    stats = filled(harmless={"twice"}, twice=4, torn=1)
    assert DropStats.from_json(stats.as_json(), {"twice"}) == stats
