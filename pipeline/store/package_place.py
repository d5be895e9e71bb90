"""Where somebody's expert lies, a folder of this machine or an fsspec URL: what is in it is asked
for by name, and no more of it is read than was said.

Invariant: no link is followed and no pipe waited for.
"""

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, cast

from ..credentials import masked
from ..errors import DataError, PipelineError
from .artifacts import flush
from .foreign import ForeignFile
from .room import writing
from .tensor_header import Wanted, check_tensors
from .upload import open_url

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

BLOCK_BYTES = 4 << 20
# Filesystems that cannot say what lies in a folder
UNLISTED = {"http", "https"}
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")


@dataclass(frozen=True)
class ExpertSource:
    """Where an expert comes from, the most bytes that it may have, and which settings say so."""

    source: str  # a path or an fsspec URL
    most_bytes: int
    setting: str = "expert.imported"
    limit: str = "expert.imported_bytes"

    @property
    def shown(self) -> str:
        """The source without the password that a URL may hold."""
        return masked(self.source)

    def check_bytes(self, total: int, what: str) -> None:
        """Raise ForeignFile for more bytes than there may be."""
        if total > self.most_bytes:
            raise ForeignFile(
                f"{what} {total:,} bytes, over {self.limit} ({self.most_bytes:,}); raise that if "
                "you trust it"
            )


@contextmanager
def refusing(source: ExpertSource, item: str) -> Iterator[None]:
    """Name the expert and where it comes from in whatever keeps it from being taken. Raises
    DataError."""
    try:
        yield
    except PipelineError:
        raise
    except ValueError as error:
        raise DataError(f"{source.setting}: {item} ({source.shown}) is refused: {error}") from None
    except Exception as error:  # a filesystem raises what it likes
        reason = " ".join(str(error).split())
        raise DataError(
            f"{source.setting}: {item} ({source.shown}) cannot be read: {reason}"
        ) from None


class PackagePlace(Protocol):
    """A folder with somebody's files."""

    def sizes(self) -> dict[str, int] | None:
        """Bytes by name of everything there; None where that cannot be listed. Raises ForeignFile
        for a link or a folder, OSError."""

    def has(self, name: str) -> bool:
        """Whether there is anything of that name. Raises ForeignFile where this is no folder."""

    def size(self, name: str) -> int:
        """Bytes of one file, 0 where nobody says. Raises OSError."""

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        """One file, for reading. Raises ForeignFile for a link or what is no file, OSError."""


def place_of(source: str, setting: str) -> PackagePlace:
    """Return the place that a path or a URL means; `setting` names it. Raises ForeignFile for an
    archive, StoreError."""
    is_here = "://" not in source
    name = source.partition("?")[0].rstrip("/").rpartition("/")[2]
    if name.lower().endswith(ARCHIVES) and not (is_here and Path(source).is_dir()):
        raise ForeignFile(
            f"{name} is an archive, of which nobody knows what comes out before it is unpacked; "
            "unpack it, and name the folder that the expert's files are in"
        )
    if is_here:
        return _Folder(Path(source))
    fs, root = open_url(source, setting)
    return _Remote(fs, root, masked(source))


def read_start(place: PackagePlace, name: str, most_bytes: int) -> bytes:
    """Return the bytes of a small file. Raises ForeignFile when there are too many of them, and
    OSError."""
    # One more than may be, so that a long file is known without reading it
    with place.open(name) as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ForeignFile(f"{name} is over {most_bytes:,} bytes")
    return data


def take_tensors(
    place: PackagePlace, name: str, size: int, wanted: Wanted, target: Path, digest: str = ""
) -> None:
    """Copy a file of so many bytes that holds the tensors that are wanted; digest: the sha256 that
    it has, where somebody said it.

    Raises ForeignFile for a header of other tensors, before anything is copied, and for what is not
    what was said; DiskFull, OSError.
    """
    with place.open(name) as file:
        check_tensors(file, name, size, wanted)
    _copy(place, name, size, target, digest)
    # Again, of the bytes that stay: those out there may be others by now
    with target.open("rb") as file:
        check_tensors(file, name, size, wanted)


def _copy(place: PackagePlace, name: str, size: int, target: Path, digest: str) -> None:
    found = hashlib.sha256()
    left = size
    with place.open(name) as source, writing(target), target.open("wb") as copy:
        while left and (block := source.read(min(left, BLOCK_BYTES))):
            copy.write(block)
            found.update(block)
            left -= len(block)
    if left:
        raise ForeignFile(f"{name} ends before its {size:,} bytes; copy it again")
    if digest and found.hexdigest() != digest:
        raise ForeignFile(f"{name} is not what was packed (sha256 differs); copy it again")
    flush(target)


@dataclass(frozen=True)
class _Folder:
    """A folder of this machine, none of whose files is a link."""

    folder: Path

    def sizes(self) -> dict[str, int]:
        self._check()
        found = {}
        with os.scandir(self.folder) as listing:
            for entry in listing:
                if entry.is_symlink():
                    raise ForeignFile(
                        f"{entry.name} is a link, and nothing in a package may lead elsewhere"
                    )
                if not entry.is_file(follow_symlinks=False):
                    raise ForeignFile(f"{entry.name} is no file, and a package holds files alone")
                found[entry.name] = entry.stat(follow_symlinks=False).st_size
        return found

    def has(self, name: str) -> bool:
        self._check()
        return os.path.lexists(self.folder / name)

    def size(self, name: str) -> int:
        return self._regular(name).st_size

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        self._regular(name)
        return (self.folder / name).open("rb")

    def _regular(self, name: str) -> os.stat_result:
        # A look opens what nobody has listed: a pipe would be waited for, a link lead elsewhere
        found = (self.folder / name).lstat()
        if stat.S_ISLNK(found.st_mode):
            raise ForeignFile(
                f"{name} is a link, and nothing in a package may lead elsewhere; copy what it "
                "leads to"
            )
        if not stat.S_ISREG(found.st_mode):
            raise ForeignFile(f"{name} is no file, and a package holds files alone")
        return found

    def _check(self) -> None:
        if self.folder.is_file():
            raise ForeignFile(
                f"{self.folder.name} is a file, and an expert is a folder; name the one that it "
                "is in"
            )


@dataclass(frozen=True)
class _Remote:
    """A folder at an fsspec URL."""

    fs: "AbstractFileSystem"
    root: str
    shown: str

    def sizes(self) -> dict[str, int] | None:
        protocol = self.fs.protocol
        protocols = {protocol} if isinstance(protocol, str) else set(protocol)
        if protocols & UNLISTED:
            return None
        found = {}
        for entry in self.fs.ls(self.root, detail=True):
            name = entry["name"].rstrip("/").rpartition("/")[2]
            if entry["type"] != "file" or entry.get("islink"):
                raise ForeignFile(f"{name} is no file, and a package holds files alone")
            found[name] = int(entry["size"])
        return found

    def has(self, name: str) -> bool:
        return bool(self.fs.exists(f"{self.root}/{name}"))

    def size(self, name: str) -> int:
        return int(self.fs.info(f"{self.root}/{name}")["size"] or 0)

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        return cast("AbstractContextManager[BinaryIO]", self.fs.open(f"{self.root}/{name}", "rb"))
