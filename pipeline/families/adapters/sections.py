"""Sections of a run of adapters: base, adapters, router, report.

Invariant: `options` and `router` are complete, so nobody asks a second time what the defaults were.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_serializer, model_validator

from ...config.base import COMMIT, NONE, Bytes, Section, Share, is_folder, merge, not_hashed
from ...config.fit import FitConfig, LearningRate
from ...config.paths import path_field
from ...config.task_data import TaskConfig

# vLLM refuses to load an adapter of any other rank
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# what these words mean in answers, in PEFT and in a routing set, so that no expert may be called so
RESERVED = ("base", "default", "none", "router")
TARGETS = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return text


def _of_names(targets: object) -> object:
    """Refuse what else PEFT takes for modules, with the expression that is meant."""
    if isinstance(targets, list | tuple):
        meant = r".*\.(" + "|".join(map(str, targets)) + ")"
    elif targets == "all-linear":
        meant = TARGETS
    else:
        return targets
    raise ValueError(f"give a regular expression of whole module names, such as {meant!r}")


def _rank(rank: int) -> int:
    if rank not in RANKS:
        raise ValueError(f"vLLM serves the ranks {', '.join(map(str, RANKS))}")
    return rank


Label = Annotated[str, Field(min_length=1, max_length=32, pattern=r"^\S+$")]
Rank = Annotated[int, AfterValidator(_rank)]
Regex = Annotated[str, BeforeValidator(_of_names), AfterValidator(_regex)]


class AdapterBaseConfig(Section):
    """The model under every adapter. A family says in `build` which random ones it can make."""

    model: str | None = path_field(
        "model", None, min_length=1, description="Model on the Hub, or a folder; none: build one"
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
    build: Section | None = Field(None, description="Sizes of a random base, when model is none")

    def most_media_tokens(self, rows: int) -> int:
        """Return the most tokens that the media of so many rows have; a text base reads none."""
        return 0

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        if (self.model is None) == (self.build is None):
            raise ValueError("give either model (a pretrained base) or build (a random one)")
        # a branch moves, and its weights with it: only a commit says which base this was
        if self.model and not is_folder(self.model) and not COMMIT.fullmatch(self.revision or ""):
            raise ValueError(
                f"revision must be the commit of {self.model} to pin, 40 hexadecimal digits "
                f"(found {self.revision!r}): see its history of files on the Hub"
            )
        return self


class AdapterConfig(FitConfig):
    """How one adapter is trained."""

    # rows here are whole chats of any length, and an adapter is small: its own words and defaults
    batch_sequences: int = Field(16, ge=1, description="Rows per optimizer step")
    micro_batch_sequences: int | None = Field(
        None, ge=1, description="Rows per forward pass, the rest is accumulated; none: all at once"
    )
    tokens: int | None = Field(
        None, gt=0, description="Training tokens, those of prompts and what they come with included"
    )
    epochs: float | None = Field(None, gt=0, description="Passes over the training rows")
    lr: LearningRate = Field(
        1e-4, description="Peak learning rate; auto: found by short trainings first (lr_search)"
    )
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
    max_tokens: int = Field(
        2048, ge=16, description="Longer rows are dropped and counted, tokens; never cut"
    )
    compile: bool = Field(
        False, description="Not for adapters: each length of rows would be compiled again"
    )
    checkpointing: bool | None = not_hashed(
        True,
        "Make each layer's activations again in the backward pass; none: where memory_budget asks",
    )
    neutral_share: Share = Field(
        0.0,
        description="Share of training prompts replaced by a neutral one, so that the expert "
        "answers those too",
    )

    @property
    def changes_encoder(self) -> bool:
        """Whether the adapter may reach into what encodes media; never, unless a family's settings
        can say so."""
        return False

    @model_validator(mode="after")
    def _nothing_is_compiled(self) -> Self:
        if self.compile:
            raise ValueError(
                "compile: rows differ in length, and each length would be compiled again; "
                "leave it out"
            )
        return self


class AdapterExpertConfig(TaskConfig):
    """One expert: a task, its data, and what of the defaults is different for it."""

    # one forward pass then gives every expert's probability, without generating anything
    label: Label = Field(
        description="What the router answers for this expert; one token of the base's tokenizer"
    )
    max_new_tokens: int = Field(64, ge=1, le=8192, description="Longest answer, tokens")
    imported: str | None = path_field(
        "path",
        None,
        min_length=1,
        not_hashed=True,
        description="Folder or fsspec URL of a finished adapter, a package (docs/kits.md) or what "
        "PEFT saved, in place of training; its rows teach the router",
    )
    imported_bytes: Bytes = not_hashed(
        8 * 10**9, "Largest finished adapter that is imported, refused before it is read"
    )
    imported_slack: float = not_hashed(
        0.0,
        "Nats a token by which an adapter as PEFT saves it, whose base nothing proves, may be "
        "worse than the base on answers of its task",
        ge=0,
    )
    overrides: AdapterConfig = Field(
        AdapterConfig(), description="Settings of defaults that are different here"
    )

    @model_validator(mode="before")
    @classmethod
    def _imported_has_rows(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("imported") and "dataset" not in raw:
            raise ValueError(
                "the router is taught by requests, so a finished adapter (imported) comes with "
                "rows of its task; name them under dataset"
            )
        return raw

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


class AdaptersConfig(Section):
    """A base and the adapters over it."""

    base: AdapterBaseConfig = Field(description="The model under every adapter")
    defaults: AdapterConfig = Field(AdapterConfig(epochs=2), description="How adapters are trained")
    experts: tuple[AdapterExpertConfig, ...] = Field(
        description="The experts, in order; at least one"
    )
    router: AdapterRouterConfig = Field(description="The router")

    @model_validator(mode="before")
    @classmethod
    def _complete_router(cls, raw: Any) -> Any:
        """Give the router what it leaves out of the defaults; bad defaults are reported once, as
        defaults."""
        router = raw.get("router", {}) if isinstance(raw, dict) else None
        if not isinstance(router, dict) or not isinstance(raw.get("defaults", {}), dict):
            return raw
        # a family's defaults know more settings than ours, so they are read by its own class
        unsaid = cls.model_fields["defaults"].default
        try:
            defaults = type(unsaid).model_validate(raw.get("defaults", {"epochs": 2}))
        except ValueError:
            return raw | {"router": router}
        return raw | {"router": merge(defaults.model_dump(mode="json", exclude_unset=True), router)}

    @property
    def labels(self) -> dict[str, str]:
        """What the router answers for each expert, and for none where it may."""
        labels = {entry.name: entry.label for entry in self.experts}
        if self.router.none_label:
            labels[NONE] = self.router.none_label
        return labels

    def entry(self, name: str) -> AdapterExpertConfig:
        """Return an expert's entry; the name is one of this run's experts."""
        return next(entry for entry in self.experts if entry.name == name)

    def options(self, name: str) -> AdapterConfig:
        """Return how one adapter is trained: the defaults with the expert's own settings, or the
        router's."""
        # the router's class has settings that are of no adapter
        kind = type(self.defaults)
        if name == self.router.name:
            return kind(**{key: getattr(self.router, key) for key in kind.model_fields})
        defaults = self.defaults.model_dump(mode="json", exclude_unset=True)
        own = self.entry(name).model_dump(mode="json")["overrides"]
        return kind.model_validate(merge(defaults, own))


