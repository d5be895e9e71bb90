"""Documents from files here or behind any URL that fsspec knows: text, JSON, tables, packed or
not."""

import codecs
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Literal

from ...config.text_data import DataConfig, FilesConfig, TextRunConfig
from ...errors import DataError, PipelineError
from ...protocols import Eye, Seen
from ...store.looking import GONE, UNREACHABLE
from ..cut import cut
from . import ENCODING, FoundRow, LargeFile, Note, Row, Rows, SkippedRow, Source, SourceFile
from .csv_rows import csv_rows
from .file_kinds import is_local, is_odd, seen_at
from .json_rows import json_rows, jsonl_rows
from .packed import SUFFIXES, open_text
from .saved_sets import missing_shards, of_saved_sets
from .tables import arrow_rows, parquet_rows

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

    _Found = list[tuple[AbstractFileSystem, str]]

STREAM_BYTES = 8 << 20  # text files above this are read twice, block by block
FEW_FILES = 20  # with fewer, as many documents would be too few to hold any out
_BLOCK_BYTES = 1 << 20
_FORMS: tuple[Literal["NFC", "NFD"], ...] = ("NFC", "NFD")
_HOLE = b"\0" * 8  # of zeros: what a disk that was full or switched off leaves in a file
_MOST_SHOWN = 10  # characters of bytes that are not UTF-8, in a message


@dataclass(frozen=True)
class _File:
    """One file to read, and what its entry and the section data say of it."""

    fs: "AbstractFileSystem"
    path: str
    entry: FilesConfig
    data: DataConfig
    is_split: bool  # at paragraph ends, if it is long

    @property
    def name(self) -> str:
        """Its name alone: what is told of a file is the same wherever it lies."""
        return self.path.rpartition("/")[2]

    @property
    def format(self) -> str:
        """The name of its format. Raises DataError for a file that has none that is known."""
        if self.entry.format != "auto":
            return self.entry.format
        known = _format(self.path)
        if known is None:
            raise DataError(
                f"data.files: {self.path} is none of {' '.join(_BY_SUFFIX)}, packed with "
                f"{' '.join(SUFFIXES)} or not; say what it is with format, beside paths"
            )
        return known


def sources(cfg: TextRunConfig) -> Iterator[Source]:
    """Yield the files of each entry of data.files. Raises DataError for one that matches none, for
    a file that two entries match, and for plain text that no domain is named for."""
    for entry, found in _entries(cfg):
        yield entry.domain, _files(entry, found, cfg.data)


def _entries(cfg: TextRunConfig) -> "list[tuple[FilesConfig, _Found]]":
    entries = [(entry, list(of_saved_sets(_matches(entry.paths)))) for entry in cfg.data.files]
    _check(entries, cfg)
    return entries


def _check(entries: "list[tuple[FilesConfig, _Found]]", cfg: TextRunConfig) -> None:
    """Raise DataError as sources does for what is found."""
    if cfg.partition.by == "labels":
        _refuse_unlabelled(entries)
    owners: dict[object, tuple[FilesConfig, str]] = {}
    for entry, found in entries:
        for fs, path in found:
            owner, first = owners.setdefault(_identity(fs, path), (entry, path))
            if owner is not entry:
                one = path if path == first else f"{first}, which {path} is a link to,"
                raise DataError(
                    f"data.files: {one} is matched by two entries, and its documents would be "
                    "read twice. Make the paths of one of them narrower"
                )


def _refuse_unlabelled(entries: "list[tuple[FilesConfig, _Found]]") -> None:
    """Raise DataError for plain text of which nothing says what domain it is of: it would be left
    out whole."""
    for entry, found in entries:
        for _, path in found:
            if entry.domain is None and _is_text(entry, path):
                raise DataError(
                    f"data.files: {path} is plain text, which has no column for a label. Give its "
                    "entry a domain, or make the entry's paths narrower"
                )


def _is_text(entry: FilesConfig, path: str) -> bool:
    return entry.format == "text" or (entry.format == "auto" and _format(path) == "text")


