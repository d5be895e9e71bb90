"""Volumes as directories, seen through views with Modal's rules of visibility.

A view starts as a copy; its changes reach the volume only by commit (last writer wins per file),
those of others reach it only by reload, and a reload with an open file is refused.
"""

import os
import shutil
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

Listing = dict[str, tuple]  # relative path -> (mtime_ns, bytes); directories end with / and have ()


@dataclass
class Volume:
    """A named directory that containers share."""

    id: str
    name: str
    path: Path
    version: int
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)


class View:
    """What one container sees of one volume."""

    def __init__(self, volume: Volume, path: Path, read_only: bool = False) -> None:
        self.volume, self.path, self.read_only = volume, path, read_only
        with volume.lock:
            shutil.copytree(volume.path, path, symlinks=True, dirs_exist_ok=True)
            self._base = listing(path)

    def commit(self) -> None:
        """Publish what has changed here since the last commit or reload."""
        if self.read_only:
            return
        with self.volume.lock:
            now = listing(self.path)
            for name in sorted(name for name, mark in now.items() if self._base.get(name) != mark):
                _copy(self.path, self.volume.path, name)
            for name in sorted(self._base.keys() - now.keys(), reverse=True):
                _remove(self.volume.path, name)
            self._base = now

    def reload(self) -> None:
        """Commit, then take over what others have published."""
        self.commit()
        with self.volume.lock:
            theirs, mine = listing(self.volume.path), listing(self.path)
            for name in sorted(name for name, mark in theirs.items() if mine.get(name) != mark):
                _copy(self.volume.path, self.path, name)
            for name in sorted(mine.keys() - theirs.keys(), reverse=True):
                _remove(self.path, name)
            self._base = listing(self.path)


def listing(root: Path) -> Listing:
    """Return everything below a directory."""
    found: Listing = {}
    for folder, folders, files in os.walk(root):
        here = Path(folder).relative_to(root)
        for name in files:
            try:
                status = (Path(folder) / name).lstat()
            except FileNotFoundError:  # gone since the walk saw it: a container is at work
                continue
            found[(here / name).as_posix()] = (status.st_mtime_ns, status.st_size)
        found |= {f"{(here / name).as_posix()}/": () for name in folders}
    return found


def _copy(source: Path, target: Path, name: str) -> None:
    if name.endswith("/"):
        (target / name).mkdir(parents=True, exist_ok=True)
        return
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    part = target / f"{name}.loopback"
    try:
        shutil.copy2(source / name, part, follow_symlinks=False)
    except FileNotFoundError:  # renamed or removed meanwhile: the next commit sees that
        return
    part.replace(target / name)


def _remove(root: Path, name: str) -> None:
    if name.endswith("/"):
        shutil.rmtree(root / name, ignore_errors=True)
    else:
        (root / name).unlink(missing_ok=True)


def open_below(root: Path, pids: Iterable[int]) -> list[str]:
    """Return what these processes hold open or mapped below a directory: what makes a reload fail
    on Modal.

    Compared by device and inode, because the links of /proc do not resolve across mount namespaces.
    """
    owned = {}
    for folder, _, files in os.walk(root):
        for path in (Path(folder), *(Path(folder) / name for name in files)):
            status = path.lstat()
            owned[status.st_dev, status.st_ino] = path.relative_to(root).as_posix()
    return sorted({owned[key] for pid in pids for key in _held(pid) if key in owned})


def _held(pid: int) -> set[tuple[int, int]]:
    """Return (device, inode) of a process's open and mapped files and its working directory."""
    here, keys = Path("/proc") / str(pid), set()
    try:
        links = [*(here / "fd").iterdir(), here / "cwd"]
        mapped = [line.split(maxsplit=5) for line in (here / "maps").read_text().splitlines()]
    except OSError:  # it has ended
        return keys
    for link in links:
        try:
            status = link.stat()
        except OSError:
            continue
        keys.add((status.st_dev, status.st_ino))
    for _, _, _, device, inode, *_ in mapped:
        major, minor = (int(part, 16) for part in device.split(":"))
        keys.add((os.makedev(major, minor), int(inode)))
    return keys
