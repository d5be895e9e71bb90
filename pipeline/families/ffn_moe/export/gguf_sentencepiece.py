"""A tokenizer of SentencePiece's kind, which Llama 2 and Mistral have, in the words of a GGUF file.

tokenizer.json lists which two pieces become one, in order; llama.cpp knows a score of each piece
and joins what gives the best one, whichever two they are. Both do the same where the list has every
way to make a piece, all ways to one piece next to each other: so those that were converted from
SentencePiece have it, and it is looked at here.
"""

from collections.abc import Mapping
from typing import Any

SPACE = "▁"
_PREPEND = {"type": "Prepend", "prepend": SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_WHOLE = {"type": "Metaspace", "replacement": SPACE, "split": False}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def is_sentencepiece(raw: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json writes what it has no piece for as bytes, as SentencePiece does."""
    return raw["model"].get("type") == "BPE" and bool(raw["model"].get("byte_fallback"))


def puts_space_first(raw: Mapping[str, Any]) -> bool:
    """Whether a text gets a space in front. Raises ValueError for what changes texts otherwise."""
    normalizer = raw.get("normalizer")
    parts = _parts(normalizer, "normalizers")
    cuts = _parts(raw.get("pre_tokenizer"), "pretokenizers")
    if parts in ([_PREPEND, _REPLACE], [_REPLACE]) and not cuts:
        return _PREPEND in parts
    if not parts and len(cuts) == 1 and cuts[0].items() >= _WHOLE.items():
        return cuts[0].get("prepend_scheme") != "never"
    raise ValueError("it changes or cuts texts otherwise than SentencePiece")


def _parts(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


def scores(raw: Mapping[str, Any]) -> dict[str, float]:
    """Return the score of every piece that is joined from two. Raises ValueError where llama.cpp
    would join others."""
    vocabulary = raw["model"]["vocab"]
    missing = [byte for byte in BYTES if byte not in vocabulary]
    if missing:
        raise ValueError(f"it has no entry for the byte {missing[0]}")
    ways: dict[str, set[int]] = {}
    found: dict[str, float] = {}
    last = ""
    for rank, merge in enumerate(raw["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        piece = left + right
        if piece in found and piece != last:
            raise ValueError(f"its ways to the piece {piece!r} have others between them")
        found.setdefault(piece, -float(rank))
        ways.setdefault(piece, set()).add(len(left))
        last = piece
    for piece, known in ways.items():
        for at in range(1, len(piece)):
            both = piece[:at] in vocabulary and piece[at:] in vocabulary
            if both and at not in known:
                raise ValueError(f"it makes the piece {piece!r} of some of its parts alone")
    return found
