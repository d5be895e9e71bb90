"""A bundle, or what is sealed as one, brought to a folder or fsspec URL: every file is read back.

Invariant: SHA256SUMS goes last, so that what is at the target is whole or is no bundle.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DiskFull, StoreError
from ..protocols import Progress
from .artifacts import sha256
from .bundle import BLOCK_BYTES, MADE, SUMS, parse_sums, read_sums, verify
from .room import no_room

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

# Filesystems where a folder must exist before its files; stores of objects have no folders.
FOLDERS = {"file", "local", "sftp", "ssh", "smb", "ftp"}


def upload(folder: Path, url: str, progress: Progress, setting: str = "deploy.upload") -> None:
    """Copy a bundle to a folder or fsspec URL; every file is read back and compared, SHA256SUMS
    goes last.

    What is there already is not sent again; files of an earlier bundle that this one has not are
    removed. `setting` is where the target was named, for messages. Raises StoreError when the
    target cannot be used or gives back other bytes than were sent.
    """
    verify(folder)
    fs, root = open_url(url, setting)
    sums = read_sums(folder)
    if (folder / MADE).exists():
        sums[MADE] = sha256(folder / MADE)
    # last, as at the target too it is what makes the folder a bundle
    sums[SUMS] = sha256(folder / SUMS)
    shown = without_password(url)
    with _translate_errors(url, setting):
        _clear(fs, root, folder)
    for done, (name, digest) in enumerate(sums.items()):
        progress(f"uploading {len(sums)} files to {shown}", done / len(sums))
        with _translate_errors(f"{url}/{name}", setting):
            _send(fs, folder / name, f"{root}/{name}", digest, setting)
    progress(f"uploaded {len(sums)} files to {shown}, each read back and compared", None)


def open_url(url: str, setting: str) -> tuple["AbstractFileSystem", str]:
    """Return the filesystem and the path of a URL. Raises StoreError."""
    from fsspec.core import url_to_fs

    shown = without_password(url)
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
    return fs, root.rstrip("/")


def _clear(fs: "AbstractFileSystem", root: str, folder: Path) -> None:
    """Make an earlier bundle at the target incomplete before it is changed, and remove what the new
    one has not."""
    if _has_folders(fs):
        fs.makedirs(root, exist_ok=True)
    there = f"{root}/{SUMS}"
    if not fs.exists(there) or _digest(fs, there) == sha256(folder / SUMS):
        return
    # a torn list names nothing
    earlier = None
    with contextlib.suppress(UnicodeDecodeError):
        earlier = parse_sums(fs.cat_file(there).decode())
    for name in (earlier or {}).keys() - read_sums(folder).keys():
        if fs.exists(f"{root}/{name}"):
            fs.rm_file(f"{root}/{name}")
    fs.rm_file(there)


def _has_folders(fs: "AbstractFileSystem") -> bool:
    protocols = [fs.protocol] if isinstance(fs.protocol, str) else fs.protocol
    return bool(FOLDERS.intersection(protocols))


def _send(fs: "AbstractFileSystem", source: Path, target: str, digest: str, setting: str) -> None:
    """Send a file unless it is there already. Raises StoreError when other bytes come back."""
    if fs.exists(target) and _digest(fs, target) == digest:
        return
    if _has_folders(fs):
        fs.makedirs(target.rpartition("/")[0], exist_ok=True)
    fs.put_file(str(source), target)
    found = _digest(fs, target)
    if found != digest:
        raise StoreError(
            f"{setting}: {target} came back with other bytes than were sent (sha256 "
            f"{found[:12]}, sent {digest[:12]}): the copy is torn. Run the same command again; it "
            "sends what is missing or different"
        )


def _digest(fs: "AbstractFileSystem", path: str) -> str:
    """Return the sha256 of what is at the target, read in constant memory."""
    digest = hashlib.sha256()
    with fs.open(path, "rb", block_size=BLOCK_BYTES) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _translate_errors(url: str, setting: str) -> Iterator[None]:
    """Turn whatever a filesystem raises into a StoreError that names the URL."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:  # each filesystem raises what it likes
        shown = without_password(url)
        if no_room(error, Path(shown)):
            raise DiskFull(f"{setting}: no room to write {shown} ({error})") from None
        raise StoreError(
            f"{setting}: {shown} cannot be written or read back: {type(error).__name__}: "
            f"{error}. Check the URL, its credentials and the network, then run the same command "
            "again; nothing is sent twice"
        ) from None


def without_password(url: str) -> str:
    """Return a URL without the password it may hold."""
    return re.sub(r"//[^/@]*@", "//***@", url)
