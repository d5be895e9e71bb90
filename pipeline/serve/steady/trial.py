"""Whether a network gives a text the same bits alone and among others, tried on this machine.

B rows, T tokens, D model width, V vocabulary.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..networks import Chunk, Network
from ..rows import Order, ServedRow

# Of the text that is looked at, which is over a block of attention, and of those beside it, one of
# which is there in every pass.
LENGTH = 70
BESIDE = (5, 52)
# How much of the second of these is read where others draw, if a network has both in one pass.
LATE = 2


def is_steady(
    network: Network, context_tokens: int, readers: Sequence[str | None] = (None,)
) -> bool:
    """Whether a text's logits, after what is read and after a token that is drawn, are to the last
    bit the same alone in one pass and among others in two; no text is served yet. They are read by
    `readers` in turn."""
    rows = []
    for number, length in enumerate((*BESIDE, LENGTH)):
        count = min(length, context_tokens - 1)
        # steps of a prime, so that ids repeat only where the vocabulary is a multiple of it
        ids = [(number + place * 7919) % network.vocab_size for place in range(count)]
        rows.append(ServedRow(_nobody(), ids, readers[number % len(readers)]))
    count = len(rows[-1].ids)
    alone = _logits(network, rows[-1:], (0, count))
    beside = _logits(network, rows, (0, count // 2, count))
    return torch.equal(alone, beside)


def _nobody() -> Order:
    """Return whose text it is."""

    def fail(error: BaseException) -> None:
        raise error

    return Order("", None, lambda: False, fail)


def _logits(network: Network, rows: Sequence[ServedRow], bounds: Sequence[int]) -> Tensor:
    """Return the last text's logits after it and after a token that is drawn; texts are read from
    one bound to the next."""
    places = len(rows[-1].ids) + 1
    network.cache.reserve(len(rows), places, len(rows) * places)
    found = []
    late = [0] * len(rows)
    if network.packs and len(rows) > 1:
        late[1] = min(LATE, len(rows[1].ids))
    with torch.no_grad():
        network.prepare(rows)
        for start, end in pairwise(bounds):
            chunks = []
            for slot, row in enumerate(rows):
                if ids := row.ids[start : min(end, len(row.ids) - late[slot])]:
                    chunks.append(Chunk(row, slot, ids, start))
            x_BD = _passed(network, chunks)
        found.append(network.logits(x_BD)[-1])
        drawn = []
        for slot, row in enumerate(rows):
            at = len(row.ids) - late[slot]
            drawn.append(Chunk(row, slot, row.ids[at:] or (1,), at))
        found.append(network.logits(_passed(network, drawn))[-1])
    network.cache.clear()
    return torch.stack(found)


def _passed(network: Network, chunks: Sequence[Chunk]) -> Tensor:
    batch = network.batch(chunks)
    x_BTD, _ = network.read(batch)
    return batch.last(x_BTD)
