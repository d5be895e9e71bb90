"""A bundle, or what is sealed as one, brought to a folder or fsspec URL and checked there.

Invariant: SHA256SUMS goes last, so that what is at the target is whole or is no bundle.
"""

import contextlib
import hashlib
import itertools
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from ..credentials import masked
from ..errors import DiskFull, StoreError
from ..protocols import Progress
from .artifacts import sha256
from .bundle import BLOCK_BYTES, MADE, SUMS, parse_sums, read_sums, verify
from .room import PART, no_room
from .sending import Outgoing, Sending, side_by_side

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from s3fs import S3FileSystem

# Filesystems where a folder must exist before its files; stores of objects have no folders.
LOCAL = {"file", "local"}
FOLDERS = LOCAL | {"sftp", "ssh", "smb", "ftp"}
S3 = {"s3", "s3a"}
# Two that bring the same file at once must not write into one part file.
_COUNT = itertools.count()
_IS_PART = re.compile(r".+\.\d+-\d+\.part")


class Place(Protocol):
    """Where files are brought; store/s3.py has the one of S3."""

    threads: int

    def is_large(self, file: Outgoing) -> bool:
        """Whether a file is sent in parts, several at once."""

    def begin(self, names: Collection[str]) -> str:
        """Look for what was begun; return what is wrong where that cannot be seen."""

    def send(self, file: Outgoing, sending: Sending) -> None:
        """Send a file unless it is there already. Raises StoreError when other bytes are there
        after that."""

    def tidy(self, names: Collection[str]) -> None:
        """Remove what others have begun of files that are there whole now."""


class PlainFiles:
    """A folder here, or what fsspec knows of a place: files in one go, each read back."""

    def __init__(self, fs: "AbstractFileSystem", root: str, setting: str) -> None:
        self._fs = fs
        self._root = root
        self._setting = setting
        self._folders = has_folders(fs)
        # A disk is not faster by it, and the others have one connection
        self.threads = 4 if fs.async_impl else 1

    def is_large(self, file: Outgoing) -> bool:
        """Never: parts are a matter of stores that know them."""
        return False

    def begin(self, names: Collection[str]) -> str:
        """Nothing is begun that could be gone on with."""
        return ""

    def send(self, file: Outgoing, sending: Sending) -> None:
        """Send a file unless it is there already. Raises StoreError when other bytes come back,
        OSError."""
        target = f"{self._root}/{file.name}"
        if self._fs.exists(target) and self._digest(target) == file.sha256:
            sending.add(file.bytes, sent=False)
            return
        if self._folders:
            self._send_beside(file, target)
        else:
            self._fs.put_file(str(file.path), target)
            self._check(file, target, target)
        sending.add(file.bytes)

    def _send_beside(self, file: Outgoing, target: str) -> None:
        """Write a file beside its place and move it there whole."""
        self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        part = f"{target}.{os.getpid()}-{next(_COUNT)}{PART}"
        try:
            self._fs.put_file(str(file.path), part)
            self._check(file, part, target)
            move(self._fs, part, target)
        except FileNotFoundError:
            # Another has brought the same file there whole, and removed what was begun of it
            self._check(file, target, target)
        finally:
            with contextlib.suppress(Exception):
                if self._fs.exists(part):
                    self._fs.rm_file(part)

    def _check(self, file: Outgoing, path: str, target: str) -> None:
        found = self._digest(path)
        if found != file.sha256:
            raise StoreError(
                f"{self._setting}: {target} came back with other bytes than were sent (sha256 "
                f"{found[:12]}, sent {file.sha256[:12]}): the copy is torn. Run the same command "
                "again; it sends what is missing or different"
            )

    def _digest(self, path: str) -> str:
        return digest_of(self._fs, path)

    def tidy(self, names: Collection[str]) -> None:
        """Remove the part files that killed uploads have left of files that are there whole now."""
        if not self._folders:
            return
        for path in self._fs.find(self._root):
            if _IS_PART.fullmatch(path):
                # Its own uploader may be there first
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm_file(path)


def upload(folder: Path, url: str, progress: Progress, setting: str = "deploy.upload") -> None:
    """Bring a bundle to a folder or fsspec URL: several files or parts at once, each compared with
    what is there then; SHA256SUMS goes last.

    What is there already, a part of a file too, is not sent again; files of an earlier bundle that
    this one has not are removed. `setting` is where the target was named, for messages. Raises
    StoreError when the target cannot be used or holds other bytes than were sent.
    """
    files = _outgoing(folder)
    verify(folder)
    fs, root = open_url(url, setting)
    names = [file.name for file in files]
    place = _place(fs, root, setting)
    shown = masked(url)
    with translate_errors(url, setting):
        _clear(fs, root, folder)
        wrong = place.begin(names)
    if wrong:
        progress(f"{setting}: {wrong}", None)
    total = sum(file.bytes for file in files)
    sending = Sending(f"uploading {len(files)} files to {shown}", total, progress)

    def send(file: Outgoing) -> None:
        with translate_errors(f"{url}/{file.name}", setting):
            place.send(file, sending)

    sending.tell()
    *content, sums = files
    small = [file for file in content if not place.is_large(file)]
    side_by_side(send, small, place.threads, sending.tell)
    # One after another, as each has its parts side by side
    for file in content:
        if place.is_large(file):
            send(file)
    for file in content:
        file.check()
    send(sums)
    with translate_errors(url, setting):
        place.tidy(names)
    progress(f"uploaded {len(files)} files to {shown}, each compared with what is there", None)


