"""The far side of a run: jobs in containers, and how each of them ended.

A container refreshes its view of the store once, before any file is open. What a person has to mend
comes back as a JobResult and is not tried again; a crash, a timeout or a preemption is, from the
last published checkpoint. A job whose lease is lost, as its container could not reach the table of
leases for longer than they last, ends with its next checkpoint and without a result.
"""

import gc
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from ..config.run import RunConfig
from ..errors import Interrupted, LeaseLost, PipelineError
from ..families.load import parse
from ..report.narrow import plain_console
from ..run.advice import sentence
from ..run.backend import printed_progress
from ..run.job import run_job
from ..run.stages import Addresses, label
from ..store.artifacts import Manifest, Store
from ..train.memory_meter import trim_heap

Items = list[str | None]
# Whether the job of an address may be another machine's by now
IsLost = Callable[[str], bool]
# Until a container works, or an endpoint's has opened its bundle: what hangs in its start is ended
LONGEST_START_S = 900
UNNAMED = "moleforge"  # app and volume where nobody names them


class ModalEdge:
    """Commands as they are typed for a run on Modal; `root` is where containers have the volume of
    that name."""

    def __init__(self, root: Path, volume: str = UNNAMED) -> None:
        self.root = root
        self.volume = volume

    def stage(self, name: str) -> str:
        """The command that does a stage, less its options."""
        return f"`modal run modal_app.py::{name}`"

    def remove(self, path: Path) -> str:
        """How something in the store is removed, as an imperative."""
        if not path.is_relative_to(self.root):
            return f"remove {path}"
        return f"type `modal volume rm -r {self.volume} {path.relative_to(self.root)}`"

    def make_room(self) -> str:
        """How room is made in the store, as an imperative."""
        return (
            "make room (`modal run modal_app.py::runs` lists what each run takes, "
            "`::rm --run NAME` removes one, `::prune` what none needs)"
        )

    def other_store(self) -> str:
        """How another store is chosen, as an imperative."""
        rename = f"`modal volume rename {self.volume} NAME`"
        return f"type {rename}, and the next command makes a new one"


def edge_of(cfg: RunConfig, root: Path) -> ModalEdge:
    """Return how the commands of a run are typed whose store is at root."""
    return ModalEdge(root, cfg.modal.volume or UNNAMED)


@dataclass(frozen=True)
class JobResult:
    """How a job ended; small enough to travel."""

    stage: str
    item: str | None
    address: str
    state: str  # made, found, failed
    error: str = ""
    bytes: int = 0
    seconds: float = 0.0
    metrics: dict = field(default_factory=dict)
    former: str = ""  # of a report: the address of the one before the run's domains changed

    @property
    def name(self) -> str:
        """The stage and the item, for people."""
        return label(self.stage, self.item)

    @classmethod
    def of(cls, manifest: Manifest, state: str) -> "JobResult":
        """Return the result of a job whose artifact is whole."""
        return cls(
            manifest.stage,
            manifest.item,
            manifest.address,
            state,
            bytes=manifest.bytes,
            seconds=manifest.made["seconds"],
            metrics=manifest.metrics,
        )


def _whatever(_address: str) -> bool:
    return True


@contextmanager
def _without_leases(_addresses: list[str]) -> Iterator[IsLost]:
    yield lambda _address: False


def work(
    stage: str,
    raw: dict,
    items: Items,
    root: Path,
    publish: Callable[[], None],
    refresh: Callable[[], None],
    renewing: Callable[[list[str]], AbstractContextManager[IsLost]] = _without_leases,
    takes: Callable[[str], bool] = _whatever,
) -> list[JobResult]:
    """Do jobs of a stage in this container, one after another; return how each ended, less those
    whose leases are lost. `renewing` keeps the leases of their addresses meanwhile and tells that;
    what another call or run does it `takes` not.

    Raises KeyboardInterrupt when asked to stop, which is how Modal knows that the input has to run
    again.
    """
    cfg = parse(raw)
    addresses = Addresses(cfg)
    items = [item for item in items if takes(addresses.of(stage, item))]
    if not items:
        return []
    with renewing([addresses.of(stage, item) for item in items]) as is_lost:

        def confirm(address: str) -> None:
            if is_lost(address):
                raise LeaseLost(
                    f"{address}: ended here, as its lease could not be renewed and another "
                    "container may be at it by now, which goes on from what is saved"
                )

        refresh()
        # Its jobs refresh nothing, as what a former one has read may still be mapped
        return _work(stage, cfg, items, Store(root, publish=publish, confirm=confirm))


def _work(stage: str, cfg: RunConfig, items: Items, store: Store) -> list[JobResult]:
    import torch

    torch.set_num_threads(cfg.runtime.most_threads(int(cfg.machine(stage).cpu)))
    console = plain_console(stderr=True)
    try:
        store.open()
    except PipelineError as error:
        # An answer, so that Modal does not try again what no other container can do either
        edge = edge_of(cfg, store.root)
        return [failed(stage, item, "", error, edge) for item in items]
    results = []
    for item in items:
        try:
            results.append(_do_job(stage, cfg, store, item, console))
        except LeaseLost as lost:
            print(lost)
            # Those of the others were renewed together with it
            break
        finally:
            # The next job of this container has a memory budget of its own
            gc.collect()
            trim_heap()
    return results


def _do_job(
    stage: str, cfg: RunConfig, store: Store, item: str | None, console: Console
) -> JobResult:
    progress = printed_progress(console)
    try:
        manifest = run_job(stage, cfg, store, item, progress=progress, console=console)
    except PipelineError as error:
        # Checkpoints and history up to here
        store.publish()
        edge = edge_of(cfg, store.root)
        return failed(stage, item, Addresses(cfg).of(stage, item), error, edge)
    except LeaseLost:
        # Nothing is published beyond the checkpoint, as others may have done so since
        raise
    except Interrupted as stopped:
        store.publish()
        raise KeyboardInterrupt(str(stopped)) from None
    return JobResult.of(manifest, "made")


def draw_anew() -> None:
    """Draw random numbers of one's own, in a process that began as an image of another one's
    memory."""
    import torch

    random.seed()
    torch.seed()


def failed(
    stage: str, item: str | None, address: str, error: PipelineError, edge: ModalEdge
) -> JobResult:
    """Return the result of a job that ended in an error which a person has to mend."""
    return JobResult(stage, item, address, "failed", sentence(error, edge))
