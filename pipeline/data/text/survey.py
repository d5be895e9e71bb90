"""What documents there are: found by one reading of each file, and known from then on.

Invariant: what is kept of a file is a function of its bytes and of the settings that it is read by,
never of its name or of the files beside it; so an edit costs a reading of the edited file alone.
Memory holds a block of rows, the keys of small domains and of what is given as held out, never a
key of every document.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from ...config.text_data import DataConfig, TextRunConfig
from ...errors import DataError
from ...protocols import Eye
from ...store.looking import ODD, UNREACHABLE
from ...store.sources import TEXT
from ..sources import SourceFile
from ..sources.text import sources
from .documents import DIGEST_BYTES, SPLITS, Document, Part, Place, limits
from .records import CODES, NO_ROWS, FileDocuments, Reading, Records

_TOLD = 5  # labels that no domain has
_FORMAT = 1  # raised when the same bytes come to have other documents
# What a domain's print is made of, document by document
_PRINTED = np.dtype([("split", "u1"), ("digest", "u1", DIGEST_BYTES)])


class Share(NamedTuple):
    """A label and a given split, which have a limit of their own."""

    label: str
    split: int


@dataclass
class Limits:
    """Counts bytes by label and split, and says which documents a limit lets in."""

    data: DataConfig
    read: Counter[Share] = field(default_factory=Counter)

    def take(self, rows: ndarray, labels: tuple[str, ...]) -> ndarray:
        """Return which of the rows (D,) are read, counted; D documents."""
        if not self.data.megabytes_per_domain:
            return np.ones(len(rows), bool)
        taken = np.zeros(len(rows), bool)
        for number, label in enumerate(labels):
            for code in CODES.values():
                own = np.flatnonzero((rows["label"] == number) & (rows["split"] == code))
                if not own.size:
                    continue
                share = Share(label, code)
                # A document is read where what came before it has not filled the limit
                after = self.read[share] + np.cumsum(rows["bytes"][own], dtype=np.int64)
                before = np.concatenate([[self.read[share]], after[:-1]])
                fits = own[before < self._most(code)]
                taken[fits] = True
                if fits.size:
                    self.read[share] = int(after[fits.size - 1])
        return taken

    def full(self, labels: Iterator[str]) -> bool:
        """Whether nothing more of some labels would be read."""
        if not self.data.megabytes_per_domain:
            return False
        codes = [code for code in CODES.values() if bool(code) == bool(self.data.split_field)]
        return all(
            self.read[Share(label, code)] >= self._most(code) for label in labels for code in codes
        )

    def _most(self, code: int) -> float:
        return limits(self.data)[SPLITS[code - 1] if code else None]


class Survey:
    """The documents of a run's sources: which file has those of which domain."""

    def __init__(self, cfg: TextRunConfig, files: list[FileDocuments]):
        self.cfg = cfg
        self.files = files
        self.by_label = cfg.partition.by == "labels"
        self._known: dict[str | None, _Contents] = {}

    @property
    def labels(self) -> list[str]:
        """The labels that there are documents of."""
        return sorted({label for file in self.files for label in file.labels})

    @property
    def others(self) -> Counter[str]:
        """Documents by a label that no domain has, the most frequent."""
        return sum((file.others for file in self.files), Counter())

    def part(self, *domains: str) -> Part:
        """Return what a job of some domains reads: the files that hold their documents, and those
        that hold nobody's, whose faults count for all."""
        places = set()
        for file in self.files:
            if any(self.is_of(file, domain) for domain in domains):
                places.add(file.place)
        return Part(frozenset(domains), frozenset(places))

    def is_of(self, file: FileDocuments, domain: str) -> bool:
        """Whether a job of a domain reads a file."""
        if not self.by_label or domain in file.labels:
            return True
        return not file.labels and file.may_hold(domain)

    def rows(self, domain: str | None) -> Iterator[ndarray]:
        """Yield the documents of a domain (none: of all) in order, as records have them, a block at
        a time."""
        counted = Limits(self.cfg.data)
        for file in self.files:
            labels = file.labels
            if domain is not None and domain not in labels:
                continue
            for block in file.blocks():
                if domain is not None:
                    block = block[block["label"] == labels.index(domain)]
                yield block[counted.take(block, labels)]

    def print_of(self, domain: str | None) -> str:
        """Return the print of a domain's documents (none: of all): their texts and given splits in
        order."""
        return self._contents(domain).print

    def count(self, domain: str | None) -> int:
        """Return how many documents a domain has (none: all)."""
        return self._contents(domain).documents

    def bytes(self, domain: str | None) -> int:
        """Return how many bytes of UTF-8 a domain has (none: all)."""
        return self._contents(domain).bytes

    def _contents(self, domain: str | None) -> "_Contents":
        if domain not in self._known:
            self._known[domain] = self._counted(domain)
        return self._known[domain]

    def _counted(self, domain: str | None) -> "_Contents":
        printed = Print()
        documents = 0
        size = 0
        for block in self.rows(domain):
            printed.add_rows(block)
            documents += len(block)
            size += int(block["bytes"].sum())
        for file in self.files:
            if file.unread and (domain is None or file.may_hold(domain)):
                printed.add_unread(file.unread)
        return _Contents(documents, size, printed.text)


