"""The run's tokenizer in the words of a GGUF file.

llama.cpp knows the patterns that cut a text by name alone (`tokenizer.ggml.pre`), and cuts
otherwise where a file names none. A tokenizer is known here by its pattern, whoever trained it, so
that one of our own is held as well as a published one; what has no name there is refused.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType

from ....data.text.tokenizer import Tokenizer
from ....errors import MismatchError
from .gguf_sentencepiece import BYTES, is_sentencepiece, puts_space_first, scores

# GPT-2's, which byte-level pre-tokenizers apply where they are told to
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
_BY_CASE = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_BY_CASE}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_BY_CASE}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
# By the patterns in order, and whether a whole word that is an entry is taken as it is
PRE = {
    ((WORDS,), False): "gpt-2",
    ((DIGIT, WORDS), False): "smollm",
    ((LLAMA3,), False): "smaug-bpe",
    ((LLAMA3,), True): "llama-bpe",
    ((QWEN2,), False): "qwen2",
}
INSTEAD = "export it in the format hf (one expert: in expert; their mean: in dense)"


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer."""

    model: str  # of llama.cpp: gpt2 of byte-level BPE, llama of SentencePiece
    pre: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    scores: list[float]  # of SentencePiece, in place of merges
    space_first: bool  # whether a text gets a space in front
    start: tuple[int, ...]  # what stands before a text: one token or none
    end: int
    more_ends: tuple[int, ...]
    template: str | None
    notes: tuple[str, ...]  # what the format does not hold of it, for people

    def write(self, writer: GGUFWriter) -> None:
        """Add it to a file's metadata."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        else:
            writer.add_token_merges(self.merges)
        writer.add_add_space_prefix(self.space_first)
        # llama.cpp takes token 11 for the beginning where none is named
        writer.add_bos_token_id(self.start[0] if self.start else self.end)
        writer.add_eos_token_id(self.end)
        for token in self.more_ends[:1]:
            writer.add_eot_token_id(token)
        writer.add_pad_token_id(self.end)
        # Said in any case, as some names imply the one or the other
        writer.add_add_bos_token(bool(self.start))
        writer.add_add_eos_token(False)
        if self.template:
            writer.add_chat_template(self.template)


def vocabulary(
    tokenizer: Tokenizer, rows: int, start: Sequence[int], ends: Sequence[int]
) -> Vocabulary:
    """Return a tokenizer as a GGUF file has it, for an embedding of so many rows.

    `start` leads a text, `ends` end one, the tokenizer's own first. Raises MismatchError for what
    the format cannot hold.
    """
    raw = json.loads(tokenizer.model.to_str())
    if len(start) > 1:
        raise MismatchError(
            f"a text begins with {len(start)} tokens here, and llama.cpp puts one in front of it "
            f"at most; {INSTEAD}"
        )
    if raw["model"].get("type") != "BPE":
        raise _refused(f"it is a {raw['model'].get('type')} model and no byte-level BPE")
    names, types = _entries(raw, rows)
    notes = []
    if is_sentencepiece(raw):
        kind, pre, merges = "llama", "default", []
        space_first, scored = _sentencepiece(raw, names)
        if space_first and raw["pre_tokenizer"]:
            notes.append(
                "llama.cpp puts a space in front of every text, the tokenizer of none that begins "
                "with one."
            )
    else:
        kind, pre, merges = "gpt2", _pre(raw), _merges(raw)
        space_first, scored = False, []
        if raw["normalizer"]:
            notes.append(
                "llama.cpp takes a text as it is written, where the tokenizer composes accents "
                "first (NFC): the same for text that is composed, as nearly all is."
            )
    end, *more = ends
    template = tokenizer.settings.get("chat_template")
    return Vocabulary(
        model=kind,
        pre=pre,
        tokens=names,
        types=types,
        merges=merges,
        scores=scored,
        space_first=space_first,
        start=tuple(start),
        end=end,
        more_ends=tuple(more),
        template=template if isinstance(template, str) else None,
        notes=tuple(notes),
    )


def _sentencepiece(raw: Mapping[str, Any], names: Sequence[str]) -> tuple[bool, list[float]]:
    """Return whether a text gets a space in front, and the score of each entry. Raises
    MismatchError."""
    try:
        found = scores(raw)
        return puts_space_first(raw), [found.get(name, 0.0) for name in names]
    except ValueError as error:
        raise _refused(str(error)) from None


def _merges(raw: Mapping[str, Any]) -> list[str]:
    merges = raw["model"]["merges"]
    return [each if isinstance(each, str) else " ".join(each) for each in merges]


def _pre(raw: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for how a tokenizer.json cuts texts. Raises MismatchError."""
    model = raw["model"]
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _refused(f"its model has {key}")
    normalizer = raw.get("normalizer")
    if normalizer and normalizer != {"type": "NFC"}:
        raise _refused(f"it changes the text first ({_kind(normalizer)})")
    patterns = tuple(_patterns(raw.get("pre_tokenizer")))
    # A choice of tokenizers, which the same text comes out of alike
    name = PRE.get((_same_as(patterns), bool(model.get("ignore_merges"))))
    if name is None:
        raise _refused(f"it cuts texts by {' then '.join(map(repr, patterns)) or 'nothing'}")
    return name


