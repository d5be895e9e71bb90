"""How far the jobs of a run are: by manifests, histories and what is held, and how long the rest
will take."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any

from pydantic import ValidationError

from ...errors import PipelineError, StoreError
from ...families.load import parse
from ...report.format import finite
from ...store import in_use
from ...store.address import job_of
from ...store.artifacts import Store
from ...store.display import LOSSES
from ...store.history import VALIDATION, read
from ...store.roots import Root
from ..stages import RUN, STAGES, Addresses, Job, label

DONE = "done"
RUNNING = "running"
QUIET = "no row for long"  # of a run that is in progress
STOPPED = "stopped"
TO_DO = "to do"
# Rows by which the pace is told: the last ones, as a machine may have become busier.
RECENT = 20
# A training that has written nothing for so many of its usual gaps, and so many seconds, is quiet.
QUIET_GAPS = 10
QUIET_S = 120.0


@dataclass(frozen=True)
class Position:
    """How far one job is."""

    address: str
    stage: str
    item: str | None
    state: str
    step: int = 0
    steps: int = 0  # of all of it; 0: no training, or not known yet
    left_s: float | None = None  # None: nobody can tell
    taken_s: float | None = None  # of a job that is done
    whole_s: float | None = None  # of all of it, by its pace
    nats: float | None = None
    valid_nats: float | None = None
    tokens_per_s: float | None = None
    curve: tuple[float, ...] = ()
    of: str = ""  # whose it is, where several runs are looked at as one

    @property
    def name(self) -> str:
        """The stage and the item, for people."""
        name = label(self.stage, self.item)
        return f"{self.of}: {name}" if self.of else name

    @property
    def share(self) -> float | None:
        """How much of it is done; None where that is not known."""
        if self.state == DONE:
            return 1.0
        return self.step / self.steps if self.steps else None


@dataclass(frozen=True)
class Look:
    """A run at one moment."""

    run: str
    positions: tuple[Position, ...]
    in_progress: bool

    @property
    def done(self) -> int:
        """How many jobs are done."""
        return sum(each.state == DONE for each in self.positions)

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be seen."""
        return not self.in_progress or self.done == len(self.positions)

    @property
    def left_s(self) -> float:
        """How long the jobs will take of which that can be told: those to do share the places of
        those that run."""
        running = [each.left_s or 0.0 for each in self.positions if each.state == RUNNING]
        waiting = [each.left_s or 0.0 for each in self.positions if each.state == TO_DO]
        return max(running, default=0.0) + sum(waiting) / max(1, len(running))

    @property
    def unknown(self) -> list[str]:
        """The jobs of which nobody can tell how long they will take."""
        found = []
        for each in self.positions:
            if each.state != DONE and each.left_s is None:
                found.append(each.name)
        return found


def look(store: Store, root: Root, usual: Mapping[str, float], now_s: float) -> Look:
    """Return how far a run is. `usual`: seconds that a job of a stage took before, where that is
    known. Raises UnreadableFile, DamagedArtifact, StoreError."""
    going = in_progress(store, root)
    found = []
    for job in jobs_of(root, store):
        found.append(position_of(store, job, going, now_s))
    return Look(root.id, tuple(with_times(found, usual)), going)


def in_progress(store: Store, root: Root) -> bool:
    """Whether a run is at work. Raises UnreadableFile, DamagedArtifact."""
    return set(root.addresses) <= in_use.addresses(store)


def jobs_of(root: Root, store: Store) -> list[Job]:
    """Return (stage, item, address) of the jobs of a run in order: all of them, of a trial of
    experiments those that it is made of, or where its settings are another version's those that
    have left something."""
    with suppress(PipelineError, ValidationError, KeyError, TypeError, AttributeError):
        addresses = Addresses(parse(root.settings))
        found = [job for stage in RUN for job in addresses.jobs(stage)]
        known = set(root.addresses)
        if root.makes:
            # It is measured by a stage that no run has
            every = [job for stage in STAGES for job in addresses.jobs(stage)]
            found = [job for job in every if job[2] in root.makes]
            known = set(root.makes)
        if found and {address for *_, address in found} <= known:
            return found
    there = []
    for address in root.makes or root.addresses:
        if store.folder(address).exists() or store.history(address).exists():
            there.append((*job_of(address), address))
    return sorted(there, key=_by_stage)


