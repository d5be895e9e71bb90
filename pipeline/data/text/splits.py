"""Which documents are held out, and a bounded sample of the rest.

Invariant: the split is a function of a document's key, so equal documents never fall into two
splits, whatever their order, domain or number.
"""

import heapq
from array import array
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ...config.text_data import DataConfig
from ...errors import DataError
from .documents import SPLITS, Document, key_of

SMALL = 100  # distinct documents: below, a domain's splits always go by rank, not by threshold
_EXPECTED = 10  # held-out documents a threshold must promise; fewer might turn out to be none
_MOST_KEYS = 100_000
# that a sampled document counts for, so that tiny ones cannot fill memory with objects
_LEAST_BYTES = 64


class Splits:
    """train, valid or test of every document.

    Without data.split_field a document whose key is in the lowest test_share of the 64-bit range is
    test, in the next valid_share valid. A small domain (see SmallDomains) is ranked by key instead:
    the lowest max(1, round(share * n)) of its n documents are test, the next valid; what it decides
    holds for the same text in every domain.
    """

    def __init__(self, data: DataConfig):
        self.data = data
        self._test_below = int(data.test_share * 2**64)
        self._valid_below = int((data.test_share + data.valid_share) * 2**64)
        self._decided: dict[int, str] = {}
        self._held = {
            "valid": array("Q"),
            "test": array("Q"),
        }  # data.split_field only; 8 bytes a document
        self._sorted: dict[str, np.ndarray] | None = None

    def see(self, document: Document) -> None:
        """Remember a held-out document, so that no training document equals it."""
        if document.split in self._held and not document.piece:
            self._held[document.split].append(document.key)

    def decide(self, domain: str, keys: set[int]) -> None:
        """Fix the splits of a small domain by rank. Raises DataError when it has fewer than three
        documents."""
        if len(keys) < len(SPLITS):
            raise DataError(
                f"domain {domain} has {len(keys)} distinct documents, and one each is needed to train, validate and "
                "test. Give it more documents, or cut its long ones into several files or rows"
            )
        left = sorted(keys - self._decided.keys())
        taken = [self._decided[key] for key in keys & self._decided.keys()]
        for split, share in (("test", self.data.test_share), ("valid", self.data.valid_share)):
            count = max(1, round(share * len(keys))) - taken.count(split)
            chosen, left = (left[:count], left[count:]) if count > 0 else ([], left)
            self._decided |= dict.fromkeys(chosen, split)
        self._decided |= dict.fromkeys(left, "train")

    def save(self, path: Path) -> None:
        """Write what was seen and decided to a safetensors file."""
        from safetensors.numpy import save

        tensors = {f"held_{name}": np.array(keys, np.uint64) for name, keys in self._held.items()}
        tensors["decided"] = np.array(list(self._decided), np.uint64)
        tensors["splits"] = np.array(
            [SPLITS.index(split) for split in self._decided.values()], np.uint8
        )
        path.write_bytes(save(tensors))

    def load(self, path: Path) -> "Splits":
        """Take over what save wrote; returns itself."""
        from safetensors.numpy import load

        tensors = load(path.read_bytes())
        self._held = {name: array("Q", tensors[f"held_{name}"].tobytes()) for name in self._held}
        decided = zip(tensors["decided"].tolist(), tensors["splits"].tolist(), strict=True)
        self._decided, self._sorted = {key: SPLITS[i] for key, i in decided}, None
        return self

    def of(self, document: Document) -> str | None:
        """Return the split; None for one that equals a document held out elsewhere, which must be
        dropped."""
        if document.split is not None:
            return None if self._elsewhere(document) else document.split
        if document.key in self._decided:
            return self._decided[document.key]
        if document.key < self._test_below:
            return "test"
        return "valid" if document.key < self._valid_below else "train"

    def _elsewhere(self, document: Document) -> bool:
        if self._sorted is None:
            self._sorted = {
                name: np.unique(np.array(keys, np.uint64)) for name, keys in self._held.items()
            }
        stricter = {"train": ("valid", "test"), "valid": ("test",), "test": ()}[document.split]
        return any(_contains(self._sorted[name], document.key) for name in stricter)


def _contains(sorted_keys: np.ndarray, key: int) -> bool:
    place = np.searchsorted(sorted_keys, np.uint64(key))
    return bool(place < len(sorted_keys) and sorted_keys[place] == key)


class SmallDomains:
    """The keys of every domain with too few distinct documents for thresholds.

    That is fewer than SMALL, or than it takes to expect ten of each held-out split (at most
    100,000).
    """

    def __init__(self, data: DataConfig):
        expected = int(_EXPECTED / min(data.valid_share, data.test_share))
        self._small = min(max(SMALL, expected), _MOST_KEYS)
        self._keys: dict[str, set[int] | None] = defaultdict(set)

    def see(self, domain: str, key: int) -> None:
        """Count one document."""
        keys = self._keys[domain]
        if keys is not None:
            keys.add(key)
            if len(keys) >= self._small:
                self._keys[domain] = None

    def decide(self, splits: Splits, names: Iterable[str]) -> None:
        """Let splits rank each small domain, in the order of names."""
        for name in names:
            if (keys := self._keys[name]) is not None:
                splits.decide(name, keys)


class Sample:
    """The documents with the smallest keyed hashes that fit into budget_bytes together.

    The order they are seen in does not matter: what follows a document that did not fit is left out
    too.
    """

    def __init__(self, budget_bytes: float, seed: int):
        self.budget_bytes, self.seed = budget_bytes, seed
        self._bytes, self._heap, self._count = 0, [], 0
        self._left_out: int | None = None  # rank of the best document that did not fit

    @property
    def whole(self) -> bool:
        """Say whether nothing was left out."""
        return self._left_out is None

    def see(self, document: Document) -> None:
        """Offer one document."""
        name = f"{document.key}/{document.piece}".encode()
        rank = -key_of(name, self.seed, b"sample")
        if self._left_out is not None and rank <= self._left_out:
            return
        self._count += 1  # so that equal ranks never compare documents
        heapq.heappush(self._heap, (rank, -self._count, document))
        self._bytes += max(document.bytes, _LEAST_BYTES)
        while self._bytes > self.budget_bytes and len(self._heap) > 1:
            self._left_out, _, worst = heapq.heappop(self._heap)
            self._bytes -= max(worst.bytes, _LEAST_BYTES)

    def documents(self) -> list[Document]:
        """Return what was kept, in order of hash."""
        return [
            document
            for _, _, document in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)
        ]
