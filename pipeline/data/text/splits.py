"""Which documents are held out, and a bounded sample of the rest.

Invariant: equal documents never fall into two splits, whatever their order, domain or number: the
first domain that has a document decides, by its key, and no later one changes that.
"""

import heapq
from array import array
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy import ndarray, uint64

from ...config.text_data import DataConfig
from ...errors import DataError
from ...store.reading import damaged, read_bytes
from ...store.room import writing
from .documents import SPLITS, Document, key_of

SMALL = 100  # distinct documents: below, a domain's splits always go by rank, not by threshold
_EXPECTED = 10  # held-out documents a threshold must promise; fewer might turn out to be none
_MOST_KEYS = 100_000
# that a sampled document counts for, so that tiny ones cannot fill memory with objects
_LEAST_BYTES = 64
# Splits that a document of each given split must not be equal to one of
_STRICTER = {
    "train": ("valid", "test"),
    "valid": ("test",),
    "test": (),
}


class Splits:
    """train, valid or test of every document.

    Without data.split_field a document whose key is in the lowest test_share of the 64-bit range is
    test, in the next valid_share valid. A small domain (see SmallDomains) is ranked by key instead:
    the lowest max(1, round(share * n)) of its n documents are test, the next valid; what it decides
    holds for the same text in every later domain.
    """

    def __init__(self, data: DataConfig):
        self.data = data
        self._decided: dict[int, str] = {}  # key -> split, of small domains and earlier ones
        # Keys that are held out as given by data.split_field; an array takes 8 bytes a document
        self._held = {"valid": array("Q"), "test": array("Q")}
        self._sorted: dict[str, ndarray] | None = None

    def remember(self, document: Document) -> None:
        """Remember a document that is given as held out, so that no training document equals it."""
        if document.split in self._held and not document.piece:
            self._held[document.split].append(document.key)

    def rule(self, decided: Mapping[int, str]) -> None:
        """Take over what is decided of some keys, whatever else would be said of them."""
        self._decided |= decided

    def hold(self, split: str, keys: ndarray) -> None:
        """Remember keys (K,) that are given as held out; other splits leave nothing to be
        remembered."""
        if split in self._held:
            self._held[split].frombytes(keys.astype(uint64).tobytes())
            self._sorted = None

    def decide(self, domain: str, keys: set[int]) -> None:
        """Fix the splits of a small domain by rank. Raises DataError when it has fewer than three
        documents."""
        if len(keys) < len(SPLITS):
            raise too_few(domain, len(keys))
        before = {key: self._decided[key] for key in keys & self._decided.keys()}
        self._decided |= ranked(self.data, keys, before)

    def save(self, path: Path) -> None:
        """Write what was remembered and decided to a safetensors file."""
        from safetensors.numpy import save

        keys = list(self._decided)
        splits = [SPLITS.index(split) for split in self._decided.values()]
        tensors: dict[str, ndarray] = {
            "held_valid": np.array(self._held["valid"], uint64),
            "held_test": np.array(self._held["test"], uint64),
            "decided": np.array(keys, uint64),
            "splits": np.array(splits, np.uint8),
        }
        with writing(path):
            path.write_bytes(save(tensors))

    def load(self, path: Path) -> "Splits":
        """Take over what save wrote; returns itself. Raises DamagedArtifact or UnreadableFile."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            tensors = load(read_bytes(path))
        except SafetensorError as error:
            raise damaged(path, f"is not what was written: {error}") from None
        for name in self._held:
            keys = tensors[f"held_{name}"]
            self._held[name] = array("Q", keys.tobytes())
        self._sorted = None
        self._decided = {}
        decided = tensors["decided"].tolist()
        splits = tensors["splits"].tolist()
        for key, split in zip(decided, splits, strict=True):
            self._decided[key] = SPLITS[split]
        return self

    def of(self, document: Document) -> str | None:
        """Return the split; None for one that equals a document held out elsewhere, which must be
        dropped."""
        key = document.key
        given = document.split
        decided = self._decided.get(key)
        if given is None:
            return decided or by_threshold(self.data, key)
        if decided is not None:
            return given if given == decided else None
        return None if self._leaks(key, given) else given

    def _leaks(self, key: int, split: str) -> bool:
        """Say whether a document of a given split is held out in a stricter one too."""
        if self._sorted is None:
            # Sorted once, after all were remembered: looked up in log n, and no set of objects
            self._sorted = {}
            for name, keys in self._held.items():
                held = np.array(keys, uint64)
                self._sorted[name] = np.unique(held)
        found = [contains(self._sorted[name], key) for name in _STRICTER[split]]
        return any(found)


def by_threshold(data: DataConfig, key: int) -> str:
    """Return the split of a key that nothing else decides."""
    held_share = data.test_share + data.valid_share
    if key < int(data.test_share * 2**64):
        return "test"
    return "valid" if key < int(held_share * 2**64) else "train"


def ranked(data: DataConfig, keys: Collection[int], before: Mapping[int, str]) -> dict[int, str]:
    """Return the split of each key of a small domain by rank; what an earlier domain has decided
    `before` stays, and counts towards this one's shares."""
    decided = dict(before)
    taken = Counter(before.values())
    left = sorted(key for key in keys if key not in before)
    shares = {"test": data.test_share, "valid": data.valid_share}
    for split, share in shares.items():
        wanted = max(1, round(share * len(keys)))
        count = max(0, wanted - taken[split])
        decided |= dict.fromkeys(left[:count], split)
        left = left[count:]
    return decided | dict.fromkeys(left, "train")


