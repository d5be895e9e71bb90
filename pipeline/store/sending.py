"""Files on their way to another place: what is known of each, how far all of them are, and a few
threads that send side by side."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..errors import StoreError
from ..protocols import Progress

T = TypeVar("T")

TOLD_EVERY_S = 5.0
JOIN_S = 0.1  # how long a thread is waited for before Ctrl-C and the next one get a turn


@dataclass(frozen=True)
class Outgoing:
    """A file that is to lie at a target, under a name with / below it."""

    name: str
    path: Path
    sha256: str
    bytes: int
    changed_ns: int  # when it was written last

    @classmethod
    def of(cls, folder: Path, name: str, sha256: str) -> "Outgoing":
        """Return a file of a folder as it is now. Raises OSError."""
        found = (folder / name).stat()
        return cls(name, folder / name, sha256, found.st_size, found.st_mtime_ns)

    def check(self) -> None:
        """Raise StoreError when the file has been written since, as then nobody knows which bytes
        went out."""
        found = self.path.stat()
        if (found.st_size, found.st_mtime_ns) != (self.bytes, self.changed_ns):
            raise StoreError(
                f"{self.path} was written while it was sent: let nobody change it, and run the "
                "same command again"
            )


class Sending:
    """How many bytes of an upload are done, told every few seconds with the time that is left."""

    def __init__(
        self,
        what: str,
        total: int,
        progress: Progress,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.sent = 0  # over the line, in this attempt
        self._what = what
        self._total = max(1, total)
        self._done = 0
        self._progress = progress
        self._clock = clock
        self._began = clock()
        self._told = float("-inf")
        self._lock = threading.Lock()

    def add(self, count: int, sent: bool = True) -> None:
        """Count bytes that are at the target now; not sent: they were there before."""
        with self._lock:
            self._done += count
            if sent:
                self.sent += count

    @property
    def left_s(self) -> float | None:
        """Seconds that the rest takes at the rate so far, None before anything was sent."""
        # What was there says nothing of the line
        if not self.sent:
            return None
        pace = (self._clock() - self._began) / self.sent
        return pace * max(0, self._total - self._done)

    def tell(self) -> None:
        """Say how far it is, unless that was said just now."""
        if self._clock() - self._told < TOLD_EVERY_S:
            return
        self._told = self._clock()
        # Only here: it draws in what draws reports, for which no other command of the store waits
        from ..report.format import seconds

        left = self.left_s
        text = self._what if left is None else f"{self._what}, {seconds(left)} left"
        self._progress(text, min(1.0, self._done / self._total))


def side_by_side(
    work: Callable[[T], None], items: Iterable[T], threads: int, tick: Callable[[], None]
) -> None:
    """Do work for each of some items in a few threads, or in this one; `tick` is called now and
    then meanwhile.

    Raises the first error, after what others had begun has ended. Ctrl-C waits for nobody.
    """
    waiting = deque(items)
    threads = min(threads, len(waiting))
    if threads < 2:
        for item in waiting:
            work(item)
            tick()
        return
    errors: list[BaseException] = []
    stopped = threading.Event()

    def run() -> None:
        while not stopped.is_set():
            try:
                item = waiting.popleft()
            except IndexError:
                return
            try:
                work(item)
            except BaseException as error:  # raised below, where it is awaited
                errors.append(error)
                stopped.set()

    # Daemons, and no executor of the library's: Python would wait for its threads at the end, and
    # one that talks to a silent server has no end
    workers = [threading.Thread(target=run, daemon=True) for _ in range(threads)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            while worker.is_alive():
                worker.join(JOIN_S)
                tick()
    finally:
        stopped.set()
    if errors:
        raise errors[0]
