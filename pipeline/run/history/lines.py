"""Runs and trainings as `history` tells of them, read from history.db."""

import json
import sqlite3
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from ...report.scores import Score
from ...store.address import job_of
from ...store.costs import by_prices
from ..find import Names
from ..stages import STAGES, label
from .past_experiments import PastExperiments, past_experiments

_TRAININGS = """
SELECT h.address, h.rows, h.last_step, h.steps, h.first_time, h.last_time, h.torn, h.missing,
    a.address IS NOT NULL, a.seconds, a.machine,
    train.last, valid.low, valid.low_step, tokens.last, rate.last, peak.high
FROM histories AS h
LEFT JOIN artifacts AS a ON a.address = h.address
LEFT JOIN series AS train ON train.address = h.address AND train.key = 'train_nats'
LEFT JOIN series AS valid ON valid.address = h.address AND valid.key = 'valid_nats'
LEFT JOIN series AS tokens ON tokens.address = h.address AND tokens.key = 'tokens'
LEFT JOIN series AS rate ON rate.address = h.address AND rate.key = 'tokens_per_s'
LEFT JOIN series AS peak ON peak.address = h.address AND peak.key = 'rss_mb'
"""
_TOTALS = """
SELECT run, count(*), total(seconds), total(bytes)
FROM run_addresses JOIN artifacts USING (address) GROUP BY run
"""
_TOKENIZERS = "SELECT run, address FROM run_addresses WHERE address GLOB 'tokenizer-*'"
# What runs share counts for each of them, as all that its addresses took does
SPENT = """
SELECT run, stage, total(seconds), total(usd), sum(estimated) FROM (
    SELECT r.run AS run, s.stage AS stage, s.seconds, s.usd, s.estimated_usd AS estimated
    FROM spent AS s JOIN run_addresses AS r ON r.address = s.address
    UNION ALL
    SELECT run, stage, seconds, usd, estimated_usd FROM spent WHERE run <> ''
) GROUP BY run, stage
"""
_PRICES = """
SELECT DISTINCT prices FROM commands JOIN spent ON spent.command = commands.id
WHERE spent.run = ? OR spent.address IN (SELECT address FROM run_addresses WHERE run = ?)
"""
T = TypeVar("T")


@dataclass(frozen=True)
class PastTraining:
    """One training, by its history."""

    address: str
    rows: int
    last_step: int
    steps: int  # of the whole training; 0 where it does not say
    first_time: float | None
    last_time: float | None
    torn: bool
    missing: str
    is_done: bool
    seconds: float | None
    machine: str | None
    train_nats: float | None  # the last one
    valid_nats: float | None  # the best one
    valid_step: int | None
    tokens: float | None
    tokens_per_s: float | None
    peak_mb: float | None

    @property
    def stage(self) -> str:
        """The stage, as the address says."""
        return job_of(self.address)[0]

    @property
    def name(self) -> str:
        """The stage and the item, for people; the whole of what is no address."""
        return label(*job_of(self.address))

    @property
    def place(self) -> tuple[int, str]:
        """Where it stands among the trainings of its run."""
        # what no stage has made comes last
        number = STAGES.index(self.stage) if self.stage in STAGES else len(STAGES)
        return number, self.address

    @property
    def position(self) -> str:
        """How far it is."""
        if self.steps and self.steps != self.last_step:
            return f"{self.last_step:,} of {self.steps:,}"
        return f"{self.last_step:,}"

    @property
    def wrong(self) -> str:
        """What is not as it should be with its history, in words; empty where nothing is."""
        words = [self.missing] if self.missing else []
        if self.torn:
            words.append("its last line is torn (being written, or its writer was killed)")
        return "; ".join(words)


@dataclass(frozen=True)
class Evaluation:
    """A report in figures."""

    address: str
    run: str
    family: str
    made: str
    passed: int
    failed: int
    untold: int
    scores: tuple[Score, ...]

    @property
    def score(self) -> Score | None:
        """The figure that stands for the run."""
        return next((score for score in self.scores if score.serves), None)

    @property
    def criteria(self) -> str:
        """How many criteria were met, in words; empty where there were none."""
        all_of_them = self.passed + self.failed + self.untold
        return f"{self.passed} of {all_of_them} met" if all_of_them else ""


