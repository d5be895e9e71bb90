"""Bytes of a file as its readers want them: unpacked, in UTF-8, and whole.

Invariant: a stream that ends before its end is a DataError and never a shorter file. The readers of
the standard library and of zstandard each let some of that pass: a frame that is cut, a damaged
second stream, what follows the first one.
"""

import bz2
import codecs
import io
import lzma
import re
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO, Protocol, cast

from ...errors import DataError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
_BUFFER_BYTES = 1 << 20
# What is unpacked at once. Small, because a thousandfold of it may come out, and is held.
_FEED_BYTES = 4 << 10
_POINTER = b"version https://git-lfs.github.com/spec/"
# What is not text though it may have that name, or be packed as text is: read as such, headers and
# zeros between the files of an archive would be learned
_NO_TEXT: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (re.compile(rb"(?s).{257}ustar"), "an archive of files (tar), which has to be unpacked"),
    (re.compile(rb"PK\x03\x04"), "an archive of files (zip), which has to be unpacked"),
    (re.compile(rb"7z\xbc\xaf\x27\x1c|Rar!\x1a\x07"), "an archive, which has to be unpacked"),
    (re.compile(rb"\x04\x22\x4d\x18"), "packed with lz4, which has to be unpacked"),
    (re.compile(rb"\x1f\x9d|LZIP\x01"), "packed in a way that is not read, so unpack it"),
    (
        re.compile(rb"WARC/1\.\d\r?\n"),
        "records of a web archive (WARC), whose texts have to be taken out, to one JSON row a line",
    ),
    (re.compile(rb"PAR1"), "a Parquet file: say format: parquet beside paths"),
    (re.compile(rb"ARROW1"), "an Arrow file: say format: arrow beside paths"),
    (re.compile(rb"SQLite format 3\0"), "a data base: export its rows as CSV or JSON Lines"),
    (
        re.compile(rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"),
        "a document of an office program: save it as text or CSV",
    ),
    (re.compile(rb"%PDF-\d"), "a PDF file, whose text has to be taken out"),
)
# Archives of the longest texts are packed with windows of 2 GB; only such a file takes that memory
_ZSTD_WINDOW_BYTES = 1 << 31
_HEAD_BYTES = 4096  # enough to tell an encoding
# Of every second byte in text of two bytes a character that has no mark; in other text none is zero
_ZEROS = 0.4


class _Decompressor(Protocol):
    """One stream of a packed file, as zlib, bz2, lzma and zstandard have it."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def _gzip() -> _Decompressor:
    # 16 more than the largest window: with the header and the checksum of gzip
    return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)


def _zstd() -> _Decompressor:
    from zstandard import ZstdDecompressor

    packing = ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
    return cast(_Decompressor, packing.decompressobj())


# By how such a file begins; the last also by a frame that is skipped, which parallel packers write
_PACKINGS: tuple[tuple[re.Pattern[bytes], Callable[[], _Decompressor]], ...] = (
    (re.compile(rb"\x1f\x8b\x08"), _gzip),
    (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), bz2.BZ2Decompressor),
    (re.compile(rb"\xfd7zXZ\x00"), lzma.LZMADecompressor),
    (re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), _zstd),
)
# The longer ones first: that of UTF-16 begins that of UTF-32
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class Contents:
    """An open file's contents in UTF-8, and what to say about how it was stored."""

    def __init__(self, file: io.BufferedReader, path: str, note: str):
        self.file = file
        self.name = path.rpartition("/")[2]  # what is told is the same wherever a file lies
        self.note = note

    def __enter__(self) -> "Contents":
        return self

    def __exit__(self, *_error: object) -> None:
        self.file.close()


def open_text(fs: "AbstractFileSystem", path: str, encoding: str | None) -> Contents:
    """Open a file of text, packed or not, to be read as UTF-8; `encoding` where it is another.

    Raises DataError for a file that is not what its name says, and while it is read for one that is
    torn. Bytes that are no text in the encoding are left as they are, for the one row that has
    them.
    """
    file = open_unpacked(fs, path)
    head = file.peek(_HEAD_BYTES)[:_HEAD_BYTES]
    _refuse_no_text(head, path)
    found = _encoding(head)
    wanted = encoding or found or "utf-8"
    if codecs.lookup(wanted).name in ("utf-8", "utf-8-sig"):
        return Contents(file, path, "")
    recoded: io.BufferedReader = io.BufferedReader(_Recoded(file, path, wanted), _BUFFER_BYTES)
    note = "" if encoding else f"read as {wanted}, for so the file begins"
    return Contents(recoded, path, note)


