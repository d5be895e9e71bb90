"""Which rows must stay together, and which split each such group goes to.

Invariant: rows that share a picture (or a document's name) are one group, and a group is in one
split; a group's split depends on its pictures and the seed, so a picture that two tasks share goes
to the same split in both.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..routing.rows import normalised
from ..text.documents import SPLITS

TEXT = "text:"  # begins the key of a row without a picture; sorts behind every digest
_STRICTEST = (
    "test",
    "valid",
    "train",
)  # a group that a source puts in several goes to the first of these


class Groups:
    """Keys that belong together, as disjoint sets."""

    def __init__(self):
        self._above: dict[str, str] = {}

    def join(self, keys: Sequence[str]) -> None:
        """Note that all these keys are of one group."""
        first, *others = (self._top(key) for key in keys)
        for other in others:
            first, other = sorted(
                (first, self._top(other))
            )  # the smallest key stands for all: a picture's digest
            self._above[other] = first

    def of(self, key: str) -> str:
        """Return the key that stands for a key's group."""
        return self._top(key)

    def _top(self, key: str) -> str:
        top = key
        while (above := self._above.setdefault(top, top)) != top:
            top = above
        while key != top:  # the next search is shorter
            self._above[key], key = top, self._above[key]
        return top


def text_key(prompt: str) -> str:
    """Return the key of a row of text alone: rows that ask the same stay together."""
    return TEXT + hashlib.sha256(normalised(prompt).encode()).hexdigest()[:16]


def group_name(key: str) -> str:
    """Return what a row says of its group, by the key that stands for it."""
    return key if key.startswith(TEXT) else f"sha256:{key}"


@dataclass
class Division:
    """The split of every group; given ones first, the rest by a hash."""

    seed: int
    valid_share: float
    test_share: float
    splits: dict[str, str] = field(default_factory=dict)
    carved: tuple[str, ...] = ()  # splits that the source lacks and were cut from the rest

    def divide(self, given: Iterable[tuple[str, str]]) -> None:
        """Settle every group's split from (group, split or "" where none is given) pairs."""
        for group, split in given:
            found = self.splits.get(group, "")
            self.splits[group] = min((found, split), key=_rank)
        present = set(self.splits.values())
        self.carved = tuple(split for split in ("valid", "test") if split not in present)
        free = [
            group
            for group, split in self.splits.items()
            if split == "" or (split == "train" and self.carved)
        ]
        for group in sorted(free):
            self.splits[group] = self._chosen(group, self.splits[group])
        self._fill(sorted(free, key=self._share))

    def _chosen(self, group: str, given: str) -> str:
        share = self._share(group)
        chosen = "test" if share < self.test_share else "train"
        if self.test_share <= share < self.test_share + self.valid_share:
            chosen = "valid"
        return chosen if given == "" or chosen in self.carved else "train"

    def _fill(self, free: list[str]) -> None:
        """Give each split that chance left empty a group of the one that has most."""
        for split in (*self.carved, "train"):
            if split not in self.splits.values():
                sizes = Counter(self.splits[group] for group in free)
                donor = max(SPLITS, key=lambda name: sizes[name])
                if sizes[donor] > 1:
                    self.splits[next(group for group in free if self.splits[group] == donor)] = (
                        split
                    )

    def _share(self, group: str) -> float:
        hashed = hashlib.blake2b(
            group.encode("utf-8", "replace"), digest_size=8, key=str(self.seed).encode()
        )
        return int.from_bytes(hashed.digest(), "little") / 2**64


def _rank(split: str) -> int:
    return _STRICTEST.index(split) if split else len(_STRICTEST)