class AdapterEvaluateConfig(Section):
    """What the report measures."""

    batch_rows: int = Field(32, ge=1, description="Rows per forward pass at most")
    rows_per_task: int | None = Field(
        200,
        ge=8,
        description="Most test rows of each task and expert, drawn with the run's seed; none: all",
    )
    baseline_rows: int = Field(
        400, ge=8, description="Training requests that baselines on frozen features learn from"
    )
    consistency_rows: int = Field(
        100, ge=0, description="Requests whose route is compared after each change"
    )
    samples: int = Field(
        2,
        ge=0,
        le=20,
        description="Requests of each task that the report shows with their media and answers, "
        "and of each set that went to a wrong expert; 0: none",
    )
    bootstrap: int = Field(1000, ge=10, description="Resamples of rows behind each 95 % interval")
    thresholds: tuple[Share, ...] = Field(
        (0.5, 0.7, 0.8, 0.9, 0.95, 0.99), description="Confidences in the table of coverage"
    )
    smoke: bool = Field(False, description="Only smoke_rows of everything: does it work at all")
    smoke_rows: int = Field(16, ge=2, description="Rows of each task and split when smoke is true")
    min_expert_score: Share = Field(
        0.9, description="Least score of every expert on its own task (criterion)"
    )
    min_router_accuracy: Share = Field(0.9, description="Least accuracy of the router (criterion)")
    oracle_gap: Share = Field(
        0.05, description="Most that the stack may score below the oracle's choice (criterion)"
    )
