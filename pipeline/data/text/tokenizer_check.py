"""What a pretrained tokenizer makes of the run's own text, tried before any of it is written.

Bits per byte divide what a model has to guess by the bytes of the text: where a tokenizer drops
text, lower-cases it or has no entry for it, a model has less to guess and every figure is too good.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from ...errors import DataError
from .tokenizer import Tokenizer, alike, unknown_ids

SAMPLE_BYTES = 1e6  # text that is tried
PIECE_CHARS = 1000  # compared at a time, as the time goes by the square
_BEFORE = 15  # characters of a text in a message, before what does not survive
_LEAST_SHARE = 1e-5  # of bytes; less is not told


def check(tokenizer: Tokenizer, texts: Iterable[str], most_lost: float) -> dict[str, Any]:
    """Return what a tokenizer does to texts: share of bytes lost, share of tokens unknown, and what
    it puts in front.

    Raises DataError when more than most_lost of the bytes do not survive, or when the same text
    gives other ids a second time.
    """
    pieces = list(_pieces(texts))
    found = [each.ids for each in tokenizer.encode(pieces)]
    again = [each.ids for each in tokenizer.encode(pieces)]
    if found != again:
        raise DataError(
            "tokenizer.pretrained: the same text gives other tokens each time (it samples), so no "
            "run could be repeated; switch the sampling off in its tokenizer.json"
        )
    unknown = unknown_ids(tokenizer.model)
    sizes = 0
    lost = 0
    example = ""
    tokens = 0
    unknown_tokens = 0
    for text, ids in zip(pieces, found, strict=True):
        known = [token for token in ids if token not in unknown]
        tokens += len(ids)
        unknown_tokens += len(ids) - len(known)
        raw = text.encode()
        missing = _missing(raw, tokenizer.model.decode(known, skip_special_tokens=False))
        sizes += len(raw)
        lost += missing
        if missing and not example:
            example = text
    share = lost / max(sizes, 1)
    if share > most_lost:
        back = _back(tokenizer, example)
        # From where they differ, or a little before it
        at = max(0, alike(example, back) - _BEFORE)
        raise DataError(
            f"tokenizer.pretrained: {share:.1%} of the text's bytes do not survive it (of "
            f"{_shown(example, at)} it gives back {_shown(back, at)}), more than "
            f"tokenizer.max_lost_share ({most_lost:g}), and bits per byte would be too good by as "
            "much; choose another tokenizer, or raise the setting"
        )
    names = [str(tokenizer.model.id_to_token(token)) for token in tokenizer.front]
    return {
        "lost_share": share if share > _LEAST_SHARE else 0.0,
        "unknown_share": unknown_tokens / max(tokens, 1),
        "front": " ".join(names) or "nothing",
    }


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """Yield the beginnings of texts, until there are enough."""
    taken = 0
    for text in texts:
        if taken >= SAMPLE_BYTES:
            return
        # A few of each, so that one long document is not all there is
        for begin in range(0, min(len(text), 4 * PIECE_CHARS), PIECE_CHARS):
            piece = text[begin : begin + PIECE_CHARS]
            taken += len(piece)
            yield piece


def _missing(raw: bytes, back: str) -> int:
    """Return how many bytes of a text are not, in their order, in what came back of it."""
    from rapidfuzz.distance import LCSseq

    found = back.encode()
    if found == raw:
        return 0
    return len(raw) - int(LCSseq.similarity(raw, found))


def _back(tokenizer: Tokenizer, text: str) -> str:
    (encoded,) = tokenizer.encode([text])
    return tokenizer.model.decode(encoded.ids, skip_special_tokens=False)


def _shown(text: str, at: int) -> str:
    return repr(text[at : at + 40])
