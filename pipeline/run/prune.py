"""What of a store no configuration reaches, and what interrupted jobs left in it: listed, and
removed when asked to.

Nothing is removed that a run in progress makes or may read, and no link is followed: what is kept
elsewhere under a name in the store is not the store's.
"""

import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from ..config.run import RunConfig
from ..errors import ConfigError, StoreError
from ..store import in_use
from ..store.artifacts import Store
from ..store.reading import reading
from .stages import Addresses

ADDRESS = re.compile(r"[a-z]\w*(-.+)?-[0-9a-f]{12}")
# What lies below these is named by its address
BY_ADDRESS = ("artifacts", "resume", "jobs", "history")
# A file that was being written: ours, and those of the library that writes tensors
PART = re.compile(r".+\.part|\.tmp\w{6}")
HALF = "was being written when its writer was killed"
DAMAGED = ".damaged-"
RUN_NOTE = re.compile(in_use.PREFIX + r"[0-9a-f]{12}")


@dataclass(frozen=True)
class Leftover:
    """Something that may go: whose lock has to be free for it, and why it may."""

    path: Path
    lock: str  # an address, the name of a run, or "store"
    why: str
    stamp: tuple[int, int]  # of the path when it was listed

    @classmethod
    def at(cls, path: Path, lock: str, why: str) -> "Iterator[Leftover]":
        """Yield a leftover as it is now, unless a run has removed it meanwhile."""
        with suppress(FileNotFoundError):
            yield cls(path, lock, why, _stamp(path))


def read_configs(paths: Iterable[Path], load: Callable[[Path], RunConfig]) -> dict[Path, RunConfig]:
    """Return the configurations whose results are kept. Raises ConfigError, also when there is
    none: without one everything would seem to be of no use."""
    configs = {path: load(path) for path in paths}
    if not configs:
        raise ConfigError(
            f"there is no configuration in {Path('config').absolute()}, so nothing would be kept: "
            "name those whose results you want to keep with --config"
        )
    return configs


def prune(
    configs: Mapping[Path, RunConfig],
    store: Store,
    console: Console,
    *,
    remove: bool,
    damaged: bool = False,
) -> None:
    """List what may go, and remove it when asked to; `damaged`: what was found damaged and renamed
    aside too.

    Raises ConfigError, UnreadableFile, or StoreError when there is no store or something could not
    be removed.
    """
    if not (store.root / "store.json").exists():
        raise StoreError(
            f"there is no store in {store.root}: it has no store.json", root=store.root
        )
    store.open()
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    kept: set[str] = set()
    for cfg in configs.values():
        kept.update(Addresses(cfg).reachable())
    say(f"configurations read, {len(configs)}, whose results are kept:")
    for path in configs:
        say(f"  {path.absolute()}")
    found = list(_leftovers(store, kept, damaged, say))
    used = in_use.addresses(store)
    counted: set[tuple[int, int]] = set()
    done = 0
    failed = 0
    for leftover in found:
        shown = f"{_bytes(leftover.path, counted) / 1e6:10.1f} MB  {leftover.path}"
        if leftover.lock in used or in_use.is_held(store, leftover.lock):
            say(f"{shown}  in use by a run in progress, left alone")
            continue
        if not remove:
            say(f"{shown}  {leftover.why}")
            done += 1
            continue
        try:
            _remove(store, leftover, say)
        except (in_use.InUse, FileNotFoundError):
            say(f"{shown}  a run has just begun to use it, or made it anew: left alone")
        except OSError as error:
            failed += 1
            say(f"{shown}  cannot be removed: {error.strerror or error}")
        else:
            say(f"{shown}  {leftover.why}, removed")
            done += 1
    if failed:
        raise StoreError(
            f"{failed} of {len(found)} could not be removed from {store.root}; give this user the "
            "right to write to it, or leave it as it is"
        )
    if not found:
        say(f"nothing to prune in {store.root}")
    elif remove:
        say(f"{done} removed from {store.root}")
    else:
        say(
            f"{done} may go, none was removed: results of a configuration that is not in the list "
            "above, or of --override, are among them; add --yes to remove"
        )


