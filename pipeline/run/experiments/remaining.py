"""What of a sweep is still to do, and how long that will take on this machine."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from ...errors import PipelineError
from ...families import family
from ...hardware import cores
from ...report.format import finite, seconds
from ...store.artifacts import Manifest, Reader, Store
from ...train.flops import JobCost
from ..speeds import Speed, alike, of_this_machine, speed_of, typical
from ..stages import is_text
from .trials import Trial


@dataclass(frozen=True)
class SweepJob:
    """A job of a sweep, with the first trial that needs it."""

    trial: Trial
    stage: str
    item: str | None

    @property
    def kind(self) -> tuple[str, str]:
        """What is the same of jobs that take about as long, where no operations are counted."""
        # Of a pretrained trunk's tokens models are much larger
        return self.stage, self.trial.tokens


class Remaining:
    """The jobs of a sweep that are not done; `parallel` of them run side by side here. With None
    they run elsewhere, and nobody tells how long they take."""

    def __init__(self, store: Store, parallel: int | None) -> None:
        self._store = store
        self._reader = Reader(store)
        self._parallel = parallel
        self._wanted: dict[str, SweepJob] = {}  # by address, as all below
        self._left: dict[str, SweepJob] = {}
        self._costs: dict[str, JobCost | None] = {}
        # Read once, as a store may have thousands, and then told by the jobs that end
        self._speeds: list[Speed] | None = None

    def want(self, trials: Iterable[Trial], stages: Iterable[str]) -> None:
        """Count the jobs that trials need of some stages."""
        counted = frozenset(stages)
        for trial in trials:
            for (stage, item), address in trial.measured.items():
                if stage not in counted or address in self._wanted:
                    continue
                self._wanted[address] = SweepJob(trial, stage, item)
                if not self._store.has(address):
                    self._left[address] = self._wanted[address]

    def over(self, address: str) -> None:
        """Count a job no longer, as it is done or nobody can do it."""
        self._left.pop(address, None)
        manifest = self._made(address) if self._speeds is not None else None
        speed = speed_of(manifest) if manifest else None
        if self._speeds is not None and speed:
            self._speeds.append(speed)

    def told(self) -> str:
        """Return how many jobs are over, and how long the others will take, in words."""
        over = len(self._wanted) - len(self._left)
        words = f"{over:,} of {len(self._wanted):,} jobs"
        # Before the text is counted nobody can tell what passes over it are
        uncounted = any(is_text(job.stage) for job in self._left.values())
        if self._parallel is None or uncounted or not self._left:
            return words
        if self._speeds is None:
            self._speeds = of_this_machine(self._store)
        beside = self._beside()
        times = [self._seconds(address, self._speeds, beside) for address in self._left]
        told = [each for each in times if each is not None]
        if not told:
            return words
        least = "about" if len(told) == len(times) else "at least"
        left_s = sum(told) / min(self._parallel, len(times))
        return f"{words}, {least} {seconds(left_s)} left"

    def _seconds(
        self, address: str, known: list[Speed], beside: dict[tuple[str, str], float]
    ) -> float | None:
        """Return how long a job will take; None where nobody can tell."""
        job = self._left[address]
        cost = self._cost(address)
        if cost is None or cost.flops is None:
            return beside.get(job.kind)
        share = cores() // (self._parallel or 1)
        threads = job.trial.cfg.runtime.most_threads(share)
        told = alike(known, cost.flops_per_token, threads, job.trial.addresses.cfg.dtype)
        rate = typical([each.flops_per_s * each.scale(cost.flops_per_token) for each in told])
        return cost.flops / rate + beside.get(job.kind, 0.0) if rate else None

    def _beside(self) -> dict[tuple[str, str], float]:
        """Return what finished jobs of each kind took beside the steps of a training, of others
        all that they took."""
        found: dict[tuple[str, str], list[float]] = {}
        for address, job in self._wanted.items():
            manifest = None if address in self._left else self._made(address)
            taken = None if manifest is None else finite(manifest.made.get("seconds"))
            if manifest is not None and taken is not None:
                taken -= finite(manifest.metrics.get("training_s")) or 0.0
                found.setdefault(job.kind, []).append(max(0.0, taken))
        return {kind: median(each) for kind, each in found.items()}

    def _cost(self, address: str) -> JobCost | None:
        """Return what a training will spend; None for what is none, or cannot be told."""
        if address not in self._costs:
            self._costs[address] = self._computed(self._left[address])
        return self._costs[address]

    def _computed(self, job: SweepJob) -> JobCost | None:
        cfg = job.trial.addresses.cfg
        if cfg.stages[job.stage].kind != "training":
            return None
        made = {}
        for each, address in job.trial.measured.items():
            manifest = self._made(address)
            if manifest is not None:
                made[each] = manifest.metrics
        try:
            return family(cfg.family).cost(cfg, job.stage, job.item, made, cfg.dtype == "bf16")
        except PipelineError:
            # Whoever does the job says what is wrong with it
            return None

    def _made(self, address: str) -> Manifest | None:
        try:
            return self._reader.recorded(address) if self._store.has(address) else None
        except PipelineError:
            return None
