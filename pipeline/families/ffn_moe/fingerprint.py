"""What a trunk and a tokenizer are known by wherever they lie: by their numbers and entries, not by
addresses, files' names or how weights are cut into files.

A trunk that was trained here and the same tensors as a checkpoint elsewhere have one fingerprint.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...data.text.tokenizer import Tokenizer
from ...store.streamed import raw_bytes
from .. import Parts
from .parts import stored_settings
from .pretrained import is_pinned, pinned_tensors

# Of a model's settings those that decide what its tensors compute; the others are of its use
_DECIDE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "layer_types",
    "sliding_window",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
)


def trunk_tensors(parts: Parts) -> dict[str, Tensor]:
    """Return every tensor of the run's trunk and dummy, as they are stored. Raises what `parts`
    does, and DataError or MismatchError of a pinned model that is gone or has changed."""
    if is_pinned(parts):
        trunk, dummy = pinned_tensors(parts, stored_settings(parts, "train_shared"))
    else:
        trunk = parts.tensors("train_shared", "trunk.safetensors")
        dummy = parts.tensors("train_shared", "dummy.safetensors")
    return {**trunk, **dummy}


def trunk_fingerprint(parts: Parts) -> str:
    """Return the fingerprint of the run's trunk. Raises what `trunk_tensors` does."""
    parts.progress("fingerprint of the trunk", None)
    return of_model(stored_settings(parts, "train_shared"), trunk_tensors(parts))


def of_model(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the fingerprint of a model: its numbers bit by bit, and what decides how they are
    used."""
    decided = {key: settings.get(key) for key in _DECIDE}
    digest = hashlib.sha256(json.dumps(decided, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(hashlib.sha256(raw_bytes(tensor.detach())).digest())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Return the fingerprint of a tokenizer: its entries and rules, and what leads a document."""
    rules = json.loads(tokenizer.model.to_str())
    text = json.dumps([rules, tokenizer.lead], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
