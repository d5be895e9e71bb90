"""Columns of a row, of a document or of a task: nested ones, what there is in place of one that is
missing, numbers and words that stand for names."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from ...errors import DataError
from ..images.formats import SUFFIXES

# What files, folders and columns call a split
SPLIT_NAMES = {
    "train": "train",
    "valid": "valid",
    "test": "test",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "training": "train",
    "testing": "test",
}
_MOST_NAMES = 12  # of columns in a message
_MOST_CHARACTERS = 40  # of one value in a message: a column may hold whole documents


def is_missing(value: object) -> bool:
    """Whether a value stands for nothing: null, or the NaN that tables have where nothing was."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def is_blank(value: object) -> bool:
    """Whether nothing is said: by a missing value, or an empty text."""
    return is_missing(value) or value == ""


def value_at(columns: dict, wanted: str) -> object:
    """Return a column's value, or what lies in it behind dots; None where there is none.

    Dots lead into objects by name, into lists by number or, for a list of objects, to what each of
    them has there, and into text that is JSON as into what it says.
    """
    # A column that has a dot in its name comes first.
    if wanted in columns:
        return columns[wanted]
    value: object = columns
    for part in wanted.split("."):
        value = _member(structured(value), part)
    return value


def structured(value: object) -> object:
    """Return what a text that is a JSON object or list says; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        return _of_json(value)
    return value


# The same text is asked for each of its fields in turn.
@lru_cache(8)
def _of_json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _member(value: object, part: str) -> object:
    if isinstance(value, dict):
        return value.get(part)
    if not isinstance(value, list | tuple):
        return None
    if part.isdecimal():
        return value[int(part)] if int(part) < len(value) else None
    if not value or not all(isinstance(item, dict) for item in value):
        return None
    return [item.get(part) for item in value]


def check_once(names: Sequence[str], wanted: Iterable[str], path: str) -> None:
    """Raise DataError where a table has a column that is wanted twice."""
    for name in wanted:
        if names.count(name) > 1:
            raise DataError(
                f"data.files: {path} has the column {name} twice, so which one is meant cannot be "
                f"told; its columns are {listed(names)}. Rename one"
            )


def root_column(names: Iterable[str], name: str) -> str | None:
    """Return the column that holds the value that value_at looks for, None where none does."""
    known = set(names)
    if name in known:
        return name
    root, _, _ = name.partition(".")
    return root if root in known else None


def column_of_pictures(row: Mapping) -> str | None:
    """Return a column whose text is called as a file of a picture is; None where there is none."""
    for name, value in row.items():
        if isinstance(value, list | tuple) and value:
            value = value[0]
        is_name = isinstance(value, str) and "\n" not in value
        if is_name and value.lower().endswith(SUFFIXES):
            return str(name)
    return None


def listed(names: Iterable[object]) -> str:
    """Return names of columns for a message: not longer than one can read."""
    known = [brief(str(name)) for name in names]
    shown = ", ".join(known[:_MOST_NAMES])
    more = len(known) - _MOST_NAMES
    return f"{shown} and {more} more" if more > 0 else shown or "none"


def brief(text: str) -> str:
    """Return a text for a message: on one line, its start where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"


def class_names(features: object, name: str) -> tuple[str, ...] | None:
    """Return what the numbers of a column stand for, by the features that `datasets` writes down;
    None for a column of anything else."""
    found = value_at(features, name) if isinstance(features, dict) else None
    if isinstance(found, Mapping) and found.get("_type") == "ClassLabel":
        names = found.get("names")
        if isinstance(names, list | tuple):
            return tuple(map(str, names))
    return None


def named(value: object, names: tuple[str, ...]) -> object:
    """Return the name that a number stands for; None for one that stands for none, as -1 does where
    labels are kept secret."""
    if not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None


def split_named(name: str) -> str | None:
    """Return the split that a name stands for, None when it is no split's."""
    return SPLIT_NAMES.get(name.strip().lower())
