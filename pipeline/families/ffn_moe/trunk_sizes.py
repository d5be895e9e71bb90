"""The sizes of the trunk that a run's settings name, as far as they are known on this machine."""

from typing import Any

from ...store.model_sources import ModelSource, on_this_machine
from ...train.flops import Shape
from .config import FfnMoeConfig
from .pretrained import stated_settings

DECODED_BYTES = 2  # of a number of a .gguf file that was decoded from fewer bits: bf16


def trunk_shape(cfg: FfnMoeConfig) -> Shape | None:
    """Return the trunk's shape; None when it is a pretrained one of which no settings are here."""
    if not cfg.trunk.init:
        return Shape.from_config(cfg.trunk, cfg.tokenizer.vocab_size)
    settings = trunk_settings(cfg)
    if settings is None:
        return None
    return Shape.from_hf_config(settings, cfg.trunk.context_tokens)


def trunk_settings(cfg: FfnMoeConfig) -> dict[str, Any] | None:
    """Return a pretrained trunk's settings with all defaults, as Hugging Face config fields; None
    where they are not on this machine, or cannot be read."""
    if not cfg.trunk.init:
        return None
    from transformers import AutoConfig

    try:
        place = on_this_machine("trunk.init", cfg.trunk.init, cfg.trunk.revision)
        if place is None:
            return None
        stated = stated_settings(ModelSource(place), weights=False)
        settings: dict[str, Any] = AutoConfig.for_model(**stated).to_dict()
        Shape.from_hf_config(settings, cfg.trunk.context_tokens)
        return settings
    except Exception:  # a library raises what it likes at settings that it cannot read
        return None  # the plan is made without it, and what is wrong is said by `preflight`


def trunk_kind(cfg: FfnMoeConfig) -> str:
    """Return the trunk's kind as transformers calls it: of a new one qwen3, as of one that is not
    here yet."""
    place = None
    if cfg.trunk.init:
        place = on_this_machine("trunk.init", cfg.trunk.init, cfg.trunk.revision)
    if place is None:
        return "qwen3"
    return str(stated_settings(ModelSource(place), weights=False)["model_type"])


def is_gguf(cfg: FfnMoeConfig) -> bool:
    """Whether the run's pretrained trunk is on this machine, and a .gguf file."""
    if not cfg.trunk.init:
        return False
    place = on_this_machine("trunk.init", cfg.trunk.init, cfg.trunk.revision)
    return place is not None and ModelSource(place).is_gguf


def stored_bytes(cfg: FfnMoeConfig, shape: Shape) -> int | None:
    """Return the bytes of a number in the files of a pinned trunk of known shape; None where it is
    no pin."""
    if not cfg.trunk.is_pinned:
        return None
    place = on_this_machine("trunk.init", str(cfg.trunk.init), cfg.trunk.revision)
    if place is None:
        return DECODED_BYTES
    if ModelSource(place).is_gguf:
        # By its size, as its list of tensors stands behind a vocabulary that takes seconds to read;
        # what is not rounded to fewer bits is kept as it is
        each = place.stat().st_size / (shape.trunk_parameters + shape.ffn_parameters)
        return 4 if each > 3 else DECODED_BYTES
    stated = stated_settings(ModelSource(place), weights=False)
    name = stated.get("dtype") or stated.get("torch_dtype") or "float32"
    return 4 if name == "float32" else 2
