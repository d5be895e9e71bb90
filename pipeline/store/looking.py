"""Files outside the store by their content: looked at, and not read again while they are unchanged.

Invariant: a look raises nothing and waits for nothing, whatever lies at a path. What is not there,
may not be read or is no file has a sum that says so, which is another than that of any content.
"""

import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar, cast

from ..errors import DiskFull
from ..protocols import Progress, Seen, quiet
from .artifacts import write_text
from .hashed import SETTLED_NS

T = TypeVar("T")
FOLDER = "sources"
SUMS = "sums.txt"
GONE = "gone"
UNREADABLE = "unreadable"
NO_FILE = "no file"
UNREACHABLE = "unreachable"
# What is no sum of any content, as people are told of it
ODD = {
    GONE: "is gone",
    UNREADABLE: "cannot be read",
    NO_FILE: "is no file",
    UNREACHABLE: "cannot be reached",
}
# Beyond it what was not asked for this time is left out: a list must not grow for ever
MOST_KEPT = 1_000_000
TOLD_EVERY_S = 2.0
State = tuple[int, int, int]  # bytes, mtime_ns, ctime_ns
# By absolute path, for as long as this process lives
_known: dict[str, tuple[State, str]] = {}


class FileSums:
    """Sums of files by path, size and times, in this process and in a list that outlives it: one
    for each look, in which a file is asked of the system once.

    A list lies in the store, and where that cannot be written in the user's cache. Losing one costs
    time and nothing else.
    """

    def __init__(
        self, root: Path | None = None, progress: Progress = quiet, by_ctime: bool = True
    ) -> None:
        """Read the lists of the store at `root`; none: this process alone. `by_ctime`: unless each
        machine sees times of its own of when a file was put where it is."""
        self._by_ctime = by_ctime
        self._places = []
        if root is not None:
            self._places = [root / FOLDER / SUMS, _user_cache() / SUMS]
        self._progress = progress
        self._used: dict[str, tuple[State, str]] = {}
        self._has_new = False
        self._read_files = 0
        self._read_bytes = 0
        self._told_s = time.monotonic()
        self._kept: dict[str, tuple[State, str]] = {}
        for place in reversed(self._places):
            self._kept |= _read(place)

    def of(self, path: Path | str) -> tuple[int, str]:
        """Return a file's bytes and its sha256, or one of ODD."""
        # As text: of a hundred thousand pictures Path would take seconds
        name = os.path.abspath(path)  # noqa: PTH100
        used = self._used.get(name)
        if used is not None:
            return used[0][0], used[1]
        try:
            state = self._state(os.stat(name))  # noqa: PTH116
        except OSError as error:
            return 0, _oddness(error)
        known = _known.get(name) or self._kept.get(name)
        if known is None or state is None or known[0] != state:
            state, found = self._hash(name)
            if state is None:
                return 0, found
            known = (state, found)
            # One that is written to again within a tick of the clock keeps its times
            if time.time_ns() - max(state[1:]) <= SETTLED_NS:
                return state[0], found
            self._has_new = True
        self._used[name] = _known[name] = known
        return known[0][0], known[1]

    def save(self) -> None:
        """Keep what was found for the next process, at the first place that can be written."""
        if not self._has_new:
            return
        kept = self._kept if len(self._kept) < MOST_KEPT else {}
        lines = []
        for name, (state, found) in (kept | self._used).items():
            # Written as JSON: a name may hold ends of lines, and bytes that are no UTF-8
            lines.append(f"{found} {state[0]} {state[1]} {state[2]} {json.dumps(name)}\n")
        text = "".join(lines)
        for place in self._places:
            # A plan makes no store, and leaves nothing in a folder that is none
            if place.parent.name == FOLDER and not (place.parents[1] / "store.json").exists():
                continue
            with suppress(OSError, DiskFull):
                place.parent.mkdir(parents=True, exist_ok=True)
                write_text(place, f"{_sum_of(text)}\n{text}")
                self._has_new = False
                return

    def _state(self, found: os.stat_result) -> State | None:
        """Return what changes with a file's content; None for what is no file."""
        if not stat.S_ISREG(found.st_mode):
            return None
        # ctime too: who unpacks another version of a file may give it the size and time of the old
        ctime_ns = found.st_ctime_ns if self._by_ctime else 0
        return found.st_size, found.st_mtime_ns, ctime_ns

    def _hash(self, name: str) -> tuple[State | None, str]:
        """Read a file through; return its state before that, None with one of ODD for no file."""
        try:
            # Whoever opens a pipe otherwise waits for somebody to write to it
            handle = os.open(name, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            return None, _oddness(error)
        try:
            state = self._state(os.fstat(handle))
            if state is None:
                return None, NO_FILE
            with open(handle, "rb", closefd=False) as file:
                self._tell(name, state[0])
                return state, hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return None, UNREADABLE
        finally:
            os.close(handle)

    def _tell(self, name: str, size: int) -> None:
        self._read_files += 1
        self._read_bytes += size
        if time.monotonic() - self._told_s > TOLD_EVERY_S or size > 10**9:
            self._told_s = time.monotonic()
            text = f"looking at {name} ({self._read_files:,} files, {self._read_bytes / 1e6:,.0f} "
            self._progress(f"{text}MB so far)", None)


class Looking:
    """One look at what a run reads: an Eye."""

    def __init__(
        self,
        sums: FileSums,
        progress: Progress = quiet,
        folder: Path | None = None,
        fetches: bool = False,
    ) -> None:
        self.progress = progress
        self.folder = folder
        self.fetches = fetches
        self._sums = sums
        self._made: dict[str, object] = {}

    def file(self, setting: str, path: Path | str, name: str) -> Seen:
        """Return a file by its content, whatever is the matter with it."""
        size, found = self._sums.of(path)
        return Seen(setting, name, found, size)

    def below(
        self, setting: str, folder: Path, wanted: Callable[[str], bool] | None = None
    ) -> Iterator[Seen]:
        """Yield the files below a folder, those whose names are wanted, in an order that is the
        same on every file system. Links to folders are followed; a file in the folder's place is
        itself."""
        if not folder.is_dir():
            yield self.file(setting, folder, folder.name)
            return
        for inner, names in folders_below(folder):
            for name in filter(wanted, names):
                shown = f"{inner}/{name}" if inner else name
                yield self.file(setting, f"{folder}/{shown}", shown)

    def once(self, key: str, make: Callable[[], T]) -> T:
        """Return what `make` gives, made once in this look."""
        if key not in self._made:
            self._made[key] = make()
        return cast(T, self._made[key])


def folders_below(top: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield a folder and every one below it, by its path from there on ("" for itself), with the
    names of its files: in the same order on every file system, links to folders followed but for
    those that lead to where they are in."""
    start = str(top)
    for place, folders, files in os.walk(start, followlinks=True):
        for name in list(folders):
            if Path(place, name).is_symlink() and _leads_back(f"{place}/{name}", start):
                folders.remove(name)
        # Sorted in place, so that os.walk goes on in this order
        folders.sort()
        yield place[len(start) :].strip("/"), sorted(files)


def _leads_back(link: str, start: str) -> bool:
    """Tell whether a link below a folder leads to one that it was reached through, or above it."""
    there = os.path.realpath(link)
    while len(link) > len(start):
        link = link.rpartition("/")[0]
        # Through links too: two folders may have links to each other
        if os.path.commonpath((os.path.realpath(link), there)) == there:
            return True
    return False


def _user_cache() -> Path:
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "moleforge"


def _oddness(error: OSError) -> str:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return GONE
    return UNREADABLE


def _read(place: Path) -> dict[str, tuple[State, str]]:
    """Return what a list holds; nothing of one that is lost or damaged."""
    try:
        seal, _, text = place.read_text("utf-8").partition("\n")
    except (OSError, ValueError):
        return {}
    # A sum with a flipped bit would be another content, and hours of training done again
    if seal != _sum_of(text):
        return {}
    found = {}
    with suppress(ValueError):
        for line in text.splitlines():
            digest, size, mtime_ns, ctime_ns, name = line.split(" ", 4)
            found[json.loads(name)] = ((int(size), int(mtime_ns), int(ctime_ns)), digest)
    return found


def _sum_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
