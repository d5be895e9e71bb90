"""The base, the experts and the router of a lora_vlm run: what loras.json says.

Invariant: `options` and `router` are complete, so nobody asks a second time what the defaults were.
"""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_serializer, model_validator

from ...config.base import COMMIT, NONE, Section, Share, is_folder, merge, not_hashed
from ...config.fit import FitConfig
from ...config.task_data import ImageLimitsConfig, TaskConfig

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM serves
RESERVED = ("base", "default", "none", "router")
TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return text


def _rank(rank: int) -> int:
    if rank not in RANKS:
        raise ValueError(f"vLLM serves the ranks {', '.join(map(str, RANKS))}")
    return rank


Label = Annotated[str, Field(min_length=1, max_length=32, pattern=r"^\S+$")]
Rank = Annotated[int, AfterValidator(_rank)]
Regex = Annotated[str, AfterValidator(_regex)]


class BuildConfig(Section):
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
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even (rotary embedding)")
        if self.vision_hidden % self.vision_heads or self.vision_hidden // self.vision_heads % 4:
            raise ValueError(
                f"vision_hidden {self.vision_hidden} over vision_heads {self.vision_heads} must be a "
                "multiple of 4 (rotary embedding of rows and columns)"
            )
        return self


class BaseConfig(Section):
    """The frozen vision-language model under every adapter: pinned, or built at random."""

    model: str | None = Field(
        None, min_length=1, description="Qwen3-VL on the Hub, or a folder; none: build one"
    )
    revision: str | None = Field(
        None, description="Commit of the model on the Hub, 40 hexadecimal digits"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="Type that the base's weights are held in"
    )
    attn: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa", description="Attention implementation"
    )
    image: ImageLimitsConfig = Field(
        ImageLimitsConfig(), description="Picture sizes, the same in training and inference"
    )
    build: BuildConfig | None = Field(
        None, description="Sizes of a random base, when model is none"
    )

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        if (self.model is None) == (self.build is None):
            raise ValueError("give either model (a pretrained base) or build (a random one)")
        if self.model and not is_folder(self.model) and not COMMIT.fullmatch(self.revision or ""):
            raise ValueError(
                f"revision must be the commit of {self.model} to pin, 40 hexadecimal digits (found {self.revision!r}): "
                f"see its history of files on the Hub"
            )
        return self


class AdapterConfig(FitConfig):
    """How one adapter is trained."""

    batch_sequences: int = Field(16, ge=1, description="Rows per optimizer step")
    micro_batch_sequences: int | None = Field(
        None, ge=1, description="Rows per forward pass, the rest is accumulated; none: all at once"
    )
    tokens: int | None = Field(
        None, gt=0, description="Training tokens, those of pictures and prompts included"
    )
    epochs: float | None = Field(None, gt=0, description="Passes over the training rows")
    lr: float = Field(1e-4, gt=0, description="Peak learning rate")
    weight_decay: float = Field(0.0, ge=0, description="AdamW decay of matrices; vectors get none")
    beta2: float = Field(
        0.98, gt=0, lt=1, description="AdamW second-moment decay; the first is 0.9"
    )
    eval_tokens: int = Field(
        65_536, ge=1, description="Validation tokens per evaluation, whole rows"
    )
    r: Rank = Field(16, description="Rank of the adapter; one that vLLM serves")
    alpha: float = Field(32.0, gt=0, description="Scale of the adapter, times 1 / r")
    dropout: float = Field(0.05, ge=0.0, lt=1.0, description="Dropout before the adapter")
    targets: Regex = Field(
        TARGETS, description="Regular expression of the modules that get an adapter"
    )
    allow_vision: bool = Field(
        False, description="Whether targets may touch the vision tower; no mixed batches then"
    )
    max_tokens: int = Field(
        2048, ge=16, description="Longer rows are dropped and counted, tokens; never cut"
    )
    compile: bool = Field(
        False, description="Not for adapters: each length of rows would be compiled again"
    )
    checkpointing: bool | None = Field(
        True,
        description="Make each layer's activations again in the backward pass; none: where memory_budget asks",
    )
    neutral_share: Share = Field(
        0.0,
        description="Share of training prompts replaced by a neutral one, so that the expert answers those too",
    )

    @model_validator(mode="after")
    def _nothing_is_compiled(self) -> Self:
        if self.compile:
            raise ValueError(
                "compile: rows differ in length, and each length would be compiled again; leave it out"
            )
        return self


