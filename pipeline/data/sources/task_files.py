"""Task rows from files on this machine: which files are which split, and one row after another.

A file has one row a line, is an array of them, a table of fields, or an object around an array as
COCO and others write it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...config.task_data import TaskDataConfig
from ...errors import DataError
from . import AS_UTF8, Note, SkippedRow
from .columns import brief, split_named
from .csv_rows import csv_rows
from .file_kinds import is_odd
from .json_rows import json_rows, jsonl_rows
from .packed import SUFFIXES as PACKED
from .task_streams import Found, Stream, base_of, given_splits, image_columns, setting

# Of files with rows, and in a folder the first kind that is there counts: a report in .json lies
# beside rows in .jsonl more often than not.
_KINDS = ((".jsonl", ".ndjson"), (".json",), (".csv", ".tsv"))

# What the source hub reads, also from a folder on this machine.
_OF_HUB = (".parquet", ".arrow", ".tar", ".zip")

# Files that say something of a data set and hold none of its rows.
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")

_COCO_CORNERS = ("x", "y", "width", "height")

_LONGEST_PATH = 1024  # characters; longer text is a picture itself

# Of files in a folder of images that say what they show, without their suffix.
_TABLE_NAMES = ("annotations", "metadata")


def streams(name: str, data: TaskDataConfig) -> Iterator[Stream]:
    """Yield the splits of a source of files. Raises DataError for a file that is not there."""
    base = base_of(data)
    for wanted, file in files_of(name, data, base).items():
        yield wanted, rows_of(setting(name), data, file, base if base.is_dir() else file.parent)


def look(name: str, data: TaskDataConfig) -> None:
    """Raise DataError for a file that is not there, empty, or not read here; none is opened for its
    rows."""
    for file in files_of(name, data, base_of(data)).values():
        _check_kind(setting(name), file, file.name)
        try:
            with file.open("rb") as opened:
                is_empty = not opened.read(1)
        except OSError as error:
            raise DataError(f"{setting(name)}: {file} cannot be read: {error.strerror}") from None
        if is_empty:
            raise DataError(f"{setting(name)}: {file} is empty; correct path, or fetch it again")


def files_of(name: str, data: TaskDataConfig, base: Path) -> dict[str | None, Path]:
    """Return the files of a source by split. Raises DataError for one that is not there."""
    given = given_splits(data)
    if not given and not data.split:
        given = _files_by_split(base)
    if given and not base.is_dir():
        raise DataError(
            f"{setting(name)}.path: {base} must be the folder of {', '.join(given.values())}"
        )
    files: dict[str | None, Path] = {}
    for split, file_name in given.items():
        files[split] = base / file_name
    if not files:
        files[None] = _table(name, data, base)
    for wanted, file in files.items():
        if not file.is_file():
            # A source of one file has no name of its own for a split.
            fix = f"path, or the name under {wanted}" if wanted else "path"
            raise DataError(f"{setting(name)}: {file} does not exist; correct {fix}")
    return files


def is_table(file: Path) -> bool:
    """Tell whether a file in a folder of images has rows about them, by its name."""
    stem, suffix = _parted(file)
    return stem in _TABLE_NAMES and any(suffix in kind for kind in (*_KINDS, _OF_HUB))


def rows_of(named: str, data: TaskDataConfig, file: Path, base: Path) -> Iterator[Found]:
    """Yield the rows of a file below base, where paths of pictures start, too; `named` is what
    errors call the settings.

    Raises DataError for a file that is torn or of a kind that is not read here.
    """
    from fsspec.implementations.local import LocalFileSystem

    if is_odd(str(file)):
        raise DataError(f"{named}: {file} is a pipe or a device and no file; take it away")
    where = file.relative_to(base).as_posix() if file.is_relative_to(base) else file.name
    local = LocalFileSystem()
    path = str(file)
    suffix = _check_kind(named, file, where)
    if suffix in (".csv", ".tsv"):
        wanted = {*image_columns(data.image_field), *data.fields.values(), "prompt", "answer"}
        found = csv_rows(local, path, None, wanted, "\t" if suffix == ".tsv" else None)
    elif suffix == ".json":
        found = _unwrapped(where, data, json_rows(local, path, None))
    else:
        found = jsonl_rows(local, path, None)
    is_below = file.parent != base and file.parent.is_relative_to(base)
    moves = is_table(file) and is_below and not data.image_root
    try:
        for place, row in found:
            if moves and isinstance(row, dict):
                row = _placed(row, file.parent, base, data)
            if isinstance(row, SkippedRow) and row.reason == "not UTF-8":
                row = SkippedRow(row.reason, f"{row.detail}; {AS_UTF8}")
            if not isinstance(row, Note):
                yield place.replace(path, where), row
    except (DataError, OSError) as error:
        # What reads a file says which it is, in the words of documents' settings.
        told = str(error).replace(path, where).removeprefix("data.files: ")
        raise DataError(f"{named}: {told}") from None


def _check_kind(named: str, file: Path, where: str) -> str:
    """Return the suffix of a file that has rows. Raises DataError for one that is not read here."""
    _, suffix = _parted(file)
    if suffix in _OF_HUB:
        raise DataError(
            f"{named}: {where} is read by the source hub; set source to hub, id to its "
            "folder and revision to any word"
        )
    return suffix


def _placed(row: dict, here: Path, base: Path, data: TaskDataConfig) -> dict:
    """Return a row of a table of images, whose paths start at the table's own folder, with paths
    from the source's folder on."""
    placed = dict(row)
    for column in row:
        is_named = str(column).endswith(("file_name", "file_names"))
        if is_named or column in image_columns(data.image_field):
            placed[column] = _path_from(here, base, row[column])
    return placed


