"""Who does which job: a lease for each, in a table that all containers share, so that two runs that
want the same are not paid for twice.

Invariant: of those that claim a job one gets it. A lease that has expired is never written over:
the next one has the next number, and the table takes each number once. A container begins by a
number of its own, so of two runs that take the same job for theirs one works; where it cannot
renew that any more, it ends with its next checkpoint.
"""

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol, Self

from ..store.artifacts import now

# Longer than several renewals that get no answer, shorter than anybody wants to wait for the dead
LASTS_S = 300.0
RENEW_S = 60.0
ALONE_EVERY_S = 1.0  # whether who is at something that takes a moment has ended
RUN = "run"  # before what the attempts of a run are called


class SharedTable(Protocol):
    """What all containers read and write; of those that put a new key with `skip_if_exists` one is
    told that it did."""

    def get(self, key: str, default: str | None = None, /) -> str | None:
        """Return what stands under a key."""

    def put(self, key: str, value: str, /, *, skip_if_exists: bool = False) -> bool:
        """Write, or with `skip_if_exists` only where nothing stands; return whether it did."""


@dataclass(frozen=True)
class Lease:
    """One job that somebody does."""

    token: str  # whose it is
    by: str  # for people
    since: str
    until: float  # seconds since the epoch; 0: given back

    @classmethod
    def read(cls, text: str) -> "Lease | None":
        """Return a lease as it stands in the table, None for what is none."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return None


class Leases:
    """The leases of one run, renewed while it lasts."""

    def __init__(
        self,
        table: SharedTable,
        by: str,
        token: str = "",
        held: Mapping[str, int] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.table = table
        self.by = by
        self.token = token or uuid.uuid4().hex
        self.since = now()
        self._clock = clock
        # number by address; a thread renews what another one claims and gives back
        self._held = dict(held or {})
        self._lost: set[str] = set()
        self._renewed_at = clock()  # all of them, or taken after that
        self._lock = threading.Lock()

    def claim(self, address: str) -> Lease | None:
        """Return None where the job is this run's from now on, else the lease of who does it."""
        number = 0
        while True:
            text = self.table.get(_key(address, number))
            if text is None:
                key, value = _key(address, number), self._value(LASTS_S)
                if self.table.put(key, value, skip_if_exists=True):
                    with self._lock:
                        self._held[address] = number
                    return None
                # Somebody was faster, whose lease is looked at now
                continue
            lease = Lease.read(text)
            if lease is None or lease.until <= self._clock():
                number += 1
                continue
            if lease.token != self.token:
                return lease
            # An earlier attempt's, whose containers may be at work
            followed = self._followed(address, number)
            if followed is None:
                number += 1
                continue
            with self._lock:
                self._held[address] = followed
            return None

    def begin(self, address: str) -> Lease | None:
        """Return None where a container is to do a job that was handed out to it, else the lease of
        the other run that does it by now: this run's had ended before the container came up."""
        while True:
            number, last = self._last(address)
            if last is not None and last.token != self.token and last.until > self._clock():
                return last
            key = _key(address, number + 1)
            # Also where the last one is this run's: who saw that one expired may just be claiming
            if self.table.put(key, self._value(LASTS_S), skip_if_exists=True):
                break
        if last is not None and last.token == self.token:
            # Nobody renews it any more
            self.table.put(_key(address, number), self._value(None))
        with self._lock:
            self._held[address] = number + 1
        return None

    def _last(self, address: str) -> tuple[int, Lease | None]:
        """Return the last number that was claimed, -1 before any, and the lease under it."""
        number = -1
        last: Lease | None = None
        while True:
            text = self.table.get(_key(address, number + 1))
            if text is None:
                return number, last
            number += 1
            last = Lease.read(text)

    def give_back(self, addresses: Iterable[str]) -> None:
        """Let others do these jobs, as far as they are this run's."""
        for address in addresses:
            with self._lock:
                number = self._held.pop(address, None)
            if number is None:
                continue
            # Its container may have claimed another one
            followed = self._followed(address, number)
            for each in dict.fromkeys((number, number if followed is None else followed)):
                self.table.put(_key(address, each), self._value(None))

    @contextmanager
    def alone(self, address: str, wait: Callable[[float], None] = time.sleep) -> Iterator[None]:
        """Have something done by one run at a time, as soon as nobody else is at it."""
        while self.claim(address) is not None:
            wait(ALONE_EVERY_S)
        try:
            yield
        finally:
            self.give_back([address])

    def renew(self) -> None:
        """Have the leases last longer; one that expired and was followed by another run's is
        lost."""
        began = self._clock()
        with self._lock:
            held = dict(self._held)
        for address, claimed in held.items():
            number = self._renewed(address, claimed)
            with self._lock:
                if number is None and self._held.pop(address, None) is not None:
                    self._lost.add(address)
                elif number is not None and address in self._held:
                    self._held[address] = number
            if number is None:
                continue
            for earlier in range(number):
                # A table forgets what nobody reads for a week, and a number must not come twice
                self.table.get(_key(address, earlier))
            with self._lock:
                given_back = address not in self._held
            if given_back:
                # Between the look and the renewal
                self.table.put(_key(address, number), self._value(None))
        self._renewed_at = began

    def is_lost(self, address: str) -> bool:
        """Whether a job that was this run's may be another's by now: it is, or its lease could not
        be renewed before it ended."""
        with self._lock:
            if address in self._held:
                return self._clock() - self._renewed_at > LASTS_S
            return address in self._lost

    def _renewed(self, address: str, number: int) -> int | None:
        """Have a lease last longer; return its number, None where it is this run's no more."""
        while True:
            followed = self._followed(address, number)
            if followed is None:
                return None
            lease = Lease.read(self.table.get(_key(address, followed)) or "")
            if lease is not None and not lease.until:
                return None
            if lease is not None and lease.until > self._clock():
                self.table.put(_key(address, followed), self._value(LASTS_S))
                return followed
            # Others may be claiming what has ended just now
            key = _key(address, followed + 1)
            if self.table.put(key, self._value(LASTS_S), skip_if_exists=True):
                return followed + 1

    def _followed(self, address: str, number: int) -> int | None:
        """Return the number under which a lease is this run's by now: another attempt of it may
        have claimed the job anew after it had expired. None where somebody else has, or where it
        was given back."""
        latest = None
        while True:
            text = self.table.get(_key(address, number + 1))
            if text is None:
                break
            number += 1
            latest = Lease.read(text)
            if latest is None:
                return None
        if latest is None or (latest.token == self.token and latest.until):
            return number
        return None

    @contextmanager
    def kept(self, conducts: bool = False) -> Iterator[Self]:
        """Renew the leases in a thread meanwhile; of who `conducts` the run it is known that he is
        there."""

        def renew() -> None:
            self.renew()
            if conducts:
                self._show(LASTS_S)

        if conducts:
            self._show(LASTS_S)
        with repeated(renew, RENEW_S, "leases were not renewed"):
            yield self
        # Whoever is killed is known to be gone once this has not been renewed for long
        if conducts:
            self._show(None)

    def _show(self, lasts_s: float | None) -> None:
        self.table.put(f"{RUN}/{self.token}", self._value(lasts_s))

    def told(self) -> dict[str, Any]:
        """Return what `of` makes them of in a container that does the jobs."""
        with self._lock:
            return {"by": self.by, "token": self.token, "held": dict(self._held)}

    @classmethod
    def of(cls, table: SharedTable, told: Mapping[str, Any], addresses: Iterable[str]) -> "Leases":
        """Return the leases of the jobs of a container, which go on while it works, also when
        whoever handed them out has ended."""
        held = {each: told["held"][each] for each in addresses if each in told["held"]}
        return cls(table, told["by"], told["token"], held)

    def _value(self, lasts_s: float | None) -> str:
        until = 0.0 if lasts_s is None else self._clock() + lasts_s
        return json.dumps(asdict(Lease(self.token, self.by, self.since, until)))


