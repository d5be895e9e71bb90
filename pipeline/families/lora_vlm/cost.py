"""What each job of a lora_vlm run will spend: the sizes of a Qwen3-VL and of its vision tower.

Invariant: no weight is opened. A base that is not on this machine yet is priced by its published
sizes, and a row that is not prepared yet as one with a picture of the largest area.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ...errors import DataError
from ...train.flops import JobCost
from .. import ExportWish
from ..adapters import cost as adapters_cost
from ..adapters.cost import DecoderSizes, job_cost, read_config
from .config import PICTURE_TOKEN_PX, LoraVlmConfig, VlmBaseConfig, VlmBuildConfig

PATCH_VALUES = 1536  # numbers of a patch: 16 x 16 px of two frames, three colours
PATCHES_PER_TOKEN = 4
TEXT_TOKENS = 64  # assumed of a request and its answer until they are known


@dataclass(frozen=True)
class VlmSizes(DecoderSizes):
    """The sizes of a Qwen3-VL that decide cost."""

    vision_layers: int
    vision_d: int
    vision_d_ff: int
    mergers: int  # what joins the tower to the language model: at its end and in deepstack layers

    prefix: ClassVar[str] = "model.language_model.layers"

    @classmethod
    def of_config(cls, raw: Mapping) -> "VlmSizes":
        """Return the sizes in a config.json. Raises KeyError where it says too little."""
        vision = raw["vision_config"]
        return cls(
            **cls.decoder_fields(raw["text_config"]),
            tied=raw.get("tie_word_embeddings", True),
            vision_layers=vision["depth"],
            vision_d=vision["hidden_size"],
            vision_d_ff=vision["intermediate_size"],
            mergers=1 + len(vision["deepstack_visual_indexes"]),
        )

    @classmethod
    def of_build(cls, build: VlmBuildConfig) -> "VlmSizes":
        """Return the sizes of a base that will be built."""
        return cls(
            layers=build.layers,
            d=build.hidden,
            heads_width=build.heads * build.head_dim,
            kv_width=build.kv_heads * build.head_dim,
            d_ff=build.intermediate,
            vocab_size=build.vocab_size,
            tied=True,
            vision_layers=build.vision_layers,
            vision_d=build.vision_hidden,
            vision_d_ff=build.vision_intermediate,
            mergers=2,
        )

    @property
    def encoder_parameters(self) -> int:
        """Parameters of the vision tower and what joins it to the language model."""
        merged = PATCHES_PER_TOKEN * self.vision_d
        block = 4 * self.vision_d**2 + 2 * self.vision_d * self.vision_d_ff
        joints = self.mergers * merged * (merged + self.d)
        return self.vision_layers * block + joints + PATCH_VALUES * self.vision_d

    @property
    def encoder_flops_per_token(self) -> int:
        """Operations of the tower for one token: a forward pass of its patches."""
        return 2 * PATCHES_PER_TOKEN * self.encoder_parameters

    def encoding_bytes(self, tokens: int, unit: int) -> int:
        """Bytes of the patches of so many tokens, in fp32, and of the tower's widest layer."""
        widest = 6 * self.vision_d + 2 * self.vision_d_ff
        return tokens * PATCHES_PER_TOKEN * (4 * PATCH_VALUES + unit * widest)


# layers, D, H, K, F, V, tied, then the vision tower's layers, width, feed-forward width, mergers
PUBLISHED = {
    "Qwen/Qwen3-VL-2B-Instruct": VlmSizes(
        28, 2048, 2048, 1024, 6144, 151_936, True, 24, 1024, 4096, 4
    ),
    "Qwen/Qwen3-VL-4B-Instruct": VlmSizes(
        36, 2560, 4096, 1024, 9728, 151_936, True, 24, 1024, 4096, 4
    ),
    "Qwen/Qwen3-VL-8B-Instruct": VlmSizes(
        36, 4096, 4096, 1024, 12_288, 151_936, False, 27, 1152, 4304, 4
    ),
}


def sizes_of(base: VlmBaseConfig) -> VlmSizes | None:
    """Return the sizes of the base that the settings name, or None when nothing here tells."""
    if base.build is not None:
        return VlmSizes.of_build(base.build)
    try:
        raw = read_config(base)
        if raw is not None:
            return VlmSizes.of_config(raw)
    except (DataError, OSError, ValueError, KeyError, TypeError):
        # the plan is made without it, and what is wrong is said by `preflight`
        return None
    return PUBLISHED.get(base.model or "")


def cost(
    cfg: LoraVlmConfig, stage: str, item: str | None, made: Mapping[tuple, dict], _bf16: bool
) -> JobCost | None:
    """Return what a training will spend, as far as finished jobs tell; None for the base, which
    needs none."""
    sizes = sizes_of(cfg.loras.base)
    return job_cost(cfg, stage, item, made, sizes, lambda name: row_tokens(cfg, name))


def writing_cost(
    cfg: LoraVlmConfig, _made: Mapping[tuple, dict], wish: ExportWish | None
) -> JobCost | None:
    """Return what the run's bundle takes, or its adapters as they are exported."""
    return adapters_cost.writing_cost(cfg, sizes_of(cfg.loras.base), wish)


def row_tokens(cfg: LoraVlmConfig, name: str) -> int:
    """Return the assumed tokens of a row: a picture of the largest area there can be, and some
    text."""
    # the router reads what all of them read
    entries = [cfg.loras.entry(name)] if name in cfg.experts else list(cfg.loras.experts)
    image = cfg.loras.base.image
    area = 0
    for entry in entries:
        synthetic = entry.dataset.synthetic
        area = max(area, synthetic.size_px**2 if synthetic else image.max_pixels)
    # a picture outside the limits is resized when its row is made
    picture = min(max(area, image.min_pixels), image.max_pixels) // PICTURE_TOKEN_PX
    return min(cfg.loras.options(name).max_tokens, picture + TEXT_TOKENS)
