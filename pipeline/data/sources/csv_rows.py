"""Rows of CSV and its kin: every row has the fields of the header, every quote its end."""

import codecs
import csv
import io
import re
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

from ...errors import DataError
from . import FoundRow, Note, SkippedRow
from .columns import check_once, value_at
from .packed import open_text

if TYPE_CHECKING:
    import _csv

    from fsspec import AbstractFileSystem

_DELIMITERS = (",", ";", "\t", "|")  # the first is meant where the header tells of no other
_QUOTES = "a quote inside a quoted field is written twice"
# By which Excel is told what parts the fields
_SAID = re.compile(rb"\"?sep=([,;|\t:])\"?\r?\n", re.IGNORECASE)
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
        # Bytes that are not UTF-8 become surrogates, which encoding the one document then refuses
        lines = io.TextIOWrapper(text.file, "utf-8-sig", errors="surrogateescape", newline="")
        head = text.file.peek().removeprefix(codecs.BOM_UTF8)
        said = _SAID.match(head)
        if said:
            lines.readline()
            head = head[said.end() :]
            delimiter = said[1].decode()
        # Its names may be of another encoding, as the rows below may
        first = b"".join(head.splitlines()[:1]).decode("utf-8", "replace")
        if delimiter is None:
            delimiter = _delimiter(first, wanted)
            if delimiter != _DELIMITERS[0]:
                yield (
                    text.name,
                    Note(f"read as fields parted by {delimiter!r}, for so the header is"),
                )
        kept = _Kept(lines)
        rows = csv.reader(
            kept,
            delimiter=delimiter,
            strict=True,
            # Else a quote behind a blank were a letter, and each label began with the blank
            skipinitialspace=_has_blanks(first, delimiter),
        )
        yield from _rows(rows, kept, delimiter, path, wanted)


class _Kept:
    """Lines of a file, with those of the row at hand as they stand there."""

    def __init__(self, lines: Iterable[str]):
        self._lines = iter(lines)
        self.of_row: list[str] = []

    def __iter__(self) -> "_Kept":
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.of_row.append(line)
        return line


def _delimiter(header: str, wanted: Collection[str]) -> str:
    """Return what parts the fields: that with which the header has a column that is wanted."""
    for delimiter in _DELIMITERS:
        found = dict.fromkeys(_names(header, delimiter), "")
        if any(value_at(found, name) is not None for name in wanted):
            return delimiter
    return _DELIMITERS[0]


def _has_blanks(header: str, delimiter: str) -> bool:
    """Whether every field of a header but its first has a blank in front."""
    _, *others = header.split(delimiter)
    return bool(others) and all(name.startswith(" ") for name in others)


def _names(header: str, delimiter: str) -> list[str]:
    return next(csv.reader([header], delimiter=delimiter), [])


def _rows(
    rows: "_csv.Reader", kept: _Kept, delimiter: str, path: str, wanted: Collection[str]
) -> Iterator[FoundRow]:
    header: list[str] | None = None
    while True:
        first = rows.line_num + 1
        where = f"{path}:{first}"
        kept.of_row.clear()
        try:
            values = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if header is None or rows.line_num > first or "end of data" in str(error):
                raise DataError(
                    f"data.files: {path} cannot be read: a quote on line {first} is not closed as "
                    f"it should be (read on to line {rows.line_num}, fields parted by "
                    f"{delimiter!r}). Mend that line: {_QUOTES}"
                ) from None
            yield where, SkippedRow("not CSV", f"a quote closes inside a field; {_QUOTES}")
            continue
        if not values:
            continue
        if header is None:
            header = values
            check_once(header, wanted, path)
        elif delimiter == "\t" and _has_swallowed(kept.of_row, len(header)):
            raise DataError(
                f"data.files: {path} cannot be read: a quote that begins a field on line {first} "
                f"would make one row of {len(kept.of_row)} lines that are rows by themselves. Put "
                "such a text in quotes and write its own twice, or write JSON Lines"
            )
        elif len(values) != len(header):
            detail = f"{len(values)} where the header has {len(header)}"
            yield where, SkippedRow("wrong number of fields", detail)
        else:
            yield where, dict(zip(header, values, strict=True))


def _has_swallowed(lines: list[str], fields: int) -> bool:
    """Whether a row goes over lines each of which would be one, were quotes letters as they often
    are between tabs."""
    return len(lines) > 1 and all(line.count("\t") == fields - 1 > 0 for line in lines)
