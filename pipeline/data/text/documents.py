"""Documents of any source as one stream of pieces, with what was dropped counted and named.

Invariant: nothing here holds more than one block of one file; a document's key depends only on its
text (ASCII white space aside) and data.seed, so equal documents always carry equal keys. Which
documents a domain has depends on no other domain.
"""

import codecs
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from ...config.labels import label_text
from ...config.text_data import DataConfig, TextRunConfig
from ..cut import cut
from ..drop_stats import DropStats
from ..sources import ENCODING, LargeFile, Note, Row, SkippedRow, SourceFile
from ..sources.columns import brief, listed, split_named, value_at
from ..sources.text import sources

EARLY = 10_000  # documents after which a wrong column name is reported without reading on
# Reasons that do not tell of a wrong setting or a damaged file
HARMLESS = frozenset(
    {
        "empty",
        "empty file",
        "too short",
        "other label",
        "over the limit",
        "equals a held-out document",
        "equals a document that an earlier split or domain has",
    }
)
SPLITS = ("train", "valid", "test")
DIGEST_BYTES = 16
_WHITE = b" \t\n\r\x0b\x0c"
_MOST_OTHER_LABELS = 1000  # a column of free text must not fill memory
_MOST_INNER = 12  # names inside a column; more are rows, written by column
_Share = tuple[str, str | None]  # label and given split, which have a limit of their own
Place = tuple[int, int]  # number of a source, and of a file in it


@dataclass(frozen=True, slots=True)
class Document:
    """A document, or one piece of a long one."""

    text: str
    bytes: int  # of text in UTF-8
    key: int  # 64-bit keyed hash of the whole document
    piece: int  # 0 for the first
    label: str  # "" when nothing names one
    split: str | None  # as given by data.split_field
    where: str
    digest: str = ""  # of the whole document's bytes, hexadecimal


@dataclass(frozen=True)
class Part:
    """The part of all documents that a job reads."""

    domains: frozenset[str]  # rows with other labels are none of its business
    files: frozenset[Place]  # others are not opened


def drop_stats() -> DropStats:
    """Return counts of what a reading of documents drops, none so far."""
    return DropStats(HARMLESS)


def documents(cfg: TextRunConfig, stats: DropStats, part: Part | None = None) -> Iterator[Document]:
    """Yield every usable piece in a fixed order and count the rest in stats; of a part of them
    alone where one is given.

    Raises DataError for a source that cannot be read, or whose documents mostly cannot.
    """
    reader = _Reader(cfg, stats, part)
    for source, (label, files) in enumerate(sources(cfg)):
        for number, file in enumerate(files):
            if part is None or (source, number) in part.files:
                yield from reader.read(file, label)
                if reader.done(label):
                    break
    _check(stats, cfg.data.max_bad_share)


def documents_of(
    cfg: TextRunConfig,
    stats: DropStats,
    others: Counter[str],
    file: SourceFile,
    label: str | None,
) -> Iterator[Document]:
    """Yield the pieces of one file, for itself, and count in `others` the labels that no domain
    has; whoever makes tokens judges how many documents cannot be read."""
    reader = _Reader(cfg, stats)
    reader.other_labels = others
    return reader.read(file, label)


def _check(stats: DropStats, max_bad_share: float) -> None:
    stats.check(
        max_bad_share,
        "documents cannot be read",
        "data.max_bad_share",
        "Mend the files, set data.text_field, data.label_field or data.split_field to the columns "
        "they have, or raise data.max_bad_share",
    )


def key_of(text: bytes, seed: int, purpose: bytes = b"") -> int:
    """Return a 64-bit hash of text without its ASCII white space, keyed by seed and purpose."""
    hasher = _hasher(seed, purpose)
    hasher.update(text.translate(None, _WHITE))
    return int.from_bytes(hasher.digest(), "little")


def _digester() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=DIGEST_BYTES)


def _hasher(seed: int, purpose: bytes = b"") -> hashlib.blake2b:
    key = str(seed).encode()
    return hashlib.blake2b(digest_size=8, key=key, person=purpose)