@dataclass(frozen=True)
class _Contents:
    documents: int
    bytes: int
    print: str


class Print:
    """What tells documents apart from all others: their texts and given splits, in order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add_rows(self, rows: ndarray) -> None:
        """Add documents (D,) as a survey has them; D documents."""
        printed = np.empty(len(rows), _PRINTED)
        for name in _PRINTED.names or ():
            printed[name] = rows[name]
        self._hash.update(printed.tobytes())

    def add(self, document: Document) -> None:
        """Add a document by its first piece; others count for nothing."""
        if not document.piece:
            self._hash.update(bytes([CODES[document.split]]) + bytes.fromhex(document.digest))

    def add_unread(self, version: str) -> None:
        """Add a file of which nothing is known but which one it is."""
        self._hash.update(f"unread {version}".encode())

    @property
    def text(self) -> str:
        """Its sha256, hexadecimal."""
        return self._hash.hexdigest()


def survey(cfg: TextRunConfig, eye: Eye) -> Survey:
    """Return what documents there are, reading files that were not read before; the eye's folder
    keeps what was found.

    Where the eye does not fetch, what is far away and was not read before is known by its version
    alone. Raises DataError for sources that are not as asked; a file that cannot be read is known
    by its sum alone, and told by whoever needs its documents.
    """
    records = Records(eye.folder and eye.folder / TEXT)
    counted = Limits(cfg.data)
    kept = cfg.partition.names if cfg.partition.by == "labels" else ("",)
    found: list[FileDocuments] = []
    beyond: list[Iterator[SourceFile]] = []
    for source, (label, files) in enumerate(sources(cfg)):
        for number, file in enumerate(files):
            place = (source, number)
            each = _of_file(cfg, records, place, label, file, eye)
            found.append(each)
            for block in each.blocks():
                counted.take(block, each.labels)
            # What follows would be over the limit, and need not be read to know it
            if counted.full(iter((label,) if label else kept)):
                beyond.append(files)
                break
    records.save()
    there = Survey(cfg, found)
    if records.has_read and there.others:
        named = ", ".join(f"{label} {count:,}" for label, count in there.others.most_common(_TOLD))
        eye.progress(f"documents left out, as no domain has their label: {named}", None)
    # Counted only where it is told: there may be many thousands
    unread = sum(1 for files in beyond for _ in files) if records.has_read else 0
    if unread:
        eye.progress(_over_the_limit(cfg, len(found), unread), None)
    return there


def _over_the_limit(cfg: TextRunConfig, read: int, unread: int) -> str:
    told = (
        f"data.megabytes_per_domain is reached after {read:,} of {read + unread:,} files, and the "
        "others are not read"
    )
    if cfg.partition.by == "clusters" and cfg.data.source == "files":
        # Clusters are found in what was read
        told += (
            ": all files of an entry without `domain` share one limit; raise it, or give each kind "
            "of text an entry of data.files with a `domain`, which has a limit of its own"
        )
    return told


def _of_file(
    cfg: TextRunConfig,
    records: Records,
    place: Place,
    label: str | None,
    file: SourceFile,
    eye: Eye,
) -> FileDocuments:
    seen = tuple(file.seen(eye))
    # A file is its bytes, whatever it is called; of many the names are part of what there is
    version = (
        seen[0].sum if len(seen) == 1 else json.dumps([[each.name, each.sum] for each in seen])
    )
    key = _key(cfg, label, file, version)
    known = records.read(key, place, label)
    if known is None:
        nothing = FileDocuments(place, label, (), NO_ROWS, Counter(), unread=version)
        known = nothing
        # A pipe would be waited for
        is_odd = any(each.sum in (*ODD, UNREACHABLE) for each in seen)
        if not is_odd and (eye.fetches or not file.is_remote):
            read_by = _unlimited(cfg) if file.is_whole else cfg
            reading = partial(Reading, read_by, file, label, eye.progress)
            with suppress(DataError):
                records.write(key, reading, seen[0].sum if seen else "")
                known = records.read(key, place, label) or nothing
    return replace(known, seen=seen)


def _unlimited(cfg: TextRunConfig) -> TextRunConfig:
    """Return settings by which a file is read whole: what a limit lets in depends on others."""
    data = cfg.data.model_copy(update={"megabytes_per_domain": None})
    return cfg.model_copy(update={"data": data})


def _key(cfg: TextRunConfig, label: str | None, file: SourceFile, version: str) -> str:
    """Return what a file's documents depend on, hashed."""
    data = cfg.data
    by_label = cfg.partition.by == "labels"
    settings = {
        "format": _FORMAT,
        "version": version,
        "read_by": dict(file.read_by),
        "by_label": by_label,
        "label": label,
        # Of rows that have labels of their own, which of them are some domain's
        "domains": cfg.partition.domain_of if by_label and label is None else None,
        **data.model_dump(include=_READ_BY),
    }
    if not file.is_whole and data.megabytes_per_domain:
        # Read up to the limit alone
        settings |= data.model_dump(include=_LIMITED_BY)
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


_READ_BY = {
    "text_field",
    "label_field",
    "split_field",
    "min_document_bytes",
    "max_document_bytes",
    "seed",
}
_LIMITED_BY = {"megabytes_per_domain", "valid_share", "test_share"}
