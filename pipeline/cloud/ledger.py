"""What a command costs while it runs: what its containers were paid for, beside what they were
estimated at, written down on the volume by the one that hands out the jobs.

Invariant: a stage that would bring a command above modal.max_cost_usd is not begun.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ..config.machines import MachineConfig
from ..config.run import RunConfig
from ..errors import ConfigError
from ..run.reach import root_of
from ..run.stages import Addresses
from ..store.artifacts import Store, now
from ..store.costs import (
    CONDUCTING,
    FOLDER,
    PLANNING,
    SUFFIX,
    Costs,
    Spent,
    costs_path,
    parse_costs,
    read_costs,
    write_costs,
)
from .calls import is_handed_out
from .containers import JobResult
from .estimate import Expected, conducting_usd_per_s
from .far import Names, Read
from .handing_out import Came, FarJob, HandOut
from .leases import SharedTable
from .meters import lives, meter_key, metered, unnoted
from .prices import Prices, is_kind

GiveBack = Callable[[Iterable[str]], None]


class Ledger:
    """The costs of one command; all attempts of what hands out its jobs write to one file."""

    def __init__(self, store: Store, table: SharedTable, run: str, expected: Expected) -> None:
        """`run` is what all attempts are called."""
        self.store = store
        self.table = table
        self.run = run
        self.expected = expected
        begun = now()
        self.path = costs_path(store, begun, run)
        self.costs = Costs("", (), begun, "", expected.prices.checked)
        self._follows = False  # another attempt, which may have been lost
        self._asked: set[str] = set()  # after what that has begun

    @contextmanager
    def kept(self, command: str, cfgs: Sequence[RunConfig]) -> Iterator[None]:
        """Write down what a command costs while it lasts; it is for those runs."""
        self._follows = self.path.exists()
        with unnoted():
            if self._follows:
                self.costs = read_costs(self.path)
        runs = tuple(root_of(cfg, "", ()).id for cfg in cfgs)
        self.costs = replace(self.costs, command=command, runs=runs, ended="")
        told = self.expected
        usd_per_s = conducting_usd_per_s(told.prices, told.regions)
        if told.planning_s:
            # Its life is over, and what it cost was a part of the estimate
            usd = told.planning_s * usd_per_s
            self._replace(Spent(PLANNING, (), 1, told.planning_s, usd, usd))
        for cfg in cfgs:
            self.catch_up(cfg)
        with unnoted():
            # So that the next attempt knows of this one
            self._save()
        key = f"{self.run}/{CONDUCTING}"
        try:
            with metered(self.table, key, gpu=lambda: None):
                yield
        finally:
            self.costs = replace(self.costs, ended=now())
            with unnoted():
                paid = _paid(lives(self.table, key), lambda _gpu: usd_per_s)
                self._write(Spent(CONDUCTING, (), *paid, told.conducting_usd))

    def metered(self, hand_out: HandOut, give_back: GiveBack) -> HandOut:
        """Return what hands out jobs and notes what they cost; of those that are not begun it gives
        back the leases."""

        def wrapped(jobs: Sequence[FarJob]) -> Iterator[tuple[Sequence[FarJob], Came]]:
            stage = jobs[0].stage
            wanted = [job.address for job in jobs]
            try:
                self.refuse_above(stage, wanted)
            except ConfigError:
                give_back(self._fresh(wanted))
                raise
            for group, came in hand_out(jobs):
                machine = group[0].addresses.cfg.machine(stage)
                told = _told(group, came)
                ended = told or [job.address for job in group]
                self.note(stage, ended, machine, bool(told) and _is_made(came))
                yield group, came

        return wrapped

    def expect(self, usd: Mapping[str, float | None]) -> None:
        """Go by what jobs, by their addresses, are estimated at now that their settings are
        known."""
        known = {address: cost for address, cost in usd.items() if cost is not None}
        self.expected = replace(self.expected, usd={**self.expected.usd, **known})

    def refuse_above(self, stage: str, addresses: Sequence[str]) -> None:
        """Raise ConfigError when jobs that are about to begin would bring a command above
        modal.max_cost_usd; what an earlier attempt has begun is waited for, whatever it costs."""
        limit_usd = self.expected.limit_usd
        if limit_usd is None or not self._fresh(addresses):
            return
        estimated = math.fsum(self.expected.of(address) or 0.0 for address in addresses)
        conducting = begun = so_far = 0.0
        for row in self.costs.rows:
            for address, _seconds, paid, _estimated in row.shares():
                if row.stage == CONDUCTING:
                    conducting += paid
                elif address in addresses:
                    begun += paid
                else:
                    so_far += paid
        # What was paid for what is not done yet is in its estimate
        usd = max(estimated, begun)
        so_far += max(conducting, self.expected.conducting_usd)
        # What was estimated alone is below the limit, or nothing would have started
        if self.costs.rows and so_far + usd > limit_usd:
            raise ConfigError(
                f"this command has cost ${self.costs.usd:.2f} so far, and {stage} is estimated at "
                f"${estimated:.2f}, above modal.max_cost_usd {limit_usd:.2f} (prices of "
                f"{self.expected.prices.checked}): raise the limit and type it again, which goes "
                "on from here"
            )

    def _fresh(self, addresses: Iterable[str]) -> list[str]:
        """Return the jobs that no attempt has handed out yet."""
        return [each for each in addresses if not is_handed_out(self.table, self.run, each)]

    def note(
        self, stage: str, addresses: Sequence[str], machine: MachineConfig, made: bool
    ) -> None:
        """Write down what the containers of some jobs were paid for, and whether those are done."""
        together = self._together(addresses)
        known = [self.expected.of(address) for address in together]
        told = [usd for usd in known if usd is not None]
        estimated = sum(told) if told else None

        def usd_per_s(gpu: str) -> float:
            there = _as_found(machine, gpu)
            return self.expected.prices.usd_per_s(there, self.expected.regions)

        with unnoted():
            # One container is noted once, by the first of its jobs
            keys = dict.fromkeys(meter_key(self.table, self.run, [each]) for each in together)
            found = []
            for key in keys:
                found += lives(self.table, key)
            # Who left all its jobs to another run is no measure of how long their like take
            if found or made:
                self._write(Spent(stage, together, *_paid(found, usd_per_s), estimated, made))

    def _together(self, addresses: Sequence[str]) -> tuple[str, ...]:
        """Return jobs with those that an earlier attempt has noted beside them, whose containers
        were theirs too and which may be done since."""
        found: dict[str, None] = {}
        for row in self.costs.rows:
            if not set(row.addresses).isdisjoint(addresses):
                found |= dict.fromkeys(row.addresses)
        return tuple(found | dict.fromkeys(addresses))

    def catch_up(self, cfg: RunConfig) -> None:
        """Write down what containers of a run were paid for that an earlier attempt has begun, and
        was lost before they ended: who is done is handed out to nobody any more."""
        if not self._follows:
            return
        addresses = Addresses(cfg)
        for row in self.costs.rows:
            self._asked.update(row.addresses)
        with unnoted():
            for stage in cfg.stages:
                jobs = [addresses.of(stage, item) for item in cfg.items(stage)]
                self._catch_up(stage, jobs, cfg.machine(stage))

    def _catch_up(self, stage: str, addresses: Iterable[str], machine: MachineConfig) -> None:
        together: dict[str, list[str]] = {}
        for address in addresses:
            # What was done when the command was planned costs nothing
            if address in self._asked or self.expected.of(address) == 0.0:
                continue
            self._asked.add(address)
            key = meter_key(self.table, self.run, [address])
            together.setdefault(key, []).append(address)
        for key, group in together.items():
            if lives(self.table, key):
                # Others of them are still at work
                made = all(self.store.has(address) for address in group)
                self.note(stage, group, machine, made)

    def _write(self, row: Spent) -> None:
        """Write a row in the place of what was said of its jobs before. Raises what the store and
        the volume raise."""
        self._replace(row)
        self._save()

    def _replace(self, row: Spent) -> None:
        others = [each for each in self.costs.rows if not _share_jobs(each, row)]
        self.costs = replace(self.costs, rows=(*others, row))

    def _save(self) -> None:
        write_costs(self.path, self.costs)
        self.store.publish()


def _paid(
    found: list[tuple[float, str]], usd_per_s: Callable[[str], float]
) -> tuple[int, float, float]:
    """Return how many containers there were, how long they lived, and what that costs."""
    seconds = math.fsum(lived_s for lived_s, _ in found)
    usd = math.fsum(lived_s * usd_per_s(gpu) for lived_s, gpu in found)
    return len(found), seconds, usd


def _told(group: Sequence[FarJob], came: Came) -> list[str]:
    """Return the jobs of a container of which it says how they ended: not those that it left to
    another run."""
    if isinstance(came, BaseException):
        return [job.address for job in group]
    items = {result.item for result in came}
    return [job.address for job in group if job.item in items]


def _is_made(ended: list[JobResult] | BaseException) -> bool:
    """Whether jobs are done, by what their container came to."""
    if isinstance(ended, BaseException):
        return False
    return not any(result.error for result in ended)


def _share_jobs(one: Spent, other: Spent) -> bool:
    """Whether two rows are of the same jobs, of which those that are done may be left out."""
    if not (one.addresses and other.addresses):
        return one.stage == other.stage
    return not set(one.addresses).isdisjoint(other.addresses)


def _as_found(machine: MachineConfig, gpu: str) -> MachineConfig:
    """Return a machine with the one of its GPUs that a container got, where it can be told."""
    for text in machine.gpu:
        if is_kind(text, gpu):
            return machine.model_copy(update={"gpu": (text,)})
    return machine


def show_costs(
    run: str,
    names: Names,
    read: Read,
    prices: Prices,
    console: Console,
) -> None:
    """Print what a command has cost beside what was estimated, as the volume has it."""
    for name in names(FOLDER):
        content = read(f"{FOLDER}/{name}") if name.endswith(f"-{run}{SUFFIX}") else None
        if content is None:
            continue
        costs = parse_costs(content, Path(FOLDER) / name)
        console.print(
            f"it cost ${costs.usd:.2f} of an estimated ${costs.estimated_usd:.2f}: "
            f"{costs.seconds:,.0f} s of containers, with {prices.told()}; Modal's own account is "
            "`modal billing report`",
            highlight=False,
            soft_wrap=True,
        )
