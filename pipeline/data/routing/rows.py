"""Candidates for a routing set: one expert's rows after another, from preprocess artifacts or JSONL
files.

Invariant: every picture of a candidate exists below its source's folder and has a key of its
pixels, so that the same picture in two tasks is known as one. Nothing here holds more than one line
and the digests of recent pictures.
"""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from ...errors import DataError
from ..drop_stats import Dropped, DropStats, shortened
from ..images import images
from ..images.inline import path_in
from ..sources import AS_UTF8
from ..sources.columns import column_of_pictures, split_named, value_at
from ..sources.file_kinds import is_odd
from ..sources.packed import SUFFIXES as PACKED
from ..sources.task_streams import image_columns
from ..tasks import markup
from ..tasks.groups import group_name, text_key

SPLITS = ("train", "valid", "test", "test_held")
FIELDS = ("id", "images", "prompt", "split", "group", "source")
_STATED = SPLITS[:3]  # test_held is made here; no source has it

# Pictures and folders whose checks are remembered: rows about one picture follow one another.
_RECENT = 1 << 14

_OTHER_KINDS = (".json", ".csv", ".tsv", ".parquet", ".arrow", ".tar", ".zip")
_SHOWN = 120  # characters of what was found in place of a path, in a message


@dataclass(frozen=True, slots=True)
class Candidate:
    """One row that may enter the routing set."""

    id: str  # unique within its expert
    expert: str
    images: tuple[str, ...]  # absolute paths
    pictures: tuple[str, ...]  # their keys: the first digits of the pixels' sha256
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

    source_index: int
    name: str  # of the source, in messages
    expert: str
    file: Path
    root: Path  # of relative pictures, none of which may lie outside
    artifact: bool
    fields: Mapping[str, str] = field(default_factory=dict)  # name here -> column there; "": none
    stated: str | None = None  # split of rows that state none

    def candidates(self, stats: DropStats) -> Iterator[Candidate]:
        """Yield the feed's candidates in the order of its file; rows that are none are counted.

        Raises DataError for a file that cannot be read, and for a row of an artifact: it was whole
        when it was made.
        """
        if not self.artifact:
            _check_kind(self.file, self.name)
        for number, line in _lines(self.file, self.name):
            stats.seen += 1
            try:
                yield self._candidate(number, _parsed(line))
            except Dropped as error:
                if self.artifact:
                    raise DataError(f"{self.file}:{number}: {error}") from None
                stats.drop(error.reason, f"{self.file.name}:{number}", str(error))

    def _candidate(self, number: int, row: dict) -> Candidate:
        value = {}
        for name in FIELDS:
            column = self.fields.get(name, name)
            if column:
                value[name] = value_at(row, column)
        prompt = value.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise Dropped(
                "no prompt",
                f"no prompt in column {self.fields.get('prompt', 'prompt')!r} (found "
                f"{_shown(prompt)}); its columns are {', '.join(row)}. Set fields.prompt of this "
                "source to the one that holds the request",
            )
        paths, keys = self._pictures(self._images(row))
        # Rows of an artifact are as the expert was trained on.
        if not self.artifact:
            prompt = _plain(prompt, len(paths))
        # A row without an id is called by its line.
        row_id = value.get("id")
        if row_id in (None, ""):
            row_id = number
        row_id = str(row_id)
        return Candidate(
            id=row_id,
            expert=self.expert,
            images=paths,
            pictures=keys,
            prompt=prompt,
            split=_split(value.get("split") or self.stated),
            group=str(value.get("group") or _group(keys, prompt)),
            origin=self._origin(value.get("source"), row_id),
        )

    def _images(self, row: dict) -> object:
        """Return what a row says of its pictures, in the column that is set or one that is called
        so by default."""
        for name in image_columns(self.fields.get("images", "images")):
            found = value_at(row, name)
            if found:
                return found
        is_asked = self.artifact or self.fields.get("images", "image") != "image"
        other = None if is_asked else column_of_pictures(row)
        if other is not None:
            raise Dropped(
                "no picture",
                f"no picture where image_field says, and column {other!r} names one; set "
                "image_field of this source to it",
            )
        return None

    def _pictures(self, found: object) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the paths of a row's pictures, and their keys."""
        names = [found] if isinstance(found, str) else found or []
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise Dropped(
                "no picture",
                f"images must be a list of paths, not {_shown(found)}; pictures that stand in rows "
                "are read where the rows are those of an expert, in loras.json",
            )
        paths = tuple(_inside(path_in(name), self.root) for name in names)
        # preprocess has named its pictures by their digest: a million need not be opened again.
        if self.artifact:
            return paths, tuple(path.rpartition(os.sep)[2][: images.DIGEST_CHARS] for path in paths)
        return paths, tuple(map(_digest, paths))

    def _origin(self, found: object, row_id: str) -> dict:
        if isinstance(found, dict):
            return found | {"row": row_id}
        dataset = str(found) if found else self.file.name
        return {"dataset": dataset, "id": row_id, "row": row_id}


