"""A folder beside a target, in which is made what is to lie there.

Invariant: what a killed process has left in one goes with the next that is made there. Each is held
by a lock in it as long as its maker lives, so that nothing is taken that somebody is at.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = "lock"


@contextmanager
def folder_beside(beside: Path, prefix: str) -> Iterator[Path]:
    """Have an empty folder in an existing one, which is gone afterwards; `prefix` is how names of
    such folders begin there. Raises OSError."""
    _remove_left(beside, prefix)
    with (
        tempfile.TemporaryDirectory(prefix=prefix, dir=beside) as place,
        FileLock(Path(place) / LOCK),
    ):
        made = Path(place) / "made"
        made.mkdir()
        yield made


def _remove_left(beside: Path, prefix: str) -> None:
    for place in beside.glob(f"{prefix}*"):
        lock = place / LOCK
        # Without a lock it may be somebody's own, or just beginning
        if place.is_symlink() or not lock.is_file():
            continue
        # What a system has no locks for, or another user has made, stays
        with suppress(OSError, Timeout, NotImplementedError), FileLock(lock, timeout=0):
            shutil.rmtree(place, ignore_errors=True)
