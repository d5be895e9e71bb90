"""Records of one task from its source: JSON lines, a folder of images, the Hub, or synthetic.

A new source is a generator here, a row of _STREAMS, and its word in config/task_data.py.

Invariant: records come in a fixed order, one at a time, with pictures still as they were found
(path, bytes, decoded); a record that cannot be read is skipped with a reason and never stops the
stream, a source that cannot be read is a DataError.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL.Image import Image

from ...config.task_data import SyntheticConfig, TaskDataConfig
from ...errors import DataError
from ..images import images
from ..images.images import ImageSource
from ..text.documents import SPLITS
from . import SkippedRow, synthetic

SIDECARS = (".json", ".txt")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
TABLES = ("annotations.jsonl", "metadata.jsonl")
IMAGE_COLUMNS = ("image", "images", "file_name")

# What files, folders and columns call a split.
_SPLIT_NAMES = {
    "train": "train",
    "valid": "valid",
    "test": "test",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
}

# Where a row was found, for messages, and its columns or why it has none.
Found = tuple[str, dict | SkippedRow]

# The rows of one split, or of a source that has to be divided (None).
Stream = tuple[str | None, Iterator[Found]]


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
        for where, found in rows:
            record = _record(where, number, found, split, data)
            if data.limit and taken[record.split] >= data.limit:
                # Rows that name their own split may still have one that is not full.
                if split or not _own_split(found, data):
                    break
                continue
            taken[record.split] += 1
            number += 1
            yield record


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
    return data.id or _base(data).name


def column(columns: dict, name: str, data: TaskDataConfig) -> object:
    """Return the value of a column under the name that templates use; None where there is none.

    data.fields may rename it, with dots into nested columns.
    """
    wanted = data.fields.get(name, name)
    # A column that has a dot in its name comes first.
    if wanted in columns:
        return columns[wanted]
    value: object = columns
    for part in wanted.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(part)
    return value


def split_named(name: str) -> str | None:
    """Return the split that a name stands for, None when it is no split's."""
    return _SPLIT_NAMES.get(name.lower())


def image_columns(setting: str) -> tuple[str, ...]:
    """Return the columns that may hold a row's pictures: the one that is set, and for the default
    its other names."""
    if setting == "image":
        return (setting, *IMAGE_COLUMNS)
    return (setting,)


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
            known = ", ".join(_SPLIT_NAMES)
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
    value = None
    for name in image_columns(data.image_field):
        if columns.get(name) not in (None, "", [], ()):
            value = columns[name]
            break
    if value is None:
        if data.pictures == "some":
            return
        known = ", ".join(map(str, columns))
        raise ValueError(
            f"none in column {data.image_field!r} of {known}; for rows of text alone set "
            "dataset.pictures"
        )
    listed = value if isinstance(value, list | tuple) else [value]
    for each in listed:
        yield _image(each, data)


def _image(value: object, data: TaskDataConfig) -> ImageSource:
    # An image feature of datasets that is left undecoded has bytes, or a path, or both.
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and data.source == "hub" and "://" in value:
        return _fetched(value, data.id)
    if isinstance(value, str | bytes) and value:
        return value
    if isinstance(value, Image):
        return value
    raise ValueError(f"a path or an image was wanted, found {type(value).__name__}")


def _fetched(url: str, name: str | None) -> bytes:
    """Return a picture's bytes from its own data set on the Hub, packed or not; ValueError for any
    other place."""
    home = f"hf://datasets/{name}"
    # A row could name any address that this machine reaches, so only the data set's own counts.
    # Of a packed one (zip://a.png::hf://...) the last part says where the archive lies.
    place = url.rpartition("::")[2]
    if not place.startswith((f"{home}@", f"{home}/")):
        raise ValueError(f"{url!r} is not in the data set {name}")
    import fsspec

    with fsspec.open(url, "rb") as file:
        return file.read(images.MAX_FILE_BYTES)


def _jsonl(name: str, data: TaskDataConfig) -> Iterator[Stream]:
    base = _base(data)
    given = _given(data)
    if not given and not data.split:
        given = _files_by_split(base)
    if given and not base.is_dir():
        raise DataError(
            f"{_setting(name)}.path: {base} must be the folder of {', '.join(given.values())}"
        )
    files: dict[str | None, Path] = {}
    for split, file_name in given.items():
        files[split] = base / file_name
    if not files:
        files[None] = _table(name, data, base)
    for wanted, file in files.items():
        if not file.is_file():
            raise DataError(
                f"{_setting(name)}: {file} does not exist; correct path, or the name under {wanted}"
            )
        yield wanted, _lines(name, file)


def _base(data: TaskDataConfig) -> Path:
    """Return where a source's files are."""
    if data.path is None:
        raise DataError(f"the source {data.source} has no path")
    return Path(data.path)


def _given(data: TaskDataConfig) -> dict[str, str]:
    """Return the files or Hub splits that are named, by split."""
    return {split: getattr(data, split) for split in SPLITS if getattr(data, split)}


def _files_by_split(base: Path) -> dict[str, str]:
    """Return the files of a folder by the split that they are named for; nothing when one file is
    all there is, or one of several is named otherwise."""
    if not base.is_dir():
        return {}
    names = [file.name for file in sorted(base.glob("*.jsonl"))]
    by_split = {}
    for name in names:
        split = split_named(Path(name).stem)
        if split is not None:
            by_split[split] = name
    # Fewer splits than files: two are of one split (val and dev), or one is of none.
    if len(names) > 1 and len(by_split) == len(names):
        return by_split
    return {}


