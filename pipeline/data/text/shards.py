"""Token shards: one flat little-endian stream per split and domain, its document index, and batches
drawn from them.

Invariant: row g of a DomainMixture is a pure function of (shards, settings, seed, g); a reader has
no state to save. Legend: G rows asked for, D domains, R rounds of the permutation, N windows of an
epoch, C context tokens, S tokens of a stream.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy import int64, ndarray, uint64
from numpy.typing import ArrayLike

from ...errors import DamagedArtifact, DataError, MissingArtifact, NewerStore
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
_COPY_BYTES = 1 << 24
# Of the Feistel network: from four on it looks random from both sides (Luby and Rackoff 1988)
_ROUNDS = 4
_OFFSET = 101  # purposes of _draw: 0.._ROUNDS-1 are keys of rounds, from here offsets of domains
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


class Shards:
    """Shards opened for reading. Streams are mapped on first use; close() drops the maps."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._about = _read_about(self.folder)
        self.domains = self._about.domains
        self.vocab_size = self._about.vocab_size
        self.end_id = self._about.end_id
        self.lead = self._about.lead or (self.end_id,)
        self.dtype = np.dtype(self._about.dtype)
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
        path = _index_path(self.folder, (split, domain))
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
            return self._about.splits[split][domain]
        except KeyError:
            raise DataError(
                f"{self.folder} has no {split} shard of domain {domain}; its splits are "
                f"{', '.join(SPLITS)}, its domains {', '.join(self.domains)}"
            ) from None

    def _map(self, name: StreamName) -> ndarray:
        tokens = self.tokens(*name)
        path = _tokens_path(self.folder, name)
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

    def append(self, part: Shards, name: StreamName) -> None:
        """Append the same stream of other shards, copied block by block."""
        self.flush()
        with (
            writing(self.tokens_path),
            open(self.tokens_path, "ab") as file,
            open(_tokens_path(part.folder, name), "rb") as of,
        ):
            shutil.copyfileobj(of, file, _COPY_BYTES)
        starts, sizes = part.documents(*name)
        # Without the part's closing row, and from where this stream ends so far
        starts = starts[:-1] + self.count.tokens
        rows = np.stack([starts, sizes], axis=1)
        _append(self.index_path, rows.astype(_INDEX).tobytes())
        found = part.count(*name)
        self.count.tokens += found.tokens
        self.count.documents += found.documents
        self.count.bytes += found.bytes

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

    def append(self, part: Shards) -> None:
        """Append every document of other shards with the same domains and tokenizer."""
        for name, stream in self._streams.items():
            stream.append(part, name)

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


@dataclass(frozen=True)
class DomainMixture:
    """Training rows of a few domains, each epoch without replacement.

    natural: every window of every domain is equally likely. equal: row g belongs to domain g mod n.
    A share general_share of the rows comes from a natural mixture over `general` instead.
    """

    shards: Shards
    split: str
    domains: tuple[str, ...]
    context_tokens: int
    seed: int
    how: str = "natural"
    general: tuple[str, ...] = ()
    general_share: float = 0.0

    def rows(self, first: int, count: int) -> ndarray:
        """Return rows first..first+count (count, context_tokens+1) int64.

        Raises DataError when a domain has no whole window, or count is more windows than an epoch
        has.
        """
        row_G = np.arange(first, first + count, dtype=int64)
        length = self.context_tokens + 1  # inputs, and targets one further
        out_GC = np.empty((count, length), int64)
        number_G, general_G = self._general(row_G)
        if general_G.any():
            _fill(self._general_pool, number_G, general_G, out_GC)
        own_G = ~general_G
        if self.how == "natural":
            _fill(self._pools[0], number_G, own_G, out_GC)
            return out_GC
        round_G, turn_G = np.divmod(number_G, len(self._pools))
        for i, pool in enumerate(self._pools):
            _fill(pool, round_G, own_G & (turn_G == i), out_GC)
        return out_GC

    def tokens(self) -> int:
        """Return the training tokens of one epoch over `domains`: whole windows only."""
        windows = sum(pool.windows for pool in self._pools)
        return windows * self.context_tokens

    def _general(self, row_G: ndarray) -> tuple[ndarray, ndarray]:
        """Number each row among its own kind, and say which rows are general."""
        if not self.general or not self.general_share:
            return row_G, np.zeros(len(row_G), bool)
        # Row g is general where floor(g * share) steps up: spread evenly, and known from g alone
        before_G = self._general_before(row_G)
        general_G = self._general_before(row_G + 1) > before_G
        number_G = np.where(general_G, before_G, row_G - before_G)
        return number_G, general_G

    def _general_before(self, row_G: ndarray) -> ndarray:
        return np.floor(row_G * self.general_share).astype(int64)

    @cached_property
    def _pools(self) -> list["_Pool"]:
        groups = [self.domains]
        if self.how != "natural":
            groups = [(domain,) for domain in self.domains]
        return [_Pool(self, group, salt) for salt, group in enumerate(groups, 1)]

    @cached_property
    def _general_pool(self) -> "_Pool":
        return _Pool(self, self.general, salt=0)


