"""Reading what may be out of reach or damaged, and telling the one from the other.

Invariant: whatever a file holds, and whatever the system says of it, what is read here ends in the
value that was written, in DamagedArtifact (it was read and is wrong) or in UnreadableFile (it was
not read, and may be as good as ever).
"""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Hashable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from ..errors import DamagedArtifact, NewerStore, StoreError, UnreadableFile
from .address import ADDRESS

T = TypeVar("T")
# Numbers of more digits are beyond every float; transformers itself writes some of thirty.
MOST_DIGITS = 308
CHECKSUM = "checksum"
# As run/stages.py makes them: names of stages have no hyphen, those of items may.
# They say what lies at a path, and nothing is wrong with the way to it.
_NO_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


@contextlib.contextmanager
def reading(path: Path, what: str = "") -> Iterator[None]:
    """Give what keeps the system from reading a path a name of its own.

    What is not there, or is a folder in a file's place, says something about the store and stays an
    OSError. `what`: a word before the path, for messages. Raises UnreadableFile.
    """
    try:
        yield
    except _NO_FILE:
        raise
    except OSError as error:
        named = f"{what} {path}".strip()
        text = f"{named} cannot be read: {error.strerror or error}"
        raise UnreadableFile(text, path=path) from None


def exists(path: Path) -> bool:
    """Whether anything lies at a path, a link that leads nowhere too.

    Raises UnreadableFile, as a file that may not be seen is not absent; NotADirectoryError.
    """
    # Path.exists says no to whatever goes wrong
    try:
        with reading(path):
            os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def check_folder(path: Path) -> None:
    """Raise StoreError when a file, or a link that leads nowhere, lies in the place of a folder;
    UnreadableFile. A folder that is not there is fine."""
    try:
        if not exists(path):
            return
        with reading(path):
            mode = path.stat().st_mode
    except FileNotFoundError:
        raise StoreError(
            f"{path} is a link that leads nowhere: bring back what it leads to, or remove the link"
        ) from None
    except NotADirectoryError:
        raise StoreError(f"{path} is below a file: name a folder") from None
    if not stat.S_ISDIR(mode):
        raise StoreError(f"{path} is a file where a folder is wanted: move it elsewhere")


def read_bytes(path: Path) -> bytes:
    """Return what a file of an artifact holds. Raises DamagedArtifact when there is no such file,
    UnreadableFile."""
    try:
        with reading(path):
            return path.read_bytes()
    except _NO_FILE:
        raise damaged(path, absence(path)) from None


def absence(path: Path) -> str:
    """Return in words what lies where a file was looked for and not found."""
    # not Path's own, which raise where nothing can be seen
    if os.path.islink(path):  # noqa: PTH114
        return "is a link that leads nowhere"
    return "is a folder, not a file" if os.path.isdir(path) else "is gone"  # noqa: PTH112


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file of an artifact holds. Raises DamagedArtifact,
    UnreadableFile."""
    try:
        return parse_object(read_bytes(path))
    except ValueError as error:
        raise damaged(path, f"is not what was written: {error}") from None


def read_as(kind: type[T], path: Path) -> T:
    """Return what a JSON file of an artifact holds as a dataclass or model, its fields' types
    checked. Raises DamagedArtifact, UnreadableFile."""
    values = read_object(path)
    try:
        return as_kind(kind, values)
    except ValueError as error:
        raise damaged(path, f"is not what was written: {error}") from None


def as_kind(kind: type[T], values: dict[str, Any]) -> T:
    """Return values as a dataclass or model of theirs. Raises ValueError in one line."""
    # Only here: a checkpoint or a history needs none of it
    from pydantic import ValidationError

    try:
        # To a type checker a class of T might be no key
        return _checker(cast(Hashable, kind)).validate_python(values)
    except ValidationError as error:
        # the first mistake tells enough of a file that nobody writes by hand
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}") from None


@cache
def _checker(kind: type) -> Any:
    """Return what checks values of a kind: to make it takes 0.8 ms, for each file that is read."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def damaged(path: Path, why: str) -> DamagedArtifact:
    """Return the error for a file that is not what was written, with the artifact that it belongs
    to, if it is in one, as what to make again."""
    for folder in (path, *path.parents):
        match = ADDRESS.fullmatch(folder.name)
        if match and folder.parent.name == "artifacts":
            return DamagedArtifact(f"{path} {why}", remove=folder, stage=match[1])
    return DamagedArtifact(f"{path} {why}")


def parse_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object in a text. Raises ValueError, also for what Python's reader lets pass:
    NaN, numbers that no computer word holds, a key given twice."""
    try:
        found = json.loads(
            data.decode(),
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(found, dict):
        raise ValueError("it holds no JSON object")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:20]} is too large a number")
    return number


def _integer(text: str) -> int:
    # Thousands of digits would be refused by int itself, with advice about its settings
    if len(text) > MOST_DIGITS:
        raise ValueError(f"{text[:20]}... is too large a number")
    return int(text)


def sealed(values: dict[str, Any], indent: int | None = None) -> str:
    """Return values as JSON with a checksum over themselves at the end."""
    # as they will be read: JSON knows no tuples, and sorts the numbers that were keys as texts
    values = json.loads(json.dumps(values))
    return json.dumps(values | {CHECKSUM: _checksum(values)}, indent=indent)


def unsealed(data: bytes, indent: int | None = None) -> dict[str, Any]:
    """Return what `sealed` was given. Raises ValueError when a single bit is another."""
    try:
        values = json.loads(data.decode())
        if not isinstance(values, dict):
            raise ValueError("it holds no JSON object")
        if CHECKSUM not in values:
            raise ValueError("it has no checksum")
        del values[CHECKSUM]
        # the text itself, as the last digits of a number may change and its value stay
        same = data.decode() == sealed(values, indent)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not same:
        raise ValueError("its checksum differs")
    return values


def of_version(kind: type[T], data: bytes, path: Path, version: int, what: str) -> T:
    """Return what a file says that was `sealed` with a version, up to the one that is known; it is
    in a folder of the store's root. Raises DamagedArtifact, or NewerStore for a later one's."""
    try:
        values = unsealed(data, indent=1)
        found = values.pop("version")
        if type(found) is not int:
            raise ValueError("it states no version")
        if found > version:
            raise NewerStore(
                f"{path} has version {found} of {what}, this program reads up to {version}",
                root=path.parents[1],
                remedy="update MoleForge",
            )
        return as_kind(kind, values)
    except (ValueError, KeyError) as error:
        raise damaged(path, f"is torn or its bytes have changed ({error})") from None


def _checksum(values: dict[str, Any]) -> str:
    """Return the sha256 of values, whatever order they come in."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
