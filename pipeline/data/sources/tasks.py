"""Records of one vision task from its source: JSON lines, a folder of images, the Hub, or
synthetic.

Invariant: records come in a fixed order, one at a time, with pictures still as they were found
(path, bytes, decoded); a record that cannot be read is a Bad and never stops the stream, a source
that cannot be read is a DataError.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...config.task_data import TaskDataConfig
from ...errors import DataError
from ..images import images as pictures
from ..images.images import ImageSource
from ..text.documents import SPLITS
from . import SkippedRow, synthetic

SIDECARS = (".json", ".txt")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
TABLES = ("annotations.jsonl", "metadata.jsonl")
IMAGE_COLUMNS = ("image", "images", "file_name")
_NAMES = {
    "train": "train",
    "valid": "valid",
    "test": "test",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
}


@dataclass(frozen=True)
class Record:
    """One row of a source, before anything is checked."""

    where: str  # for messages
    number: int  # in the stream, from 0
    found: dict | SkippedRow  # its columns
    images: tuple[ImageSource, ...] = ()
    split: str | None = None  # train, valid, test; None: to be divided


def records(name: str, data: TaskDataConfig) -> Iterator[Record]:
    """Yield the records of a task, at most data.limit of each split. Raises DataError for the
    source as a whole."""
    number, taken = 0, Counter()
    for split, stream in _STREAMS[data.source](name, data):
        for where, found in stream:
            record = _record(where, number, found, split, data)
            if data.limit and taken[record.split] >= data.limit:
                if split or not _own_split(found, data):
                    break  # all that follow are of the same split
                continue
            taken[record.split] += 1
            number += 1
            yield record


def root(data: TaskDataConfig) -> Path | None:
    """Return the folder that image paths start at and stay in; None where pictures come as bytes
    alone."""
    if data.image_root:
        return Path(data.image_root)
    given = data.path or data.id  # a data set named by its folder may have paths in it
    if given is None or (data.source == "hub" and not Path(given).is_dir()):
        return None
    return Path(given) if Path(given).is_dir() else Path(given).parent


def dataset_name(data: TaskDataConfig) -> str:
    """Return what to call the source in rows: no path of this machine."""
    if data.source == "synthetic":
        return f"synthetic/{data.synthetic.kind}"
    return data.id or Path(data.path).name


def column(found: dict, name: str, data: TaskDataConfig) -> object:
    """Return the value of a column under the name that templates use; None where there is none.

    data.fields may rename it, with dots into nested columns.
    """
    wanted = data.fields.get(name, name)
    if wanted in found:
        return found[wanted]
    value: object = found
    for part in wanted.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _record(
    where: str, number: int, found: dict | SkippedRow, split: str | None, data: TaskDataConfig
) -> Record:
    if isinstance(found, SkippedRow):
        return Record(where, number, found, (), split)
    own = _own_split(found, data)
    if split is None and own is not None:
        split = _NAMES.get(str(own).lower())
        if split is None:
            known = ", ".join(_NAMES)
            detail = f"{own!r} is none of {known}; map dataset.fields.split to another column, or to none that exists"
            return Record(where, number, SkippedRow("unknown split", detail))
    try:
        return Record(where, number, found, tuple(_images(found, data)), split)
    except ValueError as error:
        return Record(where, number, SkippedRow("no picture", str(error)), (), split)


def _own_split(found: dict | SkippedRow, data: TaskDataConfig) -> object:
    return None if isinstance(found, SkippedRow) else column(found, "split", data)


def image_columns(field: str) -> tuple[str, ...]:
    """Return the columns that may hold a row's pictures: the one that is set, and for the default
    its other names."""
    return (field, *(IMAGE_COLUMNS if field == "image" else ()))


def _images(found: dict, data: TaskDataConfig) -> Iterator[ImageSource]:
    if data.pictures == "none":
        return
    names = image_columns(data.image_field)
    value = next((found[name] for name in names if found.get(name) not in (None, "", [], ())), None)
    listed = value if isinstance(value, list | tuple) else [value]
    if value is None:
        if data.pictures == "some":
            return
        known = ", ".join(map(str, found))
        raise ValueError(
            f"none in column {data.image_field!r} of {known}; for rows of text alone set dataset.pictures"
        )
    yield from (_image(each, data) for each in listed)


def _image(value: object, data: TaskDataConfig) -> ImageSource:
    if isinstance(value, dict):  # an undecoded image feature
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and data.source == "hub" and "://" in value:
        return _fetched(value, data.id)
    if isinstance(value, str | bytes) and value:
        return value
    if hasattr(value, "tobytes") and hasattr(
        value, "getbands"
    ):  # a decoded one, or a synthetic one
        return value
    raise ValueError(f"a path or an image was wanted, found {type(value).__name__}")


def _fetched(url: str, name: str) -> bytes:
    """Return a picture's bytes from its own data set on the Hub, packed or not; ValueError for any
    other place."""
    home = f"hf://datasets/{name}"
    if not url.rpartition("::")[2].startswith((f"{home}@", f"{home}/")):
        raise ValueError(f"{url!r} is not in the data set {name}")
    import fsspec

    with fsspec.open(url, "rb") as file:
        return file.read(pictures.MAX_FILE_BYTES)


Stream = Iterator[tuple[str, dict | SkippedRow]]


def _jsonl(name: str, data: TaskDataConfig) -> Iterator[tuple[str | None, Stream]]:
    base = Path(data.path)
    given = _given(data) or ({} if data.split else _named(base))
    if given and not base.is_dir():
        raise DataError(
            f"{_setting(name)}.path: {base} must be the folder of {', '.join(given.values())}"
        )
    files = {split: base / file for split, file in given.items()} or {
        None: _table(name, data, base)
    }
    for split, file in files.items():
        if not file.is_file():
            raise DataError(
                f"{_setting(name)}: {file} does not exist; correct path, or the name under {split}"
            )
        yield split, _lines(name, file)


def _given(data: TaskDataConfig) -> dict[str, str]:
    """Return the files or Hub splits that are named, by split."""
    return {split: getattr(data, split) for split in SPLITS if getattr(data, split)}


def _named(base: Path) -> dict[str, str]:
    """Return the files of a folder by the split that they are named for; nothing when one file is
    all there is."""
    files = [file.name for file in sorted(base.glob("*.jsonl"))] if base.is_dir() else []
    named = {_NAMES[stem]: name for name in files if (stem := Path(name).stem.lower()) in _NAMES}
    return named if len(files) > 1 and len(named) == len(files) else {}


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
            f"{_setting(name)}: {base} should hold one .jsonl file, found {listed}; name the files under train, "
            "valid and test, or give the path of one"
        )
    return known[0]


def _lines(name: str, file: Path) -> Stream:
    try:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{file.name}:{number}", _parsed(line)
    except OSError as error:
        raise DataError(f"{_setting(name)}: {file} cannot be read: {error}") from None


def _parsed(line: bytes) -> dict | SkippedRow:
    try:
        found = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return SkippedRow("not UTF-8", f"byte {error.start}: {error.reason}")
    except (ValueError, RecursionError) as error:
        return SkippedRow("not JSON", str(error))
    return (
        found
        if isinstance(found, dict)
        else SkippedRow("not JSON", f"an object was wanted, found {type(found).__name__}")
    )


def _folder(name: str, data: TaskDataConfig) -> Iterator[tuple[str | None, Stream]]:
    base = Path(data.path)
    if not base.is_dir():
        raise DataError(f"{_setting(name)}.path: {base} is not a folder of images")
    if any((base / table).is_file() for table in TABLES) and not _given(data):
        yield from _jsonl(name, data)
        return
    given = _given(data) or {
        split: folder for folder, split in _NAMES.items() if (base / folder).is_dir()
    }
    for split, folder in given.items() or [(None, ".")]:
        if not (base / folder).is_dir():
            raise DataError(f"{_setting(name)}.{split}: {base / folder} is not a folder of images")
        yield split, _sidecars(base, base / folder, Path(data.image_root or base))


def _sidecars(base: Path, folder: Path, start: Path) -> Stream:
    """Yield one row per image with what stands beside it: x.json (columns) or x.txt (the answer)."""
    for place, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(file for file in files if file.lower().endswith(SUFFIXES)):
            path = Path(place, file)
            where = path.relative_to(base).as_posix()
            yield where, _annotated(path, {"id": where, "image": os.path.relpath(path, start)})


def _annotated(path: Path, row: dict) -> dict | SkippedRow:
    for beside in (path.with_suffix(suffix) for suffix in SIDECARS):
        try:
            content = beside.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            return SkippedRow("unreadable annotation", f"{beside.name}: {error}")
        if beside.suffix == ".json":
            found = _parsed(content)
            return (
                found if isinstance(found, SkippedRow) else {**row, **found, "image": row["image"]}
            )
        try:
            return {**row, "answer": content.decode("utf-8-sig")}
        except UnicodeDecodeError as error:
            return SkippedRow("not UTF-8", f"{beside.name}: byte {error.start}: {error.reason}")
    return SkippedRow("no annotation", f"nothing beside it ends in {' or '.join(SIDECARS)}")


def _hub(name: str, data: TaskDataConfig) -> Iterator[tuple[str | None, Stream]]:
    for split, wanted in (_given(data) or {None: data.split or "train"}).items():
        yield split, _streamed(name, data, wanted)


def _streamed(name: str, data: TaskDataConfig, wanted: str) -> Stream:
    from datasets import load_dataset

    what = f"{data.id}[{wanted}]"
    try:
        found = load_dataset(
            data.id, data.subset, split=wanted, revision=data.revision, streaming=True
        )
        found, labels = _undecoded(found)
        for number, row in enumerate(found):
            yield (
                f"{what} row {number}",
                row | {key: names(row[key]) for key, names in labels.items()},
            )
    except Exception as error:  # datasets, the hub client and the network raise what they like
        raise DataError(
            f"{_setting(name)}: {what} at revision {data.revision} cannot be streamed: {type(error).__name__}: "
            f"{error}. Check id, subset, split and revision, and that this machine reaches the Hub (HF_TOKEN for "
            "private data); the sources jsonl and folder work without a network"
        ) from error


def _undecoded(found) -> tuple[object, dict]:
    """Return a dataset that leaves pictures as bytes, for our own checks, and how to name its class
    labels."""
    from datasets import ClassLabel, Image

    features = found.features or {}
    for key in [key for key, feature in features.items() if isinstance(feature, Image)]:
        found = found.cast_column(key, Image(decode=False))
    labels = {
        key: partial(_label, feature)
        for key, feature in features.items()
        if isinstance(feature, ClassLabel)
    }
    return found, labels


def _label(feature, value: object) -> object:
    return feature.int2str(value) if isinstance(value, int) and value >= 0 else None


def _synthetic(_name: str, data: TaskDataConfig) -> Iterator[tuple[str | None, Stream]]:
    wanted = data.synthetic
    for split in SPLITS:
        rows = synthetic.rows(
            wanted.kind, wanted.seed, {split: getattr(wanted, split)}, wanted.size_px
        )
        yield split, ((row["id"], row) for row in rows)


def _setting(name: str) -> str:
    return f"loras.experts.{name}.dataset"


_STREAMS = {"jsonl": _jsonl, "folder": _folder, "hub": _hub, "synthetic": _synthetic}