def _by_stage(job: Job) -> tuple[int, str]:
    stage, _, address = job
    return STAGES.index(stage) if stage in STAGES else len(STAGES), address


def position_of(store: Store, job: Job, going: bool, now_s: float) -> Position:
    """Return how far a job is, of a run that is in progress or not. Raises UnreadableFile."""
    stage, item, address = job
    if store.has(address):
        seconds = None
        steps = 0
        # damaged: whoever opens it says so
        with suppress(StoreError):
            manifest = store.manifest(address)
            seconds = finite(manifest.made.get("seconds"))
            steps = int(finite(manifest.metrics.get("steps")) or 0)
        rows = _rows(store, address)
        return replace(
            _of_rows(address, stage, item, rows),
            state=DONE,
            step=steps,
            steps=steps,
            left_s=0.0,
            taken_s=seconds,
        )
    if store.history(address).exists():
        return _training(store, stage, item, address, going, now_s)
    # one that trains nothing has an empty folder as long as it is made
    begun = going and store.folder(address).exists()
    return Position(address, stage, item, RUNNING if begun else TO_DO)


def _rows(store: Store, address: str) -> list[dict[str, Any]]:
    return read(store.history(address)).rows if store.history(address).exists() else []


def _training(
    store: Store, stage: str, item: str | None, address: str, going: bool, now_s: float
) -> Position:
    """Return the position of a training that is not done. Raises UnreadableFile."""
    history = read(store.history(address))
    seen = _of_rows(address, stage, item, history.rows)
    seen = replace(seen, steps=history.steps)
    recent = [row for row in history.rows[-RECENT:] if finite(row.get("time")) is not None]
    if not recent:
        return replace(seen, state=RUNNING if going else STOPPED)
    last = recent[-1]
    gaps = [later["time"] - row["time"] for row, later in pairwise(recent)]
    quiet_s = max(QUIET_S, QUIET_GAPS * max(gaps, default=0.0))
    since_s = max(0.0, now_s - last["time"])
    state = STOPPED
    if going:
        state = QUIET if since_s > quiet_s else RUNNING
    steps = last["step"] - recent[0]["step"]
    if not history.steps or steps <= 0:
        return replace(seen, state=state)
    step_s = (last["time"] - recent[0]["time"]) / steps
    to_do = history.steps - last["step"]
    return replace(
        seen,
        state=state,
        left_s=max(0.0, to_do * step_s - (since_s if state == RUNNING else 0.0)),
        whole_s=history.steps * step_s,
    )


def _of_rows(
    address: str, stage: str, item: str | None, rows: Sequence[dict[str, Any]]
) -> Position:
    """Return what rows say of a job; its state and times are for others to say."""
    nats = [row[key] for row in rows for key in LOSSES if finite(row.get(key)) is not None]
    valid = [row[VALIDATION] for row in rows if finite(row.get(VALIDATION)) is not None]
    rates = [row["tokens_per_s"] for row in rows if finite(row.get("tokens_per_s"))]
    return Position(
        address,
        stage,
        item,
        TO_DO,
        step=rows[-1]["step"] if rows else 0,
        nats=nats[-1] if nats else None,
        valid_nats=min(valid, default=None),
        tokens_per_s=rates[-1] if rates else None,
        curve=tuple(nats),
    )


def with_times(found: Sequence[Position], usual: Mapping[str, float]) -> list[Position]:
    """Return positions with how long those will take that do not say so themselves: as the others
    of their stage in this run, else as before."""
    known: dict[str, list[float]] = {}
    for each in found:
        taken = each.taken_s or each.whole_s
        if taken:
            known.setdefault(each.stage, []).append(taken)
    times = dict(usual)
    for stage, seconds in known.items():
        times[stage] = median(seconds)
    out = []
    for each in found:
        if each.left_s is None and each.stage in times:
            each = replace(each, left_s=times[each.stage])
        out.append(each)
    return out
