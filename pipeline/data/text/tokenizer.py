"""The run's tokenizer: byte-level BPE trained on a sample, or a pretrained one taken as it is.

Invariant: text never yields the end-of-text id, even text that spells it, so end_id in a stream
always marks the start of a document.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DataError
from ...store.foreign import ForeignFile
from ...store.foreign import read_object as read_foreign
from ...store.reading import damaged, read_bytes, read_object

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as Model

END = "<|endoftext|>"
_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers.Tokenizer` with what the shards and transformers need to know of it."""

    model: "Model"
    end: str
    settings: dict[str, Any]  # tokenizer_config.json

    @property
    def end_id(self) -> int:
        """Id of the end-of-text token. Raises DataError when the tokenizer has none."""
        found = self.model.token_to_id(self.end)
        if found is None:
            raise DataError(f"the tokenizer has no entry {self.end!r}, its end-of-text token")
        return found

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, holes included."""
        # get_vocab_size counts entries, and an embedding needs a row for every id up to the last
        ids = self.model.get_vocab(with_added_tokens=True).values()
        return max(ids) + 1

    def encode(self, texts: list[str]) -> "list[Encoding]":
        """Return one Encoding per text, on all cores, without special tokens of any kind."""
        # The fast one leaves out offsets into the text, which nobody asks for
        return self.model.encode_batch_fast(texts, add_special_tokens=False)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and a tokenizer_config.json that PreTrainedTokenizerFast loads."""
        settings = self.settings | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.end,
        }
        with open(folder / "tokenizer.json", "w", encoding="utf-8") as file:
            file.write(self.model.to_str(pretty=True))
        with open(folder / "tokenizer_config.json", "w", encoding="utf-8") as file:
            file.write(json.dumps(settings, indent=1, ensure_ascii=False) + "\n")


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
    """Load a folder, a tokenizer.json, or a tokenizer of the Hub at a revision.

    Raises DataError when it cannot be found or names no end-of-text token.
    """
    from tokenizers import Tokenizer as Model

    path, config = _found(name, revision)
    try:
        model = Model.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(f"tokenizer.pretrained: {path} is not a tokenizer.json: {error}") from error
    end = _end_of(config)
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
    # A tokenizer.json may bring either, and both would change what a document becomes
    model.no_truncation()
    model.no_padding()
    # A document that spells a special token gets its plain bytes
    model.encode_special_tokens = True
    return Tokenizer(model, end, settings)


def _found(name: str, revision: str | None) -> tuple[Path, dict[str, Any]]:
    """Return the tokenizer.json and what the files beside it say."""
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
        if not path.is_file():
            raise DataError(
                f"tokenizer.pretrained: {name} has no tokenizer.json. Save the fast tokenizer "
                "there: AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
            )
    elif not path.is_file():
        return _from_hub(name, revision)
    beside = [path.parent / config for config in _CONFIGS]
    return path, _merged([config for config in beside if config.is_file()])


def _from_hub(name: str, revision: str | None) -> tuple[Path, dict[str, Any]]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    configs = []
    try:
        path = Path(hf_hub_download(name, "tokenizer.json", revision=revision))
        for config in _CONFIGS:
            try:
                configs.append(Path(hf_hub_download(name, config, revision=revision)))
            except EntryNotFoundError:  # either may be missing
                continue
    except Exception as error:  # the hub client and the network raise what they like
        raise DataError(
            f"tokenizer.pretrained: {name} is no folder and no file here, and the Hub did not give "
            f"its tokenizer.json: {type(error).__name__}: {error}. Check the name, "
            "tokenizer.revision and the network"
        ) from error
    return path, _merged(configs)


def _merged(paths: Iterable[Path]) -> dict[str, Any]:
    """Return what JSON files say together; the first to name a key has it."""
    out: dict[str, Any] = {}
    for path in paths:
        try:
            out = read_foreign(path.parent, path.name) | out
        except (ForeignFile, OSError) as error:
            raise DataError(
                f"tokenizer.pretrained: {path} is not JSON of settings: {error}"
            ) from None
    return out


def _end_of(config: dict[str, Any]) -> str | None:
    end = config.get("eos_token")
    # transformers writes a special token as its text, or as a dict with its flags
    return end.get("content") if isinstance(end, dict) else end
