"""Which large files this machine has hashed and found right, so that not every job reads them
through again.

Invariant: what is believed was noted since this machine was started, of this very file, unchanged
since by its times, size and inode. Other machines that share the store keep lists of their own.
Losing a list costs time and nothing else.
"""

import contextlib
import hashlib
import os
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from ..errors import DiskFull

FOLDER = "hashed"
_BOOT = Path("/proc/sys/kernel/random/boot_id")
# A file that is written to again within one tick of the clock keeps its times.
SETTLED_NS = 2 * 10**9


def this_boot() -> str:
    """Return what no other machine is called, nor this one after a restart; empty where the system
    does not say."""
    try:
        boot = _BOOT.read_text("ascii").strip()
    except (OSError, ValueError):
        return ""
    return f"{platform.node()}/{boot}".replace(" ", "_")


class Hashed:
    """The list of one machine. `lock` holds off its other processes while it is written, `write`
    writes a whole file or none."""

    def __init__(
        self,
        root: Path,
        lock: Callable[[], AbstractContextManager[None]],
        write: Callable[[Path, str], None],
    ) -> None:
        self.root = root
        self._lock = lock
        self._write = write
        self._boot = this_boot()
        name = hashlib.sha256(platform.node().encode()).hexdigest()[:12]
        self._path = root / FOLDER / f"{name}.txt"
        self._known: set[str] | None = None

    def holds(self, path: Path, sha256: str) -> bool:
        """Whether a file was found to have that sha256 and is unchanged since."""
        if self._known is None:
            self._known = set(self._lines())
        try:
            line = self._line(path, path.stat(), sha256)
        except OSError:
            return False
        return bool(self._boot) and line in self._known

    def note(self, path: Path, before: os.stat_result, sha256: str) -> None:
        """Remember what a file was found to be; `before` is its state before it was read."""
        newest_ns = max(before.st_mtime_ns, before.st_ctime_ns)
        settled = time.time_ns() - newest_ns > SETTLED_NS
        line = self._line(path, before, sha256)
        if not self._boot or not settled or "\n" in line:
            return
        # a list that cannot be written, in a store that may only be read, is no fault of the job's
        with contextlib.suppress(OSError, DiskFull):
            if self._line(path, path.stat(), sha256) != line:
                return
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock():
                self._write(self._path, self._with(path, line))

    def _with(self, path: Path, line: str) -> str:
        """Return the list with one more line, less what other boots and earlier states said."""
        name = f" {self._name(path)}"
        kept = []
        for known in self._lines():
            if known.startswith(f"{self._boot} ") and not known.endswith(name):
                kept.append(known)
        kept.append(line)
        self._known = set(kept)
        return "\n".join(kept) + "\n"

    def _lines(self) -> list[str]:
        try:
            return self._path.read_text("utf-8").splitlines()
        except (OSError, ValueError):
            return []

    def _line(self, path: Path, state: os.stat_result, sha256: str) -> str:
        # ctime too: who puts a copy with a flipped bit in place may keep the other times
        words = (
            self._boot,
            sha256,
            state.st_size,
            state.st_mtime_ns,
            state.st_ctime_ns,
            state.st_dev,
            state.st_ino,
            self._name(path),
        )
        return " ".join(map(str, words))

    def _name(self, path: Path) -> str:
        """Return how a file is called in the list: from the store on, or all of its path."""
        if path.is_relative_to(self.root):
            return path.relative_to(self.root).as_posix()
        return path.absolute().as_posix()
