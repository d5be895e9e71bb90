"""What of a store may go: what no run and no configuration reaches, and what interrupted jobs left.

No link is followed: what is kept elsewhere under a name in the store is not the store's.
"""

import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import StoreError
from ..store import in_use
from ..store.address import ADDRESS
from ..store.artifacts import Store
from ..store.hashed import FOLDER as HASHED
from ..store.imported import is_imported
from ..store.looking import FOLDER as SOURCES
from ..store.reading import reading
from ..store.removed import FOLDER as REMOVED
from ..store.roots import FOLDER as ROOTS
from ..store.roots import SUFFIX, root_path
from ..store.sources import SEEN, TEXT, looked_at, records, seen_path, text_records
from .reach import Reach
from .stages import first_few

# What lies below these is named by its address
# jobs/: of earlier versions, whose containers shared a preprocess
BY_ADDRESS = ("artifacts", "resume", "jobs", "history")
# Where else files are written, from the store on
WRITTEN = (
    ROOTS,
    REMOVED,
    HASHED,
    SOURCES,
    f"{SOURCES}/seen",
    f"{SOURCES}/looked",
    f"{SOURCES}/made",
    f"{SOURCES}/{TEXT}",
    "",
)
# A file that was being written: ours, and those of the library that writes tensors
PART = re.compile(r".+\.part|\.tmp\w{6}")
ROWS = ".rows"  # beside a record of documents
RECENT_S = 3600.0  # a record that is younger may be one that a look is just making
HALF = "was being written when its writer was killed"
DAMAGED = ".damaged-"
NO_RUN = "of no run"
ORPHANS = "orphans"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Leftover:
    """Something that may go: whose lock has to be free for it, and why it may."""

    path: Path
    lock: str  # an address, the name of a run's note, or "store"
    why: str
    group: str  # the runs that it is listed with, ORPHANS or NO_RUN
    # the address that nobody may reach when it goes, none where it may go whoever does
    unreached: str
    stamp: tuple[int, int]  # of the path when it was listed

    @property
    def is_root(self) -> bool:
        """Whether it is what a run is known by, which goes after all else of the run."""
        return self.path.parent.name == ROOTS and self.path.suffix == SUFFIX


def leftovers(store: Store, reach: Reach, damaged: bool, say: Say) -> Iterator[Leftover]:
    """Yield what may go, in an order in which each may go before what comes after it.

    `damaged`: what was found damaged and renamed aside too. Raises UnreadableFile.
    """
    strangers = 0
    for kind in BY_ADDRESS:
        for path in _below(store.root / kind, say):
            address = path.name.removesuffix(".jsonl") if kind == "history" else path.name
            if PART.fullmatch(path.name):
                yield from _at(path, "store", HALF)
            elif not ADDRESS.fullmatch(address):
                strangers += 1
            elif is_imported(address):
                # somebody brought it here, and no run could make it again
                continue
            else:
                yield from _of_address(store, reach, kind, path, address, damaged, say)
    yield from _of_no_run(store, reach, say)
    yield from _looks(store, reach)
    for folder in WRITTEN:
        for path in _below(store.root / folder, say):
            if PART.fullmatch(path.name):
                yield from _at(path, "store", HALF)
    # last: as long as it is there, whoever looks goes on with what it names
    for run in [] if reach.unknown else reach.removing():
        yield from _at(root_path(store, run), "store", f"the root of {run}", removed(run))
    if strangers:
        say(f"{strangers} names in {store.root} are no addresses and are left alone")


def removed(run: str) -> str:
    """Return what the leftovers of a run are listed with that somebody wants to be removed."""
    return f"{run}, to be removed"


def _at(
    path: Path, lock: str, why: str, group: str = NO_RUN, unreached: str = ""
) -> Iterator[Leftover]:
    """Yield a leftover as it is now, unless a run has removed it meanwhile."""
    with suppress(FileNotFoundError):
        yield Leftover(path, lock, why, group, unreached, stamp(path))