def _leftovers(
    store: Store, kept: set[str], damaged: bool, say: Callable[[str], None]
) -> Iterator[Leftover]:
    """Yield what may go, in an order in which each may go before what comes after it."""
    strangers = 0
    for kind in BY_ADDRESS:
        for path in _below(store.root / kind, say):
            address = path.name.removesuffix(".jsonl") if kind == "history" else path.name
            if PART.fullmatch(path.name):
                yield from Leftover.at(path, "store", HALF)
            elif not ADDRESS.fullmatch(address):
                strangers += 1
            elif why := _reason(store, kept, kind, address):
                yield from Leftover.at(path, address, why)
            elif not path.is_symlink() and path.is_dir():
                yield from _inside(store, kind, path, damaged, say)
    yield from _of_no_run(store, kept, say)
    for path in _below(store.root, say):
        if PART.fullmatch(path.name):
            yield from Leftover.at(path, "store", HALF)
    if strangers:
        say(f"{strangers} names in {store.root} are no addresses and are left alone")


def _reason(store: Store, kept: set[str], kind: str, address: str) -> str:
    """Return why what a kind has at an address may go; empty when it may not."""
    if address not in kept:
        return "no configuration reaches it"
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
    store: Store, kind: str, folder: Path, damaged: bool, say: Callable[[str], None]
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
                yield from Leftover.at(path, folder.name, HALF)
            elif kind == "resume" and DAMAGED in name:
                if damaged:
                    yield from Leftover.at(path, folder.name, "was found damaged and renamed aside")
                else:
                    say(f"{path} was found damaged and is kept; --damaged removes it too")
        folders[:] = [name for name in folders if DAMAGED not in name]


def _of_no_run(store: Store, kept: set[str], say: Callable[[str], None]) -> Iterator[Leftover]:
    """Yield the notes of runs that are gone, and locks of what is not there."""
    for path in _below(store.root / in_use.RUNS, say):
        if RUN_NOTE.fullmatch(path.stem):
            yield from Leftover.at(path, path.stem, "of a run that is gone")
    for path in _below(store.root / "locks", say):
        name = path.stem
        if RUN_NOTE.fullmatch(name):
            if not in_use.note_path(store, name).exists():
                yield from Leftover.at(path, name, "of a run that is gone")
        elif ADDRESS.fullmatch(name) and name not in kept and not _anything_at(store, name):
            yield from Leftover.at(path, name, "of nothing that is there")


def _anything_at(store: Store, address: str) -> bool:
    places = [store.root / kind / address for kind in BY_ADDRESS]
    places.append(store.history(address))
    return any(os.path.lexists(place) for place in places)


def _remove(store: Store, leftover: Leftover, say: Callable[[str], None]) -> None:
    """Remove a leftover, and its lock when that was all of it. Raises InUse, OSError."""
    path = leftover.path

    def claim() -> None:
        # what a run has made since, and ended, is another one
        if _stamp(path) != leftover.stamp:
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
        gone = RUN_NOTE.fullmatch(leftover.lock) or not _anything_at(store, leftover.lock)
        if gone and leftover.lock != "store":
            lock.unlink(missing_ok=True)


def _stamp(path: Path) -> tuple[int, int]:
    """Return what is another when a folder was emptied or filled, or a file written again."""
    status = os.lstat(path)
    return status.st_ino, status.st_mtime_ns


def _below(folder: Path, say: Callable[[str], None]) -> list[Path]:
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


def _bytes(path: Path, counted: set[tuple[int, int]]) -> int:
    """Return how much a file or folder takes, a file with several names once."""
    places = [path]
    if not path.is_symlink():
        places += [Path(above) / name for above, _, files in os.walk(path) for name in files]
    size = 0
    for place in places:
        # a run in progress removes what is its own
        with suppress(FileNotFoundError):
            status = os.lstat(place)
            inode = (status.st_dev, status.st_ino)
            size += 0 if inode in counted else status.st_size
            counted.add(inode)
    return size