def look(cfg: TextRunConfig) -> None:
    """Raise DataError for entries whose files here are none, cannot be opened, or have no
    known format, or when all are empty. What lies behind a URL is not asked."""
    problems = []
    sizes: list[int] = []
    entries = []
    is_elsewhere = False
    for entry in cfg.data.files:
        here = tuple(filter(_is_here, entry.paths))
        is_elsewhere = is_elsewhere or len(here) < len(entry.paths)
        try:
            found = list(of_saved_sets(_matches(here)))
            sizes += _sizes(entry, found, cfg.data)
            entries.append((entry, found))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("; ".join(problems))
    _check(entries, cfg)
    if not any(sizes) and not is_elsewhere:
        raise DataError(f"data.files: all of its {len(sizes)} files are empty; correct the paths")


def seen(cfg: TextRunConfig, eye: Eye) -> Iterator[Seen]:
    """Yield the files of each entry of data.files as they are now, in the order in which they are
    read; a pattern that matches none is gone."""
    for entry in cfg.data.files:
        yield from seen_paths("data.files", entry.paths, eye)


def seen_paths(setting: str, paths: Iterable[str], eye: Eye) -> Iterator[Seen]:
    """Yield the files that some patterns mean as they are now."""
    found: dict[str, tuple[AbstractFileSystem, str]] = {}
    for pattern in paths:
        try:
            hits = list(_matches([pattern]))
        except DataError as error:
            # Of a cause other than that there is nothing
            odd = UNREACHABLE if error.__cause__ and not _is_here(pattern) else GONE
            yield Seen(setting, pattern.rpartition("/")[2], odd)
            continue
        start = _start(pattern)
        for fs, path in hits:
            inside = path.startswith(start)
            name = path[len(start) :] if inside else path.rpartition("/")[2]
            found.setdefault(path, (fs, name))
    for fs, path in _of_sets(found):
        name = found[path][1]
        if is_local(fs):
            yield eye.file(setting, path, name)
        else:
            yield seen_at(setting, fs, path, name)


def _of_sets(found: "dict[str, tuple[AbstractFileSystem, str]]") -> "_Found":
    files = [(fs, path) for path, (fs, _) in found.items()]
    try:
        return list(of_saved_sets(files))
    except DataError:
        # A set that lacks a file, which whoever reads it is told
        return files


def _start(pattern: str) -> str:
    """Return the folder that a pattern starts in, whose own name says nothing of its files."""
    above = pattern.partition("://")[2] or pattern
    folders = []
    for part in above.split("/")[:-1]:
        # Brackets of a folder's own name are escaped, each as [[]
        if set("*?[") & set(part.replace("[[]", "")):
            break
        folders.append(part)
    return "/".join(folders).replace("[[]", "[") + "/"


def _sizes(entry: FilesConfig, found: "_Found", data: DataConfig) -> Iterator[int]:
    """Yield the bytes of the files here of one entry. Raises DataError for one that is not read."""
    for fs, path in found:
        # Raises for a name that tells none
        _ = _File(fs, path, entry, data, False).format
        try:
            with open(path, "rb") as file:
                yield os.fstat(file.fileno()).st_size
        except OSError as error:
            raise DataError(f"data.files: {path} cannot be read: {error.strerror}") from None


def _is_here(pattern: str) -> bool:
    return "://" not in pattern or pattern.startswith(("file://", "local://"))


def _files(entry: FilesConfig, found: "_Found", data: DataConfig) -> Iterator[SourceFile]:
    texts = sum(_is_text(entry, path) for _, path in found)
    is_few = entry.documents == "auto" and texts < FEW_FILES
    is_split = is_few or entry.documents == "paragraphs"
    told = missing_shards(path for _, path in found)
    starts = tuple(_start(pattern) for pattern in entry.paths)
    for fs, path in found:
        file = _File(fs, path, entry, data, is_split)
        yield _source_file(file, partial(_rows, file, told.get(path)), starts)


def _source_file(file: _File, rows: Rows, starts: tuple[str, ...]) -> SourceFile:
    read_by = {
        "format": file.format,
        "encoding": file.entry.encoding,
        "paragraphs": file.data.paragraph_bytes if file.is_split else None,
    }
    here = is_local(file.fs)
    seen_by = partial(_seen, file, starts)
    return SourceFile(rows, seen_by, read_by, is_whole=here, is_remote=not here)


