"""What a command will do elsewhere before it does it: jobs, machines, time, US dollars.

Of a training and of a report the operations are known, and the rate comes from jobs that have
finished on the same kind of machine, else from the price table. What else there is takes as long as
others of its stage took. A limit on the cost is held against all of it, and what cannot be
estimated is refused under a limit.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median

from ..config.machines import MachineConfig
from ..config.run import JobKey, RunConfig
from ..errors import CannotStart, ConfigError, MissingArtifact, PipelineError, StoreError
from ..run.dry_run import ASSUMED_MFU, DONE, STUCK, causes, plan, state_of, why_of
from ..run.job import done
from ..run.speeds import Speed, alike, speeds, typical
from ..run.stages import Addresses, label
from ..store.artifacts import Store
from ..store.costs import readable_costs
from ..store.lineage import Lineage
from ..train.flops import JobCost
from .far import Names
from .inputs import not_on_volume
from .prices import Prices, either_of, is_kind, most_gpus

STARTUP_S = 60.0  # until a container trains: start, imports, volume
# A job of a stage of which nobody has timed any; on the long side, as a limit has to hold
ASSUMED_S = 600.0
# What hands out jobs, waits most of its time
CONDUCTOR = MachineConfig(cpu=0.5, memory_mb=1024)


@dataclass(frozen=True)
class JobEstimate:
    """One job of a command."""

    stage: str
    address: str
    state: str  # done, done?, stale, at step n, to do
    machine: MachineConfig
    tokens: int | None
    # None: not known, before preprocess has counted the tokens, or of a model whose sizes are not
    # known here
    seconds: float | None
    usd: float | None
    trains: bool
    assumed: bool = False  # its time, as nobody has timed its like
    bytes: int = 0  # of its result: as it is, else of the weights that it will have
    peak_bytes: int | None = None  # predicted, above the level after imports
    why: str = ""  # what makes it stale, or may
    refused: PipelineError | None = None  # why it cannot run within runtime.memory_budget

    @property
    def unknown(self) -> bool:
        """Whether it will cost something that nobody knows yet."""
        return self.trains and self.usd is None and self.state not in DONE


@dataclass(frozen=True)
class Expected:
    """What the jobs of a command are estimated at, as the container that hands them out is told."""

    prices: Prices
    # By address, and by its stage and item for one that another look at the data has changed
    usd: Mapping[str, float] = field(default_factory=dict)
    conducting_usd: float = 0.0
    planning_s: float = 0.0  # of the container that made the plan, 0 where none did
    regions: tuple[str, ...] = ()
    limit_usd: float | None = None

    def of(self, address: str) -> float | None:
        """Return what a job is estimated at, None where nobody knows."""
        return self.usd.get(address, self.usd.get(_of_job(address)))

    def knows(self, address: str) -> bool:
        """Whether the very job was estimated, and not another one of its stage and item."""
        return address in self.usd


@dataclass(frozen=True)
class Total:
    """What a command comes to."""

    seconds: float  # on the clock
    jobs_usd: float
    conducting_usd: float  # of what hands them out
    planning_usd: float  # of the container that made the plan

    @property
    def usd(self) -> float:
        """All of it."""
        return self.jobs_usd + self.conducting_usd + self.planning_usd


def estimate(
    cfg: RunConfig, wanted: tuple[str, ...], store: Store, prices: Prices
) -> list[JobEstimate]:
    """Return the jobs of the wanted stages in order; store may be a mirror."""
    entries = plan(cfg, store)
    planned = {entry.address: entry for entry in entries}
    addresses = Addresses(cfg)
    lineage = Lineage(store)
    finished_jobs = list(speeds(store))
    timed = _timed(store)
    # Without the sizes of its model nothing is known of any training
    sizes_known = any(entry.job for entry in entries)
    estimates = []
    for stage in wanted:
        for _, item, address in addresses.jobs(stage):
            trains = cfg.stages[stage].kind == "training"
            machine = cfg.machine(stage)
            # A stage outside the run, such as deploy, is in no plan, and trains nothing.
            entry = planned.get(address)
            state = entry.state if entry else state_of(address, lineage)
            if entry is None and state == "done" and not done(addresses, stage, item, lineage):
                # There, and to be copied once more
                state = "to do"
            job = entry.job if entry else None
            seconds: float | None = None
            usd: float | None = None
            assumed = False
            if state == "done":
                seconds = usd = 0.0
            elif job is not None and job.flops is not None:
                # What may turn out to be stale is counted: a limit on the cost has to hold
                settled = addresses.cfg
                seconds, usd = _worst(job, job.flops, machine, settled, finished_jobs, prices)
            elif not trains or (job is None and sizes_known):
                seconds, assumed = _usual_s(stage, timed)
                usd = seconds * prices.usd_per_s(machine, cfg.modal.regions)
            estimates.append(
                JobEstimate(
                    stage,
                    address,
                    state,
                    machine,
                    tokens=job.tokens if job else None,
                    seconds=seconds,
                    usd=usd,
                    trains=trains,
                    assumed=assumed,
                    bytes=_bytes(address, job, trains, addresses.cfg.dtype, store),
                    peak_bytes=job.peak_bytes if job else None,
                    why=entry.why if entry else why_of(address, state, lineage),
                    # The prediction is of main memory and says nothing about a GPU's.
                    refused=None if machine.gpu or entry is None else entry.refused,
                )
            )
    return estimates


def _timed(store: Store) -> dict[str, list[float]]:
    """Return the seconds of containers that did one job, by stage: as they were paid for, and of
    those of which only the job was timed."""
    found: dict[str, list[float]] = defaultdict(list)
    paid: set[str] = set()
    for costs in readable_costs(store):
        for row in costs.rows:
            # One that failed says nothing of how long its like take
            if row.addresses and row.made:
                paid.update(row.addresses)
                found[row.stage].append(row.seconds / len(row.addresses))
    for address in store.addresses():
        # What cannot be read is for its own job to say
        with suppress(StoreError):
            if address not in paid and store.has(address):
                made = store.manifest(address)
                found[made.stage].append(STARTUP_S + (made.made.get("seconds") or 0.0))
    return found


def _usual_s(stage: str, timed: Mapping[str, list[float]]) -> tuple[float, bool]:
    """Return how long a job of a stage takes, and whether that is only assumed."""
    if timed.get(stage):
        return median(timed[stage]), False
    return ASSUMED_S, True


def _bytes(address: str, job: JobCost | None, trains: bool, dtype: str, store: Store) -> int:
    """Return the size of a result, or of the weights that it will have."""
    with suppress(StoreError):
        if store.has(address):
            return store.manifest(address).bytes
    width = 2 if dtype == "bf16" else 4
    return width * job.parameters if job and trains else 0


def _worst(
    job: JobCost,
    flops: float,
    machine: MachineConfig,
    cfg: RunConfig,
    finished_jobs: Iterable[Speed],
    prices: Prices,
) -> tuple[float, float]:
    """Return the seconds of a job on the slowest GPU that its machine may get, and what it costs on
    the one that makes it dearest: the cheap one may take so much longer."""
    seconds = usd = 0.0
    for got in either_of(machine):
        took_s = STARTUP_S + flops / _flops_per_s(job, got, finished_jobs, prices, cfg.dtype)
        seconds = max(seconds, took_s)
        usd = max(usd, took_s * prices.usd_per_s(got, cfg.modal.regions))
    return seconds, usd


def _flops_per_s(
    job: JobCost,
    machine: MachineConfig,
    finished_jobs: Iterable[Speed],
    prices: Prices,
    dtype: str,
) -> float:
    """Return what finished jobs like one reached on such a machine, of one kind of GPU, else a
    share of its peak."""
    there = [each for each in finished_jobs if _rate_on(machine, each)]
    rates = []
    for each in alike(there, job.flops_per_token, math.ceil(machine.cpu), dtype):
        rates.append((_rate_on(machine, each) or 0.0) * each.scale(job.flops_per_token))
    return typical(rates) or ASSUMED_MFU * prices.flops_per_s(machine)


def _rate_on(machine: MachineConfig, speed: Speed) -> float | None:
    """Return the operations per second that a job's rate is on such a machine, None when it was
    done on something else."""
    rate = speed.flops_per_s
    found = speed.manifest.made.get("machine") or {}
    gpu = found.get("gpu") or ""
    if machine.gpu:
        return rate if is_kind(machine.gpu[0], gpu) else None
    if gpu:
        return None
    # Processors differ in cores more than in what a core does.
    return rate / found.get("threads", 1) * machine.cpu


def refuse_what_cannot_start(
    cfg: RunConfig,
    estimates: list[JobEstimate],
    mount: str,
    names: Names,
) -> None:
    """Raise CannotStart when a job to do has no room in its memory budget, or reads what is not on
    the volume, which is at `mount` there and of which `names` lists a folder."""
    items = {}
    for stage in cfg.stages:
        for _, item, address in Addresses(cfg).jobs(stage):
            items[address] = item
    found: list[tuple[PipelineError, str]] = []
    for each in estimates:
        if each.state in DONE:
            continue
        item = items[each.address]
        absent = not_on_volume(cfg, each.stage, item, mount, names)
        for error in filter(None, (each.refused, absent)):
            found.append((error, label(each.stage, item)))
    if found:
        raise CannotStart(STUCK, causes=causes(found))


def refuse_above(
    cfg: RunConfig,
    estimates: list[JobEstimate],
    prices: Prices,
    sequential: bool,
    planning_s: float = 0.0,
) -> None:
    """Raise ConfigError when the estimate is above modal.max_cost_usd, or unknown while there is
    such a limit; `planning_s` is how long a container has made the plan, if one did."""
    limit_usd = cfg.modal.max_cost_usd
    if limit_usd is None:
        return
    unknown = [each for each in estimates if each.unknown]
    if any(each.peak_bytes is None for each in unknown):
        raise ConfigError(
            f"modal.max_cost_usd is {limit_usd:.2f}, and the sizes of the model that trunk.init "
            "names are not known on this machine, so no cost is: name it as on the Hub, or set "
            "modal.max_cost_usd to null to run without a limit"
        )
    if unknown:
        raise ConfigError(
            f"modal.max_cost_usd is {limit_usd:.2f}, and a duration in epochs cannot be priced "
            "before the tokens are counted: run preprocess first, then this command again, or "
            "give tokens or steps"
        )
    usd = total(cfg, estimates, prices, sequential, planning_s).usd
    if usd > limit_usd:
        raise ConfigError(
            f"this command is estimated at ${usd:.2f}, above modal.max_cost_usd "
            f"{limit_usd:.2f} (prices of {prices.checked}): train less, choose cheaper GPUs "
            "(modal.<stage>.gpu), or raise the limit; no job was started"
        )


def total(
    cfg: RunConfig,
    estimates: list[JobEstimate],
    prices: Prices,
    sequential: bool,
    planning_s: float = 0.0,
) -> Total:
    """Return what is known of all jobs, of the container that hands them out, and of the one that
    made the plan."""
    seconds = 0.0
    # Stages wait for each other, the jobs of one do not.
    for stage in dict.fromkeys(each.stage for each in estimates):
        seconds += _wall_s(cfg, stage, estimates, sequential)
    jobs_usd = math.fsum(each.usd or 0.0 for each in estimates)
    usd_per_s = conducting_usd_per_s(prices, cfg.modal.regions)
    conducting_usd = (STARTUP_S + seconds) * usd_per_s
    return Total(seconds, jobs_usd, conducting_usd, planning_s * usd_per_s)


def conducting_usd_per_s(prices: Prices, regions: Iterable[str]) -> float:
    """Return the price of a container that hands out jobs, plans, or looks at the volume."""
    return prices.usd_per_s(CONDUCTOR, regions, nonpreemptible=True)


def expected(
    cfg: RunConfig,
    estimates: list[JobEstimate],
    prices: Prices,
    sequential: bool,
    planning_s: float = 0.0,
) -> Expected:
    """Return what the container that hands out these jobs is told of their costs."""
    usd: dict[str, float] = {}
    for each in estimates:
        if each.usd is not None:
            usd[each.address] = each.usd
            # Of many trials the dearest, as a limit has to hold for one that nobody knows yet
            job = _of_job(each.address)
            usd[job] = max(each.usd, usd.get(job, 0.0))
    conducting_usd = total(cfg, estimates, prices, sequential).conducting_usd
    limit_usd = cfg.modal.max_cost_usd
    return Expected(prices, usd, conducting_usd, planning_s, cfg.modal.regions, limit_usd)


def refuse_without_inputs(cfg: RunConfig, wanted: tuple[str, ...], store: Store) -> None:
    """Raise MissingArtifact when a job reads what is not there, or StaleArtifact what is stale, and
    this command does not make it; no cost so far."""
    addresses = Addresses(cfg)
    lineage = Lineage(store)
    for stage in wanted:
        # In a dict, as experts need the same trunk; its order is that of the stages.
        needs: dict[JobKey, None] = {}
        for item in cfg.items(stage):
            if not done(addresses, stage, item, lineage):
                needs |= dict.fromkeys(cfg.needs(stage, item))
        absent = []
        there = []
        for need in needs:
            if need[0] in wanted:
                continue
            if store.has(addresses.of(*need)):
                there.append(addresses.of(*need))
            else:
                absent.append(need)
        if absent:
            names = ", ".join(label(*need) for need in absent)
            commands = [f"`modal run modal_app.py::{each}`" for each in dict(absent)]
            raise MissingArtifact(
                f"{stage} needs {names} of this configuration, not on the volume yet: "
                f"do {' and '.join(commands)} first, or all with "
                "`modal run modal_app.py::run_all`; nothing was started"
            )
        lineage.check(*there)


def _of_job(address: str) -> str:
    """Return an address without what makes it that of one run."""
    return address.rpartition("-")[0]


def _wall_s(cfg: RunConfig, stage: str, estimates: list[JobEstimate], sequential: bool) -> float:
    """Return how long a stage takes: side by side as far as modal.max_gpus allows, or one job after
    another."""
    seconds = [each.seconds for each in estimates if each.stage == stage and each.seconds]
    if not seconds:
        return 0.0
    at_once = 1
    if not sequential:
        gpus = most_gpus(cfg.machine(stage))
        at_once = max(1, cfg.modal.max_gpus // gpus)
    # No shorter than its longest job, however many containers there are.
    return max(max(seconds), math.fsum(seconds) / at_once)