def _columns(row: Row, wanted: str = "") -> str:
    for name, value in row.items():
        # One object around all rows, as some write JSON
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(first, dict) and wanted in first:
            return f"{name} is a list of rows, which has to be a file of its own"
    return f"the columns are {listed(row)}"


def _no_letters(error: UnicodeEncodeError) -> str:
    """Return what is wrong with a text that has half a character."""
    # Readers keep bytes that are no text as such halves
    if 0xDC80 <= ord(error.object[error.start]) <= 0xDCFF:
        return f"character {error.start + 1}; {ENCODING}"
    return f"character {error.start + 1} is half a surrogate"


def _no_text(name: str, value: object) -> str:
    """Return what is wrong with what stands where a text should."""
    if value is None:
        return f"{name} is missing"
    if isinstance(value, dict) and len(value) <= _MOST_INNER:
        first = next(iter(value), "")
        return f"{name} holds {listed(value)}: name the one that is meant, {name}.{first} or so"
    if isinstance(value, list | dict):
        return f"{name} is a list of {len(value)}, and a row needs one text"
    return f"{name} is {brief(repr(value))}"


def limits(data: DataConfig) -> dict[str | None, float]:
    """Return the bytes after which a label is full, by split; None is that of no given split."""
    megabytes = data.megabytes_per_domain or math.inf
    # Where splits are given, each has its share of the limit: held-out rows may all come last
    shares = {
        None: 1.0,
        "train": 1.0 - (data.valid_share + data.test_share),
        "valid": data.valid_share,
        "test": data.test_share,
    }
    return {split: share * megabytes * 1e6 for split, share in shares.items()}


class _Fields(NamedTuple):
    """What is read of a row."""

    text: str | LargeFile
    label: str
    split: str | None


