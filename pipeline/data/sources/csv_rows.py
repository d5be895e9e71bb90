"""Rows of CSV and its kin: every row has the fields of the header, every quote its end."""

import codecs
import csv
import io
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from ...errors import DataError
from . import FoundRow, Note, SkippedRow
from .columns import field_value, listed
from .packed import open_text

if TYPE_CHECKING:
    import _csv

    from fsspec import AbstractFileSystem

_DELIMITERS = (",", ";", "\t", "|")  # the first is meant where the header tells of no other
# The default refuses documents over 128 kB; with none at all, a quote without an end would take
# the rest of a large file into memory before it is told
_MOST_CHARACTERS = 64 << 20


def csv_rows(
    fs: "AbstractFileSystem",
    path: str,
    encoding: str | None,
    wanted: Collection[str],
    delimiter: str | None,
) -> Iterator[FoundRow]:
    """Yield the rows of a table; `delimiter` None is the one that its header is written with, which
    is the one that parts a column that is wanted from the others.

    A row with more or fewer fields than the header is skipped with that reason. Raises DataError
    for a quote that is not closed: what it has swallowed cannot be told from text.
    """
    csv.field_size_limit(_MOST_CHARACTERS)
    with open_text(fs, path, encoding) as text:
        if text.note:
            yield text.name, Note(text.note)
        if delimiter is None:
            delimiter = _delimiter(text.file.peek(), wanted)
            if delimiter != _DELIMITERS[0]:
                yield (
                    text.name,
                    Note(f"read as fields parted by {delimiter!r}, for so the header is"),
                )
        # Bytes that are not UTF-8 become surrogates, which encoding the one document then refuses
        lines = io.TextIOWrapper(text.file, "utf-8-sig", errors="surrogateescape", newline="")
        yield from _rows(csv.reader(lines, delimiter=delimiter, strict=True), path, wanted)


def _delimiter(head: bytes, wanted: Collection[str]) -> str:
    """Return what parts the fields: that with which the header has a column that is wanted."""
    first = head.removeprefix(codecs.BOM_UTF8).splitlines()[:1]
    for line in first:
        for delimiter in _DELIMITERS:
            names = _header(line.decode("utf-8", "replace"), delimiter)
            found = dict.fromkeys(names, "")
            if any(field_value(found, name) is not None for name in wanted):
                return delimiter
    return _DELIMITERS[0]


def _header(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter), [])


def _rows(rows: "_csv.Reader", path: str, wanted: Collection[str]) -> Iterator[FoundRow]:
    header: list[str] | None = None
    while True:
        first = rows.line_num + 1
        where = f"{path}:{first}"
        try:
            values = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if header is None or rows.line_num > first or "end of data" in str(error):
                raise DataError(
                    f"data.files: {path} cannot be read: a quote on line {first} is not closed as "
                    f"it should be ({error}, on line {rows.line_num}). Mend that line: a quote "
                    "inside a quoted field is written twice"
                ) from None
            yield where, SkippedRow("not CSV", str(error))
            continue
        if not values:
            continue
        if header is None:
            header = values
            _check_header(header, path, wanted)
        elif len(values) != len(header):
            detail = f"{len(values)} where the header has {len(header)}"
            yield where, SkippedRow("wrong number of fields", detail)
        else:
            yield where, dict(zip(header, values, strict=True))


def _check_header(header: list[str], path: str, wanted: Collection[str]) -> None:
    for name in wanted:
        if header.count(name) > 1:
            raise DataError(
                f"data.files: {path} has the column {name} twice, so which one is meant cannot be "
                f"told; its columns are {listed(header)}. Rename one"
            )
