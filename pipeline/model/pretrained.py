"""A checkpoint's tensors as trunk and dummy: mapped from its files, as they are, and each of them
in its place.

What a library does with tensors that do not fit is to warn, and draw the rest at random.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .loading import check_report
from .trunk import EMBEDDING, HEAD, build

# Computed from the settings, and stored by older versions of transformers all the same
_COMPUTED = "rotary_emb.inv_freq"
_PREFIX = "model."


def mapped(paths: Iterable[Path]) -> dict[str, Tensor]:
    """Return the tensors of safetensors files together, none of them read yet.

    Raises what safetensors raises at a file that it cannot read.
    """
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for path in paths:
        tensors.update(load_file(path))
    return tensors


def fitted(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a checkpoint's tensors of the trunk, and those of its feed-forward networks; settings
    are Hugging Face config fields.

    Raises ValueError for tensors that are missing, unknown or of another shape, or a head that is
    said to be the embedding and is another.
    """
    found = {name: each for name, each in tensors.items() if not name.endswith(_COMPUTED)}
    # Saved without its head, which is the embedding, a model has no name in front of its parts
    if EMBEDDING.removeprefix(_PREFIX) in found:
        found = {_PREFIX + name: each for name, each in found.items()}
    if settings["tie_word_embeddings"] and HEAD in found:
        _check_tied(found[HEAD], found.get(EMBEDDING))
        del found[HEAD]
    with torch.device("meta"):
        trunk, dummy = build(settings)
    places = {**trunk.named(), **dummy.named()}
    others = []
    for name in places.keys() & found.keys():
        if found[name].shape != places[name].shape:
            others.append((name, found[name].shape, places[name].shape))
    check_report(
        {
            "missing_keys": places.keys() - found.keys(),
            "unexpected_keys": found.keys() - places.keys(),
            "mismatched_keys": others,
        }
    )
    of_trunk = {name: found[name] for name in trunk.named()}
    of_dummy = {name: found[name] for name in dummy.named()}
    return of_trunk, of_dummy


def _check_tied(head: Tensor, embedding: Tensor | None) -> None:
    # A file may have both, and differ from what it says: one of them would be lost
    if embedding is not None and not torch.equal(head, embedding):
        raise ValueError(
            f"its config.json ties {HEAD} to {EMBEDDING} (tie_word_embeddings), and its weights "
            "have both, which differ; set it to false there"
        )
