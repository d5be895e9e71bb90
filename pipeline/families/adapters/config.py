"""What a run of LoRA adapters on one base says, whatever kind of model the base is.

A family derives its own sections from these (sections.py): how its base is opened or built, and
what only its adapters can be told.

Invariant: what is said of one expert enters the addresses of its own data and adapter, the routing
set, the router and the report, and no other expert's.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator

from ...config.base import NONE, hashed_fields, is_folder
from ...config.fit import SEARCHED, LrSearchConfig
from ...config.routing_set import RoutingSetConfig
from ...config.run import JobKey, RunConfig
from ...config.stage import Stage
from ...config.task_data import PLACES, TaskConfig
from ...protocols import Eye, Looked, Seen
from .sections import RESERVED, AdapterConfig, AdapterEvaluateConfig, AdaptersConfig
from .stages import STAGES

_SHORTHANDS = {
    "checkpoint": ("loras.base.model={}", "loras.base.build=null", "loras.base.revision=null"),
    "smoke": ("evaluate.smoke=true",),
}


class AdapterRunConfig(RunConfig):
    """A whole run of LoRA experts on one base, but for what its family adds."""

    stages: ClassVar[dict[str, Stage]] = STAGES
    shorthands: ClassVar[Mapping[str, tuple[str, ...]]] = {**RunConfig.shorthands, **_SHORTHANDS}

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
    def imported(self) -> dict[str, str]:
        """Where the experts are that were trained elsewhere, by name."""
        return {each.name: each.imported for each in self.loras.experts if each.imported}

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
        if name in self.imported:
            return False
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
        """Return what one expert's adapter is trained by; of one that was trained elsewhere its
        files tell."""
        if item in self.imported:
            return {"imported": True}
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
        if stage == "train_experts" and item in self.imported:
            yield f"loras.experts.{item}.imported", self.imported[item]
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
        if stage == "train_experts" and item in self.imported:
            from ...data.sources import experts

            setting = f"loras.experts.{item}.imported"
            return Looked.of(experts.seen(setting, self.imported[item], eye))
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
        """Yield (setting, path) of tasks' data, a base in a folder, finished adapters, and where
        the bundle goes."""
        yield from self.read_outside("train_shared", None)
        for name in self.tasks:
            yield from self.read_outside("preprocess", name)
        yield from self.read_outside("routing", None)
        for name in self.imported:
            yield from self.read_outside("train_experts", name)
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
            *_wrong_bundle(self),
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


def _wrong_bundle(cfg: AdapterRunConfig) -> Iterator[str]:
    if cfg.deploy.dense is not None:
        yield f"deploy.dense: a run of {cfg.family} trains no dense model; leave it out"


def _wrong_wording(cfg: AdapterRunConfig) -> Iterator[str]:
    neutral = cfg.dataset.neutral
    known = ", ".join(cfg.experts)
    for name in cfg.dataset.paraphrases:
        if name not in (*cfg.experts, NONE):
            yield (
                f"dataset.paraphrases: no such expert {name}; loras.experts has {known}: remove "
                "it; where it comes with a file that this one extends, let dataset name a file of "
                "your own"
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
