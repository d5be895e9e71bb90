"""The stages of every family, and where the results of a run's jobs live.

An address is a hash of the configuration a job reads and of its inputs' addresses, so runs that
share a prefix of work share its artifacts. Everything here is read from the families' tables.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence

from ..config.run import JobKey, RunConfig
from ..config.stage import Stage
from ..families.load import RUN_CONFIGS
from ..hardware import native_dtype
from .identity import identified

AUTO = "auto"
DTYPES = ("bf16", "fp32")  # what it may stand for
Job = tuple[str, str | None, str]  # stage, item, address
Rows = dict[str, dict[str, Stage]]  # by name, then by family


def _merged(tables: Mapping[str, Mapping[str, Stage]]) -> Rows:
    """Return the rows of each name by family, names in an order that every table agrees with.

    A name that only later tables have comes right after the one it follows there.
    """
    order: list[str] = []
    rows: Rows = {}
    for family, table in tables.items():
        at = 0
        for name, row in table.items():
            if name not in rows:
                order.insert(at, name)
                rows[name] = {}
            rows[name][family] = row
            at = order.index(name) + 1
    ordered: Rows = {}
    for name in order:
        ordered[name] = rows[name]
    return ordered


ROWS = _merged({family: kind.stages for family, kind in RUN_CONFIGS.items()})


def _is_in_run(name: str) -> bool:
    return any(row.in_run for row in ROWS[name].values())


# What a run may consist of, in order, whichever its family: a stage that a family does not have has
# no jobs there, so whoever goes through these needs no case for it
STAGES = tuple(ROWS)
RUN = tuple(filter(_is_in_run, STAGES))


def about(name: str) -> str:
    """Return what a stage does, for people: family by family where they differ."""
    rows = ROWS[name]
    texts = {row.help for row in rows.values()}
    if len(texts) == 1 and len(rows) == len(RUN_CONFIGS):
        return texts.pop()
    parts = []
    for family, row in rows.items():
        parts.append(f"{row.help} ({family})")
    return "; ".join(parts)


def has_several_jobs(name: str) -> bool:
    """Whether a stage may have more than one job."""
    return any(row.items is not None for row in ROWS[name].values())


def is_report(name: str) -> bool:
    """Whether a stage measures the stack and leaves a report."""
    return any(row.kind == "report" for row in ROWS[name].values())


def is_text(name: str) -> bool:
    """Whether a stage makes what others are trained on; what measures is only asked for by name."""
    return all(row.kind == "files" and row.in_run for row in ROWS[name].values())


def first_few(names: Sequence[str], most: int = 3) -> str:
    """Return names in a line, of many the first ones and how many more there are."""
    shown = ", ".join(names[:most])
    more = len(names) - most
    return f"{shown} and {more} more" if more > 0 else shown


def label(stage: str, item: str | None) -> str:
    """Return a job's name for people."""
    return stage if item is None else f"{stage} {item}"


def settled(cfg: RunConfig) -> RunConfig:
    """Return a run whose arithmetic is that of this machine where it was left to the machine."""
    if cfg.dtype != AUTO:
        return cfg
    return cfg.model_copy(update={"dtype": native_dtype()})


class Addresses:
    """The addresses of one configuration, each computed once.

    `cfg` is the configuration that they are of: no address has arithmetic that another machine may
    take for its own, and what is read outside the store has been looked at. They are kept here and
    not with the configuration: a copy of it with other settings would take them along.
    """

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = identified(settled(cfg))
        self._asked = cfg
        self._known: dict[JobKey, str] = {}

    def of(self, stage: str, item: str | None = None) -> str:
        """Return where the result of a job lives; the same configuration always gives the same."""
        key = (stage, item)
        if key not in self._known:
            self._known[key] = self._computed(stage, item)
        return self._known[key]

    def _computed(self, stage: str, item: str | None) -> str:
        needs = []
        for need, of_item in self.cfg.needs(stage, item):
            needs.append(self.of(need, of_item))
        version = self.cfg.stages[stage].version
        content = self.cfg.content(stage, item)
        # Keys in order, so that equal settings give equal text wherever they were written
        text = json.dumps([stage, item, version, content, needs], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        if item is None:
            return f"{stage}-{digest}"
        return f"{stage}-{item}-{digest}"

    def jobs(self, stage: str) -> list[Job]:
        """Return (stage, item, address) of every job of a stage."""
        found: list[Job] = []
        for item in self.cfg.items(stage):
            found.append((stage, item, self.of(stage, item)))
        return found

    def reachable(self) -> Iterator[str]:
        """Yield every address that the configuration can lead to, here or on other machines that
        have this store."""
        kinds = DTYPES if self._asked.dtype == AUTO else (self.cfg.dtype,)
        for dtype in kinds:
            addresses = Addresses(self.cfg.model_copy(update={"dtype": dtype}))
            for stage in STAGES:
                for _, _, address in addresses.jobs(stage):
                    yield address


def address(cfg: RunConfig, stage: str, item: str | None = None) -> str:
    """Return where the result of one job lives; who asks for more than one keeps Addresses."""
    return Addresses(cfg).of(stage, item)


def jobs(cfg: RunConfig, stage: str) -> list[Job]:
    """Return (stage, item, address) of every job of a stage."""
    return Addresses(cfg).jobs(stage)


def without_jobs(stage: str, cfg: RunConfig) -> str:
    """Return what to tell somebody who asks for a stage that has no jobs in this run."""
    return f"{stage}: nothing to do, a run of {cfg.family} with this configuration has no such jobs"
