"""Experiments on Modal: what a sweep costs, asked before it starts, and its jobs handed out to
containers by one that lasts as long as the sweep."""

import io
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ..config.experiments import ExperimentsConfig, SearchConfig
from ..config.run import RunConfig
from ..errors import ConfigError, DataError, PipelineError
from ..families.load import parse
from ..report.narrow import plain_console
from ..report.schema.experiments import ExperimentResults
from ..run.advice import sentence
from ..run.backend import printed_progress
from ..run.experiments.reading import Experiments, base_of
from ..run.experiments.sweep import Ended, GivesUp, Wanted
from ..run.experiments.trials import Trial, listed_trials, made_trial
from ..run.stages import Addresses, is_text
from ..store.artifacts import Store
from .client import check, mirror, settled
from .containers import edge_of
from .estimate import (
    Expected,
    JobEstimate,
    estimate,
    expected,
    refuse_above,
    refuse_what_cannot_start,
)
from .far import WIDE, FarStore, on_volume
from .handing_out import FarJob, HandOut, shared_out, whole
from .leases import Leases
from .ledger import Ledger
from .looks import SharedLooks, as_recorded
from .meters import process_age_s
from .plan_table import show_estimate
from .planning import not_paid_for
from .prices import Prices
from .roots import begun


@dataclass(frozen=True)
class FarSweep:
    """What the container that conducts a sweep is given; small enough to travel."""

    name: str
    file: str
    settings: dict[str, Any]
    identities: dict[str, dict[str, str]]  # what the laptop planned with, by trial
    text_only: bool = False

    @classmethod
    def of(
        cls,
        experiments: Experiments,
        text_only: bool,
        identities: dict[str, dict[str, str]] | None = None,
    ) -> "FarSweep":
        """Return what a container is to know of experiments."""
        # What is not stated must not come back as stated
        settings = experiments.settings.model_dump(mode="json", exclude_unset=True)
        file = str(experiments.file)
        return cls(experiments.name, file, settings, identities or {}, text_only)

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
        dearest = _dearest(experiments, name, search, lines, prices, far)
        tell(
            f"search {name}: it chooses its {search.trials} trials one after another, so each is "
            f"counted at ${_usd(dearest):.2f}, the dearest at the ends of its space: a bound"
        )
        for line in dearest:
            found += [line] * search.trials
    return FarSweep.of(experiments, text_only, identities), found


@dataclass(frozen=True)
class FarSweepPlan:
    """A plan of a sweep that a container made, small enough to travel."""

    printed: str
    wrong: str  # why nothing can be started, "" where it can
    sweep: FarSweep
    expected: Expected | None


def planned_sweep_there(
    wish: FarSweep,
    raw: dict,
    prices: Prices,
    root: Path,
    planning_s: Callable[[], float] = process_age_s,
) -> FarSweepPlan:
    """Plan a sweep in a container that has the volume at root and is paid for meanwhile; `raw` is
    the run that all its trials start from."""
    printed = io.StringIO()
    console = plain_console(file=printed, width=WIDE)
    cfg = parse(raw)
    sweep, wrong = wish, ""
    costs = None
    try:
        with tempfile.TemporaryDirectory() as folder:
            far = on_volume(root, Path(folder))
            sweep, costs = planned_sweep(wish, cfg, prices, far, console, planning_s)
    except PipelineError as error:
        wrong = sentence(error, edge_of(cfg, root))
    return FarSweepPlan(printed.getvalue(), wrong, sweep, costs)


