"""How long containers are paid for, kept in the table that all of them share: one that is lost says
nothing at its end, so each says how long it lives while it does.

Invariant: a container has a number of its own below its key, and writes to no other.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..hardware import gpu_name
from .leases import Leases, SharedTable, repeated

# What the end of a container that is lost may cost unseen
NOTE_S = 60.0
NOT_NOTED = "costs were not noted"


def process_age_s() -> float:
    """Return how long this process lives, 0 where the system does not say."""
    try:
        # The name of the program, in brackets, may have spaces in it
        _, _, fields = Path("/proc/self/stat").read_text("utf-8").rpartition(")")
        up_s = float(Path("/proc/uptime").read_text("utf-8").split()[0])
        started_s = int(fields.split()[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(0.0, up_s - started_s)


@contextmanager
def metered(
    table: SharedTable,
    key: str,
    age_s: Callable[[], float] = process_age_s,
    gpu: Callable[[], str | None] = gpu_name,
) -> Iterator[None]:
    """Note meanwhile how long this container lives, and at the end on which GPU."""
    own: list[int] = []  # its number, from the first note on that could be written

    def note(on: str | None = None) -> None:
        text = json.dumps({"seconds": age_s(), "gpu": on or ""})
        if own:
            table.put(_key(key, own[0]), text)
            for earlier in range(own[0]):
                # A table forgets what nobody reads for a week, and those before are paid for
                table.get(_key(key, earlier))
            return
        number = 0
        while not table.put(_key(key, number), text, skip_if_exists=True):
            number += 1
        own.append(number)

    with unnoted():
        note()
    try:
        with repeated(note, NOTE_S, NOT_NOTED):
            yield
    finally:
        # After the last of the others, which know of no GPU
        with unnoted():
            note(gpu())


@contextmanager
def unnoted() -> Iterator[None]:
    """Tell what went wrong with a note, which is not to end a job that goes well."""
    try:
        yield
    except Exception as error:  # a table raises what it likes
        print(f"{NOT_NOTED}: {type(error).__name__}: {error}")


@contextmanager
def at_work(
    table: SharedTable, told: Mapping[str, Any], addresses: Sequence[str]
) -> Iterator[Callable[[str], bool]]:
    """Keep the leases of the jobs of a container while it works, and note for how long; gives what
    tells of an address whether its lease is lost. `told` is what the container was given by whoever
    handed them out, whose token a run of leases has."""
    with Leases.of(table, told, addresses).kept() as leases:
        if not told["token"]:
            yield leases.is_lost
            return
        first = f"{told['token']}/{addresses[0]}"
        with unnoted():
            # Where a container before it did these jobs with others, it is noted after that
            first = meter_key(table, told["token"], addresses)
            for other in addresses[1:]:
                # Who asks for what is left of them must find it too
                table.put(f"{told['token']}/{other}/with", first)
        with metered(table, first):
            yield leases.is_lost


def meter_key(table: SharedTable, run: str, addresses: Sequence[str]) -> str:
    """Return where the containers of jobs that are done together are noted, those that were lost
    too."""
    first = f"{run}/{addresses[0]}"
    return table.get(f"{first}/with") or first


def lives(table: SharedTable, key: str) -> list[tuple[float, str]]:
    """Return of each container below a key how many seconds it lived, as far as was noted, and on
    which GPU."""
    found: list[tuple[float, str]] = []
    while True:
        text = table.get(_key(key, len(found)))
        if text is None:
            return found
        told = json.loads(text)
        found.append((float(told["seconds"]), str(told["gpu"])))


def _key(key: str, number: int) -> str:
    return f"{key}/container/{number}"
