"""The trainings of a sweep: stage after stage over all trials, so that what they share is made
once, and the jobs of a stage may run side by side whichever trial they are of."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from ...config.run import JobKey, RunConfig
from ...errors import PipelineError
from ...protocols import Progress
from ...store.artifacts import Store
from ...store.lineage import Lineage
from ..identity import begin, changed, note_made
from ..job import done
from ..reach import working
from ..stages import STAGES, is_text, label
from .remaining import Remaining
from .trials import Trial

# What is done where jobs run: (the run, the item) of each, all of one stage
Wanted = Sequence[tuple[RunConfig, str | None]]
# Whether a job is to be ended before its time, asked now and then by its position
GivesUp = Callable[[int], bool]
# Told the position of a job that has ended, and why it failed, "" where it did not
Ended = Callable[[int, str], None]
# Has what trials make in a store left alone while it lasts; the text is the file that names them
Known = Callable[[Store, Sequence[Trial], str], AbstractContextManager[None]]
# Does jobs of a stage
HandOut = Callable[[str, Wanted, Ended, GivesUp | None], None]


class SweepLooks(Protocol):
    """What was seen of what trials read outside the store, kept for who goes on with a sweep."""

    def former(self, trials: Sequence[Trial]) -> Mapping[str, dict[str, str]]:
        """Return what was seen for each of the trials, by their labels; nothing where nobody has
        looked."""

    def keep(self, trials: Sequence[Trial]) -> None:
        """Keep what was seen for trials that begin together."""


class NoLooks:
    """Looks of a sweep that is begun anew each time."""

    def former(self, _trials: Sequence[Trial]) -> Mapping[str, dict[str, str]]:
        """Return nothing."""
        return {}

    def keep(self, _trials: Sequence[Trial]) -> None:
        """Keep nothing."""


@dataclass
class TrialSweep:
    """Trials that are made in a store, and what went wrong with jobs of them."""

    store: Store
    hand_out: HandOut
    tell: Callable[[str], None]
    known: Known
    remaining: Remaining
    looks: SweepLooks = field(default_factory=NoLooks)
    errors: dict[str, str] = field(default_factory=dict)  # by address

    def make(
        self,
        trials: Sequence[Trial],
        gives_up: Callable[[str], bool] | None = None,
        text_only: bool = False,
    ) -> None:
        """Do what is missing of trials' models, all of it that does not need what failed; with
        `text_only` nothing is trained. `gives_up` is asked by a job's address whether it is to be
        ended before its time."""
        stages = [stage for stage in STAGES if is_text(stage) or not text_only]
        self.remaining.want(trials, stages)
        for stage in stages:
            self._make(stage, [(trial, trial.jobs) for trial in trials], gives_up)

    def measure(self, trials: Sequence[Trial]) -> None:
        """Measure the models of trials that are there."""
        for stage in STAGES:
            self._make(stage, [(trial, trial.measured) for trial in trials])

    def _make(
        self,
        stage: str,
        wanted: Sequence[tuple[Trial, Mapping[JobKey, str]]],
        gives_up: Callable[[str], bool] | None = None,
    ) -> None:
        missing = self._missing(stage, wanted)
        if missing:
            self._do(stage, missing, gives_up)

    def _do(
        self,
        stage: str,
        missing: Mapping[str, tuple[Trial, str | None]],
        gives_up: Callable[[str], bool] | None,
    ) -> None:
        addresses = list(missing)
        wanted = [(trial.addresses.cfg, item) for trial, item in missing.values()]

        def ended(at: int, error: str) -> None:
            trial, item = missing[addresses[at]]
            if error:
                self.errors[addresses[at]] = error
            self.remaining.over(addresses[at])
            told = error.removeprefix(f"{label(stage, item)}: ") or "done"
            self.tell(f"{trial.label}: {label(stage, item)}: {told} ({self.remaining.told()})")

        asked = None if gives_up is None else _by_position(gives_up, addresses)
        self.hand_out(stage, wanted, ended, asked)

    def _missing(
        self, stage: str, wanted: Sequence[tuple[Trial, Mapping[JobKey, str]]]
    ) -> dict[str, tuple[Trial, str | None]]:
        """Return the jobs of a stage that are to be done, by address, each with the first trial
        that needs it."""
        # What containers made meanwhile is seen from here on
        self.store.refresh()
        lineage = Lineage(self.store)
        found: dict[str, tuple[Trial, str | None]] = {}
        for trial, jobs in wanted:
            for (of_stage, item), address in jobs.items():
                if of_stage != stage or address in found or address in self.errors:
                    continue
                cause = self._cause(trial, jobs, (stage, item))
                if cause:
                    self.errors[address] = cause
                    self.remaining.over(address)
                    continue
                try:
                    is_done = done(trial.addresses, stage, item, lineage)
                except PipelineError as error:
                    self.errors[address] = str(error)
                    self.remaining.over(address)
                    continue
                if is_done:
                    note_made(trial.addresses.cfg, self.store, stage, item)
                else:
                    found[address] = trial, item
        return found

    def _cause(self, trial: Trial, jobs: Mapping[JobKey, str], job: JobKey) -> str:
        """Return why a job cannot be done as one that it needs failed; "" where none did."""
        for need in trial.cfg.needs(*job):
            if jobs[need] in self.errors:
                return self.errors[jobs[need]]
        return ""

    def unmeasured(self, trial: Trial) -> str:
        """Return why the model of a trial was not measured; "" where nothing went wrong."""
        return self.errors.get(trial.measured[trial.score], "")

    def error_of(self, trial: Trial) -> str:
        """Return why a trial has no model; "" where nothing went wrong."""
        for job, address in trial.jobs.items():
            if address in self.errors:
                # Most say themselves which job it was
                error = self.errors[address].removeprefix(f"{label(*job)}: ")
                return f"{label(*job)}: {error}"
        return ""


def _by_position(gives_up: Callable[[str], bool], addresses: Sequence[str]) -> GivesUp:
    return lambda at: gives_up(addresses[at])


def looked_at(
    trials: Sequence[Trial],
    store: Store,
    progress: Progress,
    frozen: bool = False,
    looks: SweepLooks | None = None,
) -> tuple[list[Trial], list[str]]:
    """Return trials that say what they read outside the store, looked at before any of them starts,
    and what to tell of that, each once; what `looks` have of them is not looked at again."""
    looks = looks or NoLooks()
    former = looks.former(trials)
    found = []
    told: dict[str, None] = {}
    if trials and all(trial.label in former for trial in trials):
        for trial in trials:
            seen = {"identity": former[trial.label]}
            found.append(replace(trial, cfg=trial.cfg.model_copy(update=seen)))
        return found, []
    for trial in trials:
        # What all of them read is looked at once: the store has its sums
        cfg, notes = begin(trial.cfg, store, progress, frozen=frozen, makes=True)
        found.append(replace(trial, cfg=cfg))
        told |= dict.fromkeys((*notes, *changed(cfg, store, found[-1].addresses.of)))
    # All at once: what they share must not be of two looks
    looks.keep(found)
    return found, list(told)


@contextmanager
def known_to(store: Store, trials: Iterable[Trial], file: str) -> Iterator[None]:
    """Have what trials make or may read left alone while it lasts, and known to be theirs."""
    with ExitStack() as stack:
        for trial in trials:
            stack.enter_context(working(store, trial.cfg, file, makes=trial.measured.values()))
        yield
