"""history.db: what a store's histories, artifacts and runs say, as tables of SQLite.

Invariant: the files of the store are the truth, and the tables are what these say now. A database
that is not byte for byte what was last written to it is thrown away and made anew, and so is one
of another version; nobody has to keep it.
"""

import contextlib
import hashlib
import os
import re
import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import DiskFull
from ..protocols import Progress, quiet
from ..report.schema.experiments import FOLDER as EXPERIMENTS
from ..report.schema.experiments import RESULTS
from . import manifest as manifests
from .artifacts import Store, write_text
from .costs import FOLDER as COSTS
from .history_fold import fold, forget
from .history_schema import SCHEMA, VERSION
from .reading import reading
from .roots import FOLDER as ROOTS
from .roots import SUFFIX

FILE = "history.db"
SUM = "history.sum"
LOCK = "history"
SERVED = "served.json"
# What SQLite keeps beside a database while it writes to it.
BESIDE = ("-journal", "-wal", "-shm")
# Files that are folded before it is written down: what a kill may cost.
BATCH = 500
MEMORY = ":memory:"
_HALVES = re.compile("[\ud800-\udfff]")


class Source(NamedTuple):
    """A file of the store that the tables are made of; plain text, as there may be very many."""

    kind: str
    subject: str  # an address, the id of a run, a command, or the name of experiments
    name: str  # below the store
    size: int
    mtime_ns: int


@contextlib.contextmanager
def history_db(store: Store, progress: Progress = quiet) -> Iterator[sqlite3.Connection]:
    """Give the tables, brought up to date. Where the store cannot be written they are made in
    memory. Raises UnreadableFile."""
    index = _current(store, progress)
    try:
        yield index
    finally:
        index.close()


def forget_removed(store: Store) -> None:
    """Take what is gone from the store out of its history.db, where it has one. Raises
    UnreadableFile."""
    if (store.root / FILE).exists():
        _current(store, quiet).close()


def _current(store: Store, progress: Progress) -> sqlite3.Connection:
    if os.access(store.root, os.W_OK):
        with contextlib.suppress(OSError, DiskFull, sqlite3.Error):
            return _on_disk(store, progress)
    # nothing to be written down, or no room for it
    return _made(MEMORY, store, progress, _nothing)


def _nothing() -> None: ...


def _on_disk(store: Store, progress: Progress) -> sqlite3.Connection:
    """Return the tables as they are in the store, made again where they are damaged. Raises
    OSError, DiskFull, sqlite3.Error, UnreadableFile."""
    path = store.root / FILE

    def waiting() -> None:
        progress(f"another process is at {path}; waiting for it", None)

    def written_down() -> None:
        write_text(store.root / SUM, _sum(path))

    # one at a time, and who comes second finds all of it done
    with store.lock(LOCK, waiting):
        if not _is_as_written(store):
            _remove(store)
        try:
            return _made(str(path), store, progress, written_down)
        except sqlite3.Error:
            # its bytes are what was written, and SQLite does not take them: another version's
            _remove(store)
            return _made(str(path), store, progress, written_down)


def _is_as_written(store: Store) -> bool:
    """Whether the database has the bytes that were last written to it."""
    path = store.root / FILE
    try:
        if any(path.with_name(FILE + end).exists() for end in BESIDE):
            _roll_back(path)
        return _sum(path) == (store.root / SUM).read_text("utf-8")
    except (OSError, ValueError, sqlite3.Error):
        return False


def _roll_back(path: Path) -> None:
    """Let SQLite undo what a killed writer had begun. Raises sqlite3.Error."""
    with contextlib.closing(sqlite3.connect(path)) as index:
        index.execute("SELECT count(*) FROM sqlite_master").fetchone()


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(store: Store) -> None:
    """Remove the database and all beside it. Raises OSError."""
    for name in (FILE, SUM, *(FILE + end for end in BESIDE)):
        (store.root / name).unlink(missing_ok=True)


def _made(
    place: str, store: Store, progress: Progress, written_down: Callable[[], None]
) -> sqlite3.Connection:
    """Open tables and bring them up to date. Raises sqlite3.Error, UnreadableFile."""
    index = sqlite3.connect(place, timeout=60.0, isolation_level=None)
    try:
        # what was removed from the store must not stay readable in here
        index.execute("PRAGMA secure_delete = ON")
        _with_tables(index)
        _bring_up_to_date(index, store, progress, written_down)
    except BaseException:
        index.close()
        raise
    return index


