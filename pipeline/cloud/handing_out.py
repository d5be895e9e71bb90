"""Jobs handed out to containers, by a container that lasts as long as the run: which are missing,
who does them, how they ended."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..config.run import RunConfig
from ..credentials import masked
from ..errors import CannotStart, PipelineError
from ..run.advice import account, sentence
from ..run.dry_run import refuse_lacking
from ..run.identity import note_made
from ..run.job import done
from ..run.stages import Addresses, label, without_jobs
from ..store.artifacts import Store
from ..store.lineage import Lineage
from .containers import JobResult, edge_of, failed
from .leases import Lease, Leases

# Whether another run has ended what this one waits for: soon at first, as it may be about to
LOOK_FIRST_S = 1.0
LOOK_EVERY_S = 15.0


@dataclass(frozen=True, eq=False)
class FarJob:
    """One job of a run, or of one of many."""

    addresses: Addresses
    stage: str
    item: str | None

    @property
    def address(self) -> str:
        """Where its result lives."""
        return self.addresses.of(self.stage, self.item)

    @property
    def name(self) -> str:
        """The stage and the item, for people."""
        return label(self.stage, self.item)


# What a container came to, or the exception that took it
Came = list[JobResult] | BaseException
# Hands jobs of a stage, of one run or of several, to containers; gives back, container by
# container, its jobs with what came
HandOut = Callable[[Sequence[FarJob]], Iterable[tuple[Sequence[FarJob], Came]]]


def not_done(
    cfg: RunConfig, wanted: Sequence[str], store: Store, error: PipelineError
) -> list[JobResult]:
    """Return the jobs of the first stage that has any as failed, where a run cannot begin; with
    none at all the last stage, so that nobody takes it for done."""
    edge = edge_of(cfg, store.root)
    for stage in wanted:
        found = [failed(stage, item, "", error, edge) for item in cfg.items(stage)]
        if found:
            return found
    return [failed(wanted[-1], None, "", error, edge)]


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
    try:
        # Only in who has looked: the next attempt goes by that look
        refuse_lacking(cfg, store, wanted)
    except CannotStart as error:
        progress(sentence(error, edge))
        return not_done(cfg, wanted, store, error)
    for stage in wanted:
        # What containers made meanwhile is seen from here on; no file is open
        store.refresh()
        items = list(cfg.items(stage))
        if not items and len(wanted) == 1:
            progress(without_jobs(stage, cfg))
        jobs = [FarJob(addresses, stage, item) for item in items]
        made: dict[str | None, JobResult] = {}
        try:
            for job, result in shared_out(jobs, store, hand_out, leases, progress, wait):
                made[job.item] = result
                progress(f"{result.name}: {result.error or result.state}")
        except PipelineError as error:
            # A manifest that cannot be read, which no container could do anything about either
            progress(f"{stage}: {sentence(error, edge)}")
            for job in jobs:
                if job.item not in made:
                    made[job.item] = failed(stage, job.item, job.address, error, edge)
            return results + [made[item] for item in items]
        for job in jobs:
            if job.item not in made:
                note_made(addresses.cfg, store, stage, job.item)
                made[job.item] = whole(job, store, "found")
        results += [made[item] for item in items]
        errors = {item: result.error for item, result in made.items() if result.error}
        if errors:
            progress(account(stage, errors, items, command))
            return results
    return results


def shared_out(
    jobs: Sequence[FarJob],
    store: Store,
    hand_out: HandOut,
    leases: Leases | None,
    progress: Callable[[str], None] = print,
    wait: Callable[[float], None] = time.sleep,
) -> Iterator[tuple[FarJob, JobResult]]:
    """Yield each job of a stage that is handed out with its result, until none is missing that
    nobody has tried; what others do is waited for. Raises DamagedArtifact."""
    missing = _missing(jobs, store)
    if leases is None:
        yield from _handed_out(missing, store, hand_out)
        return
    known: set[tuple[str, str]] = set()
    wait_s = LOOK_FIRST_S
    while missing:
        mine: list[FarJob] = []
        others: dict[FarJob, Lease] = {}
        for job in missing:
            lease = leases.claim(job.address)
            if lease is None:
                mine.append(job)
            else:
                others[job] = lease
        if mine:
            # Who had it may have ended between the look and the claim
            store.refresh()
            to_do = _missing(mine, store)
            leases.give_back(job.address for job in mine if job not in to_do)
            mine = to_do
        left = dict.fromkeys(mine)
        # Whoever goes in the middle of it keeps the leases of what its containers are at
        for job, result in _handed_out(mine, store, hand_out):
            leases.give_back([job.address])
            left.pop(job)
            yield job, result
        for job, lease in others.items():
            if (job.address, lease.token) not in known:
                known.add((job.address, lease.token))
                progress(f"{job.name}: {lease.by} does it since {lease.since}; waiting for it")
        # What containers have left is another run's, which has claimed it before they came up
        if others or left:
            wait(wait_s)
            wait_s = min(2 * wait_s, LOOK_EVERY_S)
            store.refresh()
        missing = _missing([*left, *others], store)


def _missing(jobs: Sequence[FarJob], store: Store) -> list[FarJob]:
    """Return the jobs that have something left to do. Raises DamagedArtifact."""
    lineage = Lineage(store)
    return [job for job in jobs if not done(job.addresses, job.stage, job.item, lineage)]


def _handed_out(
    missing: Sequence[FarJob], store: Store, hand_out: HandOut
) -> Iterator[tuple[FarJob, JobResult]]:
    """Yield each missing job with its result, as containers come back."""
    if not missing:
        return
    for jobs, came in hand_out(missing):
        if not isinstance(came, BaseException):
            of = {job.item: job for job in jobs}
            for result in came:
                if result.item in of:
                    yield of[result.item], result
            continue
        # A container was lost for good; it may have published something before
        store.refresh()
        for job in jobs:
            result = whole(job, store, "made")
            if result.error:
                text = masked(f"{type(came).__name__}: {came}")
                result = JobResult(job.stage, job.item, job.address, "failed", text)
            yield job, result


def whole(job: FarJob, store: Store, state: str) -> JobResult:
    """Return the result of a job whose artifact is there; it has failed when the artifact is
    damaged, or stale."""
    try:
        Lineage(store).check(job.address)
        return JobResult.of(store.require(job.address), state)
    except PipelineError as error:
        edge = edge_of(job.addresses.cfg, store.root)
        return failed(job.stage, job.item, job.address, error, edge)
