"""The configuration of a lora_vlm run: its sections together, and what each stage reads of them.

Invariant: what is said of one expert enters the addresses of its own data and adapter, the routing
set, the router and the report, and no other expert's.
"""

from collections.abc import Iterator
from typing import Literal, Self

from pydantic import Field, model_validator

from ...config.base import NONE, Section, Share, hashed_fields, is_folder
from ...config.routing_set import RoutingSetConfig
from ...config.run import JobKey, RunConfig
from ..adapters.config import RESERVED, AdapterExpertConfig, LorasConfig

_UP_TO_ROUTER = ("preprocess", "train_shared", "train_experts", "routing", "train_router")
NEEDS = {
    "routing": ("preprocess",),
    "train_router": ("train_shared", "routing"),
    "evaluate": _UP_TO_ROUTER,
    "deploy": (*_UP_TO_ROUTER, "evaluate"),
}


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


class LoraVlmConfig(RunConfig):
    """A whole run of LoRA experts on a vision-language model."""

    family: Literal["lora_vlm"] = Field("lora_vlm", description="Kind of experts")
    loras: LorasConfig = Field(
        description="Base, experts and router; a JSON file's path, or what is in it"
    )
    dataset: RoutingSetConfig = Field(
        description="The routing set; a YAML file's path, or what is in it"
    )
    evaluate: AdapterEvaluateConfig = Field(AdapterEvaluateConfig(), description="The report")

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts, in the order of loras.experts."""
        return tuple(entry.name for entry in self.loras.experts)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Whose rows preprocess makes: the experts', and those of none when the routing set has
        some."""
        return (*self.experts, *((NONE,) if NONE in self.dataset.experts else ()))

    def task(self, name: str) -> AdapterExpertConfig:
        """Return an expert's entry, or one for none that its source in the routing set makes up."""
        if name != NONE:
            return self.loras.entry(name)
        source = next(each for each in self.dataset.sources if each.expert == NONE)
        data = source.data(self.dataset.splits)
        return AdapterExpertConfig(
            name=NONE, label=self.loras.router.none_label, dataset=data, answer="-"
        )

    def items(self, stage: str) -> tuple[str | None, ...]:
        """Return the jobs of a stage by their items: a task's name, an expert's, None for the only
        job."""
        several = {"preprocess": self.tasks, "train_experts": self.experts, "train_dense": ()}
        return several.get(stage, (None,))

    def needs(self, stage: str, item: str | None) -> list[JobKey]:
        """Return the jobs whose artifacts a job reads; an expert reads its own rows alone."""
        if stage == "train_experts":
            return [("preprocess", item), ("train_shared", None)]
        return [(need, i) for need in NEEDS.get(stage, ()) for i in self.items(need)]

    def content(self, stage: str, item: str | None) -> dict:
        """Return what a job's address holds of this configuration."""
        return {"family": self.family} | getattr(self, f"_{stage}")(item)

    def _preprocess(self, item: str) -> dict:
        entry, image = self.task(item), self.loras.base.image.model_dump(mode="json")
        said = entry.model_dump(mode="json", include={"dataset", "prompt", "answer"})
        return said | {"image": image, "seed": self.seed}

    def _train_shared(self, _item: None) -> dict:
        return {"base": hashed_fields(self.loras.base)}

    def _train_experts(self, item: str) -> dict:
        options = self.loras.options(item)
        neutral = self.dataset.neutral.seen if options.neutral_share else ()
        label = self.loras.entry(item).label
        return self._trained() | {
            "options": hashed_fields(options),
            "label": label,
            "neutral": list(neutral),
        }

    def _routing(self, _item: None) -> dict:
        return {"dataset": hashed_fields(self.dataset), "labels": self.loras.labels}

    def _train_router(self, _item: None) -> dict:
        return self._trained() | {
            "router": hashed_fields(self.loras.router),
            "labels": self.loras.labels,
        }

    def _evaluate(self, _item: None) -> dict:
        router = self.loras.router.model_dump(
            mode="json", include={"top_k", "threshold", "fallback"}
        )
        experts = self._said_of_experts("name", "metric", "max_new_tokens")
        return {
            "name": self.name,
            "evaluate": hashed_fields(self.evaluate),
            "router": router,
            "experts": experts,
        }

    def _deploy(self, _item: None) -> dict:
        return {"name": self.name, "experts": self._said_of_experts("name", "task", "description")}

    def _said_of_experts(self, *keys: str) -> list[dict]:
        return [entry.model_dump(mode="json", include={*keys}) for entry in self.loras.experts]

    def _trained(self) -> dict:
        return {"seed": self.seed, "dtype": self.dtype}

    def section(self, stage: str, item: str | None) -> str:
        """Return the dotted name of a training's settings, for messages."""
        return {"train_shared": "loras.base", "train_router": "loras.router"}.get(
            stage, f"loras.experts.{item}.overrides"
        )

    def paths(self) -> Iterator[tuple[str, str]]:
        """Yield (setting, path) of tasks' data, a base in a folder, and where the bundle goes."""
        if self.loras.base.model and is_folder(self.loras.base.model):
            yield "loras.base.model", self.loras.base.model
        named = [
            (f"loras.experts.{entry.name}.dataset", entry.dataset) for entry in self.loras.experts
        ]
        named += [(f"dataset.sources.{i}", source) for i, source in enumerate(self.dataset.sources)]
        for where, data in named:
            yield from (
                (f"{where}.{key}", getattr(data, key))
                for key in ("path", "image_root")
                if getattr(data, key)
            )
        if self.deploy.upload:
            yield "deploy.upload", self.deploy.upload

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        problems = [
            *_names(self.loras),
            *_labels(self.loras),
            *_durations(self.loras),
            *_answers(self.loras),
            *_sources(self),
            *_wording(self),
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _twice(values: list[str]) -> list[str]:
    return sorted({value for value in values if values.count(value) > 1})


def _names(loras: LorasConfig) -> list[str]:
    if not loras.experts:
        return ["loras.experts: give at least one expert"]
    names = [entry.name for entry in loras.experts]
    out = [
        f"loras.experts: two experts are named {name}; adapters need names of their own"
        for name in _twice(names)
    ]
    reserved = [name for name in names if name in RESERVED]
    return out + [
        f"loras.experts: {name} means something else here; name that expert otherwise"
        for name in reserved
    ]


def _labels(loras: LorasConfig) -> list[str]:
    labels = [entry.label for entry in loras.experts] + [
        label for label in [loras.router.none_label] if label
    ]
    return [
        f"loras.experts: the label {label!r} is given twice; the router could not tell"
        for label in _twice(labels)
    ]


def _durations(loras: LorasConfig) -> list[str]:
    fits = {
        f"loras.experts.{name}.overrides": loras.options(name)
        for name in {e.name: e for e in loras.experts}
    }
    fits["loras.router"] = loras.router
    return [
        f"{key}: give one of steps, epochs, tokens, here or in loras.defaults"
        for key, fit in fits.items()
        if fit.steps is fit.epochs is fit.tokens is None
    ]


def _answers(loras: LorasConfig) -> list[str]:
    names, out, router = [entry.name for entry in loras.experts], [], loras.router
    if router.fallback != "base" and router.fallback not in names:
        out.append(
            f"loras.router.fallback: {router.fallback} is neither base nor an expert ({', '.join(names)})"
        )
    if router.top_k > len(names):
        few = f"but there are {len(names)}" if len(names) > 1 else "but there is 1; set it to 1"
        out.append(f"loras.router.top_k: {router.top_k} experts per answer, {few}")
    return out


def _sources(cfg: LoraVlmConfig) -> list[str]:
    names, sources, out = cfg.experts, [source.expert for source in cfg.dataset.sources], []
    for name in dict.fromkeys(names):
        if name not in sources and name not in RESERVED:
            out.append(
                f"dataset.sources: no requests for {name}; add {{expert: {name}, from: loras}}"
            )
    strange = [name for name in dict.fromkeys(sources) if name not in (*names, NONE)]
    out += [
        f"dataset.sources: no such expert {name}; loras.experts has {', '.join(names)}"
        for name in strange
    ]
    if sources.count(NONE) > 1:
        out.append("dataset.sources: none has two sources; give it one")
    if NONE in sources and cfg.loras.router.none_label is None:
        out.append(
            "loras.router.none_label: the routing set has requests for none, so the router needs a label for it"
        )
    if NONE not in sources and cfg.loras.router.none_label is not None:
        out.append(
            "loras.router.none_label: nothing teaches the router to answer it; add a source of the expert none"
        )
    if isinstance(cfg.dataset.balance, dict) and cfg.dataset.balance.keys() != set(sources):
        out.append(
            f"dataset.balance: name a share for each of {', '.join(dict.fromkeys(sources))}, and no other"
        )
    return out


def _wording(cfg: LoraVlmConfig) -> list[str]:
    out, neutral = [], cfg.dataset.neutral
    strange = [name for name in cfg.dataset.paraphrases if name not in (*cfg.experts, NONE)]
    known = ", ".join(cfg.experts)
    out += [
        f"dataset.paraphrases: no such expert {name}; loras.experts has {known}: remove it"
        for name in strange
    ]
    if cfg.dataset.ambiguous_share and not (neutral.seen and neutral.held):
        out.append(
            "dataset.neutral: ambiguous_share is above 0, so give prompts under seen and under held"
        )
    for name in dict.fromkeys(cfg.experts):
        if cfg.loras.options(name).neutral_share and not neutral.seen:
            out.append(
                f"dataset.neutral.seen: the expert {name} has a neutral_share, so give neutral prompts"
            )
    return out