def _seen(file: _File, starts: tuple[str, ...], eye: Eye) -> Iterator[Seen]:
    # From what its entry names on, wherever that lies
    inside = [file.path[len(start) :] for start in starts if file.path.startswith(start)]
    name = max(inside, key=len, default=file.name)
    if is_local(file.fs):
        yield eye.file("data.files", file.path, name)
    else:
        # What a storage says of a file stands for its bytes: a change of either is one reading more
        yield seen_at("data.files", file.fs, file.path, name)


def _rows(file: _File, told: str | None) -> Iterator[FoundRow]:
    read = _READERS[file.format]
    if told:
        yield file.name, Note(told)
    count = 0
    try:
        for where, row in read(file):
            count += not isinstance(row, Note)
            if isinstance(row, SkippedRow) and row.reason == "not UTF-8":
                row = SkippedRow(row.reason, f"{row.detail}{_encoding_of(file)}")
            yield where, row
    except PipelineError:
        raise
    except FileNotFoundError:
        raise DataError(
            f"data.files: {file.path} is gone, or a link to a file that is not there. Fetch it "
            "again, or take it away"
        ) from None
    except Exception as error:  # a filesystem or a decoder raises what it likes
        raise DataError(
            f"data.files: {file.path} cannot be read: {type(error).__name__}: {error}"
        ) from error
    if not count:
        yield file.path, SkippedRow("empty file", "it has no rows")


def _encoding_of(file: _File) -> str:
    # A table says itself how its text is encoded
    return "" if file.format in ("parquet", "arrow") else f"; {ENCODING}"


def _matches(patterns: Iterable[str]) -> "Iterator[tuple[AbstractFileSystem, str]]":
    from fsspec.core import url_to_fs

    # Each file once, by how many globs and links it is ever reached
    found: dict[str, AbstractFileSystem] = {}
    known: dict[object, str] = {}
    for pattern in patterns:
        try:
            fs, path = url_to_fs(pattern)
            hits = sorted(_hits(fs, path))
            # é may be one letter or two in a name: which, depends on the machine that wrote it
            for form in _FORMS:
                hits = hits or sorted(_hits(fs, unicodedata.normalize(form, path)))
            folders = [] if hits else [path] if fs.isdir(path) else fs.glob(path)
        except Exception as error:  # as above
            raise DataError(
                f"data.files: {pattern} cannot be reached: {type(error).__name__}: {error}"
            ) from error
        if not hits:
            why = "matches no file"
            if folders:
                folder = pattern.rstrip("/")
                what = "is a folder" if fs.isdir(path) else "matches only folders"
                why = f"{what}; write {folder}/*.txt or the like"
            raise DataError(
                f"data.files: {pattern} {why}. Paths start at the configuration file's folder"
            )
        for hit in hits:
            # Whoever opens a pipe waits for somebody to write to it
            if is_local(fs) and is_odd(hit):
                raise DataError(
                    f"data.files: {hit} is a pipe or a device and no file; write what it gives to "
                    "a file, or leave it out"
                )
            found[known.setdefault(_identity(fs, hit), hit)] = fs
    for path, fs in found.items():
        yield fs, path


def _identity(fs: "AbstractFileSystem", path: str) -> object:
    """Return what two paths have in common that lead to one file, by whatever links."""
    if not is_local(fs):
        return path
    real = os.path.realpath(path)
    try:
        about = os.stat(real)  # noqa: PTH116
    except OSError:
        return real
    # Not every network's disk has numbers that tell files apart, but it counts links only where
    # it has them
    return (about.st_dev, about.st_ino) if about.st_nlink > 1 else real


def _hits(fs: "AbstractFileSystem", path: str) -> Iterator[str]:
    """Yield the files that a pattern means; what exists by its very name means itself."""
    # The settings' own folder is escaped already, so that it is found either way
    literal = path.replace("[[]", "[").replace("[*]", "*").replace("[?]", "?")
    if ("[" in literal or "*" in literal) and fs.isfile(literal):
        yield literal
        return
    named = [part for part in path.split("/") if part.startswith(".")]
    for hit in fs.glob(_literal_brackets(fs, path)):
        if not fs.isdir(hit) and not _is_hidden(hit, named):
            yield hit


def _is_hidden(path: str, named: list[str]) -> bool:
    """Whether a part of a path begins with a point that is not in its pattern: as in shells, what
    systems and editors keep beside people's files is not meant."""
    for part in path.split("/"):
        if part.startswith(".") and not any(fnmatchcase(part, each) for each in named):
            return True
    return False