@contextmanager
def repeated(act: Callable[[], None], every_s: float, failed: str) -> Iterator[None]:
    """Do something in a thread meanwhile, again and again; tell what went wrong, after `failed`."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(every_s):
            try:
                act()
            except Exception as error:  # a table raises what it likes; the next time may do
                print(f"{failed}: {type(error).__name__}: {error}")

    thread = threading.Thread(target=run, name=failed.partition(" ")[0], daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def is_alive(
    table: SharedTable, run: str, addresses: Iterable[str], clock: Callable[[], float] = time.time
) -> bool:
    """Whether anybody is at a run: who hands out its jobs, or a container that does one of them. Of
    a run that the table does not know nobody can say that it is over."""
    text = table.get(f"{RUN}/{run}")
    if text is None:
        return True
    lease = Lease.read(text)
    if lease is not None and lease.until > clock():
        return True
    return any(_is_at_work(table, address, run, clock) for address in addresses)


def _is_at_work(table: SharedTable, address: str, run: str, clock: Callable[[], float]) -> bool:
    """Whether a container of a run is at a job."""
    number = 0
    while True:
        text = table.get(_key(address, number))
        if text is None:
            return False
        lease = Lease.read(text)
        if lease is not None and lease.token == run and lease.until > clock():
            return True
        number += 1


def _key(address: str, number: int) -> str:
    return f"{address}/{number}"
