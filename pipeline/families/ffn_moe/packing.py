"""A trained expert as a package that can be given away: its tensors, its statistics as they are
wanted, a sealed description, and nothing of the run or its text beside."""

from dataclasses import dataclass
from pathlib import Path

from ...errors import ConfigError
from ...store.artifacts import save_tensors
from ...store.expert_package import EXPERT, STATISTICS, ExpertFacts, Noise, write_package
from .. import Parts
from .config import FfnMoeConfig
from .fingerprint import tokenizer_fingerprint, trunk_fingerprint
from .parts import expert_layers, stored_settings
from .sections import ADAPTER
from .stock import run_tokenizer

# Whose versions decide how a package is read again
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")


@dataclass(frozen=True)
class PackWish:
    """What of an expert is given away, and the words beside it."""

    statistics: bool = True
    noise: Noise | None = None
    licence: str = ""
    description: str = ""


def check_packable(cfg: FfnMoeConfig) -> None:
    """Raise ConfigError for experts that no package holds."""
    if cfg.expert.form == ADAPTER:
        raise ConfigError(
            "expert.form: packages hold feed-forward networks, and no adapters; set it to full or "
            "low_rank"
        )
    if cfg.expert.coordinate:
        raise ConfigError(
            "expert.coordinate: packages hold no gate of an expert's own; set it to false"
        )


def pack(cfg: FfnMoeConfig, parts: Parts, item: str, wish: PackWish, folder: Path) -> None:
    """Write the package of a trained expert to an empty folder.

    Raises ConfigError for experts that no package holds, and what `parts` does.
    """
    check_packable(cfg)
    settings = stored_settings(parts, "train_shared")
    made = parts.manifest("train_experts", item)
    versions = made.made.get("packages", {})
    save_tensors(folder / EXPERT, parts.tensors("train_experts", EXPERT, item))
    if wish.statistics:
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
        dtype=cfg.dtype,
        context_tokens=cfg.trunk.context_tokens,
        tokens=made.metrics["tokens"],
        statistics_path=cfg.expert.statistics_path,
        noise=wish.noise,
        licence=wish.licence,
        description=wish.description,
        versions={name: versions[name] for name in PACKAGES if name in versions},
    )
    write_package(folder, facts)