def _same_as(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Return patterns in the spelling of the table above."""
    spelled = []
    for pattern in patterns:
        cases = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
        plain = pattern.replace(cases, _BY_CASE).replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", _BY_CASE)
        spelled.append(plain)
    return tuple(spelled)


def _patterns(part: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield the patterns by which a pre-tokenizer cuts, one after another. Raises MismatchError."""
    kind = part.get("type") if part else None
    if part is None or kind == "Sequence":
        for each in (part or {}).get("pretokenizers", ()):
            yield from _patterns(each)
    elif kind == "ByteLevel" and not part.get("add_prefix_space"):
        if part.get("use_regex", True):
            yield WORDS
    elif kind == "Digits" and part.get("individual_digits"):
        yield DIGIT
    elif kind == "Split" and _keeps_all(part):
        yield part["pattern"]["Regex"]
    else:
        raise _refused(f"it cuts texts by {_kind(part)}")


def _keeps_all(split: Mapping[str, Any]) -> bool:
    """Whether a split makes a piece of each match, and one of what is between two."""
    isolated = split["behavior"] == "Isolated" and not split["invert"]
    # The same where a pattern matches everything, as those that are known do
    matches = split["behavior"] == "Removed" and split["invert"]
    return "Regex" in split["pattern"] and (isolated or matches)


def _kind(part: Mapping[str, Any] | None) -> str:
    return json.dumps(part)[:80]


def _refused(why: str) -> MismatchError:
    return MismatchError(f"llama.cpp has no tokenizer like this run's: {why}; {INSTEAD}")


def _entries(raw: Mapping[str, Any], rows: int) -> tuple[list[str], list[TokenType]]:
    """Return the text and kind of every row of the embedding."""
    bytes_of = BYTES if is_sentencepiece(raw) else ()
    names: dict[int, str] = {}
    types: dict[int, TokenType] = {}
    for text, token in raw["model"]["vocab"].items():
        names[token] = text
        types[token] = TokenType.BYTE if text in bytes_of else TokenType.NORMAL
    unknown = raw["model"].get("unk_token")
    for added in raw["added_tokens"]:
        names[added["id"]] = added["content"]
        special = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        types[added["id"]] = TokenType.UNKNOWN if added["content"] == unknown else special
    for token in range(rows):
        # Holes, and rows that pretrained embeddings have for nobody
        names.setdefault(token, f"[PAD{token}]")
        types.setdefault(token, TokenType.UNUSED)
    order = range(rows)
    return [names[token] for token in order], [types[token] for token in order]
