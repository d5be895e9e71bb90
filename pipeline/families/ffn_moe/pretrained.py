"""The pretrained trunk that a run's settings name: found, looked at, opened and pinned.

L layers, B sequences, T tokens.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import MismatchError, PipelineError
from ...model.experts import Expert, clone
from ...model.gguf_reading import GgufTensors
from ...model.gguf_reading import positions as gguf_positions
from ...model.gguf_reading import settings as gguf_settings
from ...model.loading import check_finite
from ...model.pretrained import fitted, mapped
from ...model.trunk import Trunk, check_kind, open_tensors, whole_settings
from ...protocols import Progress, quiet
from ...store.foreign import ForeignFile, read_object
from ...store.model_files import CONFIG, check_config, check_weights
from ...store.model_sources import ModelSource, find
from ...store.pins import DECODED, NAME, FileSum, Pin, pinned_files
from ...store.streamed import Streamed, write_tensors
from .. import Parts
from .config import FfnMoeConfig

SETTING = "trunk.init"
GENERATION = "generation_config.json"
# What somebody wanted of a model's class when it was saved, and nothing of the model
ASKED = {"return_dict", "output_attentions", "output_hidden_states"}


@dataclass(frozen=True)
class Checkpoint:
    """A model's settings, as Hugging Face config fields, and its tensors in two parts."""

    settings: dict[str, Any]
    trunk: dict[str, Tensor]
    dummy: dict[str, Tensor]

    @property
    def dtype(self) -> str:
        """The dtypes of its tensors, by torch's names."""
        tensors = (*self.trunk.values(), *self.dummy.values())
        names = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors}
        return " and ".join(sorted(names))

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        tensors = (*self.trunk.values(), *self.dummy.values())
        return sum(tensor.numel() for tensor in tensors)


def open_pretrained(cfg: FfnMoeConfig, progress: Progress = quiet) -> tuple[Trunk, Expert]:
    """Return trunk and dummy of trunk.init to train: in fp32, in memory of their own.

    Raises MismatchError for a model that no trunk can be made of, or that is not complete,
    DataError when it is not where the settings say.
    """
    source = _found(cfg)
    with _refusing(cfg):
        stated = stated_settings(source)
        if source.is_gguf:
            found = GgufTensors(source.place)
            names = [stored.name for stored in found.stored]
            tensors = {name: found.decoded(place) for place, name in enumerate(names)}
        else:
            tensors = mapped(source.weights())
        checkpoint = _checked(stated, tensors, progress)
        settings, parts = checkpoint.settings, (checkpoint.trunk, checkpoint.dummy)
        trunk, dummy = open_tensors(settings, *parts, torch.float32)
    trunk.unfreeze()
    return trunk, clone(dummy)


def pin_pretrained(
    cfg: FfnMoeConfig, folder: Path, sum_of: FileSum, progress: Progress
) -> tuple[Pin, Checkpoint]:
    """Write to folder which model trunk.init is; return that, and the model, mapped.

    What cannot be mapped from its file, a .gguf, is decoded into folder. Raises what
    `open_pretrained` does, UnreadableFile and DiskFull.
    """
    source = _found(cfg)
    with _refusing(cfg):
        stated = stated_settings(source)
        files = pinned_files(source, sum_of, progress)
        if source.is_gguf:
            _decode(source.place, folder / DECODED, progress)
            tensors = mapped([folder / DECODED])
        else:
            tensors = mapped(source.weights())
        checkpoint = _checked(stated, tensors, progress)
    pin = Pin(str(cfg.trunk.init), source.revision, checkpoint.dtype, source.is_gguf, files)
    pin.write(folder)
    return pin, checkpoint


def is_pinned(parts: Parts) -> bool:
    """Whether the run's trunk is a pin and no copy. Raises what `parts.manifest` does."""
    return NAME in parts.manifest("train_shared").files


def pinned_weights(parts: Parts) -> list[Path]:
    """Return the files of a pinned trunk's tensors, checked. Raises DataError when they are gone,
    MismatchError when they have changed, and what `parts.folder` does."""
    folder = parts.folder("train_shared")
    pin = Pin.read(folder)
    if pin.decoded:
        return [folder / DECODED]
    return pin.weights(SETTING, parts.file_sum)