class _Pool:
    """One index space over the windows of a few domains.

    A stream is a ring: a window may run over its end into its first document, which is led as any
    other. So every epoch has the same number of windows whatever the offset of its grid.
    """

    def __init__(self, mixture: DomainMixture, domains: tuple[str, ...], salt: int):
        self.mixture = mixture
        self.domains = domains
        # Another seed for each pool, or all of them would shuffle alike
        seeds = scramble(np.array([mixture.seed], uint64), salt)
        self.seed = int(seeds[0])
        tokens_D = []
        for domain in domains:
            tokens = mixture.shards.tokens(mixture.split, domain)
            self._check(domain, tokens)
            tokens_D.append(tokens)
        self.tokens_D = np.array(tokens_D, int64)
        windows_D = (self.tokens_D - 1) // mixture.context_tokens
        self.ends_D = np.cumsum(windows_D)
        self.windows = int(self.ends_D[-1])

    def read(self, number_G: ndarray) -> ndarray:
        """Return the windows (G, C+1) that stand at number_G in the endless sequence of epochs."""
        context_tokens = self.mixture.context_tokens
        if len(number_G) > self.windows:
            raise DataError(
                f"{len(number_G)} rows were asked for at once, but {self.mixture.split} of "
                f"{', '.join(self.domains)} ({int(self.tokens_D.sum())} tokens) has {self.windows} "
                f"windows of {context_tokens} tokens: lower batch_sequences or "
                "trunk.context_tokens, or give it more data"
            )
        epoch_G, place_G = np.divmod(number_G, self.windows)
        place_G = shuffled(place_G, self.windows, self.seed, epoch_G)
        # The windows of all domains stand in one line, domain after domain
        domain_G = np.searchsorted(self.ends_D, place_G, side="right")
        before_D = np.concatenate([[0], self.ends_D])
        window_G = place_G - before_D[domain_G]
        # Each epoch moves the grid, so that no two epochs cut the text at the same tokens
        tokens_G = self.tokens_D[domain_G]
        random_G = _draw(self.seed, epoch_G, _OFFSET + domain_G)
        offset_G = (random_G % tokens_G.astype(uint64)).astype(int64)
        start_G = (offset_G + window_G * context_tokens) % tokens_G
        return self._gather(domain_G, start_G)

    def _gather(self, domain_G: ndarray, start_G: ndarray) -> ndarray:
        mixture = self.mixture
        length = mixture.context_tokens + 1
        out_GC = np.empty((len(start_G), length), int64)
        for out_C, d, start in zip(out_GC, domain_G, start_G, strict=True):
            stream = mixture.shards.stream(mixture.split, self.domains[d])
            # A window that runs over the end of the stream goes on at its beginning
            head = stream[start : start + length]
            out_C[: len(head)] = head
            out_C[len(head) :] = stream[: length - len(head)]
        return out_GC

    def _check(self, domain: str, tokens: int) -> None:
        wanted = self.mixture.context_tokens + 1
        if tokens < wanted:
            raise DataError(
                f"domain {domain} has {tokens} {self.mixture.split} tokens, one window needs "
                f"{wanted}: lower trunk.context_tokens, raise partition.min_tokens to find out "
                "sooner, or give it more data"
            )


def _fill(pool: _Pool, number_G: ndarray, chosen_G: ndarray, out_GC: ndarray) -> None:
    if chosen_G.any():
        out_GC[chosen_G] = pool.read(number_G[chosen_G])


def shuffled(place_G: ndarray, size: int, seed: int, epoch_G: ndarray) -> ndarray:
    """Return where each place of range(size) goes in its epoch's permutation, in memory of G alone.

    A balanced Feistel network permutes the next power of four; places that leave the range walk on
    until they return (cycle walking: Black and Rogaway 2002, Ciphers with Arbitrary Finite
    Domains).
    """
    # Half of the bits that hold size-1, but enough that tiny ranges are mixed too
    bits = max(size - 1, 1).bit_length()
    half = max(3, (bits + 1) // 2)
    keys_RG = np.stack([_draw(seed, epoch_G, r) for r in range(_ROUNDS)])
    out_G = np.asarray(place_G, uint64).copy()
    walking = np.ones(len(out_G), bool)
    # A quarter of the power or more lies in the range, of tiny ranges less: a few steps
    while walking.any():
        out_G[walking] = _feistel(out_G[walking], half, keys_RG[:, walking])
        walking = out_G >= uint64(size)
    return out_G.astype(int64)


def _feistel(x_G: ndarray, half: int, keys_RG: ndarray) -> ndarray:
    bits = uint64(half)
    mask = uint64((1 << half) - 1)
    left_G = x_G >> bits
    right_G = x_G & mask
    for key_G in keys_RG:
        mixed_G = scramble(right_G, key_G) & mask
        left_G, right_G = right_G, left_G ^ mixed_G
    return (left_G << bits) | right_G


def _draw(seed: int, epoch_G: ndarray, purpose: ArrayLike) -> ndarray:
    """Return one random 64-bit number per (seed, epoch, purpose)."""
    return scramble(scramble(epoch_G, seed), purpose)


def scramble(x_G: ndarray, key: ArrayLike) -> ndarray:
    """Mix x_G and key into 64 bits that look random: the finalizer of SplitMix64 (Steele, Lea and
    Flood 2014, Fast Splittable Pseudorandom Number Generators), applied to both."""
    # At least one dimension: numpy warns of an overflow of scalars, which is what is wanted here
    key_G = np.atleast_1d(np.asarray(key, uint64))
    mixed_G = np.asarray(x_G, uint64) ^ _finish(key_G)
    return _finish(mixed_G)


def _finish(x_G: ndarray) -> ndarray:
    x_G = x_G + uint64(0x9E3779B97F4A7C15)
    x_G = (x_G ^ (x_G >> uint64(30))) * uint64(0xBF58476D1CE4E5B9)
    x_G = (x_G ^ (x_G >> uint64(27))) * uint64(0x94D049BB133111EB)
    return x_G ^ (x_G >> uint64(31))
