"""No room for what is being written, whoever says so: the system, a library in Rust, SQLite.

What is written in files of ours names the file; what a library writes names where it was told to.
"""

import contextlib
import errno
import os
import re
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from ..errors import DiskFull, StoreError

# A quota and a limit on the size of files leave no room either.
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}
# Libraries in Rust have no numbers of their own, and put the system's into their text.
_IN_RUST = re.compile(r"\(os error (\d+)\)")
PART = ".part"


def no_room(error: BaseException, path: Path, hint: str = "") -> DiskFull | None:
    """Return the error to raise when another one, or what that came of, is a lack of room: for the
    file that is named there, else for path.

    `hint` is the end of a sentence that says how much is needed.
    """
    cause: BaseException | None = error
    while cause is not None:
        number = _number(cause)
        if number in NO_ROOM:
            return _disk_full(_named(cause, path), os.strerror(number), hint)
        # also where `from None` hides it: nobody raises anything else at a full disk but for it
        cause = cause.__cause__ or cause.__context__
    return None


def _number(error: BaseException) -> int:
    """Return the errno that an error tells of, 0 for none."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    if isinstance(error, sqlite3.Error):
        # The low byte is the kind, the rest its variant
        kind = getattr(error, "sqlite_errorcode", 0) & 0xFF
        return errno.ENOSPC if kind == sqlite3.SQLITE_FULL else 0
    told = _IN_RUST.search(str(error))
    return int(told[1]) if told else 0


def _disk_full(path: Path, reason: str, hint: str) -> DiskFull:
    # a file that could not be written does not exist, nor need its folder
    there = next((each for each in (path, *path.absolute().parents) if each.exists()), Path("/"))
    free_mb = shutil.disk_usage(there).free / 1e6
    return DiskFull(f"no room to write {path} ({reason}; {free_mb:.1f} MB free){hint}", path=path)


@contextlib.contextmanager
def writing(path: Path, hint: str = "") -> Iterator[None]:
    """Give a lack of room the name of the file that it is for: the one the error names, else path.

    Raises DiskFull.
    """
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:  # each library raises what it likes
        full = no_room(error, path, hint)
        if full is None:
            raise
        raise full from None


@contextlib.contextmanager
def writing_to(place: Path, kind: str) -> Iterator[None]:
    """Name the place that was typed after --to where the system does not let it be written; `kind`
    is what it would have to be. Raises DiskFull, StoreError."""
    try:
        with writing(place):
            yield
    except OSError as error:
        raise StoreError(
            f"--to: {place} cannot be written ({error.strerror}: {error.filename}); name a {kind} "
            "that this user may write to"
        ) from None


def _named(error: BaseException, path: Path) -> Path:
    """Return the file that an error of the system names as being written, else path."""
    # of a link, a copy and a rename the second is the new one
    for name in (getattr(error, "filename2", None), getattr(error, "filename", None)):
        if not isinstance(name, str | os.PathLike) or not str(name):
            continue
        named = Path(str(name).removesuffix(PART))
        # what is renamed to it later says nothing to a person
        is_part = named.parent == path.parent and named.name.startswith(f"{path.name}.")
        return path if is_part else named
    return path


@contextlib.contextmanager
def translate_disk_errors(folder: Path) -> Iterator[None]:
    """Turn whatever says "no space left" into DiskFull, and the system's "not allowed" into
    StoreError.

    The folder is an artifact's, or that of its checkpoints; what other files refuse is not the
    store's affair. Raises DiskFull or StoreError.
    """
    root = folder.parents[1]
    try:
        with writing(folder):
            yield
    except DiskFull as error:
        # what makes room in a store does not elsewhere
        if error.path is not None:
            error.in_store = error.path.is_relative_to(root)
        raise
    except OSError as error:
        if not Path(str(error.filename)).is_relative_to(root):
            raise
        named = _named(error, folder)
        if error.errno not in NOT_ALLOWED:
            # Not laid out as a store is, or out of reach: either way a person has to look there
            raise StoreError(
                f"{named} cannot be used: {error.strerror}; what was finished is kept: "
                "mend the cause and run the same command again"
            ) from None
        raise StoreError(
            f"{named} cannot be written: {error.strerror}",
            root=root,
            remedy=f"give this user the right to write to {root}",
        ) from None
