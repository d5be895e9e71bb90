"""What the rows of a task are read from, as it is now: their files, and the pictures that they
name."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ...config.base import is_folder
from ...config.task_data import TaskDataConfig
from ...errors import DataError, DiskFull
from ...protocols import Eye, Looked, Seen
from ...store.artifacts import write_text
from ...store.reading import sealed, unsealed
from ..images.formats import SUFFIXES
from . import image_folders, task_files, tasks
from .task_streams import base_of, setting

OUTSIDE = "outside its root"
TOLD_EVERY_ROWS = 10_000
# Settings that say where rows lie and not what they are
PLACES = frozenset({"path", "image_root"})
# By what they were read from, for as long as this process lives
_named: dict[str, list[str]] = {}


def seen(name: str, data: TaskDataConfig, eye: Eye) -> Iterator[Seen]:
    """Yield the files with a task's rows and the pictures that they name, by their paths from what
    the settings name on; of a data set on the Hub the settings have the revision.

    Of pictures that nothing names nothing is read, so that others may lie beside them.
    """
    called = setting(name)
    if data.source == "hub" and data.id and is_folder(data.id):
        yield from eye.below(f"{called}.id", Path(data.id))
        if data.image_root:
            # What its rows name is in its own format, which takes long to read
            yield from eye.below(f"{called}.image_root", Path(data.image_root), _is_picture)
    elif data.source == "jsonl":
        rows = list(_row_files(name, data, eye))
        yield from rows
        yield from _pictures(name, data, rows, set(), eye)
    elif data.source == "folder":
        below = eye.below(f"{called}.path", base_of(data), _is_of_folder)
        rows = [each for each in below if not image_folders.is_hidden(each.name)]
        yield from rows
        if any(task_files.is_table(Path(each.name)) for each in rows):
            # Elsewhere the same names are other files
            known = set() if data.image_root else {each.name for each in rows}
            yield from _pictures(name, data, rows, known, eye)


def _row_files(name: str, data: TaskDataConfig, eye: Eye) -> Iterator[Seen]:
    base = base_of(data)
    try:
        files = task_files.files_of(name, data, base)
    except (DataError, OSError):
        # Whoever reads it is told what is wrong with it
        yield eye.file(f"{setting(name)}.path", base, base.name)
        return
    for file in files.values():
        shown = file.relative_to(base).as_posix() if file.is_relative_to(base) else file.name
        # Of one file that is itself the path nothing is left
        yield eye.file(f"{setting(name)}.path", file, shown if shown != "." else file.name)


def _is_of_folder(name: str) -> bool:
    is_beside = name.lower().endswith(image_folders.SIDECARS)
    is_shown = _is_picture(name) or image_folders.is_unread(name)
    return is_beside or is_shown or task_files.is_table(Path(name))


def _is_picture(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _pictures(
    name: str, data: TaskDataConfig, rows: list[Seen], known: set[str], eye: Eye
) -> Iterator[Seen]:
    """Yield the pictures that a task's rows name, but those that are known."""
    called = f"{setting(name)}.image_root"
    root = tasks.root(data)
    if root is None:
        return
    top = str(root.resolve())
    for picture in _names(name, data, rows, eye):
        if picture in known:
            continue
        if _leads_out(picture, top):
            # Never opened: the row is dropped for it
            yield Seen(called, picture, OUTSIDE)
        else:
            yield eye.file(called, _place(picture, top), picture)


def _leads_out(picture: str, top: str) -> bool:
    """Whether a path in a row leads out of its folder, which is resolved; of one that starts there
    and never goes up, links are followed by whoever reads it."""
    if "\0" in picture:
        return True
    if not picture.startswith("/") and ".." not in picture:
        return False
    # Through links, as whoever reads it goes: the folder may be named by one
    return not os.path.realpath(_place(picture, top)).startswith(f"{top}/")


def _place(picture: str, top: str) -> str:
    """Return where a picture of a row lies; a whole path stands for itself."""
    # As text: of a hundred thousand pictures Path would take seconds
    return picture if picture.startswith("/") else f"{top}/{picture}"


def _names(name: str, data: TaskDataConfig, rows: list[Seen], eye: Eye) -> list[str]:
    """Return the paths of pictures in a task's rows, each once and in order; remembered by what the
    rows are read from, as they may be millions."""
    said = data.model_dump_json(exclude=set(PLACES))
    key = hashlib.sha256(f"{Looked.of(rows).print}{said}".encode()).hexdigest()
    if key not in _named:
        kept = eye.folder / f"pictures-{key}.json" if eye.folder else None
        found = _kept(kept)
        if found is None:
            try:
                found = _read(name, data, eye)
            except (DataError, OSError):
                # Whoever makes rows of it is told; it may be readable the next time
                return []
            _keep(kept, found)
        _named[key] = found
    return _named[key]


def _read(name: str, data: TaskDataConfig, eye: Eye) -> list[str]:
    found: dict[str, None] = {}
    for record in tasks.records(name, data):
        if record.number % TOLD_EVERY_ROWS == 0 and record.number:
            eye.progress(f"looking at {name}: row {record.number:,}", None)
        for image in record.images:
            if isinstance(image, str | Path):
                found[str(image)] = None
    return list(found)


def _kept(file: Path | None) -> list[str] | None:
    with suppress(OSError, ValueError, TypeError, AttributeError):
        return list(unsealed(file.read_bytes())["names"]) if file else None
    return None


def _keep(file: Path | None, names: list[str]) -> None:
    with suppress(OSError, DiskFull):
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, sealed({"names": names}))
