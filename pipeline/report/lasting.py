"""A report in two halves: what the same configuration gives again, and what each run measures anew.

A bundle takes the first into its report and card, so that equal runs give equal bytes, and keeps
the second in a file of its own.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from .schema.base import BaseReport

# Of a history: seconds, and what is per second, go by their unit
MEASURED_ANEW = {"time", "rss_mb"}
SECONDS = "_s"

R = TypeVar("R", bound=BaseReport)


def split(report: R, note: str) -> tuple[R, dict[str, Any]]:
    """Return a report without times, memory and machine, and those as JSON; and without texts and
    pictures of the data, which whoever gets the bundle need not have.

    `note` is added to the report's notes: where a reader finds the rest.
    """
    lasting = report.model_copy(
        update={
            "made": "",
            "machine": None,
            "speed": (),
            "notes": (*report.notes, note),
            **dict.fromkeys(report.texts, ()),
        }
    )
    moment = {
        "evaluated": report.made,
        "machine": report.machine and report.machine.model_dump(mode="json"),
        "speed": [each.model_dump(mode="json") for each in report.speed],
    }
    return lasting, moment


def lasting_rows(histories: Mapping[str, list[dict]]) -> dict[str, list[dict]]:
    """Return the rows of histories without what was measured anew, for the charts of a page."""
    out: dict[str, list[dict]] = {}
    for job, rows in histories.items():
        out[job] = []
        for row in rows:
            again = {}
            for name, value in row.items():
                if name not in MEASURED_ANEW and not name.endswith(SECONDS):
                    again[name] = value
            out[job].append(again)
    return out
