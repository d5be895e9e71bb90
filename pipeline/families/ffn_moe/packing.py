"""A trained expert as a package that can be given away: its tensors, its statistics as they are
wanted, a sealed description, and nothing of the run or its text beside.
"""

from pathlib import Path

from torch import Tensor

from ...errors import ConfigError
from ...hardware import uses_bf16
from ...store.artifacts import save_tensors
from ...store.expert_package import EXPERT, STATISTICS, ExpertFacts, Noise, write_package
from .. import PackWish, Parts
from .config import FfnMoeConfig
from .document_means import Centre, all_documents, document_means, private_sums
from .fingerprint import tokenizer_fingerprint, trunk_fingerprint
from .parts import expert_layers, open_expert, shards_of, stored_settings, stored_trunk
from .stock import run_tokenizer

# Whose versions decide how a package is read again
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")


def check_packable(cfg: FfnMoeConfig) -> None:
    """Raise ConfigError for experts that no package holds."""
    if cfg.expert.coordinate:
        raise ConfigError(
            "expert.coordinate: packages hold no gate of an expert's own; set it to false"
        )


def pack(
    cfg: FfnMoeConfig,
    parts: Parts,
    item: str,
    wish: PackWish,
    folder: Path,
    centre: Centre | None = None,
) -> None:
    """Write the package of a trained expert to an empty folder.

    centre: for noise, of public text. Noise is drawn anew each time, and each time spends what it
    promises. Raises ConfigError for experts that no package holds, and what `parts` does.
    """
    check_packable(cfg)
    if wish.noise and centre is None:
        # Never statistics as they are in the place of those that hide something
        raise ValueError("noise is measured by a centre, and none is given")
    settings = stored_settings(parts, "train_shared")
    made = parts.manifest("train_experts", item)
    versions = made.made.get("packages", {})
    # A copy: of the file in the store nobody knows what its header says
    save_tensors(folder / EXPERT, parts.tensors("train_experts", EXPERT, item))
    if wish.noise and centre:
        made_private = _private(cfg, parts, item, wish.noise, centre)
        save_tensors(folder / STATISTICS, made_private)
    elif wish.statistics:
        stored = parts.tensors("train_experts", STATISTICS, item)
        # Sums by domain are of a mixture; of one domain they say nothing more
        save_tensors(folder / STATISTICS, {key: stored[key] for key in ("sum", "gram", "tokens")})
    facts = ExpertFacts(
        name=item,
        form="low_rank" if cfg.expert.delta_rank else "full",
        rank=cfg.expert.delta_rank,
        scale=cfg.expert.packed_scale,
        layers=expert_layers(cfg, settings["num_hidden_layers"]),
        trunk=trunk_fingerprint(parts),
        tokenizer=tokenizer_fingerprint(run_tokenizer(parts)),
        dtype="bf16" if uses_bf16(cfg.dtype) else "fp32",
        context_tokens=cfg.trunk.context_tokens,
        tokens=made.metrics["tokens"],
        statistics_path=cfg.expert.statistics_path,
        noise=wish.noise if wish.statistics else None,
        licence=wish.licence,
        description=wish.description,
        versions={name: versions[name] for name in PACKAGES if name in versions},
    )
    write_package(folder, facts)


def _private(
    cfg: FfnMoeConfig, parts: Parts, item: str, noise: Noise, centre: Centre
) -> dict[str, Tensor]:
    """Return statistics that hide each document of the expert's domain."""
    shards = shards_of(parts, (item,))
    trunk, dummy = stored_trunk(cfg, parts)
    expert = open_expert(cfg, dummy, parts.tensors("train_experts", EXPERT, item))
    runs = dummy if cfg.expert.statistics_path == "base" else expert
    layers = expert_layers(cfg, len(dummy.layers))
    documents = all_documents(shards, item)
    means = document_means(cfg, trunk, runs, layers, documents, parts.progress)
    return private_sums(means, len(documents), centre, noise)
