"""What runs in progress need of a store, so that whoever removes from it leaves that alone.

A run notes its addresses in runs/ and holds a lock of its own as long as it lasts; the system lets
go of that when the run dies, however it dies, and then the note means nothing. Notes are written
and acted upon under one lock: what a run has noted stays, what was taken before is gone when it
looks. Where machines share no locks, a note says until when it counts.
"""

import contextlib
import hashlib
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..errors import DamagedArtifact, DiskFull
from .artifacts import Store, now, write_text
from .reading import reading, sealed, unsealed

RUNS = "runs"  # the folder of notes, and the lock they are written and acted upon under
PREFIX = "run-"  # of a run's note and lock
RUN = re.compile(PREFIX + r"[0-9a-f]{12}")


class InUse(Exception):
    """Somebody else has the lock, or needs the address."""


def _busy() -> None:
    raise InUse


def _nothing() -> None: ...


def new_name(attempts_of: str = "") -> str:
    """Return what no other run is called, and what all attempts of one are where it has a name."""
    if attempts_of:
        return f"{PREFIX}{hashlib.sha256(attempts_of.encode()).hexdigest()[:12]}"
    return f"{PREFIX}{uuid.uuid4().hex[:12]}"


def note_path(store: Store, name: str) -> Path:
    """Where the run of that name notes what it needs."""
    return store.root / RUNS / f"{name}.json"


def lock_path(store: Store, name: str) -> Path:
    """The file whose lock belongs to an address or a run."""
    return store.root / "locks" / f"{name}.lock"


@contextlib.contextmanager
def using(
    store: Store, addresses: Iterable[str], noted: Callable[[], None] = _nothing
) -> Iterator[None]:
    """Have what lies at these addresses left alone for as long as this lasts. `noted` is called
    before anybody can act upon the note, and may write to the store."""
    name = new_name()
    note = note_path(store, name)
    with contextlib.ExitStack() as held:
        # nobody removes from a store that cannot be written; on a full disk the first job says so
        with contextlib.suppress(OSError, DiskFull), store.lock(RUNS):
            _sweep(store)
            held.enter_context(store.lock(name))
            note.parent.mkdir(exist_ok=True)
            write_text(note, sealed({"addresses": sorted(addresses)}))
            noted()
        try:
            yield
        finally:
            for path in (note, lock_path(store, name)):
                with contextlib.suppress(OSError):
                    path.unlink()


def _sweep(store: Store) -> None:
    """Remove the notes and locks of runs that are gone."""
    for note in (store.root / RUNS).glob(f"{PREFIX}*.json"):
        # another user's may not be ours to remove
        with contextlib.suppress(InUse, OSError), store.lock(note.stem, _busy):
            if lasts(note):
                continue
            note.unlink()
            lock_path(store, note.stem).unlink()


def lasts(note: Path) -> bool:
    """Whether a note says until when it counts, and that time is to come."""
    try:
        return str(unsealed(note.read_bytes()).get("until", "")) > now()
    except (OSError, ValueError):
        return False


def is_held(store: Store, name: str, unknown: bool = False) -> bool:
    """Whether another process has the lock of an address or a run, or a run's note lasts; `unknown`
    where this user may not ask."""
    if RUN.fullmatch(name) and lasts(note_path(store, name)):
        return True
    if not lock_path(store, name).exists():
        return False
    try:
        with store.lock(name, _busy):
            return False
    except InUse:
        return True
    except OSError:
        return unknown


def addresses(store: Store) -> set[str]:
    """Return what runs in progress need. Raises UnreadableFile or DamagedArtifact."""
    found: set[str] = set()
    for note in (store.root / RUNS).glob(f"{PREFIX}*.json"):
        if not is_held(store, note.stem, unknown=True):
            continue
        try:
            with reading(note, "note of a run"):
                found.update(unsealed(note.read_bytes())["addresses"])
        except FileNotFoundError:
            # its run has just ended
            continue
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedArtifact(
                f"{note} is torn or its bytes have changed ({error}), so nobody knows what that "
                "run needs: wait until it has ended"
            ) from None
    return found


@contextlib.contextmanager
def taken(
    store: Store, name: str, claim: Callable[[], None], waiting: Callable[[], None]
) -> Iterator[None]:
    """Hold the lock of an address that nobody uses. `claim` is called while no run can begin, and
    makes absent what is to be removed; `waiting` when one is just beginning.

    Raises InUse, OSError.
    """
    with contextlib.ExitStack() as held:
        with store.lock(RUNS, waiting):
            if name in addresses(store):
                raise InUse
            held.enter_context(store.lock(name, _busy))
            claim()
        yield
