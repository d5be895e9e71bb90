"""Candidates for a routing set: one expert's rows after another, from preprocess artifacts or JSONL
files.

Invariant: every picture of a candidate exists below its source's folder and has a key of its
pixels, so that the same picture in two tasks is known as one. Nothing here holds more than one line
and the digests of recent pictures.
"""

import hashlib
import json
import os
import stat
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from ...errors import DataError
from ..images import images as pictures
from ..sources.tasks import image_columns

SPLITS = ("train", "valid", "test", "test_held")
FIELDS = ("id", "images", "prompt", "split", "group", "source")
_SPLIT_NAMES = {name: name for name in SPLITS[:3]} | {
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
}
_RECENT = 1 << 14  # pictures and folders whose checks are remembered


@dataclass(frozen=True, slots=True)
class Candidate:
    """One row that may enter the routing set."""

    id: str  # unique within its expert
    expert: str
    images: tuple[str, ...]  # absolute paths
    pictures: tuple[str, ...]  # their keys: 16 hex digits of the pixels' sha256
    prompt: str
    split: str | None  # as its source states it; none: the generator draws one
    group: str
    origin: dict


@dataclass(frozen=True)
class Feed:
    """Where one source's rows lie and how to read them.

    An artifact's pictures carry their key as file name; those of a JSONL file are opened and
    checked.
    """

    unit: int  # number of the source
    name: str  # of the source, in messages
    expert: str
    file: Path
    root: Path  # of relative pictures, none of which may lie outside
    artifact: bool
    fields: Mapping[str, str] = field(default_factory=dict)  # name here -> column there; "": none
    stated: str | None = None  # split of rows that state none

    def candidates(self) -> Iterator[Candidate]:
        """Yield the feed's candidates in the order of its file. Raises DataError for a file or row
        that is unusable."""
        for where, row in _lines(self.file, self.name):
            yield self._candidate(where, row)

    def _candidate(self, where: str, row: dict) -> Candidate:
        value = {
            ours: row.get(theirs) for ours in FIELDS if (theirs := self.fields.get(ours, ours))
        }
        prompt, name = value.get("prompt"), value.get("id")
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(
                f"{where}: no prompt in column {self.fields.get('prompt', 'prompt')!r} (found {prompt!r}); its columns "
                f"are {', '.join(row)}. Set fields.prompt of this source to the one that holds the request"
            )
        paths, keys = self._pictures(where, self._images(row))
        plain = where.rpartition(":")[2] if name in (None, "") else str(name)
        return Candidate(
            plain,
            self.expert,
            paths,
            keys,
            prompt,
            _split(where, value.get("split") or self.stated),
            str(value.get("group") or _group(keys, prompt)),
            _origin(value.get("source"), self, plain),
        )

    def _images(self, row: dict) -> object:
        """Return what a row says of its pictures, in the column that is set or one that is called
        so by default."""
        names = image_columns(self.fields.get("images", "images"))
        return next((row[name] for name in names if row.get(name)), None)

    def _pictures(self, where: str, found) -> tuple[tuple[str, ...], tuple[str, ...]]:
        names = [found] if isinstance(found, str) else found or []
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise DataError(f"{where}: images must be a list of paths, not {found!r}")
        paths = tuple(_inside(where, name, self.root) for name in names)
        if self.artifact:
            return paths, tuple(path.rpartition(os.sep)[2][:16] for path in paths)
        return paths, tuple(_key(where, path) for path in paths)


@lru_cache(_RECENT)
def normalized(prompt: str) -> str:
    """Return what two prompts that differ only in case, spaces, width or a closing mark have in
    common."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split()).rstrip(" .!?")


def _lines(file: Path, name: str) -> Iterator[tuple[str, dict]]:
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{file}:{number}", _parsed(f"{file}:{number}", line)
    except OSError as error:
        raise DataError(
            f"{name}: {file} cannot be read: {error.strerror}; set the source's path"
        ) from None


def _parsed(where: str, line: bytes) -> dict:
    try:
        row = json.loads(line)
        if b"\\u" in line:
            json.dumps(
                row, ensure_ascii=False
            ).encode()  # half of a surrogate pair is JSON, and no text
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where} is not JSON of UTF-8 text ({error}); a JSONL file has one object per line"
        ) from None
    if not isinstance(row, dict):
        raise DataError(f"{where} must be one object per line, not a {type(row).__name__}")
    return row


def split_named(name: str) -> str | None:
    """Return the split that a name stands for, None when it is no split's."""
    return _SPLIT_NAMES.get(name.lower())


def _split(where: str, found) -> str | None:
    if found in (None, ""):
        return None
    split = split_named(str(found))
    if split is None:
        raise DataError(
            f"{where}: unknown split {found!r}; a row may state {', '.join(SPLITS[:3])}, or set fields.split of this "
            "source to '', and the generator draws its own"
        )
    return split


def _group(keys: tuple[str, ...], prompt: str) -> str:
    """Return a group for a row that states none: its first picture, or for text alone its wording."""
    text = keys[0] if keys else hashlib.sha256(normalized(prompt).encode()).hexdigest()
    return f"sha256:{text}" if keys else f"text:{text[:16]}"


def _origin(found, feed: Feed, name: str) -> dict:
    origin = (
        found
        if isinstance(found, dict)
        else {"dataset": str(found) if found else feed.file.name, "id": name}
    )
    return origin | {"row": name}


def _inside(where: str, name: str, root: Path) -> str:
    """Return the absolute path of a picture that exists below root, links followed."""
    path = os.path.normpath(os.path.join(root, name))  # noqa: PTH118
    folder, base = os.path.dirname(path), _resolved(str(root))  # noqa: PTH120
    try:
        outside, mode = not _below(_resolved(folder), base), os.lstat(path).st_mode
        if stat.S_ISLNK(mode) and not outside:
            real = Path(path).resolve(strict=True)
            outside, mode = not _below(str(real.parent), base), real.stat().st_mode
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the name, a loop of links
        outside, mode = not _below(folder, os.path.abspath(root)), str(error)  # noqa: PTH100
    if outside:
        raise DataError(
            f"{where}: picture {name!r} leads outside {root}; move it there, or set image_root"
        )
    if isinstance(mode, str) or not stat.S_ISREG(mode):
        why = mode if isinstance(mode, str) else "not a file"
        raise DataError(
            f"{where}: picture {name!r} is missing from {root} ({why}); put it there, or set image_root"
        )
    return path


@lru_cache(_RECENT)
def _resolved(folder: str) -> str:
    return str(Path(folder).resolve())


def _below(folder: str, base: str) -> bool:
    return folder == base or folder.startswith(base.rstrip(os.sep) + os.sep)


def _key(where: str, path: str) -> str:
    try:
        return _digest(path)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


@lru_cache(_RECENT)
def _digest(path: str) -> str:
    return pictures.digest(pictures.open_checked(Path(path)))[:16]