def planned_sweep(
    wish: FarSweep,
    cfg: RunConfig,
    prices: Prices,
    far: FarStore,
    console: Console,
    planning_s: Callable[[], float] = not_paid_for,
) -> tuple[FarSweep, Expected]:
    """Show what a sweep will do and what it costs; return it as containers are to do it, and what
    its jobs are estimated at. `planning_s` says how long the container lives that plans, where one
    does. Raises PipelineError for what keeps it from starting."""

    def tell(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    sweep, lines = planned(wish.experiments, prices, far, tell, wish.text_only)
    took_s = planning_s()
    show_estimate(cfg, lines, prices, False, console, took_s)
    refuse_above(cfg, lines, prices, False, took_s)
    return sweep, expected(cfg, lines, prices, False, planning_s())


def _recorded(trial: Trial, far: FarStore) -> tuple[Trial, list[str]]:
    cfg, notes = as_recorded(trial.cfg, far.names, far.read)
    return replace(trial, cfg=cfg), notes


def _priced(trial: Trial, prices: Prices, far: FarStore) -> dict[str, JobEstimate]:
    """Return the jobs of a trial by address, with what each will cost. Raises ConfigError,
    CannotStart."""
    check(trial.cfg, prices, far.mount)
    store = mirror(trial.cfg, far.folder, far.names, far.read)
    stages = tuple(dict.fromkeys(stage for stage, _ in trial.measured))
    wanted = set(trial.measured.values())
    found = {}
    for line in estimate(trial.cfg, stages, store, prices):
        if line.address in wanted:
            found[line.address] = line
    refuse_what_cannot_start(trial.cfg, list(found.values()), far.mount, far.names)
    return found


def _dearest(
    experiments: Experiments,
    name: str,
    search: SearchConfig,
    lines: Mapping[str, JobEstimate],
    prices: Prices,
    far: FarStore,
) -> list[JobEstimate]:
    """Return what the dearest trial of a search will cost, as nobody knows which it will choose: of
    each setting the dearest end of its range, or of its choices, while the others are at their
    first."""

    def priced(values: Mapping[str, Any]) -> list[JobEstimate]:
        seed = (search.seeds or experiments.settings.seeds)[0]
        try:
            trial = made_trial(experiments, name, search, values, seed)
        except ConfigError:
            # Values that describe no run together cost nothing
            return []
        trial, _ = _recorded(trial, far)
        own = _priced(trial, prices, far)
        # What other trials make as well is paid once
        return [line for address, line in own.items() if address not in lines]

    first = {dotted: each.ends[0] for dotted, each in search.space.items()}
    found = [priced(first)]
    together = dict(first)
    for dotted, each in search.space.items():
        most = _usd(found[0])
        for value in each.ends[1:]:
            found.append(priced({**first, dotted: value}))
            if _usd(found[-1]) > most:
                most = _usd(found[-1])
                together[dotted] = value
    # Last, as each setting's dearest value need not go together with the others'
    found.append(priced(together))
    return max(found, key=_usd)


def _usd(lines: Sequence[JobEstimate]) -> float:
    return sum(line.usd or 0.0 for line in lines)


def _nothing(_cfg: RunConfig) -> None: ...


def _unpriced(_trial: Trial) -> None: ...


def pricing(ledger: Ledger, store: Store) -> Callable[[Trial], None]:
    """Return what has a ledger know what a trial will cost, by its own settings, as soon as those
    are known: in the container that conducts, before any of its jobs begins."""
    prices = ledger.expected.prices

    def price(trial: Trial) -> None:
        if all(ledger.expected.knows(address) for address in trial.measured.values()):
            return
        # What cannot be priced is told by its own job
        with suppress(PipelineError), tempfile.TemporaryDirectory() as folder:
            found = _priced(trial, prices, on_volume(store.root, Path(folder)))
            ledger.expect({line.address: line.usd for line in found.values()})

    return price


def conducted(
    sweep: FarSweep,
    store: Store,
    hand_out: HandOut,
    command: str,
    frozen: bool,
    run: str = "",
    leases: Leases | None = None,
    wait: Callable[[float], None] = time.sleep,
    catch_up: Callable[[RunConfig], None] = _nothing,
    price: Callable[[Trial], None] = _unpriced,
) -> ExperimentResults:
    """Do a sweep by containers, and leave its results in the store; `command` is what was typed,
    `run` what all attempts are called, what others do by their `leases` is waited for. `catch_up`
    notes what an earlier attempt has paid for a trial, `price` what one that was chosen will cost.

    Raises DataError where what is read is not what the laptop planned with, under a limit on the
    cost, and what opening a store raises.
    """
    # Only here, as the laptop has no use for what it brings
    from ..run.experiments.conduct import conduct, results_folder, write_results

    store.refresh()
    store.open()
    experiments = sweep.experiments
    progress = printed_progress(plain_console())

    @contextmanager
    def known(store: Store, trials: Iterable[Trial], _file: str) -> Iterator[None]:
        with ExitStack() as stack:
            for trial in trials:
                makes = trial.measured.values()
                noted = begun(trial.cfg, store, command, run=run, part=trial.label, makes=makes)
                stack.enter_context(noted)
                catch_up(trial.cfg)
                # After that, as what a lost attempt has done costs nothing more from now on
                price(trial)
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

    def in_containers(stage: str, wanted: Wanted, ended: Ended, _gives_up: GivesUp | None) -> None:
        # A training is not ended before its time: its rows tell afterwards where it would have been
        jobs = [FarJob(Addresses(cfg), stage, item) for cfg, item in wanted]
        left = {job: at for at, job in enumerate(jobs)}
        for job, result in shared_out(jobs, store, hand_out, leases, print, wait):
            ended(left.pop(job), result.error)
        for job, at in left.items():
            # Somebody else has done it meanwhile
            ended(at, whole(job, store, "found").error)

    results, trials = conduct(
        experiments,
        store,
        in_containers,
        print,
        progress,
        frozen=frozen,
        text_only=sweep.text_only,
        known=known,
        agree=agree,
        looks=None if leases is None else SharedLooks(store, leases.table, run),
    )
    folder = results_folder(store, experiments)
    results = write_results(results, trials, store, folder, progress)
    store.publish()
    return results
