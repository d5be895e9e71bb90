"""Documents from files here or behind any URL that fsspec knows: text, JSON lines, Parquet, CSV,
packed or not."""

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, BinaryIO

from ...config.text_data import DataConfig, FilesConfig, TextRunConfig
from ...errors import DataError, PipelineError
from . import FoundRow, LargeFile, Row, Rows, SkippedRow, Source

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

STREAM_BYTES = 8 << 20  # text files above this are read twice, block by block
_BLOCK_BYTES = 1 << 20
_BATCH_ROWS = 256  # of a Parquet file, in memory at a time


def sources(cfg: TextRunConfig) -> Iterator[Source]:
    """Yield the files of each entry of data.files. Raises DataError for one that matches none."""
    for entry in cfg.data.files:
        yield entry.domain, _rows_of_each(entry, cfg.data)


def _rows_of_each(entry: FilesConfig, data: DataConfig) -> Iterator[Rows]:
    for fs, path in _matches(entry):
        yield partial(_rows, fs, path, data)


def _rows(fs: "AbstractFileSystem", path: str, data: DataConfig) -> Iterator[FoundRow]:
    try:
        yield from _format(path)(fs, path, data)
    except PipelineError:
        raise
    except Exception as error:  # a filesystem or a decoder raises what it likes
        raise DataError(
            f"data.files: {path} cannot be read: {type(error).__name__}: {error}"
        ) from error


def _matches(entry: FilesConfig) -> "Iterator[tuple[AbstractFileSystem, str]]":
    from fsspec.core import url_to_fs

    found: dict[str, AbstractFileSystem] = {}  # each file once, whatever number of globs match it
    for pattern in entry.paths:
        try:
            fs, path = url_to_fs(pattern)
            hits = sorted(hit for hit in fs.glob(path) if not fs.isdir(hit))
            is_folder = not hits and fs.isdir(path)
        except Exception as error:  # as above
            raise DataError(
                f"data.files: {pattern} cannot be reached: {type(error).__name__}: {error}"
            ) from error
        if not hits:
            why = "matches no file"
            if is_folder:
                why = f"is a folder; write {pattern.rstrip('/')}/*.txt or the like"
            raise DataError(
                f"data.files: {pattern} {why}. Paths start at the configuration file's folder"
            )
        for hit in hits:
            found[hit] = fs
    for path, fs in found.items():
        yield fs, path


def _format(path: str) -> "Callable[[AbstractFileSystem, str, DataConfig], Iterator[FoundRow]]":
    name = path.lower()
    for packed in (".gz", ".bz2", ".xz", ".zst"):
        name = name.removesuffix(packed)
    suffix = "." + name.rpartition(".")[2]
    if suffix not in _FORMATS:
        raise DataError(
            f"data.files: {path} is none of {' '.join(_FORMATS)}, packed with .gz .bz2 .xz .zst "
            "or not"
        )
    return _FORMATS[suffix]


def _open(fs: "AbstractFileSystem", path: str) -> BinaryIO:
    file = fs.open(path, "rb", compression="infer")
    # zstandard's reader has neither lines nor the buffer that io.TextIOWrapper asks for
    return io.BufferedReader(file) if path.lower().endswith(".zst") else file


def _text_rows(fs: "AbstractFileSystem", path: str, data: DataConfig) -> Iterator[FoundRow]:
    with _open(fs, path) as file:
        # One byte more than may be held tells whether there is more
        head = file.read(STREAM_BYTES + 1)
    if len(head) > STREAM_BYTES:
        yield path, {data.text_field: LargeFile(partial(_blocks, fs, path))}
        return
    try:
        yield path, {data.text_field: head.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        yield path, SkippedRow("not UTF-8", f"byte {error.start}: {error.reason}")


def _blocks(fs: "AbstractFileSystem", path: str) -> Iterator[bytes]:
    with _open(fs, path) as file:
        yield file.read(_BLOCK_BYTES).removeprefix(codecs.BOM_UTF8)
        while block := file.read(_BLOCK_BYTES):
            yield block


def _jsonl_rows(fs: "AbstractFileSystem", path: str, data: DataConfig) -> Iterator[FoundRow]:
    with _open(fs, path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", _json_row(line)


def _json_row(line: bytes) -> Row | SkippedRow:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return SkippedRow("not UTF-8", f"byte {error.start}: {error.reason}")
    except (ValueError, RecursionError) as error:  # the latter for brackets nested without end
        return SkippedRow("not JSON", str(error))
    if not isinstance(row, dict):
        return SkippedRow("not JSON", f"an object was wanted, found {type(row).__name__}")
    return row


def _parquet_rows(fs: "AbstractFileSystem", path: str, data: DataConfig) -> Iterator[FoundRow]:
    from pyarrow.parquet import ParquetFile

    with _open(fs, path) as file:
        table = ParquetFile(file)
        wanted = (data.text_field, data.label_field, data.split_field)
        columns = [name for name in wanted if name in table.schema_arrow.names]
        number = 0
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
            # Of no column to_pylist gives no rows, and they are to be counted as without text
            for row in batch.to_pylist() if columns else [{}] * batch.num_rows:
                number += 1
                yield f"{path}:{number}", row


def _csv_rows(fs: "AbstractFileSystem", path: str, data: DataConfig) -> Iterator[FoundRow]:
    csv.field_size_limit(2**31 - 1)  # the default refuses documents over 128 kB
    with _open(fs, path) as file:
        # bytes that are not UTF-8 become surrogates, which encoding the one document then refuses
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.DictReader(text)
        for row in rows:
            yield f"{path}:{rows.line_num}", row


_FORMATS = {
    ".txt": _text_rows,
    ".md": _text_rows,
    ".jsonl": _jsonl_rows,
    ".parquet": _parquet_rows,
    ".csv": _csv_rows,
}
