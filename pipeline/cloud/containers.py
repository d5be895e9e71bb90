"""The far side of a run: jobs in containers, and the one that hands them out.

A container refreshes its view of the store once, before any file is open. What a person has to mend
comes back as a JobResult and is not tried again; a crash, a timeout or a preemption is, from the
last published checkpoint.
"""

import gc
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from ..config.run import RunConfig
from ..credentials import masked
from ..errors import Interrupted, PipelineError
from ..families.load import parse
from ..run.advice import account, sentence
from ..run.backend import printed_progress
from ..run.identity import note_made
from ..run.job import done, run_job
from ..run.stages import Addresses, label, without_jobs
from ..store.artifacts import Manifest, Store
from ..store.lineage import Lineage
from ..train.memory_meter import trim_heap
from .leases import Lease, Leases

Items = list[str | None]
LOOK_EVERY_S = 15.0  # whether another run has ended what this one waits for
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


# Hands items of a stage to containers; gives back, container by container, the items with their
# results or the exception that took the container
HandOut = Callable[[str, Items], Iterable[tuple[Items, list[JobResult] | BaseException]]]


def work(
    stage: str,
    raw: dict,
    items: Items,
    root: Path,
    publish: Callable[[], None],
    refresh: Callable[[], None],
    renewing: Callable[[list[str]], AbstractContextManager] = nullcontext,
) -> list[JobResult]:
    """Do jobs of a stage in this container, one after another; return how each ended. `renewing`
    keeps the leases of their addresses meanwhile.

    Raises KeyboardInterrupt when asked to stop, which is how Modal knows that the input has to run
    again.
    """
    cfg = parse(raw)
    addresses = Addresses(cfg)
    with renewing([addresses.of(stage, item) for item in items]):
        refresh()
        # Its jobs refresh nothing, as what a former one has read may still be mapped
        return _work(stage, cfg, items, Store(root, publish=publish))


def _work(stage: str, cfg: RunConfig, items: Items, store: Store) -> list[JobResult]:
    import torch

    torch.set_num_threads(cfg.runtime.most_threads(int(cfg.machine(stage).cpu)))
    console = Console(stderr=True)
    try:
        store.open()
    except PipelineError as error:
        # An answer, so that Modal does not try again what no other container can do either
        edge = edge_of(cfg, store.root)
        return [_failed(stage, item, "", error, edge) for item in items]
    results = []
    for item in items:
        try:
            results.append(_do_job(stage, cfg, store, item, console))
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
        return _failed(stage, item, Addresses(cfg).of(stage, item), error, edge)
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


def not_done(
    cfg: RunConfig, wanted: Sequence[str], store: Store, error: PipelineError
) -> list[JobResult]:
    """Return the jobs of the first stage as failed, where a run cannot begin."""
    found = []
    for stage in wanted[:1]:
        for item in cfg.items(stage):
            found.append(_failed(stage, item, "", error, edge_of(cfg, store.root)))
    return found


def _failed(
    stage: str, item: str | None, address: str, error: PipelineError, edge: ModalEdge
) -> JobResult:
    return JobResult(stage, item, address, "failed", sentence(error, edge))


def orchestrate(
    cfg: RunConfig,
    wanted: Sequence[str],
    store: Store,
    hand_out: HandOut,
    command: str,
    progress: Callable[[str], None] = print,
    leases: Leases | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> list[JobResult]:
    """Do stages in order, each job that has something left to do; stop after a stage with a
    failure. `command` is what finishes the rest; what others do by their `leases` is waited for."""
    addresses = Addresses(cfg)
    edge = edge_of(cfg, store.root)
    results: list[JobResult] = []
    for stage in wanted:
        # What containers made meanwhile is seen from here on; no file is open
        store.refresh()
        items = list(cfg.items(stage))
        if not items and len(wanted) == 1:
            progress(without_jobs(stage, cfg))
        made: dict[str | None, JobResult] = {}
        try:
            for result in _done(addresses, stage, store, hand_out, leases, progress, wait):
                made[result.item] = result
                progress(f"{result.name}: {result.error or result.state}")
        except PipelineError as error:
            # A manifest that cannot be read, which no container could do anything about either
            progress(f"{stage}: {sentence(error, edge)}")
            return results + [
                _failed(stage, item, addresses.of(stage, item), error, edge) for item in items
            ]
        for item in items:
            if item not in made:
                note_made(addresses.cfg, store, stage, item)
                made[item] = _whole(addresses, stage, item, store, "found")
        results += [made[item] for item in items]
        errors = {item: result.error for item, result in made.items() if result.error}
        if errors:
            progress(account(stage, errors, items, command))
            return results
    return results


def _done(
    addresses: Addresses,
    stage: str,
    store: Store,
    hand_out: HandOut,
    leases: Leases | None,
    progress: Callable[[str], None],
    wait: Callable[[float], None],
) -> Iterator[JobResult]:
    """Yield the result of each job of a stage that is handed out, until none is missing that
    nobody has tried. Raises DamagedArtifact."""
    missing = _missing(addresses, stage, store)
    if leases is None:
        yield from _handed_out(addresses, stage, missing, store, hand_out)
        return
    known: set[tuple[str | None, str]] = set()
    while missing:
        mine: Items = []
        others: dict[str | None, Lease] = {}
        for item in missing:
            lease = leases.claim(addresses.of(stage, item))
            if lease is None:
                mine.append(item)
            else:
                others[item] = lease
        if mine:
            # Who had it may have ended between the look and the claim
            store.refresh()
            left = _missing(addresses, stage, store)
            leases.give_back(addresses.of(stage, item) for item in mine if item not in left)
            mine = [item for item in mine if item in left]
        # Whoever goes in the middle of it keeps the leases of what its containers are at
        for result in _handed_out(addresses, stage, mine, store, hand_out):
            leases.give_back([addresses.of(stage, result.item)])
            yield result
        for item, lease in others.items():
            if (item, lease.token) not in known:
                known.add((item, lease.token))
                name = label(stage, item)
                progress(f"{name}: {lease.by} does it since {lease.since}; waiting for it")
        if others:
            wait(LOOK_EVERY_S)
            store.refresh()
        left = _missing(addresses, stage, store)
        missing = [item for item in others if item in left]


def _missing(addresses: Addresses, stage: str, store: Store) -> Items:
    """Return the items of a stage whose jobs have something left to do. Raises DamagedArtifact."""
    lineage = Lineage(store)
    missing = []
    for item in addresses.cfg.items(stage):
        if not done(addresses, stage, item, lineage):
            missing.append(item)
    return missing


def _handed_out(
    addresses: Addresses, stage: str, missing: Items, store: Store, hand_out: HandOut
) -> Iterable[JobResult]:
    """Yield the result of each missing job, as containers come back."""
    if not missing:
        return
    for items, ended in hand_out(stage, missing):
        if not isinstance(ended, BaseException):
            yield from ended
            continue
        # A container was lost for good; it may have published something before
        store.refresh()
        for item in items:
            result = _whole(addresses, stage, item, store, "made")
            if result.error:
                text = masked(f"{type(ended).__name__}: {ended}")
                result = JobResult(stage, item, addresses.of(stage, item), "failed", text)
            yield result


def _whole(
    addresses: Addresses, stage: str, item: str | None, store: Store, state: str
) -> JobResult:
    """Return the result of a job whose artifact is there; it has failed when the artifact is
    damaged, or stale."""
    address = addresses.of(stage, item)
    try:
        Lineage(store).check(address)
        return JobResult.of(store.require(address), state)
    except PipelineError as error:
        return _failed(stage, item, address, error, edge_of(addresses.cfg, store.root))
