"""Roots: what a store keeps of each run that made something in it, so that nobody has to guess
later which results are whose.

Invariant: a root names the addresses that its run could lead to when it ran. They are the truth,
whatever became since of the files that describe the run, of those that it read, or of this program.
"""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import NewerStore, StoreError
from .artifacts import Store, write_text
from .reading import of_version, read_bytes, reading, sealed

FOLDER = "roots"
SUFFIX = ".json"
# Raised when a root comes to say something else.
VERSION = 1
# How addresses begin of what only measures a run, by name: it is the same run on other text, and
# was one before anything measured it
MEASURES = "score-"


@dataclass(frozen=True)
class Root:
    """One run: one name with one set of addresses that it makes. The same run again renews its
    date."""

    name: str
    family: str
    at: str  # when it was begun last
    file: str  # its configuration, as it was given
    overrides: tuple[str, ...]
    addresses: tuple[str, ...]
    settings: dict[str, Any]  # the resolved configuration
    removed: bool = False  # somebody has asked for it, and it is not done yet
    # those of `addresses` that a trial of experiments is made of; none: all of them
    makes: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """What the run is called in this store, and no other run of its name."""
        made = [each for each in self.addresses if not each.startswith(MEASURES)]
        text = json.dumps([self.name, *sorted(made)])
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return f"{self.name}-{digest}"

    @property
    def experiments(self) -> str:
        """The name of the experiments that it is a trial of; "" of any other run."""
        name = Path(self.file).stem
        return name if self.makes and self.name.startswith(f"{name}.") else ""


def root_path(store: Store, run: str) -> Path:
    """Where the root of the run with that id is."""
    return store.root / FOLDER / f"{run}{SUFFIX}"


def leave(store: Store, root: Root) -> None:
    """Write a run's root, or renew it. Raises DiskFull, OSError."""
    path = root_path(store, root.id)
    try:
        read_root(path)
    except NewerStore:
        # it says more than this program could
        return
    except StoreError:
        pass
    path.parent.mkdir(exist_ok=True)
    write_root(path, root)


def write_root(path: Path, root: Root) -> None:
    """Write a root to its file. Raises DiskFull, OSError."""
    write_text(path, sealed({"version": VERSION} | asdict(root), indent=1))


def root_states(store: Store) -> dict[Path, tuple[int, int, int]]:
    """Return the files of all roots, each with what is another when it was written again. Raises
    UnreadableFile: roots that cannot be seen are not absent."""
    folder = store.root / FOLDER
    states = {}
    try:
        # not glob, to which a folder that may not be read is an empty one
        with reading(folder), os.scandir(folder) as entries:
            for entry in entries:
                # one that goes meanwhile must not hide those after it
                with suppress(FileNotFoundError):
                    if entry.name.endswith(SUFFIX):
                        found = entry.stat(follow_symlinks=False)
                        stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
                        states[folder / entry.name] = stamp
    except FileNotFoundError:
        # no run has left one yet
        return {}
    return states


def readable_roots(store: Store) -> list[Root]:
    """Return the roots that can be read, the latest run first: what only looks needs no others.
    Raises UnreadableFile."""
    found = []
    for path in root_states(store):
        with suppress(StoreError):
            found.append(read_root(path))
    # by name where two were begun in one second, so that the order is always the same
    return sorted(found, key=lambda root: (root.at, root.id), reverse=True)


def read_root(path: Path) -> Root:
    """Read a root. Raises DamagedArtifact, UnreadableFile, or NewerStore for one that a later
    version has left."""
    return of_version(Root, read_bytes(path), path, VERSION, "a root")