def _of_address(
    store: Store, reach: Reach, kind: str, path: Path, address: str, damaged: bool, say: Say
) -> Iterator[Leftover]:
    """Yield what of a kind has at an address may go: all of it, or what is in it."""
    run = reach.removed(address)
    group = first_few(reach.keepers(address)) or NO_RUN
    if run:
        yield from _at(path, address, f"of {run}", removed(run), address)
    elif why := _half_done(store, kind, address):
        yield from _at(path, address, why, group)
    elif not reach.keeps(address):
        yield from _at(path, address, "no run and no configuration reaches it", ORPHANS, address)
    elif not path.is_symlink() and path.is_dir():
        yield from _inside(store, kind, path, group, damaged, say)


def _half_done(store: Store, kind: str, address: str) -> str:
    """Return why what a kind has at an address may go whoever reaches it; empty when it may not."""
    if kind == "artifacts":
        # whoever makes it begins with an empty folder
        return "" if store.has(address) else "unfinished, and nobody is making it"
    if kind == "history":
        needed = store.has(address) or store.resume(address).exists()
        return "" if needed else "of no artifact and no checkpoint"
    return "its artifact is finished" if _is_whole(store, address) else ""


def _is_whole(store: Store, address: str) -> bool:
    """Whether an artifact has all its files, so that nobody needs its checkpoints."""
    try:
        store.require(address)
    except StoreError:
        return False
    return True


def _inside(
    store: Store, kind: str, folder: Path, group: str, damaged: bool, say: Say
) -> Iterator[Leftover]:
    """Yield what may go of an address that stays."""
    known: Collection[str] = ()
    if kind == "artifacts":
        try:
            known = store.manifest(folder.name).files
        except StoreError:
            # damaged, which is for whoever reads it to say
            return
    # jobs: several containers write there at a time and hold no lock
    elif kind != "resume":
        return
    for above, folders, files in os.walk(folder):
        for name in sorted([*folders, *files]):
            path = Path(above) / name
            if PART.fullmatch(name) and path.relative_to(folder).as_posix() not in known:
                yield from _at(path, folder.name, HALF, group)
            elif kind == "resume" and DAMAGED in name:
                if damaged:
                    yield from _at(path, folder.name, "was found damaged and renamed aside", group)
                else:
                    say(f"{path} was found damaged and is kept; --damaged removes it too")
        folders[:] = [name for name in folders if DAMAGED not in name]


def _of_no_run(store: Store, reach: Reach, say: Say) -> Iterator[Leftover]:
    """Yield the notes of runs that are gone, and locks of what is not there."""
    for path in _below(store.root / in_use.RUNS, say):
        if in_use.RUN.fullmatch(path.stem):
            yield from _at(path, path.stem, "of a run that is gone")
    for path in _below(store.root / "locks", say):
        name = path.stem
        if in_use.RUN.fullmatch(name):
            if not in_use.note_path(store, name).exists():
                yield from _at(path, name, "of a run that is gone")
        elif ADDRESS.fullmatch(name) and not (reach.keepers(name) or anything_at(store, name)):
            yield from _at(path, name, "of nothing that is there")


def _looks(store: Store, reach: Reach) -> Iterator[Leftover]:
    """Yield what was noted of data that no run reads any more."""
    readers = reach.readers()
    if readers is None:
        return
    # of what was seen the last one that goes says with whom
    groups: dict[Path, str] = {}
    for path, prints in records(store).items():
        run = readers.get(path.stem)
        seen = [seen_path(store, print_) for print_ in prints]
        if run:
            for each in seen:
                groups.setdefault(each, run)
            # nobody else has them, so that they tell when it has begun anew
            own = min(reach.own(run), default="")
            yield from _at(path, "store", f"of data that {run} read", removed(run), own)
            continue
        groups |= dict.fromkeys(seen, "")
        if run is None:
            yield from _at(path, "store", "of data that no run reads", ORPHANS)
    for path in sorted((store.root / SOURCES / SEEN).glob("*.json")):
        run = groups.get(path)
        if run:
            own = min(reach.own(run), default="")
            yield from _at(path, "store", f"of data that {run} read", removed(run), own)
        elif run is None:
            yield from _at(path, "store", "of data that no run reads")
    yield from _documents(store, reach, groups)