def too_few(domain: str, count: int) -> DataError:
    """Return the error for a domain that has fewer distinct documents than splits."""
    return DataError(
        f"domain {domain} has {count} distinct documents, and one each is needed to train, "
        "validate and test. Give it more documents, or cut its long ones into several files or rows"
    )


def contains(sorted_keys: ndarray, key: int) -> bool:
    """Whether a key is among sorted ones (K,)."""
    # As uint64: numpy would compare a Python int above 2**63 as a float
    place = np.searchsorted(sorted_keys, uint64(key))
    if place == len(sorted_keys):
        return False
    return bool(sorted_keys[place] == key)


def enough_keys(data: DataConfig) -> int:
    """Return the distinct documents from which on thresholds decide."""
    least_share = min(data.valid_share, data.test_share)
    enough = max(SMALL, int(_EXPECTED / least_share))
    return min(enough, _MOST_KEYS)


class SmallDomains:
    """The keys of every domain with too few distinct documents for thresholds.

    That is fewer than SMALL, or than it takes to expect ten of each held-out split (at most
    100,000).
    """

    def __init__(self, data: DataConfig):
        self._small = enough_keys(data)
        self._keys: dict[str, set[int] | None] = defaultdict(set)  # None: not small

    def add(self, domain: str, key: int) -> None:
        """Count one document."""
        keys = self._keys[domain]
        if keys is None:
            return
        keys.add(key)
        if len(keys) >= self._small:
            self._keys[domain] = None  # and its keys are let go

    def decide(self, splits: Splits, names: Iterable[str]) -> None:
        """Let splits rank each small domain, in the order of names."""
        for name in names:
            keys = self._keys[name]
            if keys is not None:
                splits.decide(name, keys)


_Entry = tuple[int, int, Document]  # of a sample: rank, number, document


def _rank_and_number(entry: _Entry) -> tuple[int, int]:
    # Without the document, which has no order
    rank, number, _ = entry
    return rank, number


class Sample:
    """The documents with the smallest keyed hashes that fit into budget_bytes together.

    The order they are added in does not matter: what follows a document that did not fit is left
    out too.
    """

    def __init__(self, budget_bytes: float, seed: int):
        self.budget_bytes = budget_bytes
        self.seed = seed
        self._bytes = 0
        self._count = 0
        # heapq keeps the smallest entry first, so ranks are negated hashes: the worst is at hand
        self._heap: list[_Entry] = []
        self._left_out: int | None = None  # rank of the best document that did not fit

    @property
    def whole(self) -> bool:
        """Say whether nothing was left out."""
        return self._left_out is None

    def add(self, document: Document) -> None:
        """Offer one document."""
        name = f"{document.key}/{document.piece}".encode()
        rank = -key_of(name, self.seed, b"sample")
        if self._left_out is not None and rank <= self._left_out:
            return
        self._count += 1  # so that equal ranks never compare documents
        entry = (rank, -self._count, document)
        heapq.heappush(self._heap, entry)
        self._bytes += max(document.bytes, _LEAST_BYTES)
        while self._bytes > self.budget_bytes and len(self._heap) > 1:
            self._left_out, _, worst = heapq.heappop(self._heap)
            self._bytes -= max(worst.bytes, _LEAST_BYTES)

    def documents(self) -> list[Document]:
        """Return what was kept, in order of hash."""

        best_first = sorted(self._heap, key=_rank_and_number, reverse=True)
        return [document for _, _, document in best_first]
