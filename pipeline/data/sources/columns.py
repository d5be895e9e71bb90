"""Columns of a row: nested ones, what there is in place of one that is missing, numbers that stand
for names."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...errors import DataError
from ..images.formats import SUFFIXES

_MOST_NAMES = 12  # of columns in a message
_MOST_CHARACTERS = 40  # of one value in a message: a column may hold whole documents


def field_value(row: Mapping[str, Any], name: str) -> Any:
    """Return the value of a column, of one inside it where the name has dots; None without one.

    A column that has the dots in its own name comes first. Text that holds JSON is looked into,
    for many sets keep what they know of a document in one column of it.
    """
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if isinstance(value, str) and value.lstrip().startswith("{"):
            value = _parsed(value)
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def check_once(names: Sequence[str], wanted: Iterable[str], path: str) -> None:
    """Raise DataError where a table has a column that is wanted twice."""
    for name in wanted:
        if names.count(name) > 1:
            raise DataError(
                f"data.files: {path} has the column {name} twice, so which one is meant cannot be "
                f"told; its columns are {listed(names)}. Rename one"
            )


def root_column(names: Iterable[str], name: str) -> str | None:
    """Return the column that holds the value that field_value looks for, None where none does."""
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
    found = field_value(features, name) if isinstance(features, Mapping) else None
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
