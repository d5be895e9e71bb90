"""Token shards: one flat little-endian stream per split and domain, and its document index; those
of several domains lie in several folders and are read as one.

Legend: S tokens of a stream.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy import int64, ndarray

from ...errors import DamagedArtifact, DataError, MismatchError, MissingArtifact, NewerStore
from ...store.artifacts import write_text
from ...store.reading import absence, as_kind, exists, read_object, reading
from ...store.room import writing
from .documents import SPLITS

FORMAT = 1
_ABOUT = "shards.json"
# Rows of (start in tokens, UTF-8 bytes), then one of (all tokens, all bytes)
_INDEX = np.dtype("<i8")
_BUFFER_BYTES = 32 << 20  # all streams together
_LEAST_BYTES = 1 << 16  # of one stream
_INDEX_ROW_BYTES = 128  # what a row of the index takes as a tuple of Python, roughly
StreamName = tuple[str, str]  # split, domain


def _tokens_path(folder: Path, name: StreamName) -> Path:
    split, domain = name
    return folder / split / f"{domain}.bin"


def _index_path(folder: Path, name: StreamName) -> Path:
    split, domain = name
    return folder / split / f"{domain}.idx"


@dataclass
class ShardCount:
    """What a stream holds."""

    tokens: int = 0  # end-of-text tokens included
    documents: int = 0
    bytes: int = 0  # of text in UTF-8


@dataclass(frozen=True)
class _Index:
    """What shards.json holds."""

    format: int
    dtype: Literal["<u2", "<u4"]
    vocab_size: int
    end_id: int
    domains: tuple[str, ...]
    splits: dict[str, dict[str, ShardCount]]
    lead: tuple[int, ...] = ()  # earlier versions knew the end of the last one alone

    @property
    def tokens_of(self) -> tuple[object, ...]:
        """What tokens mean: the same of all domains of a run."""
        return self.dtype, self.vocab_size, self.end_id, self.lead


class Shards:
    """Shards opened for reading. Streams are mapped on first use; close() drops the maps."""

    def __init__(self, *folders: Path):
        """Open the shards in some folders. Raises MissingArtifact, DamagedArtifact, NewerStore, and
        MismatchError for those of several tokenizers."""
        self.folders: dict[str, Path] = {}  # by domain, in the order of the folders
        self._counts: dict[StreamName, ShardCount] = {}
        abouts = [_read_about(Path(folder)) for folder in folders]
        for folder, about in zip(folders, abouts, strict=True):
            if about.tokens_of != abouts[0].tokens_of:
                raise MismatchError(
                    f"{folder} and {folders[0]} are not of one tokenizer", stage="preprocess"
                )
            self.folders |= dict.fromkeys(about.domains, Path(folder))
            for split, counts in about.splits.items():
                for domain, count in counts.items():
                    self._counts[split, domain] = count
        self.domains = tuple(self.folders)
        first = abouts[0]
        self.vocab_size = first.vocab_size
        self.end_id = first.end_id
        self.lead = first.lead or (first.end_id,)
        self.dtype = np.dtype(first.dtype)
        self._maps: dict[StreamName, ndarray] = {}

    def tokens(self, split: str, domain: str) -> int:
        """Return the length of a stream, end-of-text tokens included."""
        return self.count(split, domain).tokens

    def stream(self, split: str, domain: str) -> ndarray:
        """Return ids_S, the flat tokens of a domain, every document led by `lead`.

        Raises DamagedArtifact if torn.
        """
        name = (split, domain)
        if name not in self._maps:
            self._maps[name] = self._map(name)
        return self._maps[name]

    def documents(self, split: str, domain: str) -> tuple[ndarray, ndarray]:
        """Return starts (n+1,), token offsets of each document's lead, and bytes (n,), its UTF-8
        length."""
        count = self.count(split, domain)
        path = _index_path(self.folders[domain], (split, domain))
        rows = count.documents + 1
        _check_bytes(path, rows * 2 * _INDEX.itemsize)
        with reading(path):
            index = np.fromfile(path, _INDEX).reshape(rows, 2)
        starts, sizes = index.astype(int64).T
        return starts, sizes[:-1]  # the last row has the sum of all

    def close(self) -> None:
        """Drop every map held here; arrays that a caller still holds keep theirs."""
        self._maps.clear()

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict:
        # A map pickled into another process would arrive there as a copy of all its tokens
        return self.__dict__ | {"_maps": {}}

    def count(self, split: str, domain: str) -> ShardCount:
        """Return how much a stream holds. Raises DataError when there is none."""
        try:
            return self._counts[split, domain]
        except KeyError:
            raise DataError(
                f"there is no {split} shard of domain {domain} here; the splits are "
                f"{', '.join(SPLITS)}, the domains {', '.join(self.domains)}"
            ) from None

    def _map(self, name: StreamName) -> ndarray:
        tokens = self.tokens(*name)
        path = _tokens_path(self.folders[name[1]], name)
        _check_bytes(path, tokens * self.dtype.itemsize)
        if not tokens:  # an empty file cannot be mapped
            return np.empty(0, self.dtype)
        with reading(path):
            return np.memmap(path, self.dtype, mode="r")


def _check_bytes(path: Path, wanted: int) -> None:
    """Raise DamagedArtifact unless a file has so many bytes."""
    try:
        with reading(path):
            found = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        what = absence(path)
    else:
        if found == wanted:
            return
        what = f"has {found} bytes"
    raise DamagedArtifact(
        f"{path} {what}, {wanted} were wanted", remove=path.parents[1], stage="preprocess"
    )


def _read_about(folder: Path) -> _Index:
    path = folder / _ABOUT
    if not exists(path):
        raise MissingArtifact(f"{path} does not exist", stages=("preprocess",))
    try:
        values = read_object(path)
        found = values.get("format")
        if type(found) is int and found > FORMAT:
            raise NewerStore(
                f"{path} has format {found}, this program reads up to {FORMAT}; update MoleForge"
            )
        return as_kind(_Index, values)
    except (DamagedArtifact, ValueError) as error:
        said = str(error) if isinstance(error, DamagedArtifact) else f"{path}: {error}"
        raise DamagedArtifact(said, remove=folder, stage="preprocess") from None


class _StreamWriter:
    """The two files of one stream, and what waits to be written to them."""

    def __init__(self, folder: Path, name: StreamName):
        self.count = ShardCount()
        self.tokens_path = _tokens_path(folder, name)
        self.index_path = _index_path(folder, name)
        self._tokens = bytearray()
        self._index: list[tuple[int, int]] = []
        # A stream of no document has its files too: empty, not missing
        for path in (self.tokens_path, self.index_path):
            with writing(path):
                path.write_bytes(b"")

    @property
    def buffered_bytes(self) -> int:
        """Memory that a flush would free, roughly."""
        return len(self._tokens) + _INDEX_ROW_BYTES * len(self._index)

    def add(self, tokens: ndarray, document_bytes: int) -> None:
        """Append a document with its lead."""
        count = self.count
        self._index.append((count.tokens, document_bytes))
        self._tokens += tokens.tobytes()
        count.tokens += len(tokens)
        count.documents += 1
        count.bytes += document_bytes

    def close(self) -> None:
        """Write what is buffered and the closing row of the index."""
        self._index.append((self.count.tokens, self.count.bytes))
        self.flush()

    def flush(self) -> None:
        """Write what is buffered."""
        rows = np.array(self._index, _INDEX)
        _append(self.tokens_path, self._tokens)
        _append(self.index_path, rows.tobytes())
        self._tokens = bytearray()
        self._index.clear()


def _append(path: Path, data: bytes | bytearray) -> None:
    with writing(path), open(path, "ab") as file:
        file.write(data)


class ShardWriter:
    """Appends documents to their streams in bounded memory; finish() writes shards.json."""

    def __init__(
        self,
        folder: Path,
        domains: tuple[str, ...],
        vocab_size: int,
        end_id: int,
        lead: tuple[int, ...] = (),
    ):
        self.folder = Path(folder)
        self.domains = domains
        self.vocab_size = vocab_size
        self.end_id = end_id
        self.lead = lead or (end_id,)
        # Half the space and reading where ids fit into it, as those of most trained here do
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._streams: dict[StreamName, _StreamWriter] = {}
        for split in SPLITS:
            (self.folder / split).mkdir(exist_ok=True)
            for domain in domains:
                name = (split, domain)
                self._streams[name] = _StreamWriter(self.folder, name)
        share = _BUFFER_BYTES // len(self._streams)
        self._flush_bytes = max(_LEAST_BYTES, share)

    def count(self, split: str, domain: str) -> ShardCount:
        """Return what a stream has so far."""
        return self._streams[split, domain].count

    def add(self, split: str, domain: str, ids: list[int], document_bytes: int) -> None:
        """Append one document, `lead` first. Raises DataError for an id the vocabulary has not."""
        if ids and max(ids) >= self.vocab_size:
            raise DataError(
                f"the tokenizer gave id {max(ids)} and has {self.vocab_size} entries; its "
                "tokenizer.json contradicts itself. Save it again with save_pretrained, or train "
                "one (tokenizer.pretrained: null)"
            )
        stream = self._streams[split, domain]
        tokens = np.array([*self.lead, *ids], self.dtype)
        stream.add(tokens, document_bytes)
        if stream.buffered_bytes > self._flush_bytes:
            stream.flush()

    def finish(self) -> None:
        """Write what is buffered, the closing index rows, and shards.json last."""
        splits: dict[str, dict] = {split: {} for split in SPLITS}
        for (split, domain), stream in self._streams.items():
            stream.close()
            splits[split][domain] = asdict(stream.count)
        about = {
            "format": FORMAT,
            "dtype": self.dtype.str,
            "vocab_size": self.vocab_size,
            "end_id": self.end_id,
            "lead": self.lead,
            "domains": self.domains,
            "splits": splits,
        }
        text = json.dumps(about, indent=1)
        write_text(self.folder / _ABOUT, text + "\n")
