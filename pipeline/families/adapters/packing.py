"""A trained adapter as a package that can be given away: its numbers, its rank and scale, what it
was trained on, and nothing of the run beside.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...hardware import uses_bf16
from ...store.artifacts import save_tensors
from ...store.expert_package import EXPERT, ExpertFacts, write_package
from ...store.reading import read_object
from .. import PackWish, Parts
from .base import ModelRef
from .config import AdapterRunConfig
from .peft_io import SETTINGS, TENSORS

# Whose versions decide how a package is read again
PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def check_pack(cfg: AdapterRunConfig, wish: PackWish) -> None:
    """Raise ConfigError for noise on statistics, of which these experts have none."""
    if wish.noise:
        raise ConfigError(
            f"--epsilon: experts of {cfg.family} have no statistics that noise could be put on, as "
            "their router is taught by requests; leave it out"
        )


def pack(cfg: AdapterRunConfig, parts: Parts, item: str, wish: PackWish, folder: Path) -> None:
    """Write the package of a trained adapter to an empty folder. Raises ConfigError, and what
    `parts` does."""
    check_pack(cfg, wish)
    pin = ModelRef.read(parts.folder("train_shared"))
    told = write_numbers(parts, item, folder)
    facts = ExpertFacts(
        **told,
        # The base's own files have its tokenizer
        trunk=pin.digest,
        tokenizer=pin.digest,
        dtype="bf16" if uses_bf16(cfg.dtype) else "fp32",
        context_tokens=cfg.loras.options(item).max_tokens,
        licence=wish.licence,
        description=wish.description,
    )
    write_package(folder, facts)


def write_numbers(parts: Parts, item: str, folder: Path) -> dict[str, Any]:
    """Write an adapter's tensors to a package's folder; return what its description says of them.

    Raises what `parts` does.
    """
    made = parts.manifest("train_experts", item)
    settings = read_object(parts.folder("train_experts", item) / SETTINGS)
    stored = parts.tensors("train_experts", TENSORS, item)
    # A copy: of the file in the store nobody knows what its header says
    save_tensors(folder / EXPERT, {name: tensor.float() for name, tensor in stored.items()})
    layers = {int(match[1]) for match in map(_LAYER.search, stored) if match}
    return {
        "name": item,
        "form": "adapter",
        "rank": settings["r"],
        "scale": settings["lora_alpha"] / settings["r"],
        "layers": tuple(sorted(layers)),
        "tokens": made.metrics["tokens"],
        # The base reads a text before an adapter does
        "statistics_path": "base",
        "versions": _versions(made.made),
    }


def _versions(made: Mapping[str, Any]) -> dict[str, str]:
    versions = made.get("packages", {})
    return {name: versions[name] for name in PACKAGES if name in versions}
