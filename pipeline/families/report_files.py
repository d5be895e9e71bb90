"""What a bundle says of its run: report, page and card that equal runs write alike, and made.json
with the times and the machine of this one.

Whoever opens a bundle sees from its bytes whether it is another's; what each run measures anew must
stand where it moves no other file.
"""

import json
from collections.abc import Mapping
from typing import Any

from .. import report
from ..config.run import RunConfig
from ..report.curves import LOST
from ..store.artifacts import now
from ..store.bundle import MADE
from ..store.history import Row
from ..store.reading import read_bytes
from . import Parts

NOTE = (
    f"Times, memory and the machine that they were measured on are in {MADE}; texts and pictures "
    "of the data are in the run's own report alone."
)


def report_files(cfg: RunConfig, parts: Parts, described: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of a bundle that are drawn from the report, by name; `described` is its
    experts.json.

    Raises MissingArtifact, DamagedArtifact, UnreadableFile.
    """
    whole = report.read(read_bytes(parts.folder("evaluate") / "report.json"))
    lasting, moment = report.split(whole, NOTE)
    rows, missing = histories(cfg, parts)
    made = {"bundled": now(), **moment}
    return {
        "README.md": report.card(lasting, described),
        "report.json": lasting.to_json(),
        "report.html": report.page(lasting, report.lasting_rows(rows), missing),
        MADE: json.dumps(made, indent=1) + "\n",
    }


def histories(cfg: RunConfig, parts: Parts) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """Return the history of each training by its job, and in a few words what is missing of it.

    Where rows are gone stands a mark for the curves: the first such step, and the last as LOST.
    Raises MissingArtifact, DamagedArtifact, UnreadableFile.
    """
    rows = {}
    missing = {}
    for stage in cfg.stages.values():
        if stage.kind != "training":
            continue
        for item in cfg.items(stage.name):
            # A part that was only written has no history
            if "planned_steps" in parts.manifest(stage.name, item).metrics:
                name = f"{stage.name} {item}" if item else stage.name
                history = parts.history(stage.name, item)
                marks = [{"step": first, LOST: last} for first, last in history.lost]
                rows[name] = [*history.rows, *marks]
                if history.missing:
                    missing[name] = history.missing
    return rows, missing
