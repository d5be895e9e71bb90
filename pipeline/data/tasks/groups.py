"""Which rows must stay together, and which split each such group goes to.

Invariant: rows that share a picture (or a document's name) are one group, and a group is in one
split; a group's split depends on its pictures and the seed, so a picture that two tasks share goes
to the same split in both.
"""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from .. import union_find
from ..text.documents import SPLITS

# Begins the key of a row without a picture; sorts behind every digest, which is of hex digits, so
# that a picture stands for a group that has one.
TEXT = "text:"

# Prompts that are remembered: those of one task are often all the same.
_RECENT = 1 << 14

# A group that a source puts in several splits goes to the first of these.
_STRICTEST = ("test", "valid", "train")


class Groups:
    """Keys that belong together; a group is called by its smallest key, a picture's digest."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}

    def join(self, keys: Sequence[str]) -> None:
        """Note that all these keys are of one group."""
        first = keys[0]
        self._parents.setdefault(first, first)
        for other in keys[1:]:
            self._parents.setdefault(other, other)
            union_find.unite(self._parents, first, other)

    def copy(self) -> "Groups":
        """Return the groups as they are now."""
        out = Groups()
        out._parents = dict(self._parents)
        return out

    def of(self, key: str) -> str:
        """Return the key that stands for a key's group."""
        self._parents.setdefault(key, key)
        return union_find.root(self._parents, key)


@lru_cache(_RECENT)
def normalized(prompt: str) -> str:
    """Return what two prompts that differ only in case, spaces, width or a closing mark have in
    common."""
    folded = unicodedata.normalize("NFKC", prompt).casefold()
    return " ".join(folded.split()).rstrip(" .!?")


def text_key(prompt: str) -> str:
    """Return the key of a row of text alone: rows that ask the same stay together."""
    wording = normalized(prompt).encode()
    return TEXT + hashlib.sha256(wording).hexdigest()[:16]


def group_name(key: str) -> str:
    """Return what a row says of its group, by the key that stands for it."""
    return key if key.startswith(TEXT) else f"sha256:{key}"


@dataclass
class SplitAssignment:
    """The split of every group; given ones first, the rest by a hash."""

    seed: int
    valid_share: float
    test_share: float
    splits: dict[str, str] = field(default_factory=dict)
    carved: tuple[str, ...] = ()  # splits that the source lacks and were cut from the rest

    def assign(self, given: Iterable[tuple[str, str]]) -> None:
        """Settle every group's split from (group, split or "" where none is given) pairs."""
        for group, split in given:
            found = self.splits.get(group, "")
            stricter = min(found, split, key=strictness)
            self.splits[group] = stricter
        present = set(self.splits.values())
        for split in ("valid", "test"):
            if split not in present:
                self.carved += (split,)

        # Training rows are taken from only where the source has no rows for validation or test.
        free = []
        for group, split in self.splits.items():
            is_divided = split == "train" and self.carved
            if split == "" or is_divided:
                free.append(group)
        for group in free:
            stated = self.splits[group]
            self.splits[group] = self._chosen(group, stated)
        self._fill_empty(free)

    def _chosen(self, group: str, stated: str) -> str:
        share = self._share(group)
        chosen = "train"
        if share < self.test_share:
            chosen = "test"
        elif share < self.test_share + self.valid_share:
            chosen = "valid"
        # Rows that are stated to train may go only where the source has none of its own.
        if stated == "" or chosen in self.carved:
            return chosen
        return "train"

    def _fill_empty(self, free: list[str]) -> None:
        """Give each split that chance left empty a group of the one that has most."""
        # In an order that the rows' own has no part in.
        by_share = sorted(free, key=self._share)
        for split in (*self.carved, "train"):
            if split in self.splits.values():
                continue
            sizes = Counter(self.splits[group] for group in by_share)
            donor = max(SPLITS, key=sizes.__getitem__)
            if sizes[donor] <= 1:
                continue
            for group in by_share:
                if self.splits[group] == donor:
                    self.splits[group] = split
                    break

    def _share(self, group: str) -> float:
        """Return a number in [0, 1) that looks random, of the group's name and the seed alone."""
        key = str(self.seed).encode()
        name = group.encode("utf-8", "replace")
        hasher = hashlib.blake2b(name, digest_size=8, key=key)
        number = int.from_bytes(hasher.digest(), "little")
        return number / 2**64


def strictness(split: str) -> int:
    """Return a split's place among those that a group in several of them may go to, first ones
    first."""
    if split == "":
        return len(_STRICTEST)
    return _STRICTEST.index(split)