def _path_from(here: Path, base: Path, value: object) -> object:
    if isinstance(value, list):
        return [_path_from(here, base, item) for item in value]
    # Of what is there and nowhere else: rows may hold pictures themselves, or paths from base on.
    if not isinstance(value, str) or len(value) > _LONGEST_PATH or not (here / value).is_file():
        return value
    return (here / value).relative_to(base).as_posix()


def _parted(file: Path) -> tuple[str, str]:
    """Return a file's name without its suffix, and the suffix without that of a packed file."""
    name = file.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    stem, dot, suffix = name.rpartition(".")
    return (stem, dot + suffix) if dot else (name, "")


def _row_files(base: Path) -> list[Path]:
    """Return the files with rows in a folder, of the first kind that it has."""
    if not base.is_dir():
        return []
    files = [file for file in sorted(base.iterdir()) if file.is_file()]
    for kind in (*_KINDS, _OF_HUB):
        found = [file for file in files if _parted(file)[1] in kind and file.name not in _ABOUT]
        if found:
            return found
    return []


def _files_by_split(base: Path) -> dict[str, str]:
    """Return the files of a folder by the split that they are named for; nothing when one file is
    all there is, or one of several is named otherwise."""
    files = _row_files(base)
    by_split = {}
    for file in files:
        split = split_named(_parted(file)[0])
        if split is not None:
            by_split[split] = file.name
    # Fewer splits than files: two are of one split (val and dev), or one is of none.
    if len(files) > 1 and len(by_split) == len(files):
        return by_split
    return {}


def _table(name: str, data: TaskDataConfig, base: Path) -> Path:
    """Return the one file of a source whose splits have no files of their own."""
    if not base.is_dir():
        return base
    if data.split:
        return base / data.split
    found = _row_files(base)
    known = [file for file in found if is_table(file)] or found
    if len(known) != 1:
        listed = ", ".join(file.name for file in found[:10]) or "none"
        other = "" if found else "; a folder of pictures is read with source: folder"
        raise DataError(
            f"{setting(name)}: {base} should hold one .jsonl file, found {listed}; name the files "
            f"under train, valid and test, or give the path of one (.jsonl, .json, .csv){other}"
        )
    return known[0]


def _unwrapped(
    where: str, data: TaskDataConfig, found: Iterator[tuple[str, Any]]
) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a .json file; of one that is a single object around lists, its lists'."""
    rows = (item for item in found if not isinstance(item[1], Note))
    first = next(rows, None)
    if first is None:
        return
    second = next(rows, None)
    lists = _lists_of_rows(first[1]) if second is None else {}
    if not lists:
        yield first
        if second is not None:
            yield second
        yield from rows
        return
    if {"images", "annotations"} <= lists.keys():
        yield from _coco_rows(where, lists)
        return
    wanted = data.rows_field
    if wanted is None and len(lists) == 1:
        wanted = next(iter(lists))
    if wanted not in lists:
        raise DataError(
            f"{where} is one object with the lists {', '.join(lists)}; set rows_field to the one "
            "that has the rows"
        )
    for number, row in enumerate(lists[wanted], 1):
        yield f"{where} {wanted} {number}", row


def _lists_of_rows(value: object) -> dict[str, list[dict]]:
    """Return the lists of objects in an object that is more likely around rows than a row: it says
    nothing of a picture or a chat itself."""
    if not isinstance(value, dict) or any(key in value for key in ("image", "file_name")):
        return {}
    lists = {}
    for key, items in value.items():
        if isinstance(items, list) and items and all(isinstance(item, dict) for item in items):
            lists[key] = items
    return lists


def _coco_rows(where: str, lists: dict[str, list[dict]]) -> Iterator[tuple[str, dict | SkippedRow]]:
    """Yield one row for each picture of a COCO file: its columns, and in boxes, captions and label
    what its annotations say; and why annotations of no picture are left out."""
    # As text: where one list has numbers and the other their digits, all would be of nothing.
    names = {str(kind.get("id")): kind.get("name") for kind in lists.get("categories", [])}
    by_image: dict[str, list[dict]] = {}
    for annotation in lists["annotations"]:
        by_image.setdefault(str(annotation.get("image_id")), []).append(annotation)
    for number, image in enumerate(lists["images"], 1):
        boxes = []
        captions = []
        for annotation in by_image.get(str(image.get("id")), []):
            # Outlines alone are boxes that cannot be read, not no boxes.
            if "bbox" in annotation or "segmentation" in annotation:
                label = names.get(str(annotation.get("category_id")))
                about = annotation | {"bbox": _coco_corners(annotation.get("bbox"))}
                boxes.append(about | ({} if label is None else {"label": label}))
            if "caption" in annotation:
                captions.append(annotation["caption"])
        said: dict[str, object] = {"boxes": boxes}
        if captions:
            said |= {"answer": captions[0], "answers": captions}
        yield f"{where} images {number}", image | said
    known = {str(image.get("id")) for image in lists["images"]}
    lost = [name for name in by_image if name not in known]
    if lost:
        count = sum(len(by_image[name]) for name in lost)
        detail = (
            f"{count} of {len(lists['annotations'])} annotations have an image_id that is the id "
            f"of none in images, the first {brief(lost[0])}; take them out, or add the pictures"
        )
        yield f"{where} annotations", SkippedRow("annotations of no picture", detail)


def _coco_corners(bbox: object) -> object:
    """Return COCO's four numbers under names that say what they are, whatever the settings say."""
    if not isinstance(bbox, list) or len(bbox) != len(_COCO_CORNERS):
        return bbox
    return dict(zip(_COCO_CORNERS, bbox, strict=True))