def open_unpacked(fs: "AbstractFileSystem", path: str) -> io.BufferedReader:
    """Open a file, to be read from its start to its end. Raises DataError as open_text does."""
    file: io.BufferedReader = io.BufferedReader(_Plain(fs.open(path, "rb")), _BUFFER_BYTES)
    head = file.peek(_HEAD_BYTES)
    refuse_pointer(head, path)
    # By what it holds: a server may have unpacked it on the way, and a name may be wrong
    for begins, kind in _PACKINGS:
        if begins.match(head):
            return io.BufferedReader(_Unpacked(file, path, kind), _BUFFER_BYTES)
    if is_packed(path):
        what = "does not begin as a packed file of its name does" if head else "is empty"
        raise DataError(
            f"data.files: {path} cannot be read: it {what}. Fetch it again, or give it the name of "
            "what it holds"
        )
    return file


def is_packed(path: str) -> bool:
    """Whether a file is packed, by its name."""
    return path.lower().endswith(SUFFIXES)


def refuse_pointer(head: bytes, path: str) -> None:
    """Raise DataError where a file is what git-lfs leaves until it has fetched the contents."""
    if head.startswith(_POINTER):
        raise DataError(
            f"data.files: {path} holds a pointer of git-lfs and not its contents. Fetch them with "
            "`git lfs pull` in its repository, or download the file itself"
        )


def _refuse_no_text(head: bytes, path: str) -> None:
    for begins, _ in _PACKINGS:
        if begins.match(head):
            raise DataError(
                f"data.files: {path} is packed twice, one packing inside the other; unpack it once"
            )
    for begins, what in _NO_TEXT:
        if begins.match(head):
            raise DataError(f"data.files: {path} holds no text. It is {what}")


def _encoding(head: bytes) -> str | None:
    """Return how a text that begins so is encoded; None for UTF-8, or what cannot be told."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    # Without a mark, Latin text of two bytes a character is zero in every second one. Taken for
    # UTF-8 it would be valid, and every other character a zero.
    for offset, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        half = head[offset::2]
        # Zeros in the others too are no text at all
        others = head[1 - offset :: 2].count(0)
        if len(head) >= 8 and half.count(0) > _ZEROS * len(half) > 0 and others < half.count(0) / 8:
            return name
    return None


class _ByteStream(io.RawIOBase):
    """A stream that `_more` gives piece by piece."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, target: memoryview, /) -> int:  # type: ignore[override]
        if not self._ready:
            self._ready = memoryview(self._more())
        count = min(len(target), len(self._ready))
        target[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _more(self) -> bytes:
        """Return the next bytes, none at the end."""
        raise NotImplementedError


class _Plain(_ByteStream):
    """A file as it is: what file systems open can all be read, but few have the rest of a file."""

    def _more(self) -> bytes:
        return self._file.read(_BUFFER_BYTES)


class _Unpacked(_ByteStream):
    """What a packed file holds: any number of streams one after the other, each of them whole."""

    def __init__(self, file: BinaryIO, path: str, kind: Callable[[], _Decompressor]):
        super().__init__(file)
        self._path = path
        self._kind = kind
        self._stream: _Decompressor | None = kind()
        self._packed = b""

    def _more(self) -> bytes:
        while True:
            packed = self._packed or self._file.read(_FEED_BYTES)
            self._packed = b""
            if not packed and self._stream is None:
                return b""
            if not packed:
                raise DataError(
                    f"data.files: {self._path} cannot be read: its packed contents end before "
                    "their end, so the file is torn. Fetch or pack it again"
                )
            if self._stream is None:
                # Tapes and some packers fill up with zeros
                packed = packed.lstrip(b"\0")
                if not packed:
                    continue
                self._stream = self._kind()
            unpacked = self._unpack(self._stream, packed)
            if unpacked:
                return unpacked

    def _unpack(self, stream: _Decompressor, packed: bytes) -> bytes:
        try:
            unpacked = stream.decompress(packed)
        except Exception as error:  # each library has its own
            raise DataError(
                f"data.files: {self._path} cannot be read: its packed contents are damaged "
                f"({error}). Fetch or pack it again"
            ) from error
        if stream.eof:
            self._packed = stream.unused_data
            self._stream = None
        return unpacked


class _Recoded(_ByteStream):
    """Text of another encoding in UTF-8."""

    def __init__(self, file: BinaryIO, path: str, encoding: str):
        super().__init__(file)
        self._path = path
        self._encoding = encoding
        # What is no text stays as it was, in a form that is no UTF-8: the row that has it is
        # dropped for it, and no other
        wide = codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))
        self._errors = "surrogatepass" if wide else "surrogateescape"
        self._decoder = codecs.getincrementaldecoder(encoding)(self._errors)

    def _more(self) -> bytes:
        while True:
            block = self._file.read(_BUFFER_BYTES)
            try:
                text = self._decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"data.files: {self._path} cannot be read as {self._encoding}: {error.reason}. "
                    "The file is torn, or its entry wants another encoding"
                ) from error
            if text or not block:
                return text.encode("utf-8", self._errors)
