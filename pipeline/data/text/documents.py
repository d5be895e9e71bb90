"""Documents of any source as one stream of pieces, with what was dropped counted and named.

Invariant: nothing here holds more than one block of one file; a document's key depends only on its
text (ASCII white space aside) and data.seed, so equal documents always carry equal keys.
"""

import codecs
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from ...config.text_data import TextRunConfig
from ..drop_stats import DropStats
from ..sources.text import LargeFile, Rows, SkippedRow, sources

EARLY = 10_000  # documents after which a wrong column name is reported without reading on
# Reasons that do not tell of a wrong setting or a damaged file
HARMLESS = frozenset(
    {"empty", "too short", "other label", "over the limit", "equals a held-out document"}
)
SPLITS = ("train", "valid", "test")
_SPLIT_NAMES = {name: name for name in SPLITS} | {
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
}
_WHITE = b" \t\n\r\x0b\x0c"


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


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in the stream of documents from which it can be read on as if it had been read up to
    there."""

    source: int = 0
    file: int = 0  # of the source
    row: int = 0  # of the file
    piece: int = 0  # of the row's document
    read: tuple[
        tuple[str, str | None, int], ...
    ] = ()  # label, split and bytes before the row; only under a limit


def drop_stats() -> DropStats:
    """Return counts of what a reading of documents drops, none so far."""
    return DropStats(HARMLESS)


def documents(cfg: TextRunConfig, stats: DropStats) -> Iterator[Document]:
    """Yield every usable piece in a fixed order and count the rest in stats.

    Raises DataError for a source that cannot be read, or whose documents mostly cannot.
    """
    return iter(Stream(cfg, stats))


class Stream:
    """The documents of a configuration, to be read once: all of them, or those from a mark on.

    Only one that starts at the beginning judges how many could not be read. What lies before a mark
    is skipped: whole files unopened, the rows of its own file read and not looked at.
    """

    def __init__(self, cfg: TextRunConfig, stats: DropStats, start: Cursor | None = None):
        self.cfg, self.stats, self.start = cfg, stats, start or Cursor()
        self._whole, self._at = start is None, (0, 0, 0)
        self._reader = _Reader(cfg, stats, self.start.read, judging=self._whole)

    def mark(self, document: Document) -> Cursor:
        """Return where the stream starts with this document, the last one it has given."""
        return Cursor(*self._at, document.piece, self._reader.read_before())

    @property
    def other_labels(self) -> Counter[str]:
        """Documents by label of those that partition.domains does not name, so far."""
        return self._reader.other_labels

    def __iter__(self) -> Iterator[Document]:
        for source, (label, files) in enumerate(sources(self.cfg)):
            if source >= self.start.source:
                yield from self._source(source, label, files)
        if self._whole:
            _check(self.stats, self.cfg.data.max_bad_share)

    def _source(self, source: int, label: str | None, files: Iterable[Rows]) -> Iterator[Document]:
        first = self.start.source, self.start.file, self.start.row
        for file, rows in enumerate(files):
            if (source, file) < first[:2]:
                continue
            skipped = self.start.row if (source, file) == first[:2] else 0
            for row, (where, found) in enumerate(islice(rows(), skipped, None), skipped):
                self._at = source, file, row
                pieces = self._reader.accept(where, found, label)
                yield from islice(pieces, self.start.piece if self._at == first else 0, None)
                if self._reader.done(label):
                    return


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
    return int.from_bytes(_hasher(seed, purpose, [text.translate(None, _WHITE)]).digest(), "little")


def _hasher(seed: int, purpose: bytes, blocks: Iterable[bytes]):
    out = hashlib.blake2b(digest_size=8, key=str(seed).encode(), person=purpose)
    for block in blocks:
        out.update(block)
    return out


def cut(blocks: Iterable[bytes], max_bytes: int) -> Iterator[str]:
    """Yield pieces of at most max_bytes of the UTF-8 in blocks, ended at a line, else a space, else
    a character."""
    rest = b""
    for block in blocks:
        rest, start = rest + block, 0
        while len(rest) - start > max_bytes:
            end = _boundary(rest, start, start + max_bytes)
            yield rest[start:end].decode()
            start = end
        rest = rest[start:]
    if rest:
        yield rest.decode()


def _boundary(text: bytes, start: int, end: int) -> int:
    for mark in (b"\n", b" "):
        found = text.rfind(mark, (start + end) // 2, end)
        if found >= 0:
            return found + 1
    while text[end] & 0xC0 == 0x80:  # a continuation byte: the character began before it
        end -= 1
    return end


class _Reader:
    """Turns rows into documents under one run's rules."""

    def __init__(
        self,
        cfg: TextRunConfig,
        stats: DropStats,
        read: Iterable[tuple[str, str | None, int]],
        judging: bool,
    ):
        self.data, self.stats, self.judging = cfg.data, stats, judging
        self.keep = frozenset(cfg.partition.domains) if cfg.partition.by == "labels" else None
        self.bytes = Counter({(label, split): size for label, split, size in read})  # read so far
        self.other_labels: Counter[str] = Counter()  # of documents dropped for their label
        self._before = {}  # what the row at hand has changed of that, as it was

    def read_before(self) -> tuple[tuple[str, str | None, int], ...]:
        """Return the bytes by label and split before the row at hand; none where no limit asks for
        them."""
        if not self.data.megabytes_per_domain:
            return ()
        return tuple(
            (label, split, size)
            for (label, split), size in (dict(self.bytes) | self._before).items()
        )

    def accept(self, where: str, row, label: str | None) -> Iterator[Document]:
        """Yield the row's pieces, or count why there are none."""
        if self.judging and self.stats.seen == EARLY and self.stats.bad > EARLY / 2:
            _check(self.stats, self.data.max_bad_share)
        self.stats.seen += 1
        found = row if isinstance(row, SkippedRow) else self._fields(row, label)
        if isinstance(found, SkippedRow):
            return self.stats.drop(found.reason, where, found.detail)
        text, label, split = found
        if self.keep is not None and label not in self.keep:
            if len(self.other_labels) < 1000 or label in self.other_labels:
                self.other_labels[label] += 1
            return self.stats.drop("other label", where, label)
        if self._full(label, split):
            return self.stats.drop("over the limit", where)
        self._before = {(label, split): self.bytes[label, split]}
        yield from self._pieces(where, text, label, split)

    def done(self, label: str | None) -> bool:
        """Say whether the rest of a source with this fixed label (none: of any) would be over the
        limit."""
        if not self.data.megabytes_per_domain:
            return False
        labels = [label] if label else sorted(self.keep) if self.keep else [""]
        splits = SPLITS if self.data.split_field else (None,)
        return all(self._full(one, split) for one in labels for split in splits)

    def _full(self, label: str, split: str | None) -> bool:
        if not self.data.megabytes_per_domain:
            return False
        held = {"valid": self.data.valid_share, "test": self.data.test_share}
        share = 1.0 if split is None else held.get(split, 1.0 - sum(held.values()))
        return self.bytes[label, split] >= share * self.data.megabytes_per_domain * 1e6

    def _fields(self, row: dict, label: str | None):
        data, text = self.data, row.get(self.data.text_field)
        if not isinstance(text, (str, LargeFile)):
            return SkippedRow(
                "no text",
                f"{data.text_field} is {'missing' if text is None else type(text).__name__}",
            )
        if label is None:
            label = row.get(data.label_field) if self.keep is not None else ""
            if not isinstance(label, str) or (self.keep is not None and not label):
                return SkippedRow("no label", f"{data.label_field} is {label!r}")
        split = None
        if data.split_field:
            split = _SPLIT_NAMES.get(str(row.get(data.split_field)).lower())
            if split is None:
                return SkippedRow(
                    "unknown split", f"{data.split_field} is {row.get(data.split_field)!r}"
                )
        return text, label, split

    def _pieces(self, where: str, text, label: str, split: str | None) -> Iterator[Document]:
        if isinstance(text, LargeFile):
            try:
                key, blocks = self._long_key(text), text.blocks()
            except UnicodeDecodeError as error:
                return self.stats.drop("not UTF-8", where, error.reason)
        else:
            try:
                raw = text.encode()
            except UnicodeEncodeError as error:
                return self.stats.drop("not UTF-8", where, error.reason)
            if len(raw) < self.data.min_document_bytes or not text.strip():
                return self.stats.drop("too short" if text.strip() else "empty", where)
            key, blocks = key_of(raw, self.data.seed), [raw]
            if len(raw) <= self.data.max_document_bytes:
                self.bytes[label, split] += len(raw)
                yield Document(text, len(raw), key, 0, label, split, where)
                return
        base = Document("", 0, key, 0, label, split, where)
        for number, piece in enumerate(cut(blocks, self.data.max_document_bytes)):
            if self._full(label, split):  # one endless document must not pass the limit either
                return
            size = len(piece.encode())
            self.bytes[label, split] += size
            yield replace(base, text=piece, bytes=size, piece=number)

    def _long_key(self, text: LargeFile) -> int:
        decoder = codecs.getincrementaldecoder("utf-8")()
        hasher = _hasher(self.data.seed, b"", ())
        for block in text.blocks():
            decoder.decode(block)
            hasher.update(block.translate(None, _WHITE))
        decoder.decode(b"", final=True)
        return int.from_bytes(hasher.digest(), "little")
