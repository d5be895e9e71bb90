"""Experiments on Modal: what a sweep costs, asked before it starts, and its jobs handed out to
containers by one that lasts as long as the sweep."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console

from ..config.experiments import ExperimentsConfig, RangeConfig, SearchConfig
from ..config.run import RunConfig
from ..errors import ConfigError, DataError
from ..report.schema.experiments import ExperimentResults
from ..run.backend import printed_progress
from ..run.experiments.reading import Experiments, base_of
from ..run.experiments.sweep import Ended, GivesUp, HandOut, Wanted, is_text
from ..run.experiments.trials import Trial, listed_trials, made_trial
from ..run.stages import Addresses
from ..store.artifacts import Store
from ..store.lineage import Lineage
from .client import check, mirror, settled
from .containers import JobResult
from .estimate import JobEstimate, estimate, refuse_what_cannot_start
from .looks import as_recorded
from .prices import Prices
from .roots import begun

# Does jobs of a stage in containers: (items, settings) of each -> in order what became of it
Containers = Callable[
    [str, Sequence[tuple[list[str | None], dict]]], Iterable[list[JobResult] | BaseException]
]


@dataclass(frozen=True)
class FarStore:
    """The far store as the laptop sees it, each thing asked for once: trials share most."""

    names: Callable[[str], Iterable[str]]  # in a folder of it
    read: Callable[[str], bytes | None]
    mount: str  # where containers have it
    folder: Path  # gets what of it is needed here

    @classmethod
    def asked_once(
        cls,
        names: Callable[[str], Iterable[str]],
        read: Callable[[str], bytes | None],
        mount: str,
        folder: Path,
    ) -> "FarStore":
        """Return one that remembers what it was told."""
        return cls(cache(names), cache(read), mount, folder)


@dataclass(frozen=True)
class FarSweep:
    """What the container that conducts a sweep is given; small enough to travel."""

    name: str
    file: str
    settings: dict[str, Any]
    identities: dict[str, dict[str, str]]  # what the laptop planned with, by trial
    text_only: bool = False

    @property
    def experiments(self) -> Experiments:
        """The experiments, as they were read where they were typed."""
        settings = ExperimentsConfig.model_validate(self.settings)
        return Experiments(self.name, Path(self.file), settings)


def planned(
    experiments: Experiments,
    prices: Prices,
    far: FarStore,
    tell: Callable[[str], None],
    text_only: bool = False,
) -> tuple[FarSweep, list[JobEstimate]]:
    """Return a sweep as containers are to do it, and what each of its jobs will cost; with
    `text_only` nothing is trained, so that durations in epochs can be priced afterwards.

    Raises ConfigError and CannotStart for what no container could do.
    """
    cfg = settled(base_of(experiments), prices, tell)
    base = {**experiments.settings.base, "dtype": cfg.dtype}
    settings = experiments.settings.model_copy(update={"base": base})
    experiments = replace(experiments, settings=settings)
    lines: dict[str, JobEstimate] = {}
    identities = {}
    for listed in listed_trials(experiments):
        trial, notes = _recorded(listed, far)
        for note in notes:
            tell(note)
        identities[trial.label] = dict(trial.cfg.identity or {})
        lines |= _priced(trial, prices, far)
    found = list(lines.values())
    if text_only:
        found = [line for line in found if is_text(line.stage)]
    for name, search in () if text_only else settings.searches.items():
        found += _searched(experiments, name, search, lines, prices, far)
    sweep = FarSweep(
        experiments.name,
        str(experiments.file),
        # What is not stated must not come back as stated
        settings.model_dump(mode="json", exclude_unset=True),
        identities,
        text_only,
    )
    return sweep, found


def _recorded(trial: Trial, far: FarStore) -> tuple[Trial, list[str]]:
    cfg, notes = as_recorded(trial.cfg, far.names, far.read)
    return replace(trial, cfg=cfg), notes


def _priced(trial: Trial, prices: Prices, far: FarStore) -> dict[str, JobEstimate]:
    """Return the jobs of a trial by address, with what each will cost. Raises ConfigError,
    CannotStart."""
    check(trial.cfg, prices, far.mount)
    store = mirror(trial.cfg, far.folder, far.names, far.read)
    stages = tuple(dict.fromkeys(stage for stage, _ in trial.jobs))
    wanted = set(trial.jobs.values())
    found = {}
    for line in estimate(trial.cfg, stages, store, prices):
        if line.address in wanted:
            found[line.address] = line
    refuse_what_cannot_start(trial.cfg, list(found.values()), far.mount, far.names)
    return found


def _searched(
    experiments: Experiments,
    name: str,
    search: SearchConfig,
    lines: Mapping[str, JobEstimate],
    prices: Prices,
    far: FarStore,
) -> Iterator[JobEstimate]:
    """Yield what a search will cost: the dearer of its two outermost trials as often as it tries
    one, as nobody knows which it will choose."""
    dearest: list[JobEstimate] = []
    for outermost in (_first, _last):
        values = {dotted: outermost(each) for dotted, each in search.space.items()}
        seed = (search.seeds or experiments.settings.seeds)[0]
        try:
            trial = made_trial(experiments, name, search, {**search.change, **values}, seed)
        except ConfigError:
            # Values that describe no run together cost nothing
            continue
        trial, _ = _recorded(trial, far)
        own = _priced(trial, prices, far)
        # What other trials make as well is paid once
        new = [line for address, line in own.items() if address not in lines]
        dearest = max(dearest, new, key=_usd)
    for line in dearest:
        yield from [line] * search.trials


def _first(wanted: RangeConfig) -> Any:
    if wanted.choices is not None:
        return wanted.choices[0]
    return int(wanted.low or 0) if wanted.whole else wanted.low


def _last(wanted: RangeConfig) -> Any:
    if wanted.choices is not None:
        return wanted.choices[-1]
    return int(wanted.high or 0) if wanted.whole else wanted.high


def _usd(lines: Sequence[JobEstimate]) -> float:
    return sum(line.usd or 0.0 for line in lines)


def conducted(
    sweep: FarSweep, store: Store, containers: Containers, command: str, frozen: bool
) -> ExperimentResults:
    """Do a sweep by containers, and leave its results in the store; `command` is what was typed.

    Raises DataError where what is read is not what the laptop planned with, under a limit on the
    cost, and what opening a store raises.
    """
    # Only here, as the laptop has no use for what it brings
    from ..run.experiments.conduct import conduct, results_folder, write_results

    store.refresh()
    store.open()
    experiments = sweep.experiments
    progress = printed_progress(Console())

    @contextmanager
    def known(store: Store, trials: Iterable[Trial], _file: str) -> Iterator[None]:
        with ExitStack() as stack:
            for trial in trials:
                stack.enter_context(begun(trial.cfg, store, command))
            yield

    def agree(trials: Sequence[Trial]) -> None:
        store.publish()
        for trial in trials:
            was = sweep.identities.get(trial.label, {})
            now = trial.cfg.identity or {}
            limited = trial.cfg.modal.max_cost_usd is not None
            if limited and any(now.get(job) != print_ for job, print_ in was.items()):
                raise DataError(
                    f"what {trial.label} reads has changed since it was looked at last, and so may "
                    "the cost, which is limited: nothing was started, and the same command "
                    "estimates it anew"
                )

    results, trials = conduct(
        experiments,
        store,
        hand_out_to(containers, store),
        print,
        progress,
        frozen=frozen,
        text_only=sweep.text_only,
        known=known,
        agree=agree,
    )
    folder = results_folder(store, experiments)
    results = write_results(results, trials, store, folder, progress)
    store.publish()
    return results


def hand_out_to(containers: Containers, store: Store) -> HandOut:
    """Return what does jobs in containers, each in one of its own."""

    def hand_out(stage: str, wanted: Wanted, ended: Ended, _gives_up: GivesUp | None) -> None:
        # A training is not ended before its time: its rows tell afterwards where it would have been
        inputs: list[tuple[list[str | None], dict]] = []
        for cfg, item in wanted:
            inputs.append(([item], cfg.model_dump(mode="json")))
        for at, came in enumerate(containers(stage, inputs)):
            if isinstance(came, BaseException):
                ended(at, _lost(store, stage, wanted[at], came))
            else:
                ended(at, "".join(result.error for result in came))

    return hand_out


def _lost(store: Store, stage: str, job: tuple[RunConfig, str | None], error: BaseException) -> str:
    """Return why a job failed whose container was lost for good; "" where it had published its
    result before."""
    store.refresh()
    cfg, item = job
    if Lineage(store).is_current(Addresses(cfg).of(stage, item)):
        return ""
    return f"{type(error).__name__}: {error}"