def _documents(store: Store, reach: Reach, groups: Mapping[Path, str]) -> Iterator[Leftover]:
    """Yield what was noted of the documents of files that no run reads any more. `groups`: of what
    was seen the run that it goes with, "" for what stays."""
    # of a file that several have seen, one that stays keeps it
    readers: dict[str, str] = {}
    for path, run in groups.items():
        looked = looked_at(store, path.stem)
        for each in looked.seen if looked else ():
            readers[each.sum] = readers.get(each.sum, run) and run
    for record, of in text_records(store).items():
        # whoever has just written it is about to read it
        if _is_young(record):
            continue
        reader = readers.get(of)
        for part in (record, record.with_suffix(ROWS)):
            if reader:
                own = min(reach.own(reader), default="")
                why = f"of data that {reader} read"
                yield from _at(part, "store", why, removed(reader), own)
            elif reader is None:
                # one that does not say of which file it is was kept by an earlier version
                group = NO_RUN if of else ORPHANS
                yield from _at(part, "store", "of documents that no run reads", group)


def _is_young(path: Path) -> bool:
    with suppress(FileNotFoundError):
        return time.time() - path.lstat().st_mtime < RECENT_S
    return False


def anything_at(store: Store, address: str) -> bool:
    """Whether anything but a lock is left of an address, a link that leads nowhere too."""
    places = [store.root / kind / address for kind in BY_ADDRESS]
    places.append(store.history(address))
    return any(os.path.lexists(place) for place in places)


def remove(store: Store, reach: Reach, leftover: Leftover, say: Say) -> None:
    """Remove a leftover, and its lock when that was all of it. Raises InUse, OSError, and
    StoreError where a root cannot be seen any more."""
    path = leftover.path

    def claim() -> None:
        # what a run has made since, and ended, is another one
        if stamp(path) != leftover.stamp:
            raise in_use.InUse
        # one that has only found it has left a root since
        reach.refresh()
        if leftover.unreached and reach.keeps(leftover.unreached):
            raise in_use.InUse
        # without its manifest the rest is no artifact, whenever this is stopped
        if path.is_dir() and not path.is_symlink():
            (path / "manifest.json").unlink(missing_ok=True)

    def waiting() -> None:
        say("waiting for a run that is just beginning")

    with in_use.taken(store, leftover.lock, claim, waiting):
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path)
        lock = in_use.lock_path(store, leftover.lock)
        gone = in_use.RUN.fullmatch(leftover.lock) or not anything_at(store, leftover.lock)
        if gone and leftover.lock != "store":
            lock.unlink(missing_ok=True)


def stamp(path: Path) -> tuple[int, int]:
    """Return what is another when a folder was emptied or filled, or a file written again."""
    status = os.lstat(path)
    return status.st_ino, status.st_mtime_ns


def _below(folder: Path, say: Say) -> list[Path]:
    """Return what is in a folder of the store by name; nothing of one that is a link. Raises
    UnreadableFile."""
    if folder.is_symlink():
        say(f"{folder} is a link, and what it leads to is left alone")
        return []
    try:
        with reading(folder):
            return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def size_of(path: Path, counted: set[tuple[int, int]]) -> int:
    """Return how many bytes a file has, or all files in a folder, one with several names once."""
    places = [path]
    if path.is_dir() and not path.is_symlink():
        places = [Path(above) / name for above, _, files in os.walk(path) for name in files]
    size = 0
    for place in places:
        # a run in progress removes what is its own
        with suppress(FileNotFoundError):
            status = os.lstat(place)
            inode = (status.st_dev, status.st_ino)
            size += 0 if inode in counted else status.st_size
            counted.add(inode)
    return size
