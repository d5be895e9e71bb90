"""Rows of JSON: one a line, or the elements of one array, one at a time."""

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ...errors import DataError
from . import FoundRow, Note, Row, SkippedRow
from .packed import open_text

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_HEAD_LINES = 20  # of which one is a whole object where each of them is a row
_BLOCK_BYTES = 1 << 20
# A value that goes on after the block ends in a text, or so near to its end
_NEAR_END = 16
_MOST_SHOWN = 20  # characters of what is no JSON, in a message
_WHITE = " \t\n\r"
# Of rows: the commas of an array that has lost its brackets, the mark of JSON text sequences
_BETWEEN = f"{_WHITE},\x1e"
# An array of objects, or an object that is spread over lines
_OTHER_LAYOUT = re.compile(rb"\s*(\[\s*\{|\{[ \t]*\r?\n)")
_ARRAY_NOTE = "read as one JSON array, though its name stands for a row a line"
_SPREAD_NOTE = "read as objects spread over lines, though its name stands for a row a line"


def jsonl_rows(fs: "AbstractFileSystem", path: str, encoding: str | None) -> Iterator[FoundRow]:
    """Yield the rows of a file that has one a line, or is JSON of another layout under that name.
    Raises DataError for a file that is torn."""
    with open_text(fs, path, encoding) as text:
        if text.note:
            yield text.name, Note(text.note)
        head = text.file.peek(_BLOCK_BYTES).removeprefix(codecs.BOM_UTF8)
        # Line by line, a whole array would be one bad row
        if _OTHER_LAYOUT.match(head):
            is_array = head.lstrip().startswith(b"[")
            yield text.name, Note(_ARRAY_NOTE if is_array else _SPREAD_NOTE)
            yield from _values(text.file, path, is_array)
        else:
            yield from _lines(text.file, path)


def json_rows(fs: "AbstractFileSystem", path: str, encoding: str | None) -> Iterator[FoundRow]:
    """Yield the rows of a file that is one array, has one row a line, or objects one after the
    other. Raises DataError for a file that is torn."""
    with open_text(fs, path, encoding) as text:
        if text.note:
            yield text.name, Note(text.note)
        head = text.file.peek(_BLOCK_BYTES).removeprefix(codecs.BOM_UTF8)
        is_array = head.lstrip().startswith(b"[")
        if is_array or not _has_row_a_line(head):
            yield from _values(text.file, path, is_array)
        else:
            yield from _lines(text.file, path)


