"""Rows of Parquet and Arrow files, a batch in memory at a time."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ...config.text_data import DataConfig
from ...errors import DataError
from ...store.room import writing
from . import FoundRow, Row, SkippedRow
from .columns import check_once, class_names, listed, named, root_column, value_at
from .packed import is_packed, open_unpacked, refuse_pointer

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from pyarrow import RecordBatch, Schema, Table

BATCH_ROWS = 256  # in memory at a time
_HEAD_BYTES = 64
_SPOOL_BYTES = 64 << 20  # of a packed table in memory; what is more goes to a temporary file
_FILE_MARK = b"ARROW1"
_PARQUET_MARK = b"PAR1"
_SECRET_MARK = b"PARE"
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


def parquet_rows(fs: "AbstractFileSystem", path: str, data: DataConfig) -> Iterator[FoundRow]:
    """Yield the rows of a Parquet file, only the columns that are wanted. Raises DataError for one
    that gives fewer rows than it says."""
    from pyarrow.parquet import ParquetFile

    with _seekable(fs, path) as file:
        _check_marks(file, path)
        table = ParquetFile(file)
        columns = TableColumns(table.schema_arrow, data)
        check_once(table.schema_arrow.names, columns.read, path)
        number = 0
        for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=columns.read):
            for row in columns.rows(batch):
                number += 1
                yield f"{path}:{number}", row
        if number != table.metadata.num_rows:
            raise DataError(
                f"data.files: {path} gave {number} rows of the {table.metadata.num_rows} that it "
                "says it has. Fetch or write it again"
            )


def _check_marks(file: IO[bytes], path: str) -> None:
    """Leave a Parquet file at its start. Raises DataError for one that is none, or torn."""
    begins = file.read(len(_PARQUET_MARK))
    size = file.seek(0, 2)
    file.seek(max(0, size - len(_PARQUET_MARK)))
    ends = file.read()
    file.seek(0)
    # Where names of columns are secret, the mark is another at both ends
    if begins == ends and begins in (_PARQUET_MARK, _SECRET_MARK):
        return
    what = "it does not end as a Parquet file does, so it is torn. Fetch or write it again"
    if begins != _PARQUET_MARK:
        what = "it is no Parquet file. Say what it is with format, beside paths, or fetch it again"
    raise DataError(f"data.files: {path} cannot be read: {what}")


def arrow_rows(fs: "AbstractFileSystem", path: str, data: DataConfig) -> Iterator[FoundRow]:
    """Yield the rows of an Arrow file of either kind. Raises DataError for one that is torn."""
    from pyarrow import ipc

    with _seekable(fs, path) as file:
        if file.read(len(_FILE_MARK)) == _FILE_MARK:
            file.seek(0)
            opened = ipc.open_file(file)
            batches = map(opened.get_batch, range(opened.num_record_batches))
        else:
            _check_end(file, path)
            opened = ipc.open_stream(file)
            batches = iter(opened)
        columns = TableColumns(opened.schema, data)
        check_once(opened.schema.names, columns.read, path)
        number = 0
        for batch in batches:
            for start in range(0, batch.num_rows, BATCH_ROWS):
                for row in columns.rows(batch.slice(start, BATCH_ROWS)):
                    number += 1
                    yield f"{path}:{number}", row


def _check_end(file: IO[bytes], path: str) -> None:
    """Leave a stream's file at its start. Raises DataError for one without its end: one that is
    torn between two batches reads as a shorter one."""
    size = file.seek(0, 2)
    file.seek(max(0, size - len(_STREAM_END)))
    if file.read() != _STREAM_END:
        raise DataError(
            f"data.files: {path} cannot be read: it does not end as an Arrow stream does, so it is "
            "torn. Fetch or write it again"
        )
    file.seek(0)


@contextmanager
def _seekable(fs: "AbstractFileSystem", path: str) -> Iterator[IO[bytes]]:
    if is_packed(path):
        with (
            open_unpacked(fs, path) as packed,
            tempfile.SpooledTemporaryFile(_SPOOL_BYTES) as whole,
        ):
            # not the store's disk
            with writing(Path(tempfile.gettempdir())):
                shutil.copyfileobj(packed, whole)
            whole.seek(0)
            yield whole
        return
    with fs.open(path, "rb") as file:
        refuse_pointer(file.read(_HEAD_BYTES), path)
        file.seek(0)
        yield file


class TableColumns:
    """The columns of a table that documents need, and what stands for what in them."""

    def __init__(self, schema: "Schema", data: DataConfig, features: object = None):
        wanted = (data.text_field, data.label_field, data.split_field or "")
        found = [root_column(schema.names, name) for name in wanted]
        self.read = list(dict.fromkeys(filter(None, found)))
        self._label_field = data.label_field
        self._label_names = class_names(features or _features(schema), data.label_field)
        # Named without their values, so that who misses a column is told which there are
        self._others = {} if found[1] else dict.fromkeys(schema.names)
        self._without_text = None
        if found[0] is None:
            detail = f"no column {data.text_field}; there are {listed(schema.names)}"
            self._without_text = SkippedRow("no text", detail)

    def rows(self, table: "RecordBatch | Table") -> Iterator[Row | SkippedRow]:
        """Yield the rows of a table, or of a part of it."""
        if self._without_text is not None:
            for _ in range(table.num_rows):
                yield self._without_text
            return
        for row in _values(table.select(self.read)):
            if isinstance(row, dict) and self._label_names is not None:
                value = value_at(row, self._label_field)
                row[self._label_field] = named(value, self._label_names)
            yield self._others | row if isinstance(row, dict) else row


def _values(table: "RecordBatch | Table") -> list[Row | SkippedRow]:
    # Columns of text are not checked when they are read: one value that is none raises here
    try:
        return table.to_pylist()
    except ValueError:
        pass
    found: list[Row | SkippedRow] = []
    for number in range(table.num_rows):
        try:
            found += table.slice(number, 1).to_pylist()
        except ValueError as error:
            found.append(SkippedRow("not UTF-8", str(error)))
    return found


def _features(schema: "Schema") -> object:
    """Return the features that `datasets` has written into a table, None where it has not."""
    written = (schema.metadata or {}).get(b"huggingface")
    try:
        return json.loads(written or b"null")["info"]["features"]
    except (ValueError, TypeError, KeyError):
        return None
