"""What is served, measured again now and then: the same parts on the same text in a container of
that day, so that a change of machines or of libraries shows.

Invariant: the note beside the bundles says when and on what machine; which run it is about is told
by the bundle that is served when the time has come.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import BaseModel

from .. import report
from ..config.machines import ModalConfig, TrainerConfig
from ..config.run import RunConfig
from ..errors import DamagedArtifact, MissingArtifact, PipelineError
from ..families.load import parse
from ..report.narrow import output
from ..run.stages import Addresses
from ..store.artifacts import Store, write_text
from ..store.reading import parse_object
from ..store.roots import readable_roots
from .containers import JobResult
from .endpoint import served_addresses
from .estimate import Expected, estimate, expected, refuse_above
from .prices import Prices

NOTE = "reevaluated.json"
REPORT = "evaluate"


class ReevaluationNote(BaseModel, frozen=True, extra="forbid"):
    """When what is served is measured again, and in what container."""

    cron: str | None = None
    machine: TrainerConfig = TrainerConfig()


def note_reevaluation(
    results: Sequence[JobResult], cfg: RunConfig, root: Path, publish: Callable[[], None]
) -> None:
    """Note how a bundle among the results, new or found, is to be measured again, and publish the
    note."""
    if not any(each.stage == "deploy" and not each.error for each in results):
        return
    note = ReevaluationNote(cron=cfg.modal.reevaluate, machine=cfg.modal.evaluate)
    write_text(root / NOTE, note.model_dump_json())
    publish()


def reevaluated_as(modal: ModalConfig, content: bytes | None) -> ModalConfig:
    """Return the section of a deployment with what a note says, where there is one and the section
    says nothing itself. Raises DamagedArtifact."""
    if content is None or modal.reevaluate:
        return modal
    try:
        note = ReevaluationNote.model_validate(parse_object(content))
    # of pydantic too
    except ValueError:
        text = f"{NOTE} on the volume does not say when to measure again"
        raise DamagedArtifact(text, stage="deploy") from None
    if note.cron is None:
        return modal
    return modal.model_copy(update={"reevaluate": note.cron, "evaluate": note.machine})


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
    named = {"name": f"{cfg.name}-{time.strftime('%Y%m%d', time.gmtime())}"}
    return cfg.model_copy(update=named), Addresses(cfg).of(REPORT)


def priced_again(cfg: RunConfig, root: Path, prices: str) -> Expected:
    """Return what measuring a run again is estimated at, by prices as text. Raises ConfigError
    above the limit on the cost that the run has."""
    table = Prices.told_by(prices)
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
