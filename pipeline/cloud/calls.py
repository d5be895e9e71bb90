"""Jobs as they are handed out, so that whoever did so can be followed by another: which call does
which job stands in the table that all containers share.

Invariant: of a run one call does a job. Whoever begins one and is gone before that is noted is
followed by another that begins it again; the first call that is noted, by who began it or by its
own container, does the job, and the container of the other one ends with nothing done. A call
whose container finds the job claimed by another run leaves it, as does one that has lost its lease,
and is followed by another call when the job is this run's again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from .containers import JobResult
from .handing_out import Came, FarJob, HandOut
from .leases import Leases, SharedTable

# Attempts of what hands out jobs beside the first one, as many as Modal allows
ATTEMPTS = 10


class Call(Protocol):
    """Jobs that a container was asked for."""

    @property
    def object_id(self) -> str:
        """What it is found again by."""

    def get(self) -> list[JobResult]:
        """Wait for it. Raises what took the container."""


Start = Callable[[Sequence[FarJob]], Call]
Find = Callable[[str], Call]


def by_calls(run: str, table: SharedTable, sequential: bool, start: Start, find: Find) -> HandOut:
    """Return what hands out the jobs of a run, or of several that were begun as one, of which a
    container gets those of one; `start` asks for a container, `find` finds what an earlier attempt
    asked for. `run` is what all attempts are called."""

    def hand_out(jobs: Sequence[FarJob]) -> Iterator[tuple[list[FarJob], Came]]:
        calls: dict[str, Call] = {}
        of: dict[str, list[FarJob]] = {}
        fresh = []
        for job in jobs:
            _, known = _noted(table, run, job.address)
            if known is None:
                fresh.append(job)
            else:
                of.setdefault(known, []).append(job)
        for group in _groups(fresh, sequential):
            call = start(group)
            calls[call.object_id] = call
            for job in group:
                noted = _note(table, run, job.address, call.object_id)
                of.setdefault(noted, []).append(job)
        for known, group in of.items():
            came: Came
            try:
                came = (calls.get(known) or find(known)).get()
            except Exception as error:  # whatever took the container
                came = error
            if not isinstance(came, BaseException):
                _note_left(table, run, group, came, known)
            yield group, came

    return hand_out


def takes(table: SharedTable, told: Mapping[str, Any], address: str, call: str | None) -> bool:
    """Whether a container does a job that was handed out to it: not where it is another call's, nor
    where another run has it by now. `told` is what it was given of the leases of its run."""
    run = told["token"]
    if call is None or not run:
        return True
    # One that comes back after a preemption does not take up what it has left
    if _has_left(table, run, address, call) or _note(table, run, address, call) != call:
        return False
    lease = Leases.of(table, told, [address]).begin(address)
    if lease is None:
        return True
    print(f"{address}: {lease.by} does it since {lease.since}; nothing is done here")
    table.put(_left(run, address, call), lease.by)
    return False


def _note_left(
    table: SharedTable, run: str, group: Sequence[FarJob], came: Sequence[JobResult], call: str
) -> None:
    """Note what a call has not done of its jobs: a container that lost its leases as it could not
    reach the table noted nothing there."""
    told = {result.item for result in came}
    for job in group:
        if job.item not in told:
            table.put(_left(run, job.address, call), run, skip_if_exists=True)


def is_handed_out(table: SharedTable, run: str, address: str) -> bool:
    """Whether a call does a job for a run, or will when there is a container for it."""
    _, call = _noted(table, run, address)
    return call is not None


def _note(table: SharedTable, run: str, address: str, call: str) -> str:
    """Return the call that does a job: the one that is noted first."""
    while True:
        number, noted = _noted(table, run, address)
        if noted is not None:
            return noted
        if table.put(_key(run, address, number), call, skip_if_exists=True):
            return call


def _noted(table: SharedTable, run: str, address: str) -> tuple[int, str | None]:
    """Return the call that does a job and its number, None where all that were asked for have left
    it."""
    number = 0
    while True:
        call = table.get(_key(run, address, number))
        if call is None or not _has_left(table, run, address, call):
            return number, call
        number += 1


def _has_left(table: SharedTable, run: str, address: str, call: str) -> bool:
    return table.get(_left(run, address, call)) is not None


def _left(run: str, address: str, call: str) -> str:
    return f"{run}/{address}/left/{call}"


def _key(run: str, address: str, number: int) -> str:
    # By address, as another look at the data makes another job of it
    return f"{run}/{address}/call/{number}" if number else f"{run}/{address}"


def _groups(jobs: list[FarJob], sequential: bool) -> list[list[FarJob]]:
    """Return the jobs of each container."""
    if not jobs:
        return []
    return [jobs] if sequential else [[job] for job in jobs]
