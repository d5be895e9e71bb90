"""What was found in files of documents, kept so that each is read once.

Invariant: a record is a function of what its key holds: a file's bytes and the settings that it is
read by. It counts when all of it is as it was written; losing one costs a reading.

D documents.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from multiprocessing import util
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from ...config.text_data import TextRunConfig
from ...errors import DiskFull
from ...protocols import Progress, Seen
from ...store.artifacts import write_text
from ...store.reading import sealed, unsealed
from ...store.room import writing
from ...store.sources import OF
from ..drop_stats import DropStats
from ..sources import SourceFile
from .documents import DIGEST_BYTES, SPLITS, Document, Place, documents_of, drop_stats

# One document: its key, UTF-8 bytes, number of its label among the file's, given split, digest
ROW = np.dtype(
    [
        ("key", "<u8"),
        ("bytes", "<u8"),
        ("label", "<u2"),
        ("split", "u1"),
        ("digest", "u1", DIGEST_BYTES),
    ]
)
CODES = {None: 0} | {split: code for code, split in enumerate(SPLITS, 1)}
NO_ROWS = np.empty(0, ROW)
FEW = 16  # documents of a file that is kept with others: a corpus may be a million of those
_SMALL = "few.txt"
_MOST_KEPT = 1_000_000  # small files; beyond it those are left out that nobody asked for this time
_BLOCK_ROWS = 1 << 18  # that are looked at at once
_READ_ROWS = 1 << 14  # that are written at once, as each is an object until then
_TOLD_EVERY = 2000  # documents
_MOST_LABELS = 20  # that are named of those that no domain has
# Of small files, for as long as this process lives
_known: dict[str, "_Small"] = {}


@dataclass(frozen=True)
class FileDocuments:
    """What a survey has noted of one file: a row a document, without its text."""

    place: Place
    label: str | None  # of all of them, as the settings say
    labels: tuple[str, ...]  # those there are
    rows: ndarray  # of ROW, mapped
    others: Counter[str]  # documents by a label that no domain has
    unread: str = ""  # what it is known by where it could not be read, or was not
    seen: tuple[Seen, ...] = ()  # what its documents are taken from

    def may_hold(self, domain: str) -> bool:
        """Whether a domain's rows may stand in the file, as far as is known."""
        return self.label in (None, domain)

    def blocks(self) -> Iterator[ndarray]:
        """Yield the rows, a block at a time."""
        for first in range(0, len(self.rows), _BLOCK_ROWS):
            yield self.rows[first : first + _BLOCK_ROWS]


@dataclass(frozen=True)
class _Small:
    """What is kept of a small file."""

    labels: tuple[str, ...]
    others: tuple[tuple[str, int], ...]
    rows: bytes

    def line(self, key: str) -> str:
        """Return it as it is kept among others."""
        return json.dumps([key, self.labels, self.others, self.rows.hex()])


