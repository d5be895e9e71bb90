"""Files by what is said of them without a look into them: what lies behind a URL, what is none."""

import os
import stat
from typing import TYPE_CHECKING

from ...protocols import Seen
from ...store.looking import UNREACHABLE

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

# What changes with a content, by the names that file systems have for it, the surest first
_MARKS = (
    "sha256",
    "md5",
    "md5Hash",
    "content_md5",
    "crc32c",
    "CRC",
    "ETag",
    "etag",
    "generation",
    "LastModified",
    "last_modified",
    "updated",
    "mtime",
    "created",
)


def is_local(fs: "AbstractFileSystem") -> bool:
    """Whether the files of a file system are this machine's."""
    named = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    return "file" in named


def is_odd(path: str) -> bool:
    """Whether what lies at a path of this machine is there and no file, such as a pipe."""
    try:
        # Of a hundred thousand files Path would take a second
        mode = os.stat(path).st_mode  # noqa: PTH116
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def seen_at(setting: str, fs: "AbstractFileSystem", path: str, name: str) -> Seen:
    """Return what a server says of a file: its size, and the first mark of its content that is
    there."""
    try:
        about = fs.info(path)
    except Exception:  # a file system raises what it likes
        return Seen(setting, name, UNREACHABLE)
    size = int(about.get("size") or 0)
    for mark in _MARKS:
        if about.get(mark):
            return Seen(setting, name, f"{mark} {about[mark]}", size)
    return Seen(setting, name, f"{size} bytes", size)
