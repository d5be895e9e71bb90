"""What is served, measured again now and then: the same parts on the same text in a container of
that day, so that a change of machines or of libraries shows.

Invariant: the note beside the bundles says when and on what machine; which run it is about is told
by the bundle that is served when the time has come.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from .. import report
from ..config.base import Name
from ..config.machines import ModalConfig, TrainerConfig
from ..config.run import RunConfig
from ..errors import ConfigError, DamagedArtifact, MissingArtifact, PipelineError
from ..families.load import parse
from ..report.narrow import output
from ..run.advice import sentence
from ..run.stages import Addresses
from ..store.artifacts import Store
from ..store.roots import readable_roots
from .containers import JobResult, ModalEdge
from .endpoint import SERVED, bundles_of, serve_next, served_addresses
from .estimate import Expected, estimate, expected, refuse_above
from .inputs import packages
from .leases import Leases
from .notes import parse_note, write_note
from .prices import Prices
from .wiring import Wiring

NOTE = "reevaluated.json"
REPORT = "evaluate"


# What containers of the run had and a deployment without a configuration knows nothing of
SURROUNDINGS = ("regions", "hub_secret", "storage_secret")
BUCKET_SETTINGS = ("bucket", "bucket_endpoint")
DAY = "-%Y%m%d"
LONGEST_NAME = 64 - len("-20260101")


class ReevaluationNote(BaseModel, frozen=True, extra="forbid"):
    """When what is served is measured again, in what container and with what; older notes say no
    more than when and on what machine."""

    cron: str | None = None
    machine: TrainerConfig = TrainerConfig()
    regions: tuple[str, ...] = ()
    hub_secret: Name | None = None
    storage_secret: Name | None = None
    bucket: str | None = None
    bucket_endpoint: str | None = None
    packages: tuple[str, ...] = ()  # with models, each with its version


def note_bundle(
    results: Sequence[JobResult],
    cfg: RunConfig,
    store: Store,
    leases: Leases,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Note a bundle among the results as the one to serve, with how it is served and measured
    again. Raises ConfigError for a package that is not installed here."""
    if not bundles_of(results):
        return
    with leases.alone(SERVED, wait):
        # What another run has noted meanwhile stays named
        store.refresh()
        note_reevaluation(results, cfg, store.root, store.publish)
        serve_next(results, cfg, store.root, store.publish)


def note_reevaluation(
    results: Sequence[JobResult], cfg: RunConfig, root: Path, publish: Callable[[], None]
) -> None:
    """Note how a bundle among the results, new or found, is to be measured again, and publish the
    note. Raises ConfigError for a package that is not installed here."""
    if not bundles_of(results):
        return
    note = ReevaluationNote()
    if cfg.modal.reevaluate:
        as_the_run = {name: getattr(cfg.modal, name) for name in (*SURROUNDINGS, *BUCKET_SETTINGS)}
        note = ReevaluationNote(
            cron=cfg.modal.reevaluate,
            machine=cfg.modal.evaluate,
            packages=tuple(packages(cfg)),
            **as_the_run,
        )
    write_note(root / NOTE, note)
    publish()


def reevaluated_as(modal: ModalConfig, content: bytes | None) -> ModalConfig:
    """Return the section of a deployment with what a note says, where there is one and the section
    says nothing itself. Raises DamagedArtifact."""
    note = _note(modal, content)
    if note is None:
        return modal
    changes: dict[str, Any] = {"reevaluate": note.cron, "evaluate": note.machine}
    for name in SURROUNDINGS:
        changes[name] = getattr(modal, name) or getattr(note, name)
    for name in () if modal.bucket else BUCKET_SETTINGS:
        changes[name] = getattr(note, name)
    return modal.model_copy(update=changes)


def packages_again(modal: ModalConfig, content: bytes | None) -> tuple[str, ...]:
    """Return the packages that measuring again needs beside those of a deployment's own
    configuration, as a note says. Raises DamagedArtifact."""
    note = _note(modal, content)
    return () if note is None else note.packages


