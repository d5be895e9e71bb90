"""The configuration of an ffn_moe run: its sections together, and what each stage reads of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from .base import Section, addressed
from .run import Job, Run
from .sections import Data, Dense, Evaluate, Expert, Partition, Router, Tokenizer, Trunk

ROUTER_TOKENS = tuple(f"router.{key}" for key in ("steps", "epochs", "tokens", "batch_sequences"))
BASELINE_READS = {  # what each dense baseline's budget and size depend on
    "path": (),
    "total": ROUTER_TOKENS,
    "ffn": ROUTER_TOKENS,
    "scratch": (*ROUTER_TOKENS, "trunk"),
    "wide": (*ROUTER_TOKENS, "trunk", "router.top_k"),
}
_TRAINED = ("family", "seed", "dtype")
_TRAINING = ("train_shared", "train_experts", "train_router", "train_dense")
READS = {  # sections, or dotted fields
    "preprocess": ("family", "data", "partition", "tokenizer"),
    "train_shared": (*_TRAINED, "trunk"),
    "train_experts": (*_TRAINED, "expert", "partition.overlap"),
    "routing": (),
    "train_router": (*_TRAINED, "router", "trunk.anchor"),
    "train_dense": (*_TRAINED, "dense", "expert", "expert.domains"),
    "evaluate": ("name", "evaluate"),
    "deploy": ("family", "name"),
}
NEEDS = {
    "preprocess": (),
    "train_shared": ("preprocess",),
    "train_experts": ("preprocess", "train_shared"),
    "routing": (),
    "train_router": ("preprocess", "train_shared", "train_experts"),
    "train_dense": ("preprocess", "train_shared"),
    "evaluate": ("preprocess", *_TRAINING),
    "deploy": ("preprocess", "train_shared", "train_experts", "train_router", "evaluate"),
}


class Config(Run):
    """A whole run of FFN experts."""

    family: Literal["ffn_moe"] = Field("ffn_moe", description="Kind of experts")
    data: Data = Field(Data(), description="Where documents come from")
    partition: Partition = Field(Partition(), description="How documents become domains")
    tokenizer: Tokenizer = Field(Tokenizer(), description="How text becomes tokens")
    trunk: Trunk = Field(Trunk(steps=1000), description="The shared trunk")
    expert: Expert = Field(Expert(steps=200), description="Each expert")
    router: Router = Field(Router(steps=50), description="The gates")
    dense: Dense = Field(Dense(), description="Baselines")
    evaluate: Evaluate = Field(Evaluate(), description="The report")

    @property
    def experts(self) -> tuple[str, ...]:
        """Domains that get an expert, in stack order."""
        return self.expert.domains or self.partition.names

    def items(self, stage: str) -> tuple[str | None, ...]:
        """Return the jobs of a stage by their items: an expert's domain, a baseline's name, None for the only job."""
        several = {"train_experts": self.experts, "train_dense": self.dense.baselines, "routing": ()}
        return several.get(stage, (None,))

    def needs(self, stage: str, item: str | None) -> list[Job]:
        """Return the jobs whose artifacts a job reads: every job of the stages it needs."""
        return [(need, i) for need in NEEDS[stage] for i in self.items(need)]

    def content(self, stage: str, item: str | None) -> dict:
        """Return what a job's address holds of this configuration, by section or dotted field."""
        reads = READS[stage] + (BASELINE_READS[item] if stage == "train_dense" else ())
        return {key: _read(self, key) for key in reads}

    def section(self, stage: str, item: str | None) -> str:
        """Return the section of a training's settings, for messages."""
        dense = "trunk" if "trunk" in BASELINE_READS.get(item, ()) else "expert"
        return {"train_shared": "trunk", "train_router": "router", "train_dense": dense}.get(stage, "expert")

    def paths(self) -> Iterator[tuple[str, str]]:
        """Yield (setting, path) of documents, pretrained parts and where the bundle goes."""
        if self.data.source == "files":
            yield from (("data.files", path) for entry in self.data.files for path in entry.paths)
        if self.deploy.upload:
            yield "deploy.upload", self.deploy.upload
        for name, value in (("tokenizer.pretrained", self.tokenizer.pretrained), ("trunk.init", self.trunk.init)):
            if value and (Path(value).exists() or value.startswith(("/", "."))):  # else a name on the Hub
                yield name, value

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        problems = [*_unknown_domains(self), *_durations(self), *_pretrained(self)]
        if self.router.init == "rows" and not self.expert.coordinate:
            problems.append("router.init: rows are learned by coordinated experts; set expert.coordinate: true")
        slots = len(self.experts) + (self.trunk.anchor == "keep")
        if self.router.top_k > slots:
            problems.append(f"router.top_k: {self.router.top_k} experts per token, but the stack has {slots}")
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _read(cfg: Config, key: str):
    """Return what a stage's address holds of a section (without its later fields) or of a dotted field."""
    section, _, name = key.partition(".")
    value = getattr(cfg, section)
    if name:
        value = getattr(value, name)
        return value.model_dump(mode="json") if isinstance(value, Section) else value
    return addressed(value) if isinstance(value, Section) else value


def _unknown_domains(cfg: Config) -> list[str]:
    known, out = cfg.partition.names, []
    for key in ("trunk", "expert"):
        wanted = getattr(cfg, key).domains or ()
        strange = [d for d in wanted if d not in known]
        if strange:
            out.append(f"{key}.domains: no such domain {', '.join(strange)}; partition has {', '.join(known)}")
        if len(set(wanted)) < len(wanted):
            out.append(f"{key}.domains: a domain is named twice")
    if len(cfg.experts) > len(known):
        out.append(f"expert.domains: {len(cfg.experts)} experts, but the partition has {len(known)} domains")
    return out


def _durations(cfg: Config) -> list[str]:
    sections = {key: getattr(cfg, key) for key in ("trunk", "expert", "router")}
    return [
        f"{key}: give one of {key}.steps, {key}.epochs, {key}.tokens"
        for key, fit in sections.items()
        if fit.steps is fit.epochs is fit.tokens is None
    ]


def _pretrained(cfg: Config) -> list[str]:
    if cfg.trunk.init and not cfg.tokenizer.pretrained:
        return ["tokenizer.pretrained: a pretrained trunk (trunk.init) needs its own tokenizer; name it here"]
    fresh = sorted({"wide", "scratch"} & set(cfg.dense.baselines)) if cfg.trunk.init else []
    return [f"dense.baselines: {name} trains from zero, which a pretrained trunk rules out" for name in fresh]