class _Reader:
    """Turns rows into documents under one run's rules."""

    def __init__(self, cfg: TextRunConfig, stats: DropStats, part: Part | None = None):
        self.data = cfg.data
        self.stats = stats
        by_label = cfg.partition.by == "labels"
        self.keep = frozenset(cfg.partition.domains) if by_label else None
        # Of a part, which labels other domains have must not show in what is counted
        self.is_part = part is not None and by_label
        self.wanted = part.domains if part is not None and by_label else self.keep
        self._domain_of = cfg.partition.domain_of if by_label else {}
        self._in_small_letters = {label.casefold(): label for label in self._domain_of}
        self.other_labels: Counter[str] = Counter()  # of documents dropped for their label
        self._limits = limits(cfg.data)
        self.bytes: Counter[_Share] = Counter()  # read so far

    def read(self, file: SourceFile, label: str | None) -> Iterator[Document]:
        """Yield the pieces of one file whose rows have this label, if one is given."""
        for where, found in file.rows():
            if isinstance(found, Note):
                self.stats.note(found.text, where)
                continue
            yield from self.accept(where, found, label)
            if self.done(label):
                return

    def accept(self, where: str, row: Row | SkippedRow, label: str | None) -> Iterator[Document]:
        """Yield the row's pieces, or count why there are none."""
        stats = self.stats
        if stats.seen == EARLY and stats.bad > EARLY / 2:
            _check(stats, self.data.max_bad_share)
        stats.seen += 1
        found = self._fields(where, row, label)
        if found is None:
            return
        if isinstance(found, SkippedRow):
            stats.drop(found.reason, where, found.detail)
            return
        label = found.label
        split = found.split
        if self._full(label, split):
            stats.drop("over the limit", where)
            return
        yield from self._pieces(where, found)

    def done(self, label: str | None) -> bool:
        """Say whether the rest of a source with this fixed label (none: of any) would be over the
        limit."""
        if not self.data.megabytes_per_domain:
            return False
        labels = [""]
        if label:
            labels = [label]
        elif self.wanted:
            labels = sorted(self.wanted)
        splits: tuple[str | None, ...] = SPLITS if self.data.split_field else (None,)
        return all(self._full(one, split) for one in labels for split in splits)

    def _full(self, label: str, split: str | None) -> bool:
        return self.bytes[label, split] >= self._limits[split]

    def _fields(
        self, where: str, row: Row | SkippedRow, label: str | None
    ) -> _Fields | SkippedRow | None:
        """Return text, label and given split of a row, or what it lacks; None for one that is of
        another part."""
        if isinstance(row, SkippedRow):
            return row
        data = self.data
        text = value_at(row, data.text_field)
        if isinstance(text, bytes):
            try:
                text = text.decode()
            except UnicodeDecodeError as error:
                return SkippedRow("not UTF-8", f"byte {error.start}: {error.reason}")
        if not isinstance(text, (str, LargeFile)):
            what = _no_text(data.text_field, text)
            return SkippedRow("no text", f"{what}; {_columns(row, data.text_field)}")
        domain = label
        if label is None:
            given = value_at(row, data.label_field)
            label = label_text(given)
            domain = self._domain_of.get(label or "")
        # Only a partition by labels needs one; others must not refuse rows without it
        if self.keep is None:
            domain = domain or ""
        elif label is None:
            detail = f"{data.label_field} is {brief(repr(given))}; {_columns(row)}"
            return SkippedRow("no label", detail)
        elif domain not in self.keep:
            meant = self._in_small_letters.get(label.casefold())
            if meant and self._domain_of[meant] in (self.wanted or ()):
                self.stats.note(
                    f"the label {brief(label)} is left out, for partition.domains has "
                    f"{brief(meant)}; where they are one, list both under partition.labels",
                    where,
                )
            if self.is_part:
                return None
            self._count_other(label)
            return SkippedRow("other label", brief(label))
        elif domain not in (self.wanted or ()):
            return None
        split = None
        if data.split_field:
            given = value_at(row, data.split_field)
            split = split_named(str(given))
            if split is None:
                return SkippedRow("unknown split", f"{data.split_field} is {brief(repr(given))}")
        return _Fields(text, domain or "", split)

    def _count_other(self, label: str) -> None:
        if len(self.other_labels) < _MOST_OTHER_LABELS or label in self.other_labels:
            self.other_labels[label] += 1

    def _pieces(self, where: str, fields: _Fields) -> Iterator[Document]:
        text, label, split = fields
        blocks: Iterable[bytes]
        if isinstance(text, LargeFile):
            try:
                key, digest = self._hashes_of_blocks(text)
            except UnicodeDecodeError as error:
                self.stats.drop("not UTF-8", where, f"{error.reason}; {ENCODING}")
                return
            blocks = text.blocks()
        else:
            try:
                raw = text.encode()
            except UnicodeEncodeError as error:
                self.stats.drop("not UTF-8", where, _no_letters(error))
                return
            if not text.strip():
                self.stats.drop("empty", where)
                return
            if len(raw) < self.data.min_document_bytes:
                self.stats.drop("too short", where)
                return
            key = key_of(raw, self.data.seed)
            hasher = _digester()
            hasher.update(raw)
            digest = hasher.hexdigest()
            # Nearly every document: one piece, its text handed on as it is
            if len(raw) <= self.data.max_document_bytes:
                self.bytes[label, split] += len(raw)
                yield Document(text, len(raw), key, 0, label, split, where, digest)
                return
            blocks = [raw]
        base = Document("", 0, key, 0, label, split, where, digest)
        for number, piece in enumerate(cut(blocks, self.data.max_document_bytes)):
            if self._full(label, split):  # one endless document must not pass the limit either
                return
            self.bytes[label, split] += len(piece)
            yield replace(base, text=piece.decode(), bytes=len(piece), piece=number)

    def _hashes_of_blocks(self, text: LargeFile) -> tuple[int, str]:
        """Return what key_of gives for the whole text, and the digest of its bytes. Raises
        UnicodeDecodeError."""
        # Decoded only to find what is not UTF-8 before the first piece of it is given
        decoder = codecs.getincrementaldecoder("utf-8")()
        hasher = _hasher(self.data.seed)
        digester = _digester()
        for block in text.blocks():
            decoder.decode(block)
            hasher.update(block.translate(None, _WHITE))
            digester.update(block)
        decoder.decode(b"", final=True)
        return int.from_bytes(hasher.digest(), "little"), digester.hexdigest()