class AdapterExpertConfig(TaskConfig):
    """One expert: a task, its data, and what of the defaults is different for it."""

    label: Label = Field(
        description="What the router answers for this expert; one token of the base's tokenizer"
    )
    metric: Literal["exact", "cer", "iou", "count", "caption"] = Field(
        "exact", description="How answers are judged"
    )
    max_new_tokens: int = Field(64, ge=1, le=8192, description="Longest answer, tokens")
    overrides: AdapterConfig = Field(
        AdapterConfig(), description="Settings of defaults that are different here"
    )

    @field_serializer("overrides")
    def _only_what_differs(self, overrides: AdapterConfig) -> dict:
        return overrides.model_dump(mode="json", exclude_unset=True)


class AdapterRouterConfig(AdapterConfig):
    """The router: one more adapter, which answers with an expert's label. What it leaves out is as
    in defaults."""

    name: Literal["router"] = Field("router", description="Name of the adapter")
    none_label: Label | None = Field(
        None, description="What it answers when no expert fits; none: it always names one"
    )
    instruction: str = Field(
        "Which expert should handle this request? Answer with its label.",
        min_length=1,
        description="What it is asked about a request",
    )
    top_k: int = not_hashed(2, "Experts that answer when the first is unsure", ge=1)
    threshold: float = not_hashed(
        0.8, "Confidence below which top_k experts answer, ranked", ge=0.0, le=1.0
    )
    fallback: str = not_hashed("base", "Who answers when no expert fits: base, or an expert")


class LorasConfig(Section):
    """A base and the adapters over it."""

    base: BaseConfig = Field(description="The model under every adapter")
    defaults: AdapterConfig = Field(AdapterConfig(epochs=2), description="How adapters are trained")
    experts: tuple[AdapterExpertConfig, ...] = Field(
        description="The experts, in order; at least one"
    )
    router: AdapterRouterConfig = Field(description="The router")

    @model_validator(mode="before")
    @classmethod
    def _complete_router(cls, raw):
        """Give the router what it leaves out of the defaults; bad defaults are reported once, as
        defaults."""
        router = raw.get("router", {}) if isinstance(raw, dict) else None
        if not isinstance(router, dict) or not isinstance(raw.get("defaults", {}), dict):
            return raw
        try:
            defaults = AdapterConfig.model_validate(raw.get("defaults", {"epochs": 2}))
        except ValueError:
            return raw | {"router": router}
        return raw | {"router": merge(defaults.model_dump(mode="json", exclude_unset=True), router)}

    @property
    def labels(self) -> dict[str, str]:
        """What the router answers for each expert, and for none where it may."""
        none = {NONE: self.router.none_label} if self.router.none_label else {}
        return {entry.name: entry.label for entry in self.experts} | none

    def entry(self, name: str) -> AdapterExpertConfig:
        """Return an expert's entry; the name is one of this run's experts."""
        return next(entry for entry in self.experts if entry.name == name)

    def options(self, name: str) -> AdapterConfig:
        """Return how one adapter is trained: the defaults with the expert's own settings, or the
        router's."""
        if name == self.router.name:
            return AdapterConfig(
                **{key: getattr(self.router, key) for key in AdapterConfig.model_fields}
            )
        defaults = self.defaults.model_dump(mode="json", exclude_unset=True)
        return AdapterConfig.model_validate(
            merge(defaults, self.entry(name).model_dump(mode="json")["overrides"])
        )
