"""What a run of LoRA adapters on one base says, whatever kind of model the base is.

A family derives its own sections from these: how its base is opened or built, and what only its
adapters can be told.

Invariant: what is said of one expert enters the addresses of its own data and adapter, the routing
set, the router and the report, and no other expert's. `options` and `router` are complete, so
nobody asks a second time what the defaults were.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_serializer, model_validator

from ...config.base import COMMIT, NONE, Section, Share, hashed_fields, is_folder, merge, not_hashed
from ...config.fit import SEARCHED, FitConfig, LearningRate, LrSearchConfig
from ...config.paths import path_field
from ...config.routing_set import RoutingSetConfig
from ...config.run import JobKey, RunConfig
from ...config.stage import Stage
from ...config.task_data import PLACES, TaskConfig
from ...protocols import Eye, Looked, Seen
from .stages import STAGES

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


class AdapterRunConfig(RunConfig):
    """A whole run of LoRA experts on one base, but for what its family adds."""

    stages: ClassVar[dict[str, Stage]] = STAGES

    loras: AdaptersConfig = Field(
        description="Base, experts and router; a JSON file's path, or what is in it"
    )
    dataset: RoutingSetConfig = Field(
        description="The routing set; a YAML file's path, or what is in it"
    )
    lr_search: LrSearchConfig = Field(
        LrSearchConfig(), description="How learning rates that are auto are found"
    )
    evaluate: AdapterEvaluateConfig = Field(AdapterEvaluateConfig(), description="The report")

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts, in the order of loras.experts."""
        return tuple(entry.name for entry in self.loras.experts)

    @property
    def searches_experts(self) -> tuple[str, ...]:
        """The experts whose own rate is searched."""
        return tuple(name for name in self.experts if self.searches(name))

    @property
    def searches_router(self) -> bool:
        """Whether the router's rate is searched."""
        return self.searches(self.loras.router.name)

    def searches(self, name: str) -> bool:
        """Whether the rate of an expert's or the router's adapter is found before its training."""
        options = self.loras.options(name)
        # Without steps nothing moves
        return options.lr == SEARCHED and options.steps != 0

    @property
    def tasks(self) -> tuple[str, ...]:
        """Whose rows preprocess makes: the experts', and those of none when the routing set has
        some."""
        return (*self.experts, *((NONE,) if NONE in self.dataset.experts else ()))

    def task(self, name: str) -> TaskConfig:
        """Return an expert's entry, or one for none that its source in the routing set makes up."""
        if name != NONE:
            return self.loras.entry(name)
        source = next(each for each in self.dataset.sources if each.expert == NONE)
        # nobody learns to answer these rows, so there is nothing to make an answer of
        return TaskConfig(name=NONE, dataset=source.data(self.dataset.splits), answer="-")

    def task_reads(self, item: str) -> dict:
        """Return what a task's rows are made of."""
        read = self.task(item).model_dump(mode="json", include={"dataset", "prompt", "answer"})
        # Where they lie is no part of it, but for the name that rows have it by: of the files
        # themselves the address holds the content
        path = read["dataset"]["path"]
        for place in PLACES:
            del read["dataset"][place]
        return read | {"named": Path(path).name if path else None}

    def base_reads(self, _item: None) -> dict:
        """Return what pins the base."""
        return {"base": hashed_fields(self.loras.base)}

    def expert_reads(self, item: str) -> dict:
        """Return what one expert's adapter is trained by."""
        options = self.loras.options(item)
        neutral = self.dataset.neutral.seen if options.neutral_share else ()
        # not its label: that is what the router answers, and no tensor of the expert knows it
        return {"options": hashed_fields(options), "neutral": list(neutral)}

    def routing_reads(self, _item: None) -> dict:
        """Return what the routing set's answers are."""
        return {"labels": self.loras.labels}

    def router_reads(self, _item: None) -> dict:
        """Return what the router's adapter is trained by."""
        # its requests are asked as they are, whatever share of neutral prompts the defaults have
        router = hashed_fields(self.loras.router, frozenset({"neutral_share"}))
        return {"router": router, "labels": self.loras.labels}

    def report_reads(self, _item: None) -> dict:
        """Return what the report depends on beside its own section and the trainings."""
        # what `hashed_fields` leaves out of the address of the router is read here
        policy = {"top_k", "threshold", "fallback"}
        return {
            "router": self.loras.router.model_dump(mode="json", include=policy),
            "experts": self._said_of_experts("name", "metric", "max_new_tokens"),
        }

    def bundle_reads(self, _item: None) -> dict:
        """Return what the bundle says of its experts."""
        return {"experts": self._said_of_experts("name", "task", "description")}

    def _said_of_experts(self, *keys: str) -> list[dict]:
        return [entry.model_dump(mode="json", include={*keys}) for entry in self.loras.experts]

    def read_outside(self, stage: str, item: str | None) -> Iterator[tuple[str, str]]:
        """Yield (setting, path) of what a job reads outside the store, not on the Hub."""
        base = self.loras.base.model
        if stage == "train_shared" and base and is_folder(base):
            yield "loras.base.model", base
        for entry in self.loras.experts:
            if stage == "preprocess" and entry.name == item:
                for key, path in entry.dataset.paths():
                    yield f"loras.experts.{entry.name}.dataset.{key}", path
        for i, source in enumerate(self.dataset.sources):
            # Those of none are read as a task of their own
            of_task = ("preprocess", NONE) if source.expert == NONE else ("routing", None)
            if (stage, item) == of_task:
                for key, path in source.paths():
                    yield f"dataset.sources.{i}.{key}", path

    def look(self, stage: str, item: str | None, eye: Eye) -> Looked | None:
        """Return what a job reads outside the store as it is now; None where it reads nothing."""
        # What reads files is imported by who looks, and not with the settings
        if stage == "preprocess" and item is not None:
            from ...data.sources.task_seen import seen

            return Looked.of(seen(item, self.task(item).dataset, eye))
        if stage == "routing":
            return Looked.of(self._seen_by_routing(eye))
        base = self.loras.base.model
        if stage == "train_shared" and base and is_folder(base):
            from ...store.model_files import seen_in_folder

            return Looked.of(seen_in_folder("loras.base.model", Path(base), eye))
        return None

    def reads_through(self, stage: str, item: str | None) -> tuple[JobKey, ...]:
        """Return the jobs of which a job reads anew what they have read outside the store."""
        # The routing set names pictures of its own rows where they lie
        return (("routing", None),) if stage in ("train_router", "evaluate") else ()

    def _seen_by_routing(self, eye: Eye) -> Iterator[Seen]:
        from ...data.sources.task_seen import seen

        for source in self.dataset.sources:
            # Those of none are read as a task of their own
            if source.origin == "jsonl" and source.expert != NONE:
                yield from seen(source.expert, source.data(self.dataset.splits), eye)

    def paths(self) -> Iterator[tuple[str, str]]:
        """Yield (setting, path) of tasks' data, a base in a folder, and where the bundle goes."""
        yield from self.read_outside("train_shared", None)
        for name in self.tasks:
            yield from self.read_outside("preprocess", name)
        yield from self.read_outside("routing", None)
        if self.deploy.upload:
            yield "deploy.upload", self.deploy.upload

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        problems = [
            *_wrong_names(self.loras),
            *_wrong_labels(self.loras),
            *_wrong_durations(self.loras),
            *_wrong_policy(self.loras),
            *_wrong_sources(self),
            *_wrong_wording(self),
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _twice(values: list[str]) -> list[str]:
    return sorted({value for value in values if values.count(value) > 1})


def _wrong_names(loras: AdaptersConfig) -> Iterator[str]:
    if not loras.experts:
        yield "loras.experts: give at least one expert"
    names = [entry.name for entry in loras.experts]
    for name in _twice(names):
        yield f"loras.experts: two experts are named {name}; adapters need names of their own"
    for name in names:
        if name in RESERVED:
            yield f"loras.experts: {name} means something else here; name that expert otherwise"


def _wrong_labels(loras: AdaptersConfig) -> Iterator[str]:
    labels = [entry.label for entry in loras.experts]
    if loras.router.none_label:
        labels.append(loras.router.none_label)
    for label in _twice(labels):
        yield f"loras.experts: the label {label!r} is given twice; the router could not tell"


def _wrong_durations(loras: AdaptersConfig) -> Iterator[str]:
    fits: dict[str, AdapterConfig] = {}
    for entry in loras.experts:
        fits[f"loras.experts.{entry.name}.overrides"] = loras.options(entry.name)
    fits["loras.router"] = loras.router
    for key, fit in fits.items():
        if fit.steps is fit.epochs is fit.tokens is None:
            yield f"{key}: give one of steps, epochs, tokens, here or in loras.defaults"


def _wrong_policy(loras: AdaptersConfig) -> Iterator[str]:
    if not loras.experts:
        return
    router = loras.router
    names = [entry.name for entry in loras.experts]
    if router.fallback != "base" and router.fallback not in names:
        yield (
            f"loras.router.fallback: {router.fallback} is neither base nor an expert "
            f"({', '.join(names)})"
        )
    # with one expert there is nobody to be second
    if router.top_k > len(names):
        few = f"but there are {len(names)}" if len(names) > 1 else "but there is 1; set it to 1"
        yield f"loras.router.top_k: {router.top_k} experts per answer, {few}"


def _wrong_sources(cfg: AdapterRunConfig) -> Iterator[str]:
    names = cfg.experts
    sources = [source.expert for source in cfg.dataset.sources]
    # a name given twice is one mistake, which was told already
    for name in dict.fromkeys(names):
        if name not in sources and name not in RESERVED:
            yield f"dataset.sources: no requests for {name}; add {{expert: {name}, from: loras}}"
    for name in dict.fromkeys(sources):
        if name not in (*names, NONE):
            known = ", ".join(names)
            yield f"dataset.sources: no such expert {name}; loras.experts has {known}"
    if sources.count(NONE) > 1:
        yield "dataset.sources: none has two sources; give it one"
    # the label and the rows of none go together: a class without rows is never learned
    none_label = cfg.loras.router.none_label
    if NONE in sources and none_label is None:
        yield (
            "loras.router.none_label: the routing set has requests for none, so the router needs "
            "a label for it"
        )
    if NONE not in sources and none_label is not None:
        yield (
            "loras.router.none_label: nothing teaches the router to answer it; add a source of "
            "the expert none"
        )
    balance = cfg.dataset.balance
    if isinstance(balance, dict) and balance.keys() != set(sources):
        wanted = ", ".join(dict.fromkeys(sources))
        yield f"dataset.balance: name a share for each of {wanted}, and no other"


def _wrong_wording(cfg: AdapterRunConfig) -> Iterator[str]:
    neutral = cfg.dataset.neutral
    known = ", ".join(cfg.experts)
    for name in cfg.dataset.paraphrases:
        if name not in (*cfg.experts, NONE):
            yield (
                f"dataset.paraphrases: no such expert {name}; loras.experts has {known}: remove it"
            )
    # held-out prompts are asked of test_held alone, so both kinds are needed
    if cfg.dataset.ambiguous_share and not (neutral.seen and neutral.held):
        yield (
            "dataset.neutral: ambiguous_share is above 0, so give prompts under seen and under held"
        )
    for name in dict.fromkeys(cfg.experts):
        if cfg.loras.options(name).neutral_share and not neutral.seen:
            yield (
                f"dataset.neutral.seen: the expert {name} has a neutral_share, so give neutral "
                "prompts"
            )
