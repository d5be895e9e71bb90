"""Token shards: one flat little-endian stream per split and domain, its document index, and batches
drawn from them.

Invariant: row g of a Mixture is a pure function of (shards, settings, seed, g); a reader has no
state to save. Legend: G rows asked for, D domains, R rounds of the permutation, N windows of an
epoch, C context tokens.
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ...errors import DamagedArtifact, DataError, MissingArtifact, NewerStore
from .documents import SPLITS

FORMAT = 1
_INDEX = np.dtype(
    "<i8"
)  # rows of (start in tokens, UTF-8 bytes), then one of (all tokens, all bytes)
_BUFFER_BYTES = 32 << 20  # all streams together
_LEAST_BYTES = 1 << 16  # of one stream
_COPY_BYTES = 1 << 24
_ROUNDS = 4


class Shards:
    """Shards opened for reading. Streams are mapped on first use; close() drops the maps."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._about = _read_about(self.folder)
        self.domains: tuple[str, ...] = tuple(self._about["domains"])
        self.vocab_size: int = self._about["vocab_size"]
        self.end_id: int = self._about["end_id"]
        self.dtype = np.dtype(self._about["dtype"])
        self._maps: dict[tuple[str, str], np.ndarray] = {}

    def tokens(self, split: str, domain: str) -> int:
        """Return the length of a stream, end-of-text tokens included."""
        return self.count(split, domain)["tokens"]

    def stream(self, split: str, domain: str) -> np.memmap:
        """Return the flat tokens of a domain, every document led by end_id. Raises DamagedArtifact
        if torn."""
        if (split, domain) not in self._maps:
            self._maps[split, domain] = self._map(split, domain)
        return self._maps[split, domain]

    def documents(self, split: str, domain: str) -> tuple[np.ndarray, np.ndarray]:
        """Return starts (n+1,), token offsets of each document's end_id, and bytes (n,), its UTF-8
        length."""
        count, path = self.count(split, domain), self._path(split, domain, ".idx")
        self._check_bytes(path, 2 * _INDEX.itemsize * (count["documents"] + 1))
        rows = np.fromfile(path, _INDEX).reshape(-1, 2)
        return rows[:, 0].astype(np.int64), rows[:-1, 1].astype(np.int64)

    def close(self) -> None:
        """Drop every map held here; arrays that a caller still holds keep theirs."""
        self._maps.clear()

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_maps": {}}  # a map must not be pickled into another process

    def count(self, split: str, domain: str) -> dict[str, int]:
        """Return how many tokens, documents and bytes of text a shard has. Raises DataError when
        there is none."""
        try:
            return self._about["splits"][split][domain]
        except KeyError:
            raise DataError(
                f"{self.folder} has no {split} shard of domain {domain}; its splits are {', '.join(SPLITS)}, "
                f"its domains {', '.join(self.domains)}"
            ) from None

    def _path(self, split: str, domain: str, suffix: str) -> Path:
        return self.folder / split / f"{domain}{suffix}"

    def _map(self, split: str, domain: str) -> np.ndarray:
        tokens, path = self.tokens(split, domain), self._path(split, domain, ".bin")
        self._check_bytes(path, tokens * self.dtype.itemsize)
        if not tokens:  # an empty file cannot be mapped
            return np.empty(0, self.dtype)
        return np.memmap(path, self.dtype, mode="r")

    @staticmethod
    def _check_bytes(path: Path, wanted: int) -> None:
        found = path.stat().st_size if path.exists() else None
        if found != wanted:
            what = "is missing" if found is None else f"has {found} bytes"
            raise DamagedArtifact(
                f"{path} {what}, {wanted} were wanted; delete the artifact and run preprocess again"
            )


def _read_about(folder: Path) -> dict:
    path = folder / "shards.json"
    try:
        about = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise MissingArtifact(f"{path} does not exist; run the stage preprocess first") from None
    except ValueError as error:
        raise DamagedArtifact(
            f"{path} is not JSON ({error}); delete the artifact and run preprocess again"
        ) from None
    if about.get("format", 0) > FORMAT:
        raise NewerStore(
            f"{path} has format {about['format']}, this program reads up to {FORMAT}; update MoleForge"
        )
    return about


