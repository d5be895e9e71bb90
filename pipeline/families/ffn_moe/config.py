"""The configuration of an ffn_moe run: its sections, and whether they fit together."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from ...config.base import DURATIONS, PACKAGE, Section, Share, is_folder, not_hashed
from ...config.fit import SEARCHED, FitConfig, LearningRate, LrSearchConfig
from ...config.labels import DomainName
from ...config.paths import path_field
from ...config.stage import Stage, fields
from ...config.text_data import TextRunConfig
from .stages import BASELINE_READS, FROM_ZERO, STAGES

# the dummy where it stays as an expert; reports call it so, so that no domain may be
ANCHOR = "anchor"
DEFAULT_RANK = 16
LayerNumber = Annotated[int, Field(ge=0)]
LastLayers = Annotated[str, Field(pattern=r"^last:[1-9]\d*$")]
# of expert.form, and what reports and answers call the model without any of them
ADAPTER = "adapter"
BASE = "base"


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
    layers: Literal["all"] | LastLayers | tuple[LayerNumber, ...] = Field(
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

    def in_layers(self, count: int) -> tuple[int, ...]:
        """Return the numbers of the layers with experts in a trunk of so many.

        Raises ValueError where the trunk has not so many.
        """
        if self.layers == "all":
            return tuple(range(count))
        if isinstance(self.layers, str):
            last = int(self.layers.removeprefix("last:"))
            if last > count:
                raise ValueError(f"{self.layers} are more layers than the trunk has, {count}")
            return tuple(range(count - last, count))
        if self.layers[-1] >= count:
            raise ValueError(
                f"there is no layer {self.layers[-1]}; the trunk has layers 0 to {count - 1}"
            )
        return self.layers

    @field_validator("layers")
    @classmethod
    def _layers_ascend(cls, layers: str | tuple[int, ...]) -> str | tuple[int, ...]:
        if isinstance(layers, str):
            return layers
        if not layers or list(layers) != sorted(set(layers)):
            raise ValueError("must name at least one layer, each once, the lowest first")
        return layers

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
        description="Length of the ramp in passes over the training tokens; none: all of router "
        "training",
    )


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
    lr: LearningRate | None = Field(
        None,
        description="Peak learning rate of continued baselines; none: expert.lr, found for them "
        "where that is auto",
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
        "base, experts, dense baselines and weight soup beside the stack",
    )
    continuation_tokens: int = Field(
        32, ge=0, description="Tokens written after a held-out text of each domain; 0: none"
    )
    bootstrap: int = Field(
        1000, ge=10, description="Resamples of documents behind each 95 % interval"
    )
    min_expert_share: Share = Field(
        0.05, description="Least share of tokens of every expert (tertiary criterion)"
    )
    gap_share: Share = Field(
        0.25, description="Share of dense's train-test gap to close (primary criterion)"
    )


class FfnMoeConfig(TextRunConfig):
    """A whole run of FFN experts."""

    stages: ClassVar[dict[str, Stage]] = STAGES

    family: Literal["ffn_moe"] = Field("ffn_moe", description="Kind of experts")
    trunk: TrunkConfig = Field(TrunkConfig(steps=1000), description="The shared trunk")
    expert: ExpertConfig = Field(ExpertConfig(steps=200), description="Each expert")
    router: RouterConfig = Field(RouterConfig(steps=50), description="The gates")
    dense: DenseConfig = Field(DenseConfig(), description="Baselines")
    lr_search: LrSearchConfig = Field(
        LrSearchConfig(), description="How learning rates that are auto are found"
    )
    evaluate: EvaluateConfig = Field(EvaluateConfig(), description="The report")

    @model_validator(mode="before")
    @classmethod
    def _tokenizer_of_the_trunk(cls, raw: Any) -> Any:
        """Take a pretrained trunk's own tokenizer where none is named."""
        trunk = _values(raw, "trunk")
        tokenizer = _values(raw, "tokenizer")
        if trunk.get("init") is None or tokenizer.get("pretrained") is not None:
            return raw
        own = {"pretrained": trunk["init"], "revision": trunk.get("revision")}
        return {**raw, "tokenizer": tokenizer | own}

    @property
    def experts(self) -> tuple[str, ...]:
        """Domains that get an expert, in stack order."""
        return self.expert.domains or self.partition.names

    @property
    def searches_shared(self) -> bool:
        """Whether the trunk's rate is searched."""
        return _searches(self.trunk)

    @property
    def searches_experts(self) -> bool:
        """Whether the experts' rate is searched."""
        return _searches(self.expert)

    @property
    def searches_router(self) -> bool:
        """Whether the gates' rate is searched."""
        return _searches(self.router)

    @property
    def searches_dense(self) -> tuple[str, ...]:
        """The searches for continued baselines' rates: one for each choice of weights."""
        lr = self.dense.lr or self.expert.lr
        if lr != SEARCHED:
            return ()
        continued = [name for name in self.dense.baselines if name not in FROM_ZERO]
        kinds = [self.own_item("lr_dense", name) for name in continued]
        return tuple(kind for kind in ("all", "ffn") if kind in kinds)

    def own_item(self, need: str, item: str | None) -> str | None:
        """Return which job of a stage is an item's own, where others are not read."""
        if need == "lr_dense" and item in FROM_ZERO:
            return None  # these train at the trunk's rate
        if need == "lr_dense":
            return "ffn" if item == "ffn" else "all"
        return super().own_item(need, item)

    def shards_read(self, _item: None) -> dict:
        """Return what shards depend on beside their settings: how documents are led."""
        # Before, a pretrained tokenizer's own bos was left out; those of other runs are unchanged
        return {"led_by": "its own"} if self.tokenizer.pretrained else {}

    def dense_reads(self, item: str) -> dict:
        """Return what a dense baseline's budget, size and training depend on."""
        return fields(self, BASELINE_READS[item])

    def read_outside(self, stage: str, _item: str | None) -> Iterator[tuple[str, str]]:
        """Yield (setting, path) of what a job reads outside the store, not on the Hub."""
        named = {}
        if stage == "preprocess":
            if self.data.source == "files":
                for entry in self.data.files:
                    for path in entry.paths:
                        yield "data.files", path
            named["tokenizer.pretrained"] = self.tokenizer.pretrained
        # A pinned trunk is read by whatever stands on it
        if stage == "train_shared" or (self.trunk.is_pinned and stage != "preprocess"):
            named["trunk.init"] = self.trunk.init
        for name, value in named.items():
            # What is neither there nor written as a path is a name on the Hub
            if value and (_is_here(value) or is_folder(value)):
                yield name, value

    def paths(self) -> Iterator[tuple[str, str]]:
        """Yield (setting, path) of documents, pretrained parts and where the bundle goes."""
        for stage in ("preprocess", "train_shared"):
            yield from self.read_outside(stage, None)
        if self.deploy.upload:
            yield "deploy.upload", self.deploy.upload

    @model_validator(mode="before")
    @classmethod
    def _adapters_need_no_steps(cls, given: Any) -> Any:
        """Give a router of adapters what it has in place of the gates' defaults."""
        if not isinstance(given, dict):
            return given
        expert = given.get("expert")
        router = given.get("router", {})
        is_adapter = isinstance(expert, dict) and expert.get("form") == ADAPTER
        if not is_adapter or not isinstance(router, dict):
            return given
        own: dict[str, Any] = {"top_k": 1}
        if not DURATIONS & router.keys():
            own["steps"] = 0
        return given | {"router": own | router}

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        # All at once: whoever mends one should not meet the next one only then
        problems = [
            *_unknown_domains(self),
            *_durations(self),
            *_pretrained(self),
            *_expert_layers(self),
            *_not_for_adapters(self),
        ]
        if self.router.init == "rows" and not self.expert.coordinate:
            problems.append(
                "router.init: rows are learned by coordinated experts; set expert.coordinate: true"
            )
        # A kept anchor is an expert too
        slots = len(self.experts) + (self.trunk.anchor == "keep")
        if self.router.top_k > slots:
            problems.append(
                f"router.top_k: {self.router.top_k} experts per token, but the stack has "
                f"{slots}; lower it, or name more in expert.domains"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _values(raw: Any, section: str) -> dict[str, Any]:
    """Return what is given of a section's settings, before they are checked."""
    given = raw.get(section) if isinstance(raw, dict) else None
    if isinstance(given, BaseModel):
        return given.model_dump()
    return given if isinstance(given, dict) else {}


def _is_here(name: str) -> bool:
    """Whether a model's name means something of this machine."""
    return name.startswith(PACKAGE) or Path(name).exists()


def _searches(fit: FitConfig) -> bool:
    """Whether something is trained whose rate is not known."""
    return fit.lr == SEARCHED and fit.steps != 0


def _unknown_domains(cfg: FfnMoeConfig) -> list[str]:
    known = cfg.partition.names
    given = {"trunk": cfg.trunk.domains, "expert": cfg.expert.domains}
    out = []
    for key, domains in given.items():
        wanted = domains or ()
        unknown = [domain for domain in wanted if domain not in known]
        if unknown:
            out.append(
                f"{key}.domains: no such domain {', '.join(unknown)}; partition has "
                f"{', '.join(known)}"
            )
        if len(set(wanted)) < len(wanted):
            out.append(f"{key}.domains: a domain is named twice")
    if ANCHOR in cfg.experts:
        out.append(
            f"partition.domains: {ANCHOR} is the trunk's own network among experts; name that "
            "domain otherwise"
        )
    if len(cfg.experts) > len(known):
        out.append(
            f"expert.domains: {len(cfg.experts)} experts, but the partition has {len(known)} "
            "domains"
        )
    return out


def _expert_layers(cfg: FfnMoeConfig) -> list[str]:
    if cfg.trunk.init:
        return []  # its own config.json says how many layers it has
    try:
        cfg.expert.in_layers(cfg.trunk.layers)
    except ValueError as error:
        return [f"expert.layers: {error}"]
    return []


def _durations(cfg: FfnMoeConfig) -> list[str]:
    sections: dict[str, FitConfig] = {
        "trunk": cfg.trunk,
        "expert": cfg.expert,
        "router": cfg.router,
    }
    out = []
    for key, fit in sections.items():
        # FitConfig refuses two of them; that there is one is asked here, of the whole
        if fit.steps is None and fit.epochs is None and fit.tokens is None:
            out.append(f"{key}: give one of {key}.steps, {key}.epochs, {key}.tokens")
    return out


def _not_for_adapters(cfg: FfnMoeConfig) -> list[str]:
    if cfg.expert.form != ADAPTER:
        return []
    router = cfg.router
    trains = router.steps != 0
    refused = {
        "expert.coordinate: an adapter has no gate to train beside it": cfg.expert.coordinate,
        "expert.statistics_path: an adapter's text is read by the base in any case; leave it at "
        "own": cfg.expert.statistics_path != "own",
        "expert.init: an adapter starts from nothing added; leave it at trunk": (
            cfg.expert.init != "trunk"
        ),
        "trunk.anchor: the base answers beside adapters in any case; leave it at discard": (
            cfg.trunk.anchor == "keep"
        ),
        "router.steps: the router of adapters follows from statistics alone; set router.steps to "
        "0": trains,
        "router.top_k: one adapter reads a text; set it to 1": router.top_k > 1,
        "router.balance: nothing balances texts between adapters; leave it at none": (
            router.balance != "none"
        ),
    }
    out = [f"{sentence} (expert.form: adapter)" for sentence, is_so in refused.items() if is_so]
    if router.prompt_tokens > cfg.trunk.context_tokens:
        out.append(
            f"router.prompt_tokens: {router.prompt_tokens} tokens, and trunk.context_tokens is "
            f"{cfg.trunk.context_tokens}; lower it"
        )
    reserved = {BASE, "none", "default"} & set(cfg.experts)
    if reserved:
        out.append(
            f"partition.domains: {', '.join(sorted(reserved))} has a meaning of its own where "
            "experts are adapters; name that domain otherwise"
        )
    return out


def _pretrained(cfg: FfnMoeConfig) -> list[str]:
    if not cfg.trunk.init:
        return []
    out = []
    for name in sorted(FROM_ZERO):
        if name in cfg.dense.baselines:
            out.append(
                f"dense.baselines: {name} trains from zero, which a pretrained trunk rules out"
            )
    return out
