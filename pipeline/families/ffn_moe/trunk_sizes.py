"""The sizes of the trunk that a run's settings name, as far as they are known on this machine."""

from ...store.model_sources import ModelSource, on_this_machine
from ...train.flops import Shape
from .config import FfnMoeConfig
from .pretrained import stated_settings

DECODED_BYTES = 2  # of a number of a .gguf file that was decoded from fewer bits: bf16


def trunk_shape(cfg: FfnMoeConfig) -> Shape | None:
    """Return the trunk's shape; None when it is a pretrained one of which no settings are here."""
    if not cfg.trunk.init:
        return Shape.from_config(cfg.trunk, cfg.tokenizer.vocab_size)
    from transformers import AutoConfig

    try:
        place = on_this_machine("trunk.init", cfg.trunk.init, cfg.trunk.revision)
        if place is None:
            return None
        stated = stated_settings(ModelSource(place), weights=False)
        settings = AutoConfig.for_model(**stated).to_dict()
        return Shape.from_hf_config(settings, cfg.trunk.context_tokens)
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


def stored_bytes(cfg: FfnMoeConfig) -> int | None:
    """Return the bytes of a number in the files of a pinned trunk; None where it is no pin."""
    if not cfg.trunk.is_pinned:
        return None
    place = on_this_machine("trunk.init", str(cfg.trunk.init), cfg.trunk.revision)
    if place is None or ModelSource(place).is_gguf:
        return DECODED_BYTES
    stated = stated_settings(ModelSource(place), weights=False)
    name = stated.get("dtype") or stated.get("torch_dtype") or "float32"
    return 4 if name == "float32" else 2
