"""The sections of an ffn_moe run's configuration."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from ...config.base import Bytes, Section, Share, not_hashed
from ...config.fit import FitConfig, LearningRate
from ...config.labels import DomainName
from ...config.paths import path_field

# the dummy where it stays as an expert; reports call it so, so that no domain may be
ANCHOR = "anchor"
DEFAULT_RANK = 16
LayerNumber = Annotated[int, Field(ge=0)]
LastLayers = Annotated[str, Field(pattern=r"^last:[1-9]\d*$")]
LayerChoice = Literal["all"] | LastLayers | tuple[LayerNumber, ...]
# of expert.form, and what reports and answers call the model without any of them
ADAPTER = "adapter"
BASE = "base"
# what the dense model that a bundle holds is asked for by
DENSE = "dense"


def chosen_layers(layers: LayerChoice, count: int) -> tuple[int, ...]:
    """Return the numbers of chosen layers in a trunk of so many. Raises ValueError where the trunk
    has not so many."""
    if layers == "all":
        return tuple(range(count))
    if isinstance(layers, str):
        last = int(layers.removeprefix("last:"))
        if last > count:
            raise ValueError(f"{layers} are more layers than the trunk has, {count}")
        return tuple(range(count - last, count))
    if layers[-1] >= count:
        raise ValueError(f"there is no layer {layers[-1]}; the trunk has layers 0 to {count - 1}")
    return layers


def ascending(layers: LayerChoice) -> LayerChoice:
    """Return layers as they were chosen. Raises ValueError for numbers that do not ascend."""
    if isinstance(layers, str):
        return layers
    if not layers or list(layers) != sorted(set(layers)):
        raise ValueError("must name at least one layer, each once, the lowest first")
    return layers


class TrunkConfig(FitConfig):
    """The shared trunk and its temporary feed-forward network, the dummy."""

    init: str | None = path_field(
        "model",
        None,
        description="Folder, .gguf file, package:NAME (an installed package that carries a model) "
        "or Hub name of a Qwen3, Llama or Mistral model; none: new. With steps 0 its files are "
        "pinned and not copied",
    )
    revision: str | None = Field(None, description="Commit to pin when init is a Hub name")
    layers: int = Field(4, ge=1, description="Transformer layers (new trunk)")
    d_model: int = Field(192, ge=8, description="Width of the residual stream (new trunk)")
    heads: int = Field(3, ge=1, description="Attention heads (new trunk)")
    kv_heads: int | None = Field(None, ge=1, description="Key-value heads; none: as many as heads")
    head_dim: int | None = Field(None, ge=2, description="Width of a head; none: d_model / heads")
    d_ff: int = Field(
        512, ge=8, description="Width of the dummy's and each expert's SwiGLU (new trunk)"
    )
    context_tokens: int = Field(256, ge=8, description="Tokens per training sequence")
    rope_theta: float = Field(
        10_000.0, gt=0, description="Base of the rotary embedding (new trunk)"
    )
    tie_embeddings: bool = Field(
        True, description="LM head shares the embedding's weights (new trunk)"
    )
    domains: tuple[DomainName, ...] | None = Field(
        None, description="Domains the trunk sees; none: all"
    )
    mixture: Literal["natural", "equal"] = Field(
        "natural", description="Share of domains in a batch: by size, or equal"
    )
    statistics_tokens: int = Field(
        65_536, ge=1, description="Tokens of its domains summed into the dummy's router statistics"
    )
    # Of the stack and not of the trunk: a trunk serves both, so its address holds neither
    anchor: Literal["discard", "keep"] = not_hashed(
        "discard", "keep: the dummy stays in the stack as expert 0; discard: it only helps training"
    )

    @property
    def is_pinned(self) -> bool:
        """Whether a pretrained trunk is taken as it is: its files are named, and not copied."""
        return self.init is not None and self.steps == 0

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.head_dim is None and self.d_model % self.heads:
            raise ValueError(
                f"d_model {self.d_model} is not a multiple of heads {self.heads}; set head_dim"
            )
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        # The rotary embedding turns pairs of a head's numbers
        if (self.head_dim or self.d_model // self.heads) % 2:
            raise ValueError("the width of a head must be even (rotary embedding)")
        return self


class ExpertConfig(FitConfig):
    """One expert: a feed-forward network per layer, trained on its own domain over the frozen
    trunk."""

    init: Literal["trunk", "fresh"] = Field(
        "trunk", description="Start from a copy of the dummy, or at random"
    )
    form: Literal["full", "low_rank", "adapter"] = Field(
        "full",
        description="full: networks of its own; low_rank: a delta of few numbers on the frozen "
        "dummy's matrices; adapter: a LoRA on all linear layers of the model, one for a whole text",
    )
    rank: int | None = Field(
        None, ge=1, description="Rank of what a low-rank expert or an adapter adds; none: 16"
    )
    alpha: float | None = Field(
        None,
        gt=0,
        description="What is added counts alpha / rank times; none: twice the rank",
    )
    layers: LayerChoice = Field(
        "all",
        description="Layers with experts and gates: all, last:N, or their numbers from 0; "
        "elsewhere the dummy's networks stay",
    )
    coordinate: bool = Field(
        False,
        description="Train beside the frozen dummy with a two-way gate (FlexOlmo) instead of alone",
    )
    coordinate_bias: float = Field(
        -0.5, le=0, description="Start of the expert's gate bias when coordinate is on"
    )
    z_weight: float = Field(
        1e-3, ge=0, description="z-loss weight of the two-way gate when coordinate is on"
    )
    statistics_tokens: int = Field(
        65_536, ge=1, description="Own tokens summed into the expert's router statistics"
    )
    statistics_path: Literal["own", "base"] = Field(
        "own",
        description="Networks that run while they are summed: the expert's own, or the dummy's, as "
        "those of the anchor are",
    )
    # An expert does not depend on which others there are: one can be added without training again
    domains: tuple[DomainName, ...] | None = not_hashed(
        None, "Domains that get an expert, in order; none: all"
    )

    # None of them says anything of the experts that are trained here, whose addresses have none
    imported: dict[DomainName, str] = path_field(
        "path",
        {},
        not_hashed=True,
        description="Experts that were trained elsewhere, by name: the folder or fsspec URL of "
        "each one's package (docs/kits.md); among adapters also of one that PEFT saved",
    )
    imported_text: dict[DomainName, tuple[str, ...]] = path_field(
        "glob",
        {},
        not_hashed=True,
        description="Public text like that of an imported expert, by its name, for the gates "
        "where its package has no statistics: globs or fsspec URLs",
    )
    imported_bytes: Bytes = not_hashed(
        8 * 10**9, "Largest package that is imported, refused before it is read"
    )
    imported_slack: float = not_hashed(
        0.0,
        "Nats a token by which an adapter as PEFT saves it, whose base nothing proves, may be "
        "worse than the base on text of its domain",
        ge=0,
    )

    @property
    def is_whole(self) -> bool:
        """Whether an expert has networks of its own in every layer."""
        return self.form == "full" and self.layers == "all"

    @property
    def delta_rank(self) -> int:
        """The rank of the deltas that stand for an expert; 0 where it has networks of its own."""
        return (self.rank or DEFAULT_RANK) if self.form == "low_rank" else 0

    @property
    def adapter_rank(self) -> int:
        """The rank of the two matrices that an adapter adds to each linear layer."""
        return self.rank or DEFAULT_RANK

    @property
    def delta_scale(self) -> float:
        """What a low-rank product B A is multiplied by."""
        rank = self.rank or DEFAULT_RANK
        return (self.alpha or 2 * rank) / rank

    @property
    def packed_scale(self) -> float:
        """What an expert's package says of it; 0 of networks of its own."""
        return self.delta_scale if self.delta_rank else 0.0

    def in_layers(self, count: int) -> tuple[int, ...]:
        """Return the numbers of the layers with experts in a trunk of so many.

        Raises ValueError where the trunk has not so many.
        """
        return chosen_layers(self.layers, count)

    @field_validator("layers")
    @classmethod
    def _layers_ascend(cls, layers: LayerChoice) -> LayerChoice:
        return ascending(layers)

    @model_validator(mode="after")
    def _form_fits(self) -> Self:
        if self.form == "low_rank" and self.init == "fresh":
            raise ValueError(
                "init: fresh starts at random, and a low-rank expert is a change of the trunk's "
                "own networks; set form: full or init: trunk"
            )
        given = [name for name in ("rank", "alpha") if getattr(self, name) is not None]
        if given and self.form == "full":
            raise ValueError(
                f"{given[0]} is of low-rank experts and adapters; set form: low_rank or adapter, "
                "or leave it out"
            )
        if self.coordinate and self.layers != "all":
            raise ValueError(
                "coordinate trains a gate beside an expert in every layer; set layers: all"
            )
        return self