@dataclass(frozen=True)
class Deploy:
    """A bundle that `deploy` left."""

    address: str
    made: str
    bytes: int
    served: bool  # on Modal, now


@dataclass(frozen=True)
class PastRun:
    """A run and what a store has of it; or a training that no run reaches, by itself."""

    id: str
    name: str
    family: str
    begun: str
    file: str
    overrides: tuple[str, ...]
    removed: bool
    made: int = 0  # artifacts
    seconds: float = 0.0  # of all jobs that are done
    bytes: int = 0
    usd: float | None = None  # on Modal; None: nothing is known of any cost
    trainings: tuple[PastTraining, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    deploys: tuple[Deploy, ...] = ()
    tokens: str = ""  # the same where losses a token compare; not known of every run
    has_root: bool = True  # False: a history that was brought from elsewhere, or is of no run

    @property
    def addresses(self) -> tuple[str, ...]:
        """What there is of it."""
        found = [each.address for each in self.trainings]
        found += [each.address for each in self.evaluations]
        found += [each.address for each in self.deploys]
        return tuple(found)

    @property
    def last(self) -> PastTraining | None:
        """The training that the others led to."""
        return self.trainings[-1] if self.trainings else None

    @property
    def evaluation(self) -> Evaluation | None:
        """The newest report."""
        return max(self.evaluations, key=lambda each: each.made, default=None)

    @property
    def wrong(self) -> list[str]:
        """What is not as it should be with its histories."""
        return [f"{each.address}: {each.wrong}" for each in self.trainings if each.wrong]


@dataclass(frozen=True)
class Known:
    """All that a store's history.db knows of runs."""

    runs: tuple[PastRun, ...]  # the one that was begun last first
    wrong: tuple[str, ...]  # files that could not be read
    where: Path  # the store
    experiments: tuple[PastExperiments, ...]  # those that were made last first
    commands: int = 0  # of which it is known what they cost on Modal
    usd: float = 0.0  # of all of them, those of runs that are gone too
    priced: str = ""  # when the prices of that were checked, in words

    @cached_property
    def trainings(self) -> dict[str, PastTraining]:
        """Every training once, by address."""
        found: dict[str, PastTraining] = {}
        for run in self.runs:
            found |= {each.address: each for each in run.trainings}
        return found

    def experiments_called(self, name: str) -> PastExperiments | None:
        """Return the experiments of a name; None where there are none."""
        return next((each for each in self.experiments if each.name == name), None)

    def run_beside(self, name: str) -> PastRun | None:
        """Return the latest run of a name that experiments have too, and are meant by; None where
        there are not both."""
        if self.experiments_called(name) is None:
            return None
        # a training that no run reaches has its item for a name
        return next((run for run in self.runs if run.name == name and run.has_root), None)

    def trials_of(self, experiments: PastExperiments) -> list[PastRun]:
        """Return the runs that are trials of experiments."""
        return [run for run in self.runs if experiments.has(run.name, run.addresses)]

    @cached_property
    def names(self) -> Names:
        """What can be named, as every command takes it."""
        there = set(self.trainings)
        for run in self.runs:
            there.update(run.addresses)
        rooted = [run for run in self.runs if run.has_root]
        return Names(self.where, lambda: rooted, there.__contains__, lambda: there)


@dataclass
class _Places:
    """What lies at the addresses of a store, by address."""

    trainings: Mapping[str, PastTraining]
    evaluations: Mapping[str, Evaluation]
    deploys: Mapping[str, Deploy]
    tokens: Mapping[str, str]  # of runs, where their tokenizer is
    of_run: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def known(index: sqlite3.Connection, where: Path) -> Known:
    """Return what the history.db of a store knows of runs."""
    places = _Places(
        {each.address: each for each in _trainings(index)},
        {each.address: each for each in _evaluations(index)},
        {each.address: each for each in _deploys(index)},
        dict(index.execute(_TOKENIZERS)),
    )
    reached = set()
    for table in ("histories", "evaluations", "deploys"):
        # names of ours, no values
        there = f"SELECT address FROM {table}"  # noqa: S608
        pairs = f"SELECT run, address FROM run_addresses WHERE address IN ({there})"  # noqa: S608
        for run, address in index.execute(pairs):
            places.of_run[run].append(address)
            reached.add(address)
    totals = {run: rest for run, *rest in index.execute(_TOTALS)}
    usd: dict[str, float] = defaultdict(float)
    for run, _stage, _seconds, paid, _estimated in index.execute(SPENT):
        usd[run] += paid
    runs = []
    for row in index.execute("SELECT id, name, family, begun, file, overrides, removed FROM runs"):
        total = totals.get(row[0], [0, 0.0, 0])
        runs.append(_run(row, [*total, usd.get(row[0])], places))
    runs += [_alone(each) for address, each in places.trainings.items() if address not in reached]
    runs.sort(key=lambda run: (run.begun, run.id), reverse=True)
    wrong = []
    for path, text in index.execute("SELECT path, wrong FROM files WHERE wrong <> ''"):
        # What reads results knows no path of theirs
        wrong.append(text if path in text else f"{path}: {text}")
    commands, paid = index.execute("SELECT count(*), total(usd) FROM commands").fetchone()
    when = by_prices(date for (date,) in index.execute("SELECT DISTINCT prices FROM commands"))
    tried = past_experiments(index)
    return Known(tuple(runs), tuple(wrong), where, tried, commands, paid, when)


def priced_when(runs: Iterable[str], index: sqlite3.Connection) -> str:
    """Return in words when the prices were checked by which the costs of runs are told."""
    dates: list[str] = []
    for run in runs:
        dates += [date for (date,) in index.execute(_PRICES, (run, run))]
    return by_prices(dates)


def _alone(training: PastTraining) -> PastRun:
    """Return a training that no run reaches as a run of its own."""
    begun = ""
    if training.first_time is not None:
        begun = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(training.first_time))
    stage, item = job_of(training.address)
    return PastRun(
        training.address,
        item or stage,
        "",
        begun,
        "",
        (),
        removed=False,
        made=int(training.is_done),
        seconds=training.seconds or 0.0,
        trainings=(training,),
        has_root=False,
    )


