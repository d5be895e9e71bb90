"""Jobs as they are handed out, so that whoever did so can be followed by another: which call does
which job stands in the table that all containers share.

Invariant: a run hands a job out once. Its next attempt, after a day or after a crash, waits for the
calls that were begun and begins the others.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from ..run.stages import Addresses
from .containers import HandOut, Items, JobResult
from .leases import SharedTable

# Attempts of what hands out jobs beside the first one, as many as Modal allows
ATTEMPTS = 10


class Call(Protocol):
    """Jobs that a container was asked for."""

    @property
    def object_id(self) -> str:
        """What it is found again by."""

    def get(self) -> list[JobResult]:
        """Wait for it. Raises what took the container."""


def by_calls(
    addresses: Addresses,
    run: str,
    table: SharedTable,
    sequential: bool,
    start: Callable[[str, Items], Call],
    find: Callable[[str], Call],
) -> HandOut:
    """Return what hands out the jobs of a run; `start` asks for a container, `find` finds what an
    earlier attempt asked for. `run` is what all attempts call it."""

    def key(stage: str, item: str | None) -> str:
        # By address, as another look at the data makes another job of it
        return f"{run}/{addresses.of(stage, item)}"

    def hand_out(
        stage: str, items: Items
    ) -> Iterator[tuple[Items, list[JobResult] | BaseException]]:
        begun: dict[str, Items] = {}
        fresh: Items = []
        for item in items:
            known = table.get(key(stage, item))
            if known is None:
                fresh.append(item)
            else:
                begun.setdefault(known, []).append(item)
        waiting = [(group, find(known)) for known, group in begun.items()]
        for group in _groups(fresh, sequential):
            call = start(stage, group)
            for item in group:
                table.put(key(stage, item), call.object_id)
            waiting.append((group, call))
        for group, call in waiting:
            try:
                yield group, call.get()
            except Exception as error:  # whatever took the container
                yield group, error

    return hand_out


def _groups(items: Items, sequential: bool) -> Iterable[Items]:
    """Return the items of each container."""
    if not items:
        return []
    return [items] if sequential else [[item] for item in items]