def json_row(line: bytes) -> Row | SkippedRow:
    """Return the object that a line holds, or why there is none."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return SkippedRow("not UTF-8", f"byte {error.start}")
    # RecursionError: for brackets nested without end
    except (ValueError, RecursionError) as error:
        return SkippedRow("not JSON", why(error))
    return _row(row)


def _rows_of(line: bytes) -> list[Row | SkippedRow]:
    """Return the objects that a line holds, or why there is none.

    They are several where the ends of lines were lost, or are those of old Macs: taken for one row
    that is bad, a whole file would be.
    """
    alone = json_row(line)
    if not isinstance(alone, SkippedRow) or alone.reason != "not JSON":
        return [alone]
    text = line.decode("utf-8-sig").strip(_BETWEEN)
    decoder = json.JSONDecoder()
    rows: list[Row | SkippedRow] = []
    at = 0
    while text.startswith("{", at):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            return [*rows, SkippedRow("not JSON", why(error))]
        rows.append(value)
        while at < len(text) and text[at] in _BETWEEN:
            at += 1
    if at == len(text) and rows:
        return rows
    # What follows a single row is a part of it that went wrong
    return [*rows, alone] if len(rows) > 1 else [alone]


def why(error: ValueError | RecursionError) -> str:
    """Return in words for people why a text is no JSON."""
    if not isinstance(error, json.JSONDecodeError):
        return "it is nested too deep" if isinstance(error, RecursionError) else str(error)
    if error.msg.startswith("Unterminated"):
        return f"the quote at character {error.pos + 1} is not closed"
    found = error.doc[error.pos : error.pos + _MOST_SHOWN]
    if not found:
        return f"it ends at character {error.pos + 1}, before its brackets are closed"
    return f"no JSON from character {error.pos + 1} on: {found!r}"


def _row(value: object) -> Row | SkippedRow:
    if isinstance(value, dict):
        return value
    kind = type(value).__name__
    return SkippedRow("not JSON", f"an object was wanted, found {kind}")


def _lines(file: io.BufferedReader, path: str) -> Iterator[FoundRow]:
    for number, line in enumerate(file, 1):
        # A mark alone is what some programs leave of an empty file
        if not line.removeprefix(codecs.BOM_UTF8).strip():
            continue
        rows = _rows_of(line)
        for count, row in enumerate(rows, 1):
            # Only the last one has no end
            if isinstance(row, SkippedRow) and not line.endswith(b"\n"):
                row = SkippedRow(row.reason, f"the last line, cut off: {row.detail}")
            yield f"{path}:{number}" + (f" row {count}" if len(rows) > 1 else ""), row


def _has_row_a_line(head: bytes) -> bool:
    """Whether one of a file's first lines is a row of its own; of objects that are spread over
    lines none is."""
    for line in head.split(b"\n")[:_HEAD_LINES]:
        if line.strip().startswith(b"{") and not isinstance(json_row(line), SkippedRow):
            return True
    return not head.strip()


class _Buffer:
    """Text of a file from some place on, as much as is needed at once."""

    def __init__(self, file: io.BufferedReader):
        self.text = ""
        self.at = 0
        self.is_whole = False  # the file's end is in it
        self._file = file
        # Bytes that are no text stay in the one row that has them, which is dropped for them
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")

    def more(self) -> None:
        """Read on: as much again as is there, so that a long value is not read over and over."""
        left = self.text[self.at :]
        block = self._file.read(max(_BLOCK_BYTES, len(left)))
        self.is_whole = not block
        self.text = left + self._decoder.decode(block, final=self.is_whole)
        self.at = 0

    def next(self) -> str:
        """Return the next character that is not white space; none at the end."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in _WHITE:
                    return self.text[self.at]
                self.at += 1
            if self.is_whole:
                return ""
            self.more()

    def value(self) -> Any:
        """Return the JSON value that begins here. Raises ValueError, RecursionError."""
        decoder = json.JSONDecoder()
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or (
                    error.pos > len(self.text) - _NEAR_END
                )
                if self.is_whole or not is_cut:
                    raise
            else:
                # A number may go on; what ends in a bracket does not
                if self.is_whole or end < len(self.text):
                    self.at = end
                    return value
            self.more()


def _values(file: io.BufferedReader, path: str, is_array: bool) -> Iterator[FoundRow]:
    """Yield the elements of an array, or objects one after the other."""
    buffer = _Buffer(file)
    number = 0
    if is_array:
        buffer.next()
        buffer.at += 1
    while True:
        mark = buffer.next()
        if is_array and number and mark == ",":
            buffer.at += 1
            mark = buffer.next()
        elif is_array and number and mark not in ("]", ""):
            raise _damaged(path, number, f"is followed by {mark!r}")
        if mark == "" and not is_array:
            return
        if mark == "]" and is_array:
            break
        number += 1
        try:
            value = buffer.value()
        except (ValueError, RecursionError) as error:
            raise _damaged(path, number, f"cannot be read ({why(error)})") from None
        yield f"{path} row {number}", _row(value)
    buffer.at += 1
    if buffer.next():
        raise _damaged(path, number, "is its array's last, and more follows")


def _damaged(path: str, number: int, what: str) -> DataError:
    return DataError(
        f"data.files: {path} cannot be read: row {number} {what}. The file is torn or no JSON; "
        "mend it, or write one row a line and name it .jsonl, where a bad row is left out alone"
    )
