"""Rows of any source: dicts of fields from installed text, files or the Hub, read one block at a
time.

Invariant: a row that cannot be read is a Bad and never stops the stream; a source that cannot be
read is a DataError.
"""

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from ...config.text_data import DataConfig, FilesConfig, HubConfig, TextRunConfig
from ...errors import DataError, PipelineError
from . import installed

STREAM_BYTES = 8 << 20  # text files above this are read twice, block by block
Rows = Callable[[], Iterator[tuple[str, object]]]  # opens nothing before it is called


@dataclass(frozen=True)
class SkippedRow:
    """Why a row could not be read."""

    reason: str
    detail: str


@dataclass(frozen=True)
class LargeFile:
    """A text file too large for memory: a way to read its blocks again."""

    blocks: Callable[[], Iterator[bytes]]


def sources(cfg: TextRunConfig) -> Iterator[tuple[str | None, Iterator[Rows]]]:
    """Yield (fixed label or None, the rows of each of its files in order), each row a dict of
    fields or a Bad."""
    data = cfg.data
    if data.source == "installed":
        wanted = cfg.partition.domains if cfg.partition.by == "labels" else installed.DOMAINS
        for domain in (d for d in installed.DOMAINS if d in wanted):
            yield domain, iter([partial(_installed_rows, domain, data)])
    for entry in data.files if data.source == "files" else ():
        yield entry.domain, (partial(_file_rows, fs, path, data) for fs, path in _matches(entry))
    for entry in data.hub if data.source == "hub" else ():
        yield entry.domain, iter([partial(_hub_rows, entry, data)])


def _installed_rows(domain: str, data: DataConfig) -> Iterator[tuple[str, object]]:
    for where, text in installed.READERS[domain]():
        yield where, {data.text_field: text}


def _file_rows(fs, path: str, data: DataConfig) -> Iterator[tuple[str, object]]:
    try:
        yield from _format(path)(fs, path, data)
    except PipelineError:
        raise
    except Exception as error:  # a filesystem or a decoder raises what it likes
        raise DataError(
            f"data.files: {path} cannot be read: {type(error).__name__}: {error}"
        ) from error


def _matches(entry: FilesConfig) -> Iterator[tuple[object, str]]:
    from fsspec.core import url_to_fs

    found = {}
    for pattern in entry.paths:
        try:
            fs, path = url_to_fs(pattern)
            hits = sorted(hit for hit in fs.glob(path) if not fs.isdir(hit))
            folder = not hits and fs.isdir(path)
        except Exception as error:  # as above
            raise DataError(
                f"data.files: {pattern} cannot be reached: {type(error).__name__}: {error}"
            ) from error
        if not hits:
            why = (
                f"is a folder; write {pattern.rstrip('/')}/*.txt or the like"
                if folder
                else "matches no file"
            )
            raise DataError(
                f"data.files: {pattern} {why}. Paths start at the configuration file's folder"
            )
        found |= dict.fromkeys(hits, fs)
    yield from ((fs, path) for path, fs in found.items())


def _format(path: str) -> Callable:
    name = path.lower()
    for packed in (".gz", ".bz2", ".xz", ".zst"):
        name = name.removesuffix(packed)
    suffix = "." + name.rpartition(".")[2]
    if suffix not in _FORMATS:
        raise DataError(
            f"data.files: {path} is none of {' '.join(_FORMATS)}, packed with .gz .bz2 .xz .zst or not"
        )
    return _FORMATS[suffix]


def _open(fs, path: str):
    file = fs.open(path, "rb", compression="infer")
    # zstandard's reader has neither lines nor the buffer that io.TextIOWrapper asks for
    return io.BufferedReader(file) if path.lower().endswith(".zst") else file


def _text_rows(fs, path: str, data: DataConfig) -> Iterator[tuple[str, object]]:
    with _open(fs, path) as file:
        head = file.read(STREAM_BYTES + 1)
    if len(head) > STREAM_BYTES:
        yield path, {data.text_field: LargeFile(lambda: _blocks(fs, path))}
        return
    try:
        yield path, {data.text_field: head.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        yield path, SkippedRow("not UTF-8", f"byte {error.start}: {error.reason}")


def _blocks(fs, path: str) -> Iterator[bytes]:
    with _open(fs, path) as file:
        yield file.read(1 << 20).removeprefix(codecs.BOM_UTF8)
        while block := file.read(1 << 20):
            yield block


def _jsonl_rows(fs, path: str, data: DataConfig) -> Iterator[tuple[str, object]]:
    with _open(fs, path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", _json_row(line)


def _json_row(line: bytes) -> object:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return SkippedRow("not UTF-8", f"byte {error.start}: {error.reason}")
    except (ValueError, RecursionError) as error:
        return SkippedRow("not JSON", str(error))
    return (
        row
        if isinstance(row, dict)
        else SkippedRow("not JSON", f"an object was wanted, found {type(row).__name__}")
    )


def _parquet_rows(fs, path: str, data: DataConfig) -> Iterator[tuple[str, object]]:
    from pyarrow.parquet import ParquetFile

    with _open(fs, path) as file:
        table, number = ParquetFile(file), 0
        columns = [
            c
            for c in (data.text_field, data.label_field, data.split_field)
            if c in table.schema_arrow.names
        ]
        for batch in table.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist() if columns else [{}] * batch.num_rows:
                number += 1
                yield f"{path}:{number}", row


def _csv_rows(fs, path: str, data: DataConfig) -> Iterator[tuple[str, object]]:
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


def _hub_rows(entry: HubConfig, data: DataConfig) -> Iterator[tuple[str, object]]:
    from datasets import load_dataset

    name = f"{entry.dataset}[{entry.split}]"
    wanted = dict(split=entry.split, revision=entry.revision, streaming=True)
    try:
        for number, row in enumerate(load_dataset(entry.dataset, entry.subset, **wanted)):
            yield f"{name} row {number}", row
    except Exception as error:  # datasets, the hub client and the network raise what they like
        raise DataError(
            f"data.hub: {name} at revision {entry.revision} cannot be streamed: {type(error).__name__}: {error}. "
            "Check the name, subset, split and revision, and that this machine reaches the Hub (HF_TOKEN for "
            "private data); a local folder or data.source=files works without a network"
        ) from error
