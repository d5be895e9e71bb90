"""The configuration of a lora_vlm run: what a Qwen3-VL adds to a run of adapters."""

from typing import Literal, Self

from pydantic import Field, model_validator

from ...config.base import Section
from ...config.paths import path_field
from ...config.task_data import ImageLimitsConfig
from ..adapters.config import AdapterRunConfig
from ..adapters.sections import (
    AdapterBaseConfig,
    AdapterConfig,
    AdapterExpertConfig,
    AdapterRouterConfig,
    AdaptersConfig,
    Regex,
)

# the vision tower has projections of the same names, so a pattern has to say which half it means
TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

PICTURE_TOKEN_PX = 1024  # area that becomes one token


class VlmBuildConfig(Section):
    """Sizes of a random Qwen3-VL, built where a pretrained one would be opened."""

    hidden: int = Field(128, ge=16, description="Width of the language model")
    layers: int = Field(2, ge=1, description="Layers of the language model")
    heads: int = Field(4, ge=1, description="Attention heads")
    kv_heads: int = Field(2, ge=1, description="Key-value heads")
    head_dim: int = Field(32, ge=6, description="Width of a head, even")
    intermediate: int = Field(256, ge=8, description="Width of a feed-forward network")
    vision_hidden: int = Field(64, ge=8, description="Width of the vision tower")
    vision_layers: int = Field(2, ge=1, description="Layers of the vision tower")
    vision_heads: int = Field(4, ge=1, description="Attention heads of the vision tower")
    vision_intermediate: int = Field(
        128, ge=8, description="Width of a feed-forward network of the vision tower"
    )
    vocab_size: int = Field(
        600, ge=300, description="Most entries of the tokenizer, special ones included"
    )
    initializer_range: float = Field(
        0.1,
        gt=0,
        description="Standard deviation of weights; far below 1/sqrt(hidden) nothing is learned",
    )
    text: tuple[str, ...] = Field(
        (), description="What the tokenizer is trained on beside the words of synthetic pictures"
    )
    seed: int = Field(0, ge=0, description="Seed of the weights")

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        # a rotary embedding turns pairs of numbers; the tower's turns them by row and by column
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even (rotary embedding)")
        if self.vision_hidden % self.vision_heads or self.vision_hidden // self.vision_heads % 4:
            raise ValueError(
                f"vision_hidden {self.vision_hidden} over vision_heads {self.vision_heads} must be "
                "a multiple of 4 (rotary embedding of rows and columns)"
            )
        return self


class VlmBaseConfig(AdapterBaseConfig):
    """The frozen vision-language model under every adapter: pinned, or built at random."""

    model: str | None = path_field(
        "model", None, min_length=1, description="Qwen3-VL on the Hub, or a folder; none: build one"
    )
    image: ImageLimitsConfig = Field(
        ImageLimitsConfig(), description="Picture sizes, the same in training and inference"
    )
    build: VlmBuildConfig | None = Field(
        None, description="Sizes of a random base, when model is none"
    )

    def most_media_tokens(self, rows: int) -> int:
        """Return the tokens of so many pictures of the largest area."""
        return rows * self.image.max_pixels // PICTURE_TOKEN_PX


class VlmAdapterConfig(AdapterConfig):
    """How one adapter is trained on a vision-language model."""

    tokens: int | None = Field(
        None, gt=0, description="Training tokens, those of pictures and prompts included"
    )
    targets: Regex = Field(
        TARGETS, description="Regular expression of the modules that get an adapter"
    )
    allow_vision: bool = Field(
        False, description="Whether targets may touch the vision tower; no mixed batches then"
    )

    @property
    def changes_encoder(self) -> bool:
        """Whether the adapter may reach into the vision tower."""
        return self.allow_vision


class VlmExpertConfig(AdapterExpertConfig):
    """One expert: a task, its data, and what of the defaults is different for it."""

    overrides: VlmAdapterConfig = Field(
        VlmAdapterConfig(), description="Settings of defaults that are different here"
    )


# The order of the bases counts: pydantic lets the first one say what a field is that both have, and
# the targets must be a Qwen3-VL's.
class VlmRouterConfig(VlmAdapterConfig, AdapterRouterConfig):
    """The router: one more adapter, which answers with an expert's label. What it leaves out is as
    in defaults."""


class VlmAdaptersConfig(AdaptersConfig):
    """A Qwen3-VL and the adapters over it."""

    base: VlmBaseConfig = Field(description="The model under every adapter")
    defaults: VlmAdapterConfig = Field(
        VlmAdapterConfig(epochs=2), description="How adapters are trained"
    )
    experts: tuple[VlmExpertConfig, ...] = Field(description="The experts, in order; at least one")
    router: VlmRouterConfig = Field(description="The router")


class LoraVlmConfig(AdapterRunConfig):
    """A whole run of LoRA experts on a vision-language model."""

    family: Literal["lora_vlm"] = Field("lora_vlm", description="Kind of experts")
    loras: VlmAdaptersConfig = Field(
        description="Base, experts and router; a JSON file's path, or what is in it"
    )

    def task_reads(self, item: str) -> dict:
        """Return what a task's rows are made of."""
        # pictures are resized when rows are made, so the limits are part of what the rows are
        image = self.loras.base.image.model_dump(mode="json")
        return super().task_reads(item) | {"image": image}
