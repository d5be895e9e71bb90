"""A report in a few figures: what is listed of a run beside others.

A figure that could not be measured is left out, so whatever is here can be compared.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from .format import finite
from .schema.language import LanguageReport
from .schema.reading import Report
from .schema.requests import RequestReport

BITS = "bits per byte"
ACCURACY = "accuracy"
# Of which less is better; of every other measure more is.
LESS_IS_BETTER = (BITS,)


@dataclass(frozen=True)
class Score:
    """One figure of a report."""

    name: str  # the row, with the set it was measured on where there are several
    measure: str
    value: float
    serves: bool  # whether it is of what the run serves


@dataclass(frozen=True)
class Verdicts:
    """How many of the things that a configuration asked for a run met."""

    passed: int
    failed: int
    untold: int  # too little was measured to tell


def scores(report: Report) -> list[Score]:
    """Return the figures of a report in its own order."""
    found = _of_text(report) if isinstance(report, LanguageReport) else _of_requests(report)
    return list(found)


def main_score(found: list[Score]) -> Score | None:
    """Return the figure that stands for the run: the first one of what it serves."""
    return next((score for score in found if score.serves), None)


def verdicts(report: Report) -> Verdicts:
    """Count the criteria of a report by how they came out."""
    ended = [criterion.passed for criterion in report.criteria]
    return Verdicts(ended.count(True), ended.count(False), ended.count(None))


def _of_text(report: LanguageReport) -> Iterator[Score]:
    for row in report.quality:
        value = finite(row.mean)
        if value is not None:
            yield Score(row.name, BITS, value, row.is_stack)


def _of_requests(report: RequestReport) -> Iterator[Score]:
    if report.routing:
        for routed in report.routing.sets:
            for row in routed.rows:
                value = finite(row.accuracy)
                if value is not None:
                    yield Score(f"{routed.name}: {row.name}", ACCURACY, value, row.is_router)
    for answered in report.answers:
        for name in ("stack", "oracle", "base"):
            value = finite(getattr(answered.all, name).score)
            if value is not None:
                yield Score(f"{answered.set}: answers of {name}", "score", value, False)