def _with_tables(index: sqlite3.Connection) -> None:
    """Make the tables in an empty database. Raises sqlite3.DatabaseError for one of another
    version."""
    found = index.execute("PRAGMA user_version").fetchone()[0]
    if found == VERSION:
        return
    if found or index.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        raise sqlite3.DatabaseError(f"version {found}")
    index.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")


def _bring_up_to_date(
    index: sqlite3.Connection, store: Store, progress: Progress, written_down: Callable[[], None]
) -> None:
    """Fold in what has changed, and take out what is gone. Raises sqlite3.Error,
    UnreadableFile."""
    known = {}
    changed = set()
    for path, kind, subject, size, mtime_ns, wrong in index.execute("SELECT * FROM files"):
        known[path] = Source(kind, subject, path, size, mtime_ns)
        if wrong:
            # whoever mends rights leaves size and time as they were
            changed.add(path)
    found = {source.name: source for source in _sources(str(store.root))}
    gone = [name for name in known if name not in found]
    changed &= found.keys()
    changed.update(name for name in found if found[name] != known.get(name))
    changed.update(_with_them({*changed, *gone}, found, known))
    # the manifest of a job says how far its history must reach, so it comes first
    steps = [*gone, *sorted(changed, key=lambda name: (found[name].kind == "history", name))]
    for start in range(0, len(steps), BATCH):
        if len(steps) > BATCH:
            progress(f"folding {len(steps):,} files of {store.root}", start / len(steps))
        index.execute("BEGIN IMMEDIATE")
        try:
            for name in steps[start : start + BATCH]:
                _take(index, store, found.get(name) or known[name], name in found)
            index.execute("COMMIT")
        except BaseException:
            index.execute("ROLLBACK")
            raise
        written_down()
    if not steps and not known:
        written_down()


def _with_them(
    moved: set[str], found: dict[str, Source], known: dict[str, Source]
) -> Iterator[str]:
    """Yield the histories whose artifact came, went or changed."""
    subjects = set()
    for name in moved:
        source = found.get(name) or known[name]
        if source.kind == "artifact":
            subjects.add(source.subject)
    for name, source in found.items():
        if source.kind == "history" and source.subject in subjects:
            yield name


def _take(index: sqlite3.Connection, store: Store, source: Source, is_there: bool) -> None:
    """Fold one file, or take it out."""
    if not is_there:
        forget(index, source.kind, source.subject)
        index.execute("DELETE FROM files WHERE path = ?", (source.name,))
        return
    wrong = fold(index, source.kind, source.subject, store.root / source.name)
    row = (source.name, source.kind, source.subject, source.size, source.mtime_ns, wrong)
    index.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", row)


def _sources(root: str) -> Iterator[Source]:
    """Yield the files that the tables are made of, as they are now. Raises UnreadableFile."""
    for name in _below(f"{root}/history"):
        if name.endswith(".jsonl"):
            yield from _source(root, "history", name.removesuffix(".jsonl"), f"history/{name}")
    for name in _below(f"{root}/artifacts"):
        yield from _source(root, "artifact", name, f"artifacts/{name}/{manifests.NAME}")
    for name in _below(f"{root}/{ROOTS}"):
        if name.endswith(SUFFIX):
            yield from _source(root, "root", name.removesuffix(SUFFIX), f"{ROOTS}/{name}")
    for name in _below(f"{root}/{COSTS}"):
        if name.endswith(SUFFIX):
            yield from _source(root, "costs", name.removesuffix(SUFFIX), f"{COSTS}/{name}")
    for name in _below(f"{root}/{EXPERIMENTS}"):
        yield from _source(root, "experiments", name, f"{EXPERIMENTS}/{name}/{RESULTS}")
    yield from _source(root, "served", "", SERVED)


def _below(folder: str) -> list[str]:
    """Return what is in a folder, nothing of one that is not there. Raises UnreadableFile."""
    try:
        with reading(Path(folder)):
            names = os.listdir(folder)  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        return []
    # bytes that are no text are in no name of ours
    return sorted(name for name in names if not _HALVES.search(name))


def _source(root: str, kind: str, subject: str, name: str) -> Iterator[Source]:
    path = f"{root}/{name}"
    try:
        found = os.stat(path)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        # an artifact that is not whole has no manifest yet, and a file may go meanwhile
        return
    except OSError:
        with reading(Path(path)):
            raise
    # a folder of such a name is somebody else's
    if stat.S_ISREG(found.st_mode):
        yield Source(kind, subject, name, found.st_size, found.st_mtime_ns)