def _outgoing(folder: Path) -> list[Outgoing]:
    """Return the files of a bundle, the list of its sums last: at the target too it is what makes
    the folder a bundle. Raises MissingArtifact, DamagedArtifact."""
    sums = read_sums(folder)
    if (folder / MADE).exists():
        sums[MADE] = sha256(folder / MADE)
    sums[SUMS] = sha256(folder / SUMS)
    found = []
    for name, digest in sums.items():
        # One that is gone is told when the bundle is verified
        with contextlib.suppress(OSError):
            found.append(Outgoing.of(folder, name, digest))
    return found


def _place(fs: "AbstractFileSystem", root: str, setting: str) -> Place:
    if not is_s3(fs):
        return PlainFiles(fs, root, setting)
    # Only here, as no other target needs it
    from .s3 import S3Files

    return S3Files(cast("S3FileSystem", fs), root, setting)


def open_url(url: str, setting: str) -> tuple["AbstractFileSystem", str]:
    """Return the filesystem and the path of a URL. Raises StoreError."""
    from fsspec.core import url_to_fs

    shown = masked(url)
    try:
        # nothing is remembered: what was listed a minute ago may be stale
        fs, root = url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)
    except ImportError as error:
        raise StoreError(
            f"{setting}: {shown} needs a package that is not installed: {error}"
        ) from None
    except ValueError as error:
        raise StoreError(
            f"{setting}: {shown} is no folder and no URL that fsspec knows ({error}); write a "
            "folder, s3://bucket/path or another fsspec URL"
        ) from None
    root = root.rstrip("/")
    if is_s3(fs) and not root:
        raise StoreError(f"{setting}: {shown} names no bucket; write s3://bucket/path")
    return fs, root


def _clear(fs: "AbstractFileSystem", root: str, folder: Path) -> None:
    """Make an earlier bundle at the target incomplete before it is changed, and remove what the new
    one has not."""
    if has_folders(fs):
        fs.makedirs(root, exist_ok=True)
    there = f"{root}/{SUMS}"
    if not fs.exists(there) or digest_of(fs, there) == sha256(folder / SUMS):
        return
    # a torn list names nothing
    earlier = None
    with contextlib.suppress(UnicodeDecodeError):
        earlier = parse_sums(fs.cat_file(there).decode())
    for name in (earlier or {}).keys() - read_sums(folder).keys():
        if fs.exists(f"{root}/{name}"):
            fs.rm_file(f"{root}/{name}")
    fs.rm_file(there)


def has_folders(fs: "AbstractFileSystem") -> bool:
    """Whether a folder has to be made before its files."""
    return _speaks(fs, FOLDERS)


def is_local(fs: "AbstractFileSystem") -> bool:
    """Whether a filesystem is this machine's."""
    return _speaks(fs, LOCAL)


def is_s3(fs: "AbstractFileSystem") -> bool:
    """Whether a filesystem is a store that knows S3's requests."""
    return _speaks(fs, S3)


def has_no_bucket(error: FileNotFoundError) -> bool:
    """Whether an S3 store says so of a place, and not that nothing lies there."""
    answer = getattr(error.__cause__, "response", None) or {}
    return bool(answer.get("Error", {}).get("Code") == "NoSuchBucket")


def _speaks(fs: "AbstractFileSystem", known: set[str]) -> bool:
    protocols = [fs.protocol] if isinstance(fs.protocol, str) else fs.protocol
    return bool(known.intersection(protocols))


def digest_of(fs: "AbstractFileSystem", path: str) -> str:
    """Return the sha256 of what is at the target, read in constant memory."""
    digest = hashlib.sha256()
    with fs.open(path, "rb", block_size=BLOCK_BYTES) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def move(fs: "AbstractFileSystem", part: str, target: str) -> None:
    """Give a file that was written beside its place the name that it is to have."""
    try:
        fs.mv(part, target)
    except FileNotFoundError:
        raise
    except OSError:
        # Some servers rename to no name that is taken, which a disk does
        if is_local(fs) or not fs.exists(target):
            raise
        fs.rm_file(target)
        fs.mv(part, target)


@contextlib.contextmanager
def translate_errors(url: str, setting: str) -> Iterator[None]:
    """Turn whatever a filesystem raises into a StoreError that names the URL."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:  # each filesystem raises what it likes
        shown = masked(url)
        if no_room(error, Path(shown)):
            raise DiskFull(f"{setting}: no room to write {shown} ({error})") from None
        raise StoreError(
            f"{setting}: {shown} cannot be written or read back: {type(error).__name__}: "
            f"{error}. Check the URL, its credentials and the network, then run the same command "
            "again; nothing is sent twice"
        ) from None
