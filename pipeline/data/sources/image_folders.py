"""Task rows from a folder of images: what stands beside each of them, or a table in it."""

import os
from collections.abc import Iterator
from pathlib import Path

from ...config.task_data import TaskDataConfig
from ...errors import DataError
from ..images.formats import SUFFIXES
from . import SkippedRow, task_files
from .task_files import TABLES, parsed
from .task_streams import SPLIT_NAMES, Found, Stream, base_of, given_splits, setting

SIDECARS = (".json", ".txt")


def streams(name: str, data: TaskDataConfig) -> Iterator[Stream]:
    """Yield the splits of a folder of images. Raises DataError for one that is not there."""
    base = base_of(data)
    if not base.is_dir():
        raise DataError(f"{setting(name)}.path: {base} is not a folder of images")
    given = given_splits(data)
    # A folder with a table in it is read by the table: what lies beside the images is not asked.
    if not given and any((base / table).is_file() for table in TABLES):
        yield from task_files.streams(name, data)
        return
    if not given:
        for folder_name, split in SPLIT_NAMES.items():
            if (base / folder_name).is_dir():
                given[split] = folder_name
    start = Path(data.image_root or base)
    if not given:
        yield None, _sidecars(base, base, start)
    for split, folder_name in given.items():
        folder = base / folder_name
        if not folder.is_dir():
            raise DataError(f"{setting(name)}.{split}: {folder} is not a folder of images")
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
            found = parsed(content)
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