class ShardWriter:
    """Appends documents to their streams in bounded memory; finish() writes shards.json."""

    def __init__(self, folder: Path, domains: tuple[str, ...], vocab_size: int, end_id: int):
        self.folder, self.domains, self.vocab_size, self.end_id = (
            Path(folder),
            domains,
            vocab_size,
            end_id,
        )
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        names = [(split, domain) for split in SPLITS for domain in domains]
        self.counts = {name: {"tokens": 0, "documents": 0, "bytes": 0} for name in names}
        self._flush_bytes = max(_LEAST_BYTES, _BUFFER_BYTES // len(names))
        self._tokens = {name: bytearray() for name in names}
        self._index: dict[tuple[str, str], list[tuple[int, int]]] = {name: [] for name in names}
        for split in SPLITS:
            (self.folder / split).mkdir(exist_ok=True)
        for name in names:
            for suffix in (".bin", ".idx"):
                open(self._path(name, suffix), "wb").close()

    def add(self, split: str, domain: str, ids: list[int], document_bytes: int) -> None:
        """Append one document, end_id first. Raises DataError for an id the vocabulary has not."""
        name = split, domain
        count, tokens = self.counts[name], self._tokens[name]
        if ids and max(ids) >= self.vocab_size:
            raise DataError(
                f"the tokenizer gave id {max(ids)} and has {self.vocab_size} entries; its tokenizer.json contradicts "
                "itself. Save it again with save_pretrained, or train one (tokenizer.pretrained: null)"
            )
        self._index[name].append((count["tokens"], document_bytes))
        tokens += np.array([self.end_id, *ids], self.dtype).tobytes()
        count["tokens"] += len(ids) + 1
        count["documents"] += 1
        count["bytes"] += document_bytes
        if len(tokens) + 128 * len(self._index[name]) > self._flush_bytes:
            self._flush(name)

    def append(self, part: Shards) -> None:
        """Append every document of other shards with the same domains and tokenizer, copied block
        by block."""
        for name, count in self.counts.items():
            self._flush(name)
            with (
                open(self._path(name, ".bin"), "ab") as file,
                open(part.folder / name[0] / f"{name[1]}.bin", "rb") as of,
            ):
                shutil.copyfileobj(of, file, _COPY_BYTES)
            starts, sizes = part.documents(*name)
            with open(self._path(name, ".idx"), "ab") as file:
                file.write(
                    np.stack([starts[:-1] + count["tokens"], sizes], 1).astype(_INDEX).tobytes()
                )
            for what, found in part.count(*name).items():
                count[what] += found

    def finish(self) -> None:
        """Write what is buffered, the closing index rows, and shards.json last."""
        for name, count in self.counts.items():
            self._index[name].append((count["tokens"], count["bytes"]))
            self._flush(name)
        about = {
            "format": FORMAT,
            "dtype": self.dtype.str,
            "vocab_size": self.vocab_size,
            "end_id": self.end_id,
            "domains": self.domains,
            "splits": {split: {d: self.counts[split, d] for d in self.domains} for split in SPLITS},
        }
        with open(self.folder / "shards.json", "w", encoding="utf-8") as file:
            file.write(json.dumps(about, indent=1) + "\n")

    def _path(self, name: tuple[str, str], suffix: str) -> Path:
        return self.folder / name[0] / f"{name[1]}{suffix}"

    def _flush(self, name: tuple[str, str]) -> None:
        rows = np.array(self._index[name], _INDEX).tobytes()
        for suffix, data in ((".bin", self._tokens[name]), (".idx", rows)):
            with open(self._path(name, suffix), "ab") as file:
                file.write(data)
        self._tokens[name] = bytearray()
        self._index[name].clear()


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

    def rows(self, first: int, count: int) -> np.ndarray:
        """Return rows first..first+count (count, context_tokens+1) int64.

        Raises DataError when a domain has no whole window, or count is more windows than an epoch
        has.
        """
        row_G = np.arange(first, first + count, dtype=np.int64)
        out_GC = np.empty((count, self.context_tokens + 1), np.int64)
        number_G, general_G = self._general(row_G)
        if general_G.any():
            _fill(self._general_pool, number_G, general_G, out_GC)
        own_G = ~general_G
        if self.how == "natural":
            _fill(self._pools[0], number_G, own_G, out_GC)
        else:
            n = len(self._pools)
            for i, pool in enumerate(self._pools):
                _fill(pool, number_G // n, own_G & (number_G % n == i), out_GC)
        return out_GC

    def tokens(self) -> int:
        """Return the training tokens of one epoch over `domains`: whole windows only."""
        return sum(pool.windows for pool in self._pools) * self.context_tokens

    def _general(self, row_G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number each row among its own kind, and say which rows are general."""
        if not self.general or not self.general_share:
            return row_G, np.zeros(len(row_G), bool)
        before_G = np.floor(row_G * self.general_share).astype(np.int64)
        general_G = np.floor((row_G + 1) * self.general_share).astype(np.int64) > before_G
        return np.where(general_G, before_G, row_G - before_G), general_G

    @cached_property
    def _pools(self) -> list["_Pool"]:
        groups = [self.domains] if self.how == "natural" else [(domain,) for domain in self.domains]
        return [_Pool(self, group, salt) for salt, group in enumerate(groups, 1)]

    @cached_property
    def _general_pool(self) -> "_Pool":
        return _Pool(self, self.general, salt=0)


class _Pool:
    """One index space over the windows of a few domains.

    A stream is a ring: a window may run over its end into its first document, which end_id leads as
    any other. So every epoch has the same number of windows whatever the offset of its grid.
    """

    def __init__(self, mixture: DomainMixture, domains: tuple[str, ...], salt: int):
        self.mixture, self.domains = mixture, domains
        self.seed = int(scramble(np.array([mixture.seed], np.uint64), np.uint64(salt))[0])
        tokens_D = [mixture.shards.tokens(mixture.split, domain) for domain in domains]
        for domain, tokens in zip(domains, tokens_D, strict=True):
            self._check(domain, tokens)
        self.tokens_D = np.array(tokens_D, np.int64)
        self.ends_D = np.cumsum((self.tokens_D - 1) // mixture.context_tokens)
        self.windows = int(self.ends_D[-1])

    def read(self, number_G: np.ndarray) -> np.ndarray:
        """Return the windows (G, C+1) that stand at number_G in the endless sequence of epochs."""
        if len(number_G) > self.windows:
            raise DataError(
                f"{len(number_G)} rows were asked for at once, but {self.mixture.split} of {', '.join(self.domains)} "
                f"({int(self.tokens_D.sum())} tokens) has {self.windows} windows of {self.mixture.context_tokens} "
                "tokens: lower batch_sequences or trunk.context_tokens, or give it more data"
            )
        epoch_G, place_G = np.divmod(number_G, self.windows)
        place_G = shuffled(place_G, self.windows, self.seed, epoch_G)
        domain_G = np.searchsorted(self.ends_D, place_G, side="right")
        window_G = place_G - np.concatenate([[0], self.ends_D])[domain_G]
        offset_G = _draw(self.seed, epoch_G, 101 + domain_G) % self.tokens_D[domain_G].astype(
            np.uint64
        )
        start_G = (
            offset_G.astype(np.int64) + window_G * self.mixture.context_tokens
        ) % self.tokens_D[domain_G]
        return self._gather(domain_G, start_G)

    def _gather(self, domain_G: np.ndarray, start_G: np.ndarray) -> np.ndarray:
        length = self.mixture.context_tokens + 1
        out_GC = np.empty((len(start_G), length), np.int64)
        for row, (d, start) in enumerate(zip(domain_G.tolist(), start_G.tolist(), strict=True)):
            stream = self.mixture.shards.stream(self.mixture.split, self.domains[d])
            head = stream[start : start + length]
            out_GC[row, : len(head)] = head
            out_GC[row, len(head) :] = stream[: length - len(head)]
        return out_GC

    def _check(self, domain: str, tokens: int) -> None:
        wanted = self.mixture.context_tokens + 1
        if tokens < wanted:
            raise DataError(
                f"domain {domain} has {tokens} {self.mixture.split} tokens, one window needs {wanted}: lower "
                "trunk.context_tokens, raise partition.min_tokens to find out sooner, or give it more data"
            )


def _fill(pool: _Pool, number_G: np.ndarray, chosen_G: np.ndarray, out_GC: np.ndarray) -> None:
    if chosen_G.any():
        out_GC[chosen_G] = pool.read(number_G[chosen_G])


def shuffled(place_G: np.ndarray, size: int, seed: int, epoch_G: np.ndarray) -> np.ndarray:
    """Return where each place of range(size) goes in its epoch's permutation, in memory of G alone.

    A balanced Feistel network permutes the next power of four; places that leave the range walk on
    until they return.
    """
    half = max(3, (max(size - 1, 1).bit_length() + 1) // 2)
    keys_RG = [_draw(seed, epoch_G, np.full_like(epoch_G, r)) for r in range(_ROUNDS)]
    out_G = np.asarray(place_G, np.uint64).copy()
    walking = np.ones(len(out_G), bool)
    while walking.any():
        out_G[walking] = _feistel(out_G[walking], half, [key_G[walking] for key_G in keys_RG])
        walking = out_G >= np.uint64(size)
    return out_G.astype(np.int64)


def _feistel(x_G: np.ndarray, half: int, keys: Iterable[np.ndarray]) -> np.ndarray:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left_G, right_G = x_G >> bits, x_G & mask
    for key_G in keys:
        left_G, right_G = right_G, left_G ^ (scramble(right_G, key_G) & mask)
    return (left_G << bits) | right_G


def _draw(seed: int, epoch_G: np.ndarray, purpose_G: np.ndarray) -> np.ndarray:
    """Return one random 64-bit number per (seed, epoch, purpose)."""
    start_G = scramble(np.asarray(epoch_G, np.uint64), np.uint64(seed))
    return scramble(start_G, np.asarray(purpose_G, np.uint64))


def scramble(x_G: np.ndarray, key) -> np.ndarray:
    """Mix x_G and key into 64 bits that look random (the finalizer of SplitMix64, applied to both)."""
    x_G = np.asarray(x_G, np.uint64) ^ _finish(np.atleast_1d(np.asarray(key, np.uint64)))
    return _finish(x_G)


def _finish(x_G: np.ndarray) -> np.ndarray:
    x_G = x_G + np.uint64(0x9E3779B97F4A7C15)
    x_G = (x_G ^ (x_G >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_G = (x_G ^ (x_G >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x_G ^ (x_G >> np.uint64(31))