def _note(modal: ModalConfig, content: bytes | None) -> ReevaluationNote | None:
    """Return what a note says, None where there is none, it says never, or the section of a
    deployment says more. Raises DamagedArtifact."""
    if content is None or modal.reevaluate:
        return None
    try:
        note = parse_note(ReevaluationNote, content)
    # of pydantic too
    except ValueError:
        text = f"{NOTE} on the volume does not say when to measure again"
        raise DamagedArtifact(text, stage="deploy") from None
    return note if note.cron else None


@dataclass(frozen=True)
class Due:
    """What is to be measured again now."""

    cfg: RunConfig
    former: str  # the address of the report that it is held against
    expected: Expected


def due(root: Path, refresh: Callable[[], None], wiring: Wiring, edge: ModalEdge) -> Due | None:
    """Return what a deployment is to measure again; None where that is refused, which is told: no
    other attempt would come to more."""
    try:
        found, former = once_more(root, refresh)
        cfg = on_what_is_deployed(found, wiring.measures_on)
        return Due(cfg, former, priced_again(cfg, root, wiring.prices))
    except PipelineError as error:
        print(f"nothing is measured again: {sentence(error, edge)}")
        return None


def on_what_is_deployed(cfg: RunConfig, measures_on: str) -> RunConfig:
    """Return a run with what a deployment gives it to be measured on, as Wiring.measures_on has it,
    and the deployment's limit on the cost where it has one."""
    told = ModalConfig.model_validate_json(measures_on)
    changes: dict[str, Any] = {}
    for name in told.model_fields_set:
        value = getattr(told, name)
        if value is not None:
            changes[name] = value
    return cfg.model_copy(update={"modal": cfg.modal.model_copy(update=changes)})


def once_more(root: Path, refresh: Callable[[], None]) -> tuple[RunConfig, str]:
    """Return the run whose bundle is served, under a name of this day, and the address of the
    report that it is held against. Raises MissingArtifact where no root leads to it."""
    refresh()
    store = Store(root).open()
    addresses = served_addresses(root)
    known = [each for each in readable_roots(store) if set(addresses[:1]) & set(each.addresses)]
    if not known:
        raise MissingArtifact(
            "no run's root leads to the bundle that is served", stages=("deploy",)
        )
    latest = max(known, key=lambda each: each.at)
    cfg = parse(latest.settings)
    name = cfg.name[:LONGEST_NAME] + time.strftime(DAY, time.gmtime())
    return cfg.model_copy(update={"name": name}), Addresses(cfg).of(REPORT)


def priced_again(cfg: RunConfig, root: Path, prices: str) -> Expected:
    """Return what measuring a run again is estimated at, by prices as text. Raises ConfigError
    above the limit on the cost that the run has, and for what those prices do not know."""
    table = Prices.told_by(prices)
    unknown = table.problems(REPORT, cfg.machine(REPORT))
    unknown += table.region_problems("modal.regions", cfg.modal.regions)
    if unknown:
        told = "; ".join(unknown)
        raise ConfigError(f"the prices of this deployment do not know where it runs: {told}")
    lines = estimate(cfg, (REPORT,), Store(root), table)
    refuse_above(cfg, lines, table, False)
    return expected(cfg, lines, table, False)


def tell_change(results: Sequence[JobResult], former: str, root: Path) -> None:
    """Print what is other in a report than in the one before it; one that cannot be read is only
    not compared with."""
    console = output()
    for result in results:
        if result.error:
            console.print(f"{result.name}: {result.error}", highlight=False, markup=False)
            continue
        with contextlib.suppress(PipelineError, OSError):
            was = report.read(_report(root, former))
            report.show_changes(was, report.read(_report(root, result.address)), console)


def _report(root: Path, address: str) -> bytes:
    return (root / "artifacts" / address / "report.json").read_bytes()