class Records:
    """Records of a folder in the store, or for as long as this process lives where there is
    none."""

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._kept = _small_of(folder / _SMALL) if folder else {}
        self._used: dict[str, _Small] = {}
        self._has_new = False
        self.has_read = False  # a file that was not known

    def read(self, key: str, place: Place, label: str | None) -> FileDocuments | None:
        """Return what is kept under a key; None where there is nothing whole."""
        small = _known.get(key) or self._kept.get(key)
        if small is not None:
            self._has_new |= key not in self._kept
            self._used[key] = _known[key] = small
            rows = np.frombuffer(small.rows, ROW)
            return FileDocuments(place, label, small.labels, rows, Counter(dict(small.others)))
        for folder in filter(None, (self._folder, *_own)):
            found = self._read(folder, key, place, label)
            if found is not None:
                return found
        return None

    def _read(
        self, folder: Path, key: str, place: Place, label: str | None
    ) -> FileDocuments | None:
        try:
            about = unsealed((folder / f"{key}.json").read_bytes())
            rows = self._rows(folder / f"{key}.rows", about)
            labels = tuple(about["labels"])
            others = Counter(about["others"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return FileDocuments(place, label, labels, rows, others)

    def _rows(self, path: Path, about: dict[str, Any]) -> ndarray:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != about["sha256"]:
            raise ValueError(f"{path} is not what was written")
        return np.memmap(path, ROW, mode="r")

    def write(self, key: str, reading: Callable[[], "Reading"], of: str) -> None:
        """Read a file's documents and keep what they are; `of` is the sum of the file, of several
        that of the first, by which whoever removes records knows whose it is. Raises DataError, and
        DiskFull or OSError where they can be kept nowhere."""
        self.has_read = True
        if self._folder:
            # A store may be read alone
            with suppress(DiskFull, OSError):
                self._write(self._folder, key, reading(), of)
                return
        self._write(_own_folder(), key, reading(), of)

    def _write(self, folder: Path, key: str, found: "Reading", of: str) -> None:
        blocks = found.blocks()
        first = next(blocks)
        second = next(blocks, None)
        others = found.others.most_common(_MOST_LABELS)
        if second is None and len(first) <= FEW:
            _known[key] = _Small(tuple(found.labels), tuple(others), first.tobytes())
            return
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{os.getpid()}-{key}.part"
        hasher = hashlib.sha256()
        begun = [first] if second is None else [first, second]
        try:
            with writing(part), open(part, "wb") as file:
                for block in chain(begun, blocks):
                    raw = block.tobytes()
                    hasher.update(raw)
                    file.write(raw)
            about = {
                OF: of,
                "sha256": hasher.hexdigest(),
                "labels": found.labels,
                "others": dict(found.others.most_common(_MOST_LABELS)),
            }
            part.replace(folder / f"{key}.rows")
            with writing(part):
                part.write_text(sealed(about), "utf-8")
            # Last, as it vouches for the rows
            part.replace(folder / f"{key}.json")
        finally:
            part.unlink(missing_ok=True)

    def save(self) -> None:
        """Keep what was found of small files for the next process, if that can be written."""
        if not (self._has_new and self._folder):
            return
        kept = self._kept if len(self._kept) < _MOST_KEPT else {}
        lines = [small.line(key) for key, small in (kept | self._used).items()]
        text = "\n".join(lines)
        with suppress(OSError, DiskFull):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_text(self._folder / _SMALL, f"{_sum_of(text)}\n{text}")
            self._has_new = False


def _small_of(path: Path) -> dict[str, _Small]:
    """Return what a list of small files holds; nothing of one that is lost or damaged."""
    try:
        seal, _, text = path.read_text("utf-8").partition("\n")
    except (OSError, ValueError):
        return {}
    found = {}
    for line in text.splitlines() if seal == _sum_of(text) else ():
        key, labels, others, rows = json.loads(line)
        counts = tuple((label, count) for label, count in others)
        found[key] = _Small(tuple(labels), counts, bytes.fromhex(rows))
    return found


def _sum_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


_own: list[Path] = []


def _own_folder() -> Path:
    """Return a folder that goes with this process."""
    if not _own:
        made = Path(tempfile.mkdtemp(prefix="moleforge-"))
        # in a forked process too, where what is registered with atexit is not done
        util.Finalize(None, shutil.rmtree, (made, True), exitpriority=0)
        _own.append(made)
    return _own[0]


class Reading:
    """One reading of a file."""

    def __init__(self, cfg: TextRunConfig, file: SourceFile, label: str | None, progress: Progress):
        self.cfg = cfg
        self.file = file
        self.label = label
        self.progress = progress
        self.labels: list[str] = []
        self.stats: DropStats = drop_stats()
        self.others: Counter[str] = Counter()

    def blocks(self) -> Iterator[ndarray]:
        """Yield what documents the file has, as ROW. Raises DataError."""
        rows: list[tuple] = []
        number = 0
        found = documents_of(self.cfg, self.stats, self.others, self.file, self.label)
        for document in found:
            if document.piece:
                key, size, *rest = rows[-1]
                rows[-1] = (key, size + document.bytes, *rest)
                continue
            if len(rows) >= _READ_ROWS:
                yield np.array(rows, ROW)
                rows = []
            rows.append(self._row(document))
            number += 1
            if number % _TOLD_EVERY == 0:
                self.progress(f"looking at documents: {number:,} in {document.where}", None)
        yield np.array(rows, ROW)

    def _row(self, document: Document) -> tuple:
        if document.label not in self.labels:
            self.labels.append(document.label)
        digest = np.frombuffer(bytes.fromhex(document.digest), np.uint8)
        code = CODES[document.split]
        return document.key, document.bytes, self.labels.index(document.label), code, digest
