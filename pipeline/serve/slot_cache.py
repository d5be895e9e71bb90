"""Keys and values of the texts that are being generated: a slot for each, side by side in one
tensor a layer, where each text is as long as it is.

A slot has one place more than texts may have, where what only fills a batch up is written and never
looked at.

B rows of a pass, T tokens of each, N = B*T, R slots, S places, H heads, K width of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

# Places and slots are had in steps of these, as every growth copies all there is.
PLACES = 64
SLOTS = 4


@dataclass(frozen=True)
class Passing:
    """Where a pass writes and what it looks at."""

    slot_BT: Tensor  # or of shape (B, 1)
    place_BT: Tensor
    seen: int  # S: the first places of each slot
    slots: slice | Tensor  # that are looked at; of a slice nothing has to be gathered


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values of all slots."""

    is_sliding = False
    keys: Any  # (R, H, S, K), once anything was kept
    values: Any

    def __init__(self, cache: "SlotCache"):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room of the kind that keys and values of a pass are, both of shape (B, H, T, K)."""
        self.keys = self._empty(key_states)
        self.values = self._empty(value_states)
        self.is_initialized = True

    def _empty(self, like: Tensor) -> Tensor:
        heads = like.shape[1]
        width = like.shape[-1]
        # Zeros: what a mask hides still has to be a number, and memory may hold anything
        return like.new_zeros(self.cache.slots, heads, self.cache.places + 1, width)

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values of shape (B, H, T, K); return all that the pass looks at, of shape
        (B, H, S, K), or (R, H, S, K) where that is all slots."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        passing = self.cache.passing
        out = []
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            # an index on either side of a slice puts what it picks in front: (B, T, H, K)
            kept[passing.slot_BT, :, passing.place_BT] = new.transpose(1, 2)
            out.append(kept[passing.slots, :, : passing.seen])
        keys, values = out
        return keys, values

    def resize(self) -> None:
        """Have as much room as the cache says, with all that was there and still has its place."""
        if not self.is_initialized:
            return
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = self._empty(old)
            slots = min(old.shape[0], new.shape[0])
            places = min(old.shape[2], new.shape[2])
            new[:slots, :, :places] = old[:slots, :, :places]
            setattr(self, name, new)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many places a pass looks at, and the first of them."""
        return self.cache.passing.seen, 0

    def get_seq_length(self) -> int:
        """Return the places before those that a pass writes: each row has its own number of them,
        which `position_ids` and the mask say."""
        return 0

    def get_max_length(self) -> int:
        """Return the most places of a slot."""
        return self.cache.places


class SlotCache(Cache):
    """The slots of all layers."""

    passing: Passing  # set before every pass
    layers: list[Any]  # of SlotLayer

    def __init__(self, layers: int):
        self.slots = 0
        self.places = 0
        super().__init__(layers=[SlotLayer(self) for _ in range(layers)])

    def reserve(self, slots: int, places: int, most: int) -> None:
        """Have so many slots of so many places at least, at most so many places in all slots unless
        these need more; what stands in these places stays."""
        if slots <= self.slots and places <= self.places:
            return
        wanted = max(self.slots, rounded(slots, SLOTS))
        length = max(self.places, rounded(places, PLACES))
        if wanted * length > most:
            # what a longer text had left behind goes first
            length = rounded(places, PLACES)
        if wanted * length > most:
            wanted = slots
        self.slots = wanted
        self.places = length
        for layer in self.layers:
            layer.resize()

    def write(self, slots: Sequence[int], place_BT: Tensor, seen: int) -> None:
        """Say where the next pass writes, and that it looks at the first places up to `seen`."""
        are_first = list(slots) == list(range(len(slots)))
        slot_B = torch.tensor(slots, device=place_BT.device)
        looked_at = slice(len(slots)) if are_first else slot_B
        self.passing = Passing(slot_B.unsqueeze(1), place_BT, seen, looked_at)

    def write_packed(self, slots: Sequence[int], place_1N: Tensor) -> None:
        """Say in which slot and place, of shape (1, N), each token of the next pass is kept; it
        looks at all slots."""
        slot_1N = torch.tensor([slots], device=place_1N.device)
        self.passing = Passing(slot_1N, place_1N, self.places, slice(None))

    def move(self, source: int, target: int, places: int) -> None:
        """Copy what stands in a slot's first places to another slot."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys[target, :, :places] = layer.keys[source, :, :places]
                layer.values[target, :, :places] = layer.values[source, :, :places]

    def swap(self, first: int, second: int, places: int) -> None:
        """Exchange what stands in the first places of two slots."""
        both = [first, second]
        for layer in self.layers:
            if layer.is_initialized:
                # what stands on the right is a copy, as the index is a list
                layer.keys[both, :, :places] = layer.keys[both[::-1], :, :places]
                layer.values[both, :, :places] = layer.values[both[::-1], :, :places]

    def wipe(self, kept: Sequence[int]) -> None:
        """Put zeros wherever no text stands; `kept` are how many places are one's, slot by slot."""
        for layer in self.layers:
            if not layer.is_initialized:
                continue
            for numbers in (layer.keys, layer.values):
                for slot, places in enumerate(kept):
                    numbers[slot, :, places:] = 0
                numbers[len(kept) :] = 0

    @property
    def place_bytes(self) -> int | None:
        """Bytes of one token in all layers; None before any was kept."""
        if not self.layers[0].is_initialized:
            return None
        keys = self.layers[0].keys
        return 2 * len(self.layers) * keys.shape[1] * keys.shape[-1] * keys.element_size()

    def clear(self) -> None:
        """Give all memory back; every slot must be free."""
        self.slots = 0
        self.places = 0
        self.layers = [SlotLayer(self) for _ in self.layers]


def rounded(count: int, step: int) -> int:
    """Return the first multiple of a step that is no less."""
    return -(-count // step) * step
