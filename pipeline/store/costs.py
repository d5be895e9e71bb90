"""What commands on rented machines have cost: a file for each, beside what it was estimated at.

Invariant: one writer per file, which writes it whole. It stays when its runs are removed, as what
was paid for stays paid.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import StoreError
from .artifacts import Store, write_text
from .reading import of_version, read_bytes, sealed

FOLDER = "costs"
SUFFIX = ".json"
# Raised when a file comes to say something else.
VERSION = 1
CONDUCTING = "conducting"  # in a stage's place: what handed out the jobs
PLANNING = "planning"  # likewise: the container that made the plan, where the laptop did not


@dataclass(frozen=True)
class Spent:
    """What was paid for jobs that one container after another worked on, until they were done or
    given up."""

    stage: str
    addresses: tuple[str, ...]  # of the jobs; none: of what handed them out
    containers: int
    seconds: float  # of all of them together, from start to end
    usd: float
    estimated_usd: float | None  # None: nobody knew
    made: bool = True  # whether all of the jobs are done

    def shares(self) -> list[tuple[str, float, float, float | None]]:
        """Return address, seconds, cost and estimate of each job, which are told in equal parts."""
        parts = max(1, len(self.addresses))
        estimated = None if self.estimated_usd is None else self.estimated_usd / parts
        share = (self.seconds / parts, self.usd / parts, estimated)
        return [(address, *share) for address in self.addresses or ("",)]


@dataclass(frozen=True)
class Costs:
    """One command."""

    command: str  # as typed
    runs: tuple[str, ...]  # ids of the runs that it was for
    begun: str
    ended: str  # "": it goes on, or was lost
    prices: str  # when they were checked
    rows: tuple[Spent, ...] = ()

    @property
    def usd(self) -> float:
        """What it has cost so far."""
        return math.fsum(row.usd for row in self.rows)

    @property
    def seconds(self) -> float:
        """How long its containers were paid for, together."""
        return math.fsum(row.seconds for row in self.rows)

    @property
    def estimated_usd(self) -> float:
        """What was estimated of what it has cost so far, as far as anybody knew."""
        return math.fsum(row.estimated_usd or 0.0 for row in self.rows)


def costs_path(store: Store, begun: str, command: str) -> Path:
    """Where the costs of a command are, by what its attempts are called: one that is there already,
    else named by when it was begun, so that names are in the order of time."""
    for path in sorted((store.root / FOLDER).glob(f"*-{command}{SUFFIX}")):
        return path
    return store.root / FOLDER / f"{begun.replace(':', '')}-{command}{SUFFIX}"


def write_costs(path: Path, costs: Costs) -> None:
    """Write what a command has cost so far. Raises DiskFull, OSError."""
    path.parent.mkdir(exist_ok=True)
    write_text(path, sealed({"version": VERSION} | asdict(costs), indent=1))


def read_costs(path: Path) -> Costs:
    """Read what a command has cost. Raises DamagedArtifact, UnreadableFile, NewerStore."""
    return parse_costs(read_bytes(path), path)


def parse_costs(data: bytes, path: Path) -> Costs:
    """Return what the file at `path` says. Raises DamagedArtifact, NewerStore."""
    return of_version(Costs, data, path, VERSION, "costs")


def usd_of_runs(store: Store, runs: Mapping[str, Iterable[str]]) -> dict[str, float]:
    """Return what the jobs of each run have cost, and its part of what handed them out, of those of
    which anything is known; `runs` has their addresses. What several share counts for each."""
    of_address: dict[str, float] = defaultdict(float)
    found: dict[str, float] = defaultdict(float)
    for costs in readable_costs(store):
        for row in costs.rows:
            for address, _seconds, usd, _estimated in row.shares():
                if address:
                    of_address[address] += usd
                for run in () if address else costs.runs:
                    found[run] += usd / len(costs.runs)
    for run, addresses in runs.items():
        paid = [of_address[address] for address in addresses if address in of_address]
        if paid:
            found[run] += math.fsum(paid)
    return dict(found)


def by_prices(dates: Iterable[str]) -> str:
    """Return in words when the prices were checked by which costs were told, "" where none says."""
    known = sorted(set(dates) - {""})
    if not known:
        return ""
    first, last = known[0], known[-1]
    return f"by prices of {first}" if first == last else f"by prices of {first} to {last}"


def readable_costs(store: Store) -> list[Costs]:
    """Return the costs that can be read, the oldest first."""
    found = []
    for path in sorted((store.root / FOLDER).glob(f"*{SUFFIX}")):
        with suppress(StoreError):
            found.append(read_costs(path))
    return found
