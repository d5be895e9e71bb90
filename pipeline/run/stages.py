"""The stages of every family, and where the results of a run's jobs live.

An address is a hash of the configuration a job reads and of its inputs' addresses, so runs that
share a prefix of work share its artifacts. Everything here is read from the families' tables.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping

from ..config.run import RunConfig
from ..config.stage import Stage
from ..families.load import RUN_CONFIGS


def _merged(tables: Mapping[str, Mapping[str, Stage]]) -> dict[str, dict[str, Stage]]:
    """Return the rows of each name by family, names in an order that every table agrees with.

    A name that only later tables have comes right after the one it follows there.
    """
    order: list[str] = []
    rows: dict[str, dict[str, Stage]] = {}
    for family, table in tables.items():
        at = 0
        for name, row in table.items():
            if name not in order:
                order.insert(at, name)
            at = order.index(name) + 1
            rows.setdefault(name, {})[family] = row
    return {name: rows[name] for name in order}


# By name, then by family
ROWS = _merged({family: kind.stages for family, kind in RUN_CONFIGS.items()})
STEPS = tuple(name for name, rows in ROWS.items() if any(row.step_of for row in rows.values()))
STAGES = tuple(name for name in ROWS if name not in STEPS)
RUN = tuple(name for name in STAGES if any(row.in_run for row in ROWS[name].values()))


def about(name: str) -> str:
    """Return what a stage does, for people: family by family where they differ."""
    rows = ROWS[name]
    texts = {row.help for row in rows.values()}
    if len(texts) == 1 and len(rows) == len(RUN_CONFIGS):
        return texts.pop()
    return "; ".join(f"{row.help} ({family})" for family, row in rows.items())


def has_several_jobs(name: str) -> bool:
    """Whether a stage may have more than one job."""
    return any(row.items is not None for row in ROWS[name].values())


def is_report(name: str) -> bool:
    """Whether a stage measures the stack and leaves a report."""
    return any(row.kind == "report" for row in ROWS[name].values())


def label(stage: str, item: str | None) -> str:
    """Return a job's name for people."""
    return stage if item is None else f"{stage} {item}"


class Addresses:
    """The addresses of one configuration, each computed once."""

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg
        self._known: dict[tuple[str, str | None], str] = {}

    def of(self, stage: str, item: str | None = None) -> str:
        """Return where the result of a job lives; the same configuration always gives the same."""
        if (stage, item) not in self._known:
            needs = [self.of(*need) for need in self.cfg.needs(stage, item)]
            version = self.cfg.stages[stage].version
            content = [stage, item, version, self.cfg.content(stage, item), needs]
            digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
            named = (stage, digest[:12]) if item is None else (stage, item, digest[:12])
            self._known[stage, item] = "-".join(named)
        return self._known[stage, item]

    def jobs(self, stage: str) -> list[tuple[str, str | None, str]]:
        """Return (stage, item, address) of every job of a stage."""
        return [(stage, item, self.of(stage, item)) for item in self.cfg.items(stage)]

    def reachable(self) -> Iterator[str]:
        """Yield every address that the configuration can lead to."""
        for stage in STAGES:
            for _, _, address in self.jobs(stage):
                yield address


def address(cfg: RunConfig, stage: str, item: str | None = None) -> str:
    """Return where the result of one job lives; who asks for more than one keeps Addresses."""
    return Addresses(cfg).of(stage, item)


def jobs(cfg: RunConfig, stage: str) -> list[tuple[str, str | None, str]]:
    """Return (stage, item, address) of every job of a stage."""
    return Addresses(cfg).jobs(stage)


def without_jobs(stage: str, cfg: RunConfig) -> str:
    """Return what to tell somebody who asks for a stage that has no jobs in this run."""
    return f"{stage}: nothing to do, a run of {cfg.family} with this configuration has no such jobs"