def _table(name: str, data: TaskDataConfig, base: Path) -> Path:
    """Return the one file of a source whose splits have no files of their own."""
    if not base.is_dir():
        return base
    if data.split:
        return base / data.split
    found = sorted(base.glob("*.jsonl"))
    known = [file for file in found if file.name in TABLES] or found
    if len(known) != 1:
        listed = ", ".join(file.name for file in found) or "none"
        raise DataError(
            f"{_setting(name)}: {base} should hold one .jsonl file, found {listed}; name the files "
            "under train, valid and test, or give the path of one"
        )
    return known[0]


def _lines(name: str, file: Path) -> Iterator[Found]:
    try:
        # As bytes: one line that is not UTF-8 is skipped, where a text file would end there.
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{file.name}:{number}", _parsed(line)
    except OSError as error:
        raise DataError(f"{_setting(name)}: {file} cannot be read: {error}") from None


def _parsed(line: bytes) -> dict | SkippedRow:
    try:
        # The first line of a file from Windows often begins with a byte order mark.
        found = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return SkippedRow("not UTF-8", f"byte {error.start}: {error.reason}")
    # RecursionError: a line of a thousand brackets is no row, and no reason to end either.
    except (ValueError, RecursionError) as error:
        return SkippedRow("not JSON", str(error))
    if not isinstance(found, dict):
        return SkippedRow("not JSON", f"an object was wanted, found {type(found).__name__}")
    return found


def _folder(name: str, data: TaskDataConfig) -> Iterator[Stream]:
    base = _base(data)
    if not base.is_dir():
        raise DataError(f"{_setting(name)}.path: {base} is not a folder of images")
    given = _given(data)
    # A folder with a table in it is read by the table: what lies beside the images is not asked.
    if not given and any((base / table).is_file() for table in TABLES):
        yield from _jsonl(name, data)
        return
    if not given:
        for folder_name, split in _SPLIT_NAMES.items():
            if (base / folder_name).is_dir():
                given[split] = folder_name
    start = Path(data.image_root or base)
    if not given:
        yield None, _sidecars(base, base, start)
    for split, folder_name in given.items():
        folder = base / folder_name
        if not folder.is_dir():
            raise DataError(f"{_setting(name)}.{split}: {folder} is not a folder of images")
        yield split, _sidecars(base, folder, start)


def _sidecars(base: Path, folder: Path, start: Path) -> Iterator[Found]:
    """Yield one row per image with what stands beside it: x.json (columns) or x.txt (an answer)."""
    for place, folders, files in os.walk(folder):
        # Sorted in place, so that os.walk goes on in this order, the same on every file system.
        folders.sort()
        for file in sorted(files):
            if not file.lower().endswith(SUFFIXES):
                continue
            path = Path(place, file)
            where = path.relative_to(base).as_posix()
            row = {"id": where, "image": os.path.relpath(path, start)}
            yield where, _annotated(path, row)


def _annotated(path: Path, row: dict) -> dict | SkippedRow:
    for suffix in SIDECARS:
        beside = path.with_suffix(suffix)
        try:
            content = beside.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            return SkippedRow("unreadable annotation", f"{beside.name}: {error}")
        if suffix == ".json":
            found = _parsed(content)
            if isinstance(found, SkippedRow):
                return found
            # An id of its own counts, a picture of its own does not: it stands beside this one.
            return {**row, **found, "image": row["image"]}
        try:
            return {**row, "answer": content.decode("utf-8-sig")}
        except UnicodeDecodeError as error:
            detail = f"{beside.name}: byte {error.start}: {error.reason}"
            return SkippedRow("not UTF-8", detail)
    return SkippedRow("no annotation", f"nothing beside it ends in {' or '.join(SIDECARS)}")


def _hub(name: str, data: TaskDataConfig) -> Iterator[Stream]:
    given = _given(data)
    if not given:
        yield None, _streamed(name, data, data.split or "train")
    for split, wanted in given.items():
        yield split, _streamed(name, data, wanted)


def _streamed(name: str, data: TaskDataConfig, wanted: str) -> Iterator[Found]:
    from datasets import load_dataset

    what = f"{data.id}[{wanted}]"
    try:
        found = load_dataset(
            data.id, data.subset, split=wanted, revision=data.revision, streaming=True
        )
        found, labels = _undecoded(found)
        for number, row in enumerate(found):
            named = {key: name_of(row[key]) for key, name_of in labels.items()}
            yield f"{what} row {number}", row | named
    # datasets, the hub client and the network raise what they like.
    except Exception as error:
        raise DataError(
            f"{_setting(name)}: {what} at revision {data.revision} cannot be streamed: "
            f"{type(error).__name__}: {error}. Check id, subset, split and revision, and that "
            "this machine reaches the Hub (HF_TOKEN for private data); the sources jsonl and "
            "folder work without a network"
        ) from error


def _undecoded(found: Any) -> tuple[Any, dict[str, Callable[[object], object]]]:
    """Return a dataset that leaves pictures as bytes, for our own checks, and how to name its class
    labels."""
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    # A stream whose features nobody knows before the first row has None.
    features = found.features or {}
    labels: dict[str, Callable[[object], object]] = {}
    for key, feature in features.items():
        if isinstance(feature, ImageFeature):
            found = found.cast_column(key, ImageFeature(decode=False))
        elif isinstance(feature, ClassLabel):
            labels[key] = partial(_label, feature)
    return found, labels


def _label(feature: Any, value: object) -> object:
    # Test splits of the Hub often have -1 for labels that are kept secret.
    if isinstance(value, int) and value >= 0:
        return feature.int2str(value)
    return None


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


def _setting(name: str) -> str:
    return f"loras.experts.{name}.dataset"


_STREAMS: dict[str, Callable[[str, TaskDataConfig], Iterator[Stream]]] = {
    "jsonl": _jsonl,
    "folder": _folder,
    "hub": _hub,
    "synthetic": _synthetic,
}
