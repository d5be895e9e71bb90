"""Which documents each domain holds out, where domains are labels.

Invariant: the first domain that has a document decides on its split, and every later one follows;
so no document is trained on in one domain and held out in another, and a domain that is added
changes nothing in those before it. Memory holds the keys of small domains, or of what is given as
held out, and never a key of every document.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy import ndarray

from .records import CODES
from .splits import Splits, by_threshold, contains, enough_keys, ranked
from .survey import Survey

_NO_KEYS = np.empty(0, np.uint64)
_STRICTEST_FIRST = ("test", "valid", "train")
Decided = dict[int, str]  # split by key


@dataclass
class _Watched:
    """The keys of a domain that somebody has to know, sorted, by given split ("" without)."""

    by_split: dict[str, ndarray]
    is_small: bool = False

    @cached_property
    def keys(self) -> ndarray:
        """All of them, sorted."""
        return _union(self.by_split.values())

    def given(self, key: int) -> str:
        """Return the strictest split that a key is given."""
        for split in _STRICTEST_FIRST:
            if contains(self.by_split.get(split, _NO_KEYS), key):
                return split
        raise KeyError(key)


@dataclass(frozen=True)
class _Ruling:
    """What is decided key by key for a domain, and what of that earlier domains have changed."""

    decided: Decided
    swayed: Decided


class HeldOut:
    """The splits of every domain of a survey."""

    def __init__(self, survey: Survey):
        self.survey = survey
        self.data = survey.cfg.data
        self.names = survey.cfg.partition.names

    def splits(self, domain: str) -> Splits:
        """Return the splits of a domain's documents."""
        splits = Splits(self.data)
        splits.rule(self._rulings[domain].decided)
        for split, keys in self._own[domain].by_split.items():
            splits.hold(split, keys)
        return splits

    def print_of(self, domain: str) -> str:
        """Return the print of what earlier domains have changed in a domain's splits; "" where that
        is nothing."""
        swayed = sorted(self._rulings[domain].swayed.items())
        return hashlib.sha256(json.dumps(swayed).encode()).hexdigest() if swayed else ""

    def distinct(self, domain: str) -> int | None:
        """Return how many distinct documents a small domain has; None for others."""
        own = self._own[domain]
        return len(own.keys) if own.is_small else None

    @cached_property
    def _own(self) -> dict[str, _Watched]:
        """What each domain by itself makes to be watched: a small one all of its keys, others those
        that are given as held out."""
        found = {}
        for name in self.names:
            if self.data.split_field:
                found[name] = _given_as_held_out(self.survey, name)
            else:
                found[name] = _of_small(self.survey, name)
        return found

    @cached_property
    def _present(self) -> dict[str, _Watched]:
        """Which keys that any domain watches each domain has."""
        watched = _union(own.keys for own in self._own.values())
        found = {}
        for name, own in self._own.items():
            # Of a small one they are known already, and alone nobody has to be asked
            if own.is_small or len(self.names) == 1 or not len(watched):
                found[name] = own
            else:
                found[name] = _among(self.survey, name, watched)
        return found

    @cached_property
    def _rulings(self) -> dict[str, _Ruling]:
        every = np.concatenate([each.keys for each in self._present.values()])
        keys, counts = np.unique(every, return_counts=True)
        shared = keys[counts > 1]
        earlier: Decided = {}
        rulings = {}
        for name in self.names:
            own = np.intersect1d(self._present[name].keys, shared, assume_unique=True).tolist()
            before = {key: earlier[key] for key in own if key in earlier}
            rulings[name] = self._ruling(name, before)
            alone = self._alone(name, own)
            for key in own:
                earlier.setdefault(key, rulings[name].decided.get(key, alone[key]))
        return rulings

    def _ruling(self, name: str, before: Decided) -> _Ruling:
        """Return what is decided for a domain, some of whose keys earlier domains have decided."""
        own = self._own[name]
        if not own.is_small:
            alone = self._alone(name, before)
            swayed = {key: split for key, split in before.items() if split != alone[key]}
            return _Ruling(swayed, swayed)
        # By rank, what others have decided counts towards a domain's shares
        keys = own.keys.tolist()
        alone = ranked(self.data, keys, {})
        decided = ranked(self.data, keys, before)
        return _Ruling(
            decided, {key: split for key, split in decided.items() if split != alone[key]}
        )

    def _alone(self, name: str, keys: list[int] | Decided) -> Decided:
        """Return what a domain that is not small decides of some keys by itself."""
        if self.data.split_field:
            return {key: self._present[name].given(key) for key in keys}
        return {key: by_threshold(self.data, key) for key in keys}


def _of_small(survey: Survey, name: str) -> _Watched:
    """Return the keys of a domain with too few documents for thresholds, none of any other."""
    keys = _NO_KEYS
    for block in survey.rows(name):
        keys = np.union1d(keys, block["key"])
        if len(keys) >= enough_keys(survey.cfg.data):
            return _Watched({"": _NO_KEYS})
    return _Watched({"": keys}, is_small=True)


def _given_as_held_out(survey: Survey, name: str) -> _Watched:
    found: dict[str, list[ndarray]] = {"valid": [], "test": []}
    for block in survey.rows(name):
        for split, blocks in found.items():
            blocks.append(np.unique(block["key"][block["split"] == CODES[split]]))
    return _Watched({split: _union(blocks) for split, blocks in found.items()})


def _among(survey: Survey, name: str, watched: ndarray) -> _Watched:
    """Return which of some keys a domain has."""
    found: dict[str, list[ndarray]] = {split or "": [] for split in CODES}
    for block in survey.rows(name):
        known = block[np.isin(block["key"], watched)]
        for split, code in CODES.items():
            found[split or ""].append(np.unique(known["key"][known["split"] == code]))
    return _Watched({split: _union(blocks) for split, blocks in found.items()})


def _union(arrays: Iterable[ndarray]) -> ndarray:
    return np.unique(np.concatenate([_NO_KEYS, *arrays]))
