"""Task rows from files on this machine: which files are which split, and one row after another."""

import json
from collections.abc import Iterator
from pathlib import Path

from ...config.task_data import TaskDataConfig
from ...errors import DataError
from . import SkippedRow
from .task_streams import Found, Stream, base_of, given_splits, setting, split_named

TABLES = ("annotations.jsonl", "metadata.jsonl")


def streams(name: str, data: TaskDataConfig) -> Iterator[Stream]:
    """Yield the splits of a source of files. Raises DataError for a file that is not there."""
    base = base_of(data)
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
            raise DataError(
                f"{setting(name)}: {file} does not exist; correct path, or the name under {wanted}"
            )
        yield wanted, _lines(name, file)


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
            f"{setting(name)}: {base} should hold one .jsonl file, found {listed}; name the files "
            "under train, valid and test, or give the path of one"
        )
    return known[0]


def _lines(name: str, file: Path) -> Iterator[Found]:
    try:
        # As bytes: one line that is not UTF-8 is skipped, where a text file would end there.
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{file.name}:{number}", parsed(line)
    except OSError as error:
        raise DataError(f"{setting(name)}: {file} cannot be read: {error}") from None


def parsed(line: bytes) -> dict | SkippedRow:
    """Return the row of a line of JSON, or why it is none."""
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
