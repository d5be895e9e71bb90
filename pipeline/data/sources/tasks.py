"""Records of one task from its source: JSON lines, a folder of images, the Hub, or synthetic.

A new source is a generator here, a row of _STREAMS, and its word in config/task_data.py.

Invariant: records come in a fixed order, one at a time, with pictures still as they were found
(path, bytes, decoded); a record that cannot be read is skipped with a reason and never stops the
stream, a source that cannot be read is a DataError.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL.Image import Image

from ...config.base import is_folder
from ...config.task_data import SyntheticConfig, TaskDataConfig
from ...errors import DataError
from ..images import images
from ..images.images import ImageSource
from ..images.inline import bytes_in, is_address, path_in
from ..tasks.markup import picture_named
from ..text.documents import SPLITS
from . import SkippedRow, conversations, image_folders, synthetic, task_files, task_hub
from .columns import (
    SPLIT_NAMES,
    column_of_pictures,
    is_missing,
    listed,
    split_named,
    structured,
    value_at,
)
from .task_streams import Found, Stream, base_of, image_columns, setting

# Where an object has its picture, in the order in which they are asked.
_IMAGE_KEYS = ("bytes", "base64", "data", "path", "url", "image_url", "image", "file_name")

_SHOWN = 120  # characters of an address, in a message


@dataclass(frozen=True)
class Record:
    """One row of a source, before anything is checked."""

    where: str  # for messages
    number: int  # in the stream, from 0
    columns: dict = field(default_factory=dict)
    images: tuple[ImageSource, ...] = ()
    split: str | None = None  # train, valid, test; None: to be divided
    skipped: SkippedRow | None = None  # why it could not be read; then it has no columns


def records(name: str, data: TaskDataConfig) -> Iterator[Record]:
    """Yield the records of a task, at most data.limit of each split. Raises DataError for the
    source as a whole."""
    number = 0
    taken: Counter[str | None] = Counter()
    for split, rows in _STREAMS[data.source](name, data):
        for where, found in _exchanges(rows, data):
            record = _record(where, number, found, split, data)
            if data.limit and taken[record.split] >= data.limit:
                # Rows that name their own split may still have one that is not full.
                if split or not _own_split(found, data):
                    break
                continue
            taken[record.split] += 1
            number += 1
            yield record


def look(name: str, data: TaskDataConfig) -> None:
    """Raise DataError when a source on this machine is not there, or has nothing in it; no row is
    read, and the Hub is not asked."""
    named = setting(name)
    if data.image_root and not Path(data.image_root).is_dir():
        raise DataError(f"{named}.image_root: there is no folder {data.image_root}; correct it")
    if data.source == "hub" and data.id and is_folder(data.id) and not Path(data.id).is_dir():
        raise DataError(f"{named}.id: there is no folder {data.id}; correct it")
    if data.source == "jsonl":
        task_files.look(name, data)
    if data.source == "folder":
        image_folders.look(name, data)


def _exchanges(rows: Iterator[Found], data: TaskDataConfig) -> Iterator[Found]:
    """Pass rows on, those that are chats as the questions and answers in them."""
    for where, found in rows:
        if isinstance(found, dict) and "prompt" not in data.fields:
            found = conversations.of_prompt(found)
        is_asked = isinstance(found, dict) and column(found, "prompt", data) not in (None, "")
        if isinstance(found, SkippedRow) or is_asked:
            yield where, found
        else:
            yield from conversations.rows(where, found, data.turns)


def root(data: TaskDataConfig) -> Path | None:
    """Return the folder that image paths start at and stay in; None where pictures come as bytes
    alone."""
    if data.image_root:
        return Path(data.image_root)
    given = data.path or data.id
    if given is None:
        return None
    # A Hub data set that is named by its folder on this machine may have paths in it.
    if Path(given).is_dir():
        return Path(given)
    if data.source == "hub":
        return None
    return Path(given).parent


def dataset_name(data: TaskDataConfig) -> str:
    """Return what to call the source in rows: no path of this machine."""
    if data.source == "synthetic":
        return f"synthetic/{_synthetic_settings(data).kind}"
    return data.id or base_of(data).name


def column(columns: dict, name: str, data: TaskDataConfig) -> object:
    """Return the value of a column under the name that templates use; None where there is none, or
    what tables have instead.

    data.fields may rename it, with dots into what the column holds (see value_at).
    """
    value = value_at(columns, data.fields.get(name, name))
    return None if is_missing(value) else value


def _record(
    where: str,
    number: int,
    found: dict | SkippedRow,
    split: str | None,
    data: TaskDataConfig,
) -> Record:
    if isinstance(found, SkippedRow):
        return Record(where, number, split=split, skipped=found)
    own = _own_split(found, data)
    if split is None and own is not None:
        split = split_named(str(own))
        if split is None:
            known = ", ".join(SPLIT_NAMES)
            detail = (
                f"{own!r} is none of {known}; map dataset.fields.split to another column, or to "
                "none that exists"
            )
            return Record(where, number, skipped=SkippedRow("unknown split", detail))
    try:
        return Record(where, number, found, tuple(_images(found, data)), split)
    except ValueError as error:
        skipped = SkippedRow("no picture", str(error))
        return Record(where, number, split=split, skipped=skipped)


def _own_split(found: dict | SkippedRow, data: TaskDataConfig) -> object:
    if isinstance(found, SkippedRow):
        return None
    return column(found, "split", data)


def _images(columns: dict, data: TaskDataConfig) -> Iterator[ImageSource]:
    """Yield the pictures of a row. Raises ValueError where there should be one and is none."""
    if data.pictures == "none":
        return
    found: dict[str, list] = {}
    for name in _image_columns(columns, data):
        value = structured(value_at(columns, name))
        if value not in (None, "", [], ()):
            found[name] = list(value) if isinstance(value, list | tuple) else [value]
    if not found:
        if data.pictures == "some":
            # Who names a column may mean that the others are no pictures of the row.
            is_default = data.image_field == "image"
            other = column_of_pictures(columns) if is_default else None
            if other is None:
                return
            raise ValueError(
                f"none in column {data.image_field!r}, and {other} names one; set "
                "dataset.image_field to it"
            )
        named = picture_named(column(columns, "prompt", data))
        if named is not None:
            raise ValueError(
                f"none in column {data.image_field!r}, and the prompt names one, {named!r}; write "
                f"its path into {data.image_field}"
            )
        raise ValueError(
            f"none in column {data.image_field!r} of {listed(columns)}; set dataset.image_field to "
            "the one that has them; for rows of text alone set dataset.pictures"
        )
    items = _of_one_column(found)
    for number, item in enumerate(items, 1):
        try:
            yield _image(item, data)
        except ValueError as error:
            which = f"picture {number} of {len(items)}: " if len(items) > 1 else ""
            raise ValueError(f"{which}{error}") from None


def _of_one_column(found: dict[str, list]) -> list:
    """Return the pictures of the column that has them. Raises ValueError where several have some,
    and none has all."""
    name, items = next(iter(found.items()))
    for other, others in found.items():
        # The name of a file beside the picture itself says where it was.
        is_same = others == items or other in ("file_name", "file_names")
        if not is_same:
            raise ValueError(
                f"columns {name} and {other} both have pictures; set dataset.image_field to the "
                "one that is meant, or write all into one list"
            )
    return items


def _image_columns(columns: dict, data: TaskDataConfig) -> Iterator[str]:
    yield from image_columns(data.image_field)
    # Folders of images on the Hub may have several, each under a name of its own.
    if data.image_field == "image":
        for name in columns:
            if str(name).endswith(("_file_name", "_file_names")):
                yield name


def _image(value: object, data: TaskDataConfig) -> ImageSource:
    """Return a picture as a row has it: a path, bytes, or decoded. Raises ValueError."""
    if isinstance(value, dict):
        value = _of_object(value)
    if isinstance(value, Image):
        return value
    if isinstance(value, bytes) and value:
        # No picture is text, so this is what some tables have in place of its bytes.
        spelled = bytes_in(value.decode("ascii")) if value.isascii() else None
        return value if spelled is None else spelled
    if not isinstance(value, str) or not value:
        raise ValueError(f"a path or an image was wanted, found {type(value).__name__}")
    spelled = bytes_in(value)
    if spelled is not None:
        return spelled
    value = path_in(value)
    if data.source == "hub" and "://" in value:
        return _fetched(value, data.id)
    if is_address(value):
        raise ValueError(
            f"{value[:_SHOWN]!r} is an address, and pictures are not fetched: download them into "
            "dataset.image_root and have their paths in the rows"
        )
    return value


def _of_object(value: dict) -> object:
    """Return the picture in an object: an image feature of `datasets` that is left undecoded has
    bytes, or a path, or both, and one of a chat has an address that may be the picture itself."""
    for key in _IMAGE_KEYS:
        found = value.get(key)
        if found:
            return _of_object(found) if isinstance(found, dict) else found
    shown = listed(value)
    raise ValueError(f"an object with {shown} has no bytes and no path")


def _fetched(url: str, name: str | None) -> bytes:
    """Return a picture's bytes from its own data set on the Hub, packed or not. Raises ValueError
    for any other place and for a file that is not there, DataError for a Hub out of reach."""
    home = f"hf://datasets/{name}"
    # A row could name any address that this machine reaches, so only the data set's own counts.
    # Of a packed one (zip://a.png::hf://...) the last part says where the archive lies.
    place = url.rpartition("::")[2]
    if not place.startswith((f"{home}@", f"{home}/")):
        raise ValueError(
            f"{url[:_SHOWN]!r} is not in the data set {name}, and pictures from elsewhere are not "
            "fetched"
        )
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            return file.read(images.MAX_FILE_BYTES)
    except FileNotFoundError:
        raise ValueError(f"{url[:_SHOWN]!r} is not there") from None
    except Exception as error:  # the hub client and the network raise what they like
        raise DataError(
            f"the picture {url[:_SHOWN]!r} cannot be fetched: {type(error).__name__}: {error}"
        ) from error


def _synthetic(_name: str, data: TaskDataConfig) -> Iterator[Stream]:
    wanted = _synthetic_settings(data)
    for split in SPLITS:
        counts = {split: getattr(wanted, split)}
        rows = synthetic.rows(wanted.kind, wanted.seed, counts, wanted.size_px)
        yield split, ((row["id"], row) for row in rows)


def _synthetic_settings(data: TaskDataConfig) -> SyntheticConfig:
    if data.synthetic is None:
        raise DataError(f"the source {data.source} has no settings of synthetic pictures")
    return data.synthetic


_STREAMS: dict[str, Callable[[str, TaskDataConfig], Iterator[Stream]]] = {
    "jsonl": task_files.streams,
    "folder": image_folders.streams,
    "hub": task_hub.streams,
    "synthetic": _synthetic,
}
