"""Files that belong together: shards of one data set, which is more or less without one of them."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ...errors import DataError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

    Found = tuple[AbstractFileSystem, str]

_STATE = "state.json"  # what `datasets` writes beside the files of a set that it has saved
_COUNTED = re.compile(r"(.*)-(\d{3,6})-of-(\d{3,6})\b(.*)")


def of_saved_sets(files: "Iterable[Found]") -> "Iterator[Found]":
    """Yield the files but those that lie in the folder of a saved set and are none of it, such as
    results that `datasets` keeps there for itself. Raises DataError for a set that lacks a file."""
    known: dict[str, set[str] | None] = {}
    for fs, path in files:
        folder, _, name = path.rpartition("/")
        # Of a bucket it is a request for each folder; only saved sets hold Arrow files
        if folder not in known and name.lower().endswith((".arrow", ".json")):
            known[folder] = _files_of_set(fs, folder)
        of_set = known.get(folder)
        if of_set is None or name in of_set:
            yield fs, path


def _files_of_set(fs: "AbstractFileSystem", folder: str) -> set[str] | None:
    """Return the names of the files of the set that a folder holds; None where it holds none."""
    state = f"{folder}/{_STATE}"
    if not fs.isfile(state):
        return None
    try:
        found = {str(each["filename"]) for each in json.loads(fs.cat_file(state))["_data_files"]}
    except OSError as error:
        raise DataError(f"data.files: {state} cannot be read: {error}") from None
    except (ValueError, TypeError, KeyError):
        return None  # another program's
    missing = [name for name in sorted(found) if not fs.isfile(f"{folder}/{name}")]
    if missing:
        raise DataError(
            f"data.files: {folder} is a saved data set of {len(found)} files, and "
            f"{len(missing)} of them are missing ({missing[0]} is the first). Copy the rest too"
        )
    return found


def missing_shards(names: Iterable[str]) -> dict[str, str]:
    """Return, by the first name of each set of numbered shards (`-00001-of-00004`) that is not
    complete, what to tell of it."""
    sets: dict[tuple[str, str, str], list[str]] = {}
    for name in names:
        found = _COUNTED.fullmatch(name)
        if found:
            start, _, count, end = found.groups()
            sets.setdefault((start, count, end), []).append(name)
    told = {}
    for (_, count, _), shards in sets.items():
        if len(shards) < int(count):
            told[shards[0]] = f"only {len(shards)} of the {int(count)} files that its name counts"
    return told