def pinned_tensors(
    parts: Parts, settings: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a pinned model's tensors, mapped from its own files: the trunk's and the dummy's."""
    return fitted(settings, mapped(pinned_weights(parts)))


def _found(cfg: FfnMoeConfig) -> ModelSource:
    if cfg.trunk.init is None:
        raise ValueError("only settings with trunk.init name a trunk to open")
    return find(SETTING, cfg.trunk.init, cfg.trunk.revision)


@contextmanager
def _refusing(cfg: FfnMoeConfig) -> Iterator[None]:
    """Say of whatever goes wrong that trunk.init cannot be loaded."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:  # a library raises what it likes at a file it cannot read
        reason = " ".join(str(error).split())
        text = f"{SETTING}: {cfg.trunk.init} cannot be loaded: {reason}"
        raise MismatchError(text) from error


def check_vocabulary(cfg: FfnMoeConfig, vocab_size: int, entries: int) -> None:
    """Raise MismatchError when a tokenizer of that size is larger than a pretrained trunk."""
    # A trunk may have more rows than its tokenizer has entries: they are padding
    if vocab_size <= entries:
        return
    way = "name the trunk's own tokenizer in tokenizer.pretrained"
    if cfg.tokenizer.pretrained == cfg.trunk.init:
        way = (
            "tokens were added to it, and the model was not told. Remove those from "
            f"{entries} on from its tokenizer.json (added_tokens), or save both anew after "
            "model.resize_token_embeddings(len(tokenizer))"
        )
    raise MismatchError(
        f"tokenizer {cfg.tokenizer.pretrained} has {vocab_size} entries, trunk "
        f"{cfg.trunk.init} has {entries}: {way}"
    )


def stated_settings(source: ModelSource, weights: bool = True) -> dict[str, Any]:
    """Return a model's settings as its files state them, after a look at the files.

    weights: they are here too. Raises ForeignFile, ValueError, OSError and what libraries raise.
    """
    stated = gguf_settings(source.place) if source.is_gguf else check_config(source.place)
    check_kind(stated)
    if source.is_gguf:
        return stated | gguf_positions(source.place)
    if weights:
        check_weights(source.place)
    model = {key: value for key, value in stated.items() if key not in ASKED}
    return model | _ends(source.place, stated)


def _ends(folder: Path, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ends a text of a model: the tokens of its config.json, and those that stand only
    in generation_config.json, as Qwen3's and Llama 3's. Raises ForeignFile, OSError."""
    if not (folder / GENERATION).is_file():
        return {}
    found: list[int] = []
    for file, said in ((CONFIG, stated), (GENERATION, read_object(folder, GENERATION))):
        own = said.get("eos_token_id")
        tokens = own if isinstance(own, list) else [own]
        for token in tokens:
            if token is None:
                continue
            if type(token) is not int or token < 0:
                raise ForeignFile(f"{file} has an eos_token_id that is no token: {str(own)[:40]}")
            if token not in found:
                found.append(token)
    if not found:
        return {}
    return {"eos_token_id": found if len(found) > 1 else found[0]}


def _checked(
    stated: Mapping[str, Any], tensors: Mapping[str, Tensor], progress: Progress
) -> Checkpoint:
    """Return a checkpoint whose tensors are all in their places and finite. Raises ValueError."""
    settings = whole_settings(stated)
    for key in ("_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    trunk, dummy = fitted(settings, tensors)
    check_finite(_looked_at({**trunk, **dummy}, progress))
    return Checkpoint(settings, trunk, dummy)


def _looked_at(tensors: Mapping[str, Tensor], progress: Progress) -> Iterator[tuple[str, Tensor]]:
    for done, (name, tensor) in enumerate(tensors.items()):
        progress("looking for values that are not finite", done / len(tensors))
        yield name, tensor


def _decode(source: Path, target: Path, progress: Progress) -> None:
    progress(f"reading {source.name}", None)
    found = GgufTensors(source)
    tensors = {}
    for place, stored in enumerate(found.stored):
        read = partial(found.decoded, place)
        tensors[stored.name] = Streamed(stored.shape, stored.dtype, read)
    write_tensors(target, tensors, progress)
