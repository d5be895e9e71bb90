"""The run's tokenizer: byte-level BPE trained on a sample, or a pretrained one taken as it is.

Invariant: text never yields the end-of-text id, nor that of another special token, even text that
spells it; so end_id in a stream always marks the start of a document.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DataError
from ...store.artifacts import write_text
from ...store.foreign import without_code
from ...store.reading import damaged, read_bytes, read_object
from .pretrained_tokenizer import opened, size_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Model

END = "<|endoftext|>"
# Of a tokenizer_config.json: what would put other tokens around a text than its tokenizer.json
_AROUND = ("add_bos_token", "add_eos_token")


def alike(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their beginnings."""
    for at, (mine, yours) in enumerate(zip(one, other, strict=False)):
        if mine != yours:
            return at
    return min(len(one), len(other))


@dataclass(frozen=True)
class Encoded:
    """The ids of a text."""

    ids: list[int]


@dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers.Tokenizer` with what the shards and transformers need to know of it."""

    model: "Model"
    end: str
    settings: dict[str, Any]  # tokenizer_config.json
    front: tuple[int, ...]  # what it puts in front of a text by itself: a bos, or nothing
    special: frozenset[int]  # ids that no text may get

    @property
    def end_id(self) -> int:
        """Id of the end-of-text token. Raises DataError when the tokenizer has none."""
        found = self.model.token_to_id(self.end)
        if found is None:
            raise DataError(f"the tokenizer has no entry {self.end!r}, its end-of-text token")
        return found

    @property
    def lead(self) -> tuple[int, ...]:
        """What stands before each document of a stream: the end of the one before, then what the
        tokenizer itself puts in front."""
        # Of many models one token is both
        return (self.end_id, *[token for token in self.front if token != self.end_id])

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, holes included."""
        return size_of(self.model)

    def encode(self, texts: list[str]) -> list[Encoded]:
        """Return the ids of each text, on all cores, without special tokens of any kind.

        Raises DataError for text that a tokenizer has no other way to write than as one.
        """
        out = []
        # The fast one leaves out offsets into the text, which hardly anybody asks for
        found = self.model.encode_batch_fast(texts, add_special_tokens=False)
        for text, encoding in zip(texts, found, strict=True):
            ids = encoding.ids
            if not self.special.isdisjoint(ids):
                ids = list(self._spelled(text, self.model))
            out.append(Encoded(ids))
        return out

    def decode(self, ids: Sequence[int], before: Sequence[int] = ()) -> str:
        """Return the text of ids as it stands after others, without special tokens: a decoder of
        SentencePiece's kind drops the space in front of what it takes for a text's first word. A
        character that begins in those is whole here."""
        whole = self.model.decode([*before, *ids], skip_special_tokens=True)
        known = self.model.decode(list(before), skip_special_tokens=True)
        return whole[alike(known, whole) :]

    def _spelled(self, text: str, model: "Model") -> Iterator[int]:
        """Yield the ids of a text that spells special tokens, which are cut in two as often as it
        takes."""
        encoding = model.encode(text, add_special_tokens=False)
        cuts = []
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token not in self.special:
                continue
            if end - start < 2:
                name = model.id_to_token(token)
                raise DataError(
                    f"tokenizer.pretrained: text with {text[start:end]!r} becomes the special "
                    f"token {name!r} and cannot be written otherwise; choose another tokenizer"
                )
            cuts.append(start + 1)
        if not cuts:
            yield from encoding.ids
            return
        begin = 0
        for cut in (*cuts, len(text)):
            yield from self._spelled(text[begin:cut], self._inside if begin else model)
            begin = cut

    @cached_property
    def _inside(self) -> "Model":
        """The same for text that goes on: nothing is put before its first word."""
        from tokenizers import Tokenizer as Model

        raw = json.loads(self.model.to_str())
        for part in ("normalizer", "pre_tokenizer"):
            raw[part] = _without_prefix(raw[part])
        return _plain(Model.from_str(json.dumps(raw)))

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and a tokenizer_config.json that PreTrainedTokenizerFast loads.
        Raises DiskFull."""
        settings = self.settings | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.end,
        }
        write_text(folder / "tokenizer.json", self.model.to_str(pretty=True))
        write_text(folder / "tokenizer_config.json", _as_json(settings))

    def stock_files(self, start: Sequence[int]) -> dict[str, str]:
        """Return the texts of tokenizer.json and tokenizer_config.json by which transformers, left
        to itself, puts `start` in front of a text and nothing behind it."""
        raw = json.loads(self.model.to_str())
        raw["post_processor"] = self._template(start)
        kept = {key: value for key, value in self.settings.items() if key not in _AROUND}
        # A processor of pictures beside the tokenizer, say: a bundle has none and names none
        settings = without_code(kept) | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.end,
            # Its default has token_type_ids too, which causal models refuse to generate from
            "model_input_names": ["input_ids", "attention_mask"],
        }
        return {"tokenizer.json": _as_json(raw), "tokenizer_config.json": _as_json(settings)}

    def _template(self, start: Sequence[int]) -> dict[str, Any]:
        """Return a post-processor of tokenizer.json, which is there also to put nothing anywhere:
        without one transformers makes one of its own."""
        names = [self.model.id_to_token(token) for token in start]
        front = [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]
        one = [*front, {"Sequence": {"id": "A", "type_id": 0}}]
        special = {}
        for name, token in zip(names, start, strict=True):
            special[name] = {"id": name, "ids": [token], "tokens": [name]}
        return {
            "type": "TemplateProcessing",
            "single": one,
            "pair": [*one, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": special,
        }


def train(vocab_size: int, texts: Iterable[str]) -> Tokenizer:
    """Train a byte-level BPE of at most vocab_size entries; the same texts give the same
    tokenizer."""
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model = Model(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        # All 256 bytes, met or not: no text is ever unknown. Sorted, as a set has no order
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    settings = {"bos_token": END, "clean_up_tokenization_spaces": False, "add_prefix_space": False}
    return _ready(model, END, settings)


def pretrained(name: str, revision: str | None = None) -> Tokenizer:
    """Load the tokenizer of a folder, a tokenizer.json, a .gguf file, a package or the Hub at a
    revision.

    Raises DataError when it cannot be found or names no end-of-text token.
    """
    model, config = opened(name, revision)
    end = _token(config, "eos_token")
    if end is None or model.token_to_id(end) is None:
        found = "names none" if end is None else f"names {end!r}, which is not in its vocabulary"
        raise DataError(
            f"tokenizer.pretrained: {name} needs an end-of-text token, and its configuration "
            f'{found}. Put "eos_token" into the tokenizer_config.json beside its tokenizer.json'
        )
    # auto_map names code of its repository, which a bundle does not have and must not run
    settings = {key: value for key, value in config.items() if key != "auto_map"}
    return _ready(model, end, settings)


def load(folder: Path) -> Tokenizer:
    """Load what Tokenizer.save wrote. Raises DamagedArtifact or UnreadableFile."""
    from tokenizers import Tokenizer as Model

    settings = read_object(folder / "tokenizer_config.json")
    path = folder / "tokenizer.json"
    data = read_bytes(path)
    try:
        return _ready(Model.from_buffer(data), settings["eos_token"], settings)
    except Exception as error:  # tokenizers raises plain Exception
        raise damaged(path, f"is not what was written: {error!r}") from None


def _ready(model: "Model", end: str, settings: dict[str, Any]) -> Tokenizer:
    from tokenizers import AddedToken

    added = model.get_added_tokens_decoder().values()
    known = {token.content for token in added if token.special}
    for name in (end, _token(settings, "bos_token")):
        # Some are added as if they were words, and words are found in text
        if name and name not in known and model.token_to_id(name) is not None:
            model.add_special_tokens([AddedToken(name, special=True, normalized=False)])
    _plain(model)
    front = _front(model, settings)
    return Tokenizer(model, end, settings, front, _special(model, end, front))


def _special(model: "Model", end: str, front: tuple[int, ...]) -> frozenset[int]:
    """Return the ids that no text may get."""
    found = model.token_to_id(end)
    ends = set() if found is None else {found}
    special = {*front, *ends}
    for token_id, token in model.get_added_tokens_decoder().items():
        if token.special:
            special.add(token_id)
    # What text has no entry for is of text, unless the end of a text is called the same
    unknown = unknown_ids(model) - ends
    return frozenset(special - unknown)


def unknown_ids(model: "Model") -> set[int]:
    """Return the id that stands for text without an entry; of most there is none."""
    raw = json.loads(model.to_str())["model"]
    found = raw.get("unk_id")
    if raw.get("unk_token") is not None:
        found = model.token_to_id(raw["unk_token"])
    return set() if found is None else {found}


def _plain(model: "Model") -> "Model":
    """Return a model that makes the same of a text each time, and plain tokens of what it spells.

    A tokenizer.json may bring truncation, padding and dropout of merges, which all change what a
    document becomes.
    """
    from tokenizers import models

    model.no_truncation()
    model.no_padding()
    if isinstance(model.model, models.BPE):
        model.model.dropout = None
    # A document that spells a special token gets its plain bytes
    model.encode_special_tokens = True
    return model


def _front(model: "Model", settings: dict[str, Any]) -> tuple[int, ...]:
    """Return what a tokenizer puts in front of a text: as its tokenizer.json has it, else as its
    configuration asks for (transformers 5 reads the former alone, 4 the latter too)."""
    encoding = model.encode("a")
    front = []
    for token, added in zip(encoding.ids, encoding.special_tokens_mask, strict=True):
        if not added:
            break
        front.append(token)
    bos = _token(settings, "bos_token")
    if not front and settings.get("add_bos_token") and bos is not None:
        found = model.token_to_id(bos)
        return () if found is None else (found,)
    return tuple(front)


def _without_prefix(part: Any) -> Any:
    """Return a normalizer or pre-tokenizer that puts no space before the first word."""
    if isinstance(part, list):
        cleaned = [_without_prefix(each) for each in part]
        return [each for each in cleaned if each is not None]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    changed = {key: _without_prefix(value) for key, value in part.items()}
    if "add_prefix_space" in changed:
        changed["add_prefix_space"] = False
    if "prepend_scheme" in changed:
        changed["prepend_scheme"] = "never"
    return changed


def _as_json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _token(config: dict[str, Any], key: str) -> str | None:
    value = config.get(key)
    # transformers writes a special token as its text, or as a dict with its flags
    name = value.get("content") if isinstance(value, dict) else value
    # Ids and lists, which a generation_config.json has, are no text to look up
    return name if isinstance(name, str) else None