def _run(row: tuple, totals: list, places: _Places) -> PastRun:
    run, name, family, begun, file, overrides, removed = row
    addresses = places.of_run.get(run, [])
    made, seconds, size, usd = totals
    trainings = _at(addresses, places.trainings)
    return PastRun(
        run,
        name,
        family,
        begun,
        file,
        tuple(json.loads(overrides)),
        bool(removed),
        made,
        seconds,
        int(size),
        usd,
        tuple(sorted(trainings, key=lambda each: each.place)),
        tuple(_at(addresses, places.evaluations)),
        tuple(_at(addresses, places.deploys)),
        places.tokens.get(run, ""),
    )


def _at(addresses: Iterable[str], found: Mapping[str, T]) -> list[T]:
    return [found[address] for address in addresses if address in found]


def _trainings(index: sqlite3.Connection) -> list[PastTraining]:
    found = []
    for row in index.execute(_TRAININGS):
        address, rows, last_step, steps, first, last, torn, missing, is_done, *rest = row
        told = (rows, last_step, steps, first, last)
        found.append(PastTraining(address, *told, bool(torn), missing, bool(is_done), *rest))
    return found


def _evaluations(index: sqlite3.Connection) -> list[Evaluation]:
    scores: dict[str, list[Score]] = defaultdict(list)
    for address, name, measure, value, serves in index.execute(
        "SELECT address, name, measure, value, serves FROM scores ORDER BY address, place"
    ):
        scores[address].append(Score(name, measure, value, bool(serves)))
    found = []
    for row in index.execute("SELECT * FROM evaluations"):
        address, run, family, made, passed, failed, untold = row
        criteria = (passed, failed, untold)
        found.append(Evaluation(address, run, family, made, *criteria, tuple(scores[address])))
    return found


def _deploys(index: sqlite3.Connection) -> list[Deploy]:
    current = {address for (address,) in index.execute("SELECT address FROM served WHERE current")}
    found = []
    for address, made, size in index.execute("SELECT address, made, bytes FROM deploys"):
        found.append(Deploy(address, made, size, address in current))
    return found
