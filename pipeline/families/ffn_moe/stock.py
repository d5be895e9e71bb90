"""What stock tools read beside the weights of a model: settings in each version's spelling, the
tokenizer, what begins and ends a text.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ...data.text.tokenizer import Tokenizer, load
from ...store.bundle import BundleFile, check_source
from .. import Parts
from .config import FfnMoeConfig

# Of a dense model, by the trunk's kind
DENSE_CLASSES = {
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}


def dense_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json of a dense model with these Hugging Face config fields."""
    from transformers import AutoConfig

    written: dict[str, Any] = AutoConfig.for_model(**settings).to_diff_dict()
    written["architectures"] = [DENSE_CLASSES[settings["model_type"]]]
    written["use_cache"] = True
    return written | old_rope(written.get("rope_parameters") or {})


def old_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary embedding as readers before transformers 5 look for it."""
    out: dict[str, Any] = {}
    if "rope_theta" in rope:
        out["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        out["rope_scaling"] = dict(rope)
    return out


def run_tokenizer(parts: Parts) -> Tokenizer:
    """Return the run's tokenizer. Raises DamagedArtifact."""
    folder = parts.folder("tokenizer")
    files = parts.manifest("tokenizer").files
    for name in ("tokenizer.json", "tokenizer_config.json"):
        check_source(BundleFile(name, folder / name, files[name]["sha256"]))
    return load(folder)


def text_start(cfg: FfnMoeConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokens that lead a text: those the trunk was trained with before, or what led
    each document here."""
    if tokenizer.front or cfg.trunk.init:
        return tokenizer.front
    return tokenizer.lead


def generation_settings(
    settings: Mapping[str, Any], end_id: int, start: Sequence[int]
) -> dict[str, Any]:
    """Return generation_config.json; a pretrained trunk's own end tokens end a text too."""
    own = settings.get("eos_token_id")
    ends = {end_id}
    if isinstance(own, list):
        ends.update(own)
    elif own is not None:
        ends.add(own)
    return {
        # Where there is nothing to go on from, generate begins with it
        "bos_token_id": start[-1] if start else end_id,
        "eos_token_id": sorted(ends) if len(ends) > 1 else end_id,
        "pad_token_id": end_id,
    }