def _literal_brackets(fs: "AbstractFileSystem", path: str) -> str:
    """Return a pattern in which the brackets of folders that there are mean themselves."""
    walked: list[str] = []
    pattern: list[str] = []
    for part in path.split("/"):
        walked.append(part.replace("[[]", "["))
        # Asked of a few only: of a bucket it is a request
        if "[" in part and fs.exists("/".join(walked)):
            part = walked[-1].replace("[", "[[]")
        pattern.append(part)
    return "/".join(pattern)


def _format(path: str) -> str | None:
    """Return the format that a name stands for; None for one that tells none."""
    name = path.lower()
    # A URL may go on after the name of its file
    if "://" in name:
        name = name.partition("?")[0]
    for packed in SUFFIXES:
        name = name.removesuffix(packed)
    suffix = "." + name.rpartition(".")[2]
    return _BY_SUFFIX.get(suffix)


def _text_rows(file: _File) -> Iterator[FoundRow]:
    with open_text(file.fs, file.path, file.entry.encoding) as text:
        if text.note:
            yield text.name, Note(text.note)
        # One byte more than may be held tells whether there is more
        head = text.file.read(STREAM_BYTES + 1)
    if not head:
        return
    # Before its mark is taken off: what is left of a large file could pass for a small one
    is_large = len(head) > STREAM_BYTES
    head = head.removeprefix(codecs.BOM_UTF8)
    size = min(file.data.paragraph_bytes, file.data.max_document_bytes)
    if file.is_split and (is_large or len(head) > size):
        # Read again only where it was not read whole
        yield from _documents(file, _blocks(file) if is_large else [head], size)
    elif is_large:
        yield file.path, {file.data.text_field: LargeFile(partial(_blocks, file))}
    else:
        yield file.path, _document(head, file)


def _documents(file: _File, blocks: Iterable[bytes], size: int) -> Iterator[FoundRow]:
    """Yield the documents, of at most `size` bytes, of a text file that holds many."""
    yield (
        file.name,
        Note(
            f"split at paragraph ends into documents of at most {size:,} bytes; documents: file "
            "beside paths takes each file for one"
        ),
    )
    for number, piece in enumerate(cut(blocks, size, paragraphs=True), 1):
        yield f"{file.path} part {number}", _document(piece, file)


def _document(content: bytes, file: _File) -> Row | SkippedRow:
    if _HOLE in content:
        return SkippedRow("not text", f"byte {content.index(_HOLE)}: zeros")
    try:
        return {file.data.text_field: content.decode()}
    except UnicodeDecodeError as error:
        shown = content[error.start : error.start + _MOST_SHOWN]
        return SkippedRow(
            "not UTF-8",
            f"byte {error.start}: {shown!r}",
        )


def _blocks(file: _File) -> Iterator[bytes]:
    with open_text(file.fs, file.path, file.entry.encoding) as text:
        yield text.file.read(_BLOCK_BYTES).removeprefix(codecs.BOM_UTF8)
        while block := text.file.read(_BLOCK_BYTES):
            yield block


def _lines(file: _File) -> Iterator[FoundRow]:
    return jsonl_rows(file.fs, file.path, file.entry.encoding)


def _json(file: _File) -> Iterator[FoundRow]:
    return json_rows(file.fs, file.path, file.entry.encoding)


def _table(delimiter: str | None) -> "Callable[[_File], Iterator[FoundRow]]":
    def rows(file: _File) -> Iterator[FoundRow]:
        data = file.data
        wanted = filter(None, (data.text_field, data.label_field, data.split_field))
        return csv_rows(file.fs, file.path, file.entry.encoding, tuple(wanted), delimiter)

    return rows


def _parquet(file: _File) -> Iterator[FoundRow]:
    return parquet_rows(file.fs, file.path, file.data)


def _arrow(file: _File) -> Iterator[FoundRow]:
    return arrow_rows(file.fs, file.path, file.data)


_READERS: dict[str, Callable[[_File], Iterator[FoundRow]]] = {
    "text": _text_rows,
    "jsonl": _lines,
    "json": _json,
    "csv": _table(None),
    "tsv": _table("\t"),
    "parquet": _parquet,
    "arrow": _arrow,
}
_BY_SUFFIX = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