class TemperatureConfig(Section):
    """Softmax temperature of the gates while they train: linear, then constant; folded into the
    export."""

    start: float = Field(1.0, gt=0, description="Temperature at the first step")
    end: float = Field(1.0, gt=0, description="Temperature at the end of the ramp and after")
    epochs: float | None = Field(
        None,
        gt=0,
        description="Length of the ramp in passes over the training tokens; none: all of the "
        "training",
    )

    def in_small(self, share: float) -> Self:
        """Return the ramp of a training that is a share as long, and over at the same part of
        it."""
        if self.epochs is None:
            return self
        return self.model_copy(update={"epochs": self.epochs * share})

    def at(self, step: int, steps: int, epoch_steps: float) -> float:
        """Return the temperature at one of the steps of a training, of which a pass over the
        training tokens takes `epoch_steps`."""
        length: float = steps - 1  # steps count from 0: the last one is at the end
        if self.epochs is not None:
            length = self.epochs * epoch_steps
        done = min(1.0, step / max(1.0, length))
        return self.start + (self.end - self.start) * done


class RouterConfig(FitConfig):
    """One linear gate per layer; zero steps assemble the stack without any training."""

    init: Literal["uniform", "random", "centroid", "ridge", "rows"] = Field(
        "ridge",
        description="Gate rows before training: zeros, random, mean input, closed form (DUME), or "
        "the coordinated experts' own rows (FlexOlmo)",
    )
    ridge_lambda: float = Field(
        1e-2, gt=0, description="Ridge penalty relative to the mean squared input"
    )
    margin: float = Field(
        4.0,
        gt=0,
        description="Mean lead of a domain's own expert in gate logits after centroid or ridge, "
        "nats",
    )
    top_k: int = Field(2, ge=1, description="Experts that run per token (adapters: 1)")
    prompt_tokens: int = Field(
        16, ge=2, description="First tokens of a text that choose its adapter; the base reads them"
    )
    threshold: Share | None = Field(
        None,
        description="Least probability of an adapter, below which the base answers; none: that "
        "with the least loss on validation text",
    )
    temperature: TemperatureConfig = Field(
        TemperatureConfig(), description="Softmax temperature while training"
    )
    balance: Literal["none", "aux", "bias"] = Field(
        "none",
        description="Load balance: none, auxiliary loss (Switch, divided by k), or selection bias "
        "(aux-loss-free)",
    )
    balance_weight: float = Field(
        1e-2, ge=0, description="Weight of the auxiliary loss, or step of the bias"
    )
    z_weight: float = Field(1e-3, ge=0, description="Weight of the router z-loss (ST-MoE)")
    noise: float = Field(
        0.0, ge=0, description="Standard deviation of noise on gate logits while training"
    )
    capacity_factor: float | None = Field(
        None,
        gt=0,
        description="Slots per expert relative to an even load while training; none: dropless",
    )

    @model_validator(mode="after")
    def _one_forward_pass(self) -> Self:
        if self.checkpointing:
            raise ValueError(
                "checkpointing: the gates count the tokens of every forward pass, so none is made "
                "twice"
            )
        return self