def _check_kind(file: Path, name: str) -> None:
    """Raise DataError for a file that is called as one of another kind than JSON Lines is."""
    if file.name.lower().endswith((*PACKED, *_OTHER_KINDS)):
        raise DataError(
            f"{name}: {file.name} is not plain JSON Lines, which are all that `from: jsonl` reads; "
            "unpack or convert it, or have an expert in loras.json read it"
        )
    if is_odd(str(file)):
        raise DataError(f"{name}: {file} is a pipe or a device and no file; set the source's path")


def _lines(file: Path, name: str) -> Iterator[tuple[int, bytes]]:
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(
            f"{name}: {file} cannot be read: {error.strerror}; set the source's path"
        ) from None


def _parsed(line: bytes) -> dict:
    try:
        row = json.loads(line)
        # Half of a surrogate pair is JSON and no text; it can only be written as an escape.
        if b"\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise Dropped("not UTF-8", f"not UTF-8 at byte {error.start}; {AS_UTF8}") from None
    except (ValueError, RecursionError) as error:
        raise Dropped(
            "not JSON",
            f"not JSON of UTF-8 text ({error}); a JSONL file has one object per line",
        ) from None
    if not isinstance(row, dict):
        raise Dropped("not JSON", f"one object per line was wanted, not a {type(row).__name__}")
    return row


def _shown(value: object) -> str:
    return shortened(repr(value), _SHOWN)


def _split(found: object) -> str | None:
    if found in (None, ""):
        return None
    split = split_named(str(found))
    if split is None:
        raise Dropped(
            "unknown split",
            f"unknown split {_shown(found)}; a row may state {', '.join(_STATED)}, or set "
            "fields.split of this source to '', and the generator draws its own",
        )
    return split


def _plain(prompt: str, pictures: int) -> str:
    """Return a prompt as an expert would be asked it, without placeholders of pictures: a router
    would know by them whose request it is."""
    try:
        plain, _ = markup.without_placeholders(prompt, pictures)
    except markup.StrangePlaceholder as error:
        raise Dropped("placeholder without a picture", str(error)) from None
    mark = markup.special_token(plain, is_answer=False)
    if mark is not None:
        raise Dropped(
            "special token",
            f"the prompt holds {mark!r}, a mark of another format; write what it means",
        )
    if not plain:
        raise Dropped("no prompt", f"{_shown(prompt)} is nothing but placeholders of pictures")
    return plain


def _group(keys: tuple[str, ...], prompt: str) -> str:
    """Return a group for a row that states none: its first picture, or its wording if it has
    none."""
    return group_name(keys[0] if keys else text_key(prompt))


def _inside(name: str, root: Path) -> str:
    """Return the absolute path of a picture that exists below root, links followed."""
    # os.path and remembered folders, not Path.resolve(): this is asked for every picture of a set,
    # and a tenth of the time.
    path = os.path.normpath(os.path.join(root, name))  # noqa: PTH118
    folder = os.path.dirname(path)  # noqa: PTH120
    base = _resolved(str(root))
    fault = None
    try:
        outside = not _is_below(_resolved(folder), base)
        mode = os.lstat(path).st_mode
        # A link is followed one by one; of a plain file it is enough to know its folder.
        if stat.S_ISLNK(mode) and not outside:
            real = Path(path).resolve(strict=True)
            outside = not _is_below(str(real.parent), base)
            mode = real.stat().st_mode
        if not stat.S_ISREG(mode):
            fault = "not a file"
    # ValueError for a NUL in the name, RuntimeError for a loop of links.
    except (OSError, ValueError, RuntimeError) as error:
        # Where nothing can be followed, the path as it is written still says what is outside.
        outside = not _is_below(folder, os.path.abspath(root))  # noqa: PTH100
        fault = str(error)
    if outside:
        raise Dropped(
            "path outside its root",
            f"picture {_shown(name)} leads outside {root}; move it there, or set image_root",
        )
    if fault is not None:
        raise Dropped(
            "missing picture",
            f"picture {_shown(name)} is missing from {root} ({shortened(fault, _SHOWN)}); put it "
            "there, or set image_root",
        )
    return path


@lru_cache(_RECENT)
def _resolved(folder: str) -> str:
    return str(Path(folder).resolve())


def _is_below(folder: str, base: str) -> bool:
    # With the separator: /data/images-2 begins with /data/images and is not in it.
    return folder == base or folder.startswith(base.rstrip(os.sep) + os.sep)


@lru_cache(_RECENT)
def _digest(path: str) -> str:
    image = images.open_checked(Path(path))
    return images.digest(image)[: images.DIGEST_CHARS]
