"""Task rows from a folder of images: what stands beside each of them, or a table in it."""

import os
from collections.abc import Iterator
from glob import escape
from pathlib import Path

from ...config.task_data import TaskDataConfig
from ...errors import DataError
from ...store.looking import folders_below
from ..images.formats import SUFFIXES, UNREAD_SUFFIXES
from . import AS_UTF8, SkippedRow, sidecars, task_files
from .columns import split_named
from .json_rows import json_row
from .task_streams import (
    IMAGE_COLUMNS,
    Found,
    Stream,
    base_of,
    given_splits,
    setting,
)

SIDECARS = (".json", ".txt")

# What a Mac packs beside the files themselves, under the same names.
_OF_A_MAC = "__MACOSX"


def streams(name: str, data: TaskDataConfig) -> Iterator[Stream]:
    """Yield the splits of a folder of images. Raises DataError for one that is not there."""
    base = base_of(data)
    if not base.is_dir():
        raise DataError(f"{setting(name)}.path: {base} is not a folder of images")
    given = given_splits(data)
    # A folder with a table in it is read by the table: what lies beside the images is not asked.
    if not given and any(map(task_files.is_table, base.iterdir())):
        for split, rows in task_files.streams(name, data):
            yield split, map(_with_split_of_folder, rows)
        return
    if not given:
        given = _folders_by_split(name, base)
    if not given:
        yield None, _folder_rows(name, data, base, base)
    for split, folder_name in given.items():
        folder = base / folder_name
        if not folder.is_dir():
            raise DataError(f"{setting(name)}.{split}: {folder} is not a folder of images")
        yield split, _folder_rows(name, data, base, folder)


def look(name: str, data: TaskDataConfig) -> None:
    """Raise DataError for a folder that is not there or has no image; none is opened."""
    for _ in streams(name, data):
        continue
    # One is enough: there may be a million
    base = base_of(data)
    places = [base]
    if data.image_root:
        places.append(Path(data.image_root))
    for place in places:
        for file in files(place):
            if file.suffix.lower() in SUFFIXES or task_files.is_table(file):
                return
    raise DataError(f"{setting(name)}.path: {base} has no images; correct path")


def _folders_by_split(name: str, base: Path) -> dict[str, str]:
    """Return the folders that are named for a split. Raises DataError for two of the same."""
    found: dict[str, str] = {}
    for folder in sorted(base.iterdir()):
        split = split_named(folder.name)
        if split is None or not folder.is_dir():
            continue
        if split in found:
            raise DataError(
                f"{setting(name)}: {found[split]} and {folder.name} in {base} both stand for "
                f"{split}; name the one that is meant under {split}, and the other splits' too"
            )
        found[split] = folder.name
    return found


def _folder_rows(name: str, data: TaskDataConfig, base: Path, folder: Path) -> Iterator[Found]:
    """Yield the rows of a split's folder: from the tables in it, from what stands beside each
    image, or else from the names of the folders that images are in."""
    start = Path(data.image_root or base)
    tables = list(filter(task_files.is_table, files(folder)))
    for table in tables:
        yield from task_files.rows_of(setting(name), data, table, base)
    if not tables:
        yield from _sidecars(base, folder, start, _is_annotated(folder))


def is_hidden(name: str) -> bool:
    """Tell whether a path below a folder of images is of what programs keep there for themselves:
    .ipynb_checkpoints/cat.jpg would be one more class, ._cat.jpg no picture."""
    return any(part.startswith(".") or part == _OF_A_MAC for part in name.split("/"))


def is_unread(name: str) -> bool:
    """Tell whether a file is called as one that shows something and is of no format read here."""
    return name.lower().endswith(UNREAD_SUFFIXES)


def unread(path: Path) -> SkippedRow:
    """Return why such a file gives no row."""
    detail = f"pictures of the kind {path.suffix} are not read; save it as PNG or JPEG"
    return SkippedRow("unread format", detail)


def _folders(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield a folder and every one below it with the names of its files, in the same order on
    every file system."""
    for inner, names in folders_below(folder):
        shown = [name for name in names if not is_hidden(f"{inner}/{name}".strip("/"))]
        yield folder / inner, shown


def files(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder of images but hidden ones, in the same order on every file
    system."""
    for place, names in _folders(folder):
        for name in names:
            yield place / name


def _is_annotated(folder: Path) -> bool:
    """Tell whether any image below a folder has a text or an object of its own: one that is called
    otherwise, a README.txt, says nothing of any."""
    elsewhere: set[str] = set()
    for _, names in _folders(folder):
        beside = _stems(names, SIDECARS)
        if not beside.isdisjoint(_stems(names, SUFFIXES)):
            return True
        elsewhere |= beside
    # In a folder of their own they are not found, which whoever has them has to be told.
    return any(not elsewhere.isdisjoint(_stems(names, SUFFIXES)) for _, names in _folders(folder))


def _stems(names: list[str], suffixes: tuple[str, ...]) -> set[str]:
    return {Path(name).stem for name in names if name.lower().endswith(suffixes)}


def _with_split_of_folder(found: Found) -> Found:
    """Return a row whose picture lies in a folder that is named for a split as one of that split,
    if it says nothing of its own."""
    where, row = found
    if isinstance(row, SkippedRow) or "split" in row:
        return found
    for column in IMAGE_COLUMNS:
        path = row.get(column)
        if isinstance(path, str) and "/" in path:
            split = split_named(path.removeprefix("./").partition("/")[0])
            if split is not None:
                return where, row | {"split": split}
    return found


def _sidecars(base: Path, folder: Path, start: Path, annotated: bool) -> Iterator[Found]:
    """Yield one row per image: with what stands beside it, x.json (columns) or x.txt (an answer),
    or where no image has that, with the name of its folder as its label."""
    for place, names in _folders(folder):
        pictures = _stems(names, SUFFIXES)
        for name in names:
            path = place / name
            where = path.relative_to(base).as_posix()
            if name.lower().endswith(SUFFIXES):
                row = {"id": where, "image": os.path.relpath(path, start)}
                if annotated or place == folder:
                    yield where, _annotated(path, row)
                else:
                    yield where, row | {"label": path.relative_to(folder).parts[0]}
            elif path.stem not in pictures and is_unread(name):
                # Beside a picture of its name it is what that was made from.
                yield where, unread(path)


def _annotated(path: Path, row: dict) -> dict | SkippedRow:
    for suffix in (*SIDECARS, *map(str.upper, SIDECARS)):
        beside = path.with_suffix(suffix)
        try:
            # A pipe of that name would block
            if not beside.is_file():
                continue
            content = beside.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            return SkippedRow("unreadable annotation", f"{beside.name}: {error}")
        if suffix.lower() == ".json":
            found = json_row(content)
            if isinstance(found, SkippedRow):
                return found
            # An id of its own counts, a picture of its own does not: it stands beside this one.
            return {**row, **found, "image": row["image"]}
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            detail = f"{beside.name}: byte {error.start}: {error.reason}; {AS_UTF8}"
            return SkippedRow("not UTF-8", detail)
        given = sidecars.columns(beside.name, text)
        return given if isinstance(given, SkippedRow) else row | given
    detail = f"nothing beside it is named {path.stem}{f' or {path.stem}'.join(SIDECARS)}"
    others = (file.name for file in sorted(path.parent.glob(f"{escape(path.stem)}.*")))
    other = next((name for name in others if name != path.name), None)
    if other is not None:
        detail += f"; {other} is not read, write what it says as columns into {path.stem}.json"
    return SkippedRow("no annotation", detail)