class DenseConfig(Section):
    """Dense baselines, each named by what it has in common with the stack."""

    baselines: tuple[Literal["total", "path", "ffn", "wide", "scratch"], ...] = not_hashed(
        ("total", "path", "ffn", "wide"),
        "total: trunk continued, same total tokens; path: trunk continued, tokens of one expert's "
        "path; ffn: total, but only its FFN trains; wide: same active parameters, from zero; "
        "scratch: total, from zero",
    )
    domains: tuple[DomainName, ...] | None = not_hashed(
        None,
        "Domains that baselines train on and whose experts' tokens they are given; none: those of "
        "the experts",
    )
    lr: LearningRate | None = Field(
        None,
        description="Peak learning rate of continued baselines; none: expert.lr, found for them "
        "where that is auto",
    )


class ScoreConfig(Section):
    """What one model is measured on by itself, as those of experiments are."""

    bytes_per_domain: int = Field(
        131_072,
        ge=1,
        description="Held-out text of each domain, whole documents: counted in bytes, so that "
        "models of any tokenizer read the same",
    )


class EvaluateConfig(Section):
    """What the report measures."""

    tokens_per_domain: int = Field(
        32_768, ge=64, description="Test tokens per domain, whole documents"
    )
    batch_sequences: int = Field(16, ge=1, description="Sequences per forward pass")
    rivals: Literal["all", "few"] = Field(
        "all",
        description="all: every way to join the experts, and every number of them a token; few: "
        "base, experts, dense baselines and weight soup beside the stack. Adapters: all, as no "
        "way to choose one runs over the held-out text again",
    )
    continuation_tokens: int = Field(
        32, ge=0, description="Tokens written after a held-out text of each domain; 0: none"
    )
    samples: int = Field(
        2,
        ge=0,
        le=20,
        description="Held-out texts of each domain whose beginning the report shows, with who read "
        "each token; 0: no text at all, continuations neither",
    )
    bootstrap: int = Field(
        1000, ge=10, description="Resamples of documents behind each 95 % interval"
    )
    min_expert_share: Share = Field(
        0.05,
        description="Least share of tokens, of adapters of texts, of every expert (tertiary "
        "criterion)",
    )
    gap_share: Share = Field(
        0.25,
        description="Share of dense's train-test gap to close (primary criterion); adapters have "
        "to beat it",
    )
