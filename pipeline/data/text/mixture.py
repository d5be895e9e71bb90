"""Rows of training drawn from token shards.

Invariant: row g of a DomainMixture is a pure function of (shards, settings, seed, g); a reader has
no state to save. Legend: G rows asked for, D domains, R rounds of the permutation, C context
tokens.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy import int64, ndarray, uint64
from numpy.typing import ArrayLike

from ...errors import DataError
from .shards import Shards

# Of the Feistel network: from four on it looks random from both sides (Luby and Rackoff 1988)
_ROUNDS = 4
_OFFSET = 101  # purposes of _draw: 0.._ROUNDS-1 are keys of rounds, from here offsets of domains


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
