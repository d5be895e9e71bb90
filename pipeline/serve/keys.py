"""Who may ask: API keys, which requests bring as bearer tokens.

Invariant: no key is logged or answered with, and how long a comparison takes tells neither how much
of a key is right nor which of several it is nearest to.
"""

import hashlib
import hmac
import logging
import os
import threading
from collections.abc import Collection
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import ConfigError
from .refusals import ApiError, refuse

log = logging.getLogger(__name__)

COMMENT = "#"
# Of a file with keys: a person's own has some lines.
FILE_BYTES = 1 << 20
OTHERS = 0o077  # the bits of a file's mode by which others may read, write or run it


class Keys:
    """The keys that let a request in: those given, and those of a file, one a line, which is read
    again once it has changed. Without either everybody is let in.

    Raises ConfigError for an empty key, one with a space in it, or a file without any.
    """

    def __init__(self, given: str | None = None, file: Path | None = None):
        self._file = file
        # several are parted by spaces or lines
        self._given = _digests(given.split()) if given is not None else ()
        self._of_file: tuple[bytes, ...] = ()
        self._seen: tuple[int, int, int] | None = None
        # of every key that ever came: who has a former one's line in the file is somebody else,
        # who has neither its turns nor its pictures
        self._numbers: dict[bytes, int] = {}
        self._lock = threading.Lock()
        if given is not None and not self._given:
            raise ConfigError(
                "the API key is empty, which would let everybody in; set one, or none at all"
            )
        if file is not None:
            self._seen = _stamp(file)
            self._of_file = _read(file)

    @property
    def wanted(self) -> bool:
        """Whether a request needs a key at all."""
        return bool(self._given) or self._file is not None

    def find(self, key: str) -> int | None:
        """Return the number of the key that a request brought, in the order in which they first
        came; no other key ever has it. None: it is none of them."""
        self.reload(changed_only=True)
        # Digests, as they are of one length, whatever the keys are; headers are latin-1.
        asked = hashlib.sha256(key.encode("latin-1", "replace")).digest()
        found = None
        # all of them, whichever it is
        for known in (*self._given, *self._of_file):
            if hmac.compare_digest(asked, known):
                found = self._numbers.setdefault(known, len(self._numbers))
        return found

    def reload(self, changed_only: bool = False) -> None:
        """Read the file again. Where it cannot be, the keys stay as they are, and it is told."""
        if self._file is None:
            return
        with self._lock:
            try:
                stamp = _stamp(self._file)
            except ConfigError as error:
                # once, and not at every request
                if self._seen is not None:
                    log.error("%s; the keys of before still hold", error)
                self._seen = None
                return
            if changed_only and stamp == self._seen:
                return
            # before it is read: what changes meanwhile is seen at the next request
            self._seen = stamp
            try:
                self._of_file = _read(self._file)
            except ConfigError as error:
                log.error("%s; the keys of before still hold", error)
                return
        log.info("read %d keys from %s", len(self._of_file), self._file)


def _stamp(file: Path) -> tuple[int, int, int]:
    """Return what changes when a file does. Raises ConfigError where there is none."""
    try:
        found = file.stat()
    except OSError as error:
        raise ConfigError(f"the file of API keys {file} cannot be read: {error.strerror}") from None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _read(file: Path) -> tuple[bytes, ...]:
    """Return the digests of a file's keys. Raises ConfigError."""
    try:
        with file.open("rb") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            data = opened.read(FILE_BYTES + 1)
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise ConfigError(f"the file of API keys {file} cannot be read: {reason}") from None
    if len(data) > FILE_BYTES:
        raise ConfigError(f"the file of API keys {file} is over {FILE_BYTES:,} bytes")
    if mode & OTHERS:
        log.warning("others can read the API keys in %s: chmod 600 %s", file, file)
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        words = []
        for word in line.split():
            if word.startswith(COMMENT):
                break
            words.append(word)
        if len(words) > 1:
            # the line's number and nothing of it
            raise ConfigError(f"line {number} of {file} has a space in its key: write one a line")
        keys += words
    if not keys:
        raise ConfigError(f"{file} has no API key in it: write one a line, # begins a comment")
    return _digests(keys)


def _digests(keys: Collection[str]) -> tuple[bytes, ...]:
    # As a header brings them: UTF-8, read as latin-1, is the same bytes again.
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys)


class KeyCheck:
    """Lets requests in that bring a key, and those for a few addresses without one."""

    def __init__(self, app: ASGIApp, keys: Keys, open_paths: Collection[str]):
        self.app = app
        self.keys = keys
        self.open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it with 401 before its body is read."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            scope.setdefault("state", {})["client"] = self._client(scope)
        except ApiError as error:
            await refuse(error, scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _client(self, scope: Scope) -> str:
        """Return who asks, for a fair order: a key, or else an address. Raises ApiError."""
        client = scope.get("client")
        address = client[0] if client else ""
        if not self.keys.wanted or scope["path"] in self.open_paths:
            return address
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        # of bytes read as latin-1, of which strip() would take more than spaces
        given = given.strip(" \t")
        found = self.keys.find(given)
        if scheme.lower() == "bearer" and found is not None:
            return f"key {found}"
        if given:
            problem = "is not one that this server was started with"
        else:
            problem = "is missing: send Authorization: Bearer KEY"
        raise ApiError(
            401, f"the API key {problem}", None, "invalid_api_key", **{"WWW-Authenticate": "Bearer"}
        )
