"""The configuration of an ffn_moe run: its sections together, and whether they fit."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, model_validator

from ...config.base import DURATIONS, PACKAGE, is_folder
from ...config.fit import SEARCHED, FitConfig, LrSearchConfig
from ...config.run import JobKey
from ...config.stage import Stage, fields
from ...config.text_data import FilesConfig, TextRunConfig
from ...protocols import Eye, Looked, Seen
from .joint.section import MOE, JointConfig
from .sections import (
    ADAPTER,
    ANCHOR,
    BASE,
    DenseConfig,
    EvaluateConfig,
    ExpertConfig,
    RouterConfig,
    TrunkConfig,
)
from .stages import BASELINE_READS, FROM_ZERO, JOINT_READS, MIXTURE_READS, STAGES

_SHORTHANDS = {
    "input": ("data.source=files", "data.files=[{paths: {}}]"),
    # A model brings its tokenizer, and what else is said of another one is not said of it
    "checkpoint": (
        *("trunk.init={}", "trunk.revision=null"),
        *("tokenizer.pretrained={}", "tokenizer.revision=null"),
    ),
    "smoke": (
        *("evaluate.tokens_per_domain=512", "evaluate.rivals=few", "evaluate.bootstrap=100"),
        *("evaluate.samples=0", "evaluate.continuation_tokens=0"),
    ),
}


class FfnMoeConfig(TextRunConfig):
    """A whole run of FFN experts."""

    stages: ClassVar[dict[str, Stage]] = STAGES
    shorthands: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **TextRunConfig.shorthands,
        **_SHORTHANDS,
    }

    family: Literal["ffn_moe"] = Field("ffn_moe", description="Kind of experts")
    trunk: TrunkConfig = Field(TrunkConfig(steps=1000), description="The shared trunk")
    expert: ExpertConfig = Field(ExpertConfig(steps=200), description="Each expert")
    router: RouterConfig = Field(RouterConfig(steps=50), description="The gates")
    dense: DenseConfig = Field(DenseConfig(), description="Baselines")
    joint: JointConfig = Field(
        JointConfig(epochs=20), description="Models that are trained end to end"
    )
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
        """Names of the experts, in stack order: domains that get one, then imported ones of no text
        here."""
        if self.expert.domains:
            return self.expert.domains
        names = self.partition.names
        beside = [name for name in self.expert.imported if name not in names]
        return (*names, *beside)

    @property
    def experts_with_text(self) -> tuple[str, ...]:
        """Those of the experts whose domain has text here to train and measure on."""
        return tuple(name for name in self.experts if name in self.partition.names)

    def has_text_for(self, expert: str) -> bool:
        """Whether there is text here to fit the gates of an imported expert on."""
        return expert in self.partition.names or expert in self.expert.imported_text

    def needs(self, stage: str, item: str | None) -> list[JobKey]:
        """Return the jobs whose artifacts a job reads, in order."""
        found = super().needs(stage, item)
        if stage == "train_experts" and item in self.expert.imported:
            # Nothing is trained, so no rate is
            return [job for job in found if job[0] != "lr_experts"]
        return found

    def read_settings(self, stage: str, item: str | None) -> dict:
        """Return the settings that a job reads."""
        if stage == "train_experts" and item in self.expert.imported:
            return self._read_by_imported(item)
        settings = super().read_settings(stage, item)
        # Named or all that there are: the same domains make the same trunk
        trunk = settings.get("trunk")
        if trunk is not None:
            settings["trunk"] = trunk | {"domains": self.trunk_domains}
        return settings

    def _read_by_imported(self, item: str) -> dict:
        """Return what an imported expert depends on here: what it is held against, and what its
        statistics are made of where it brings none. How experts are trained is no part of it."""
        held_to: tuple[str, ...] = ("form", "statistics_tokens")
        if self.expert.form != ADAPTER:
            # An adapter brings its own, whatever those have that are trained here
            held_to = (*held_to, "rank", "alpha", "layers", "statistics_path")
        found = {"imported": True} | fields(self, ("family", "dtype", "seed"))
        found |= fields(self, tuple(f"expert.{key}" for key in held_to))
        if item in self.expert.imported_text:
            read_by = ("text_field", "min_document_bytes", "max_document_bytes", "paragraph_bytes")
            found |= fields(self, tuple(f"data.{key}" for key in read_by))
        return found

    @property
    def trunk_domains(self) -> tuple[str, ...]:
        """Domains that the trunk sees: those of general text too."""
        return self.trunk.domains or self.partition.names

    @property
    def dense_domains(self) -> tuple[str, ...]:
        """Domains that dense baselines are trained on."""
        return self.dense.domains or self.experts_with_text

    @property
    def joint_domains(self) -> tuple[str, ...]:
        """Domains that joint models are trained on."""
        both = (*self.trunk_domains, *self.dense_domains)
        return self.joint.domains or tuple(dict.fromkeys(both))

    @property
    def tokenizer_domains(self) -> tuple[str, ...]:
        """The domains whose text a tokenizer is trained on, where documents have labels."""
        return self.trunk_domains

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

    def needed_items(self, stage: str, item: str | None, need: str) -> tuple[str | None, ...]:
        """Return the jobs of another stage that a job reads, in order: of domains those alone whose
        text it needs, so that others come and go without it."""
        if need != "preprocess":
            return super().needed_items(stage, item, need)
        return self.domains_read(stage, item)

    def domains_read(self, stage: str, item: str | None) -> tuple[str, ...]:
        """Return the domains whose text a job reads, each once and wherever it stands among all."""
        wanted: tuple[str, ...] = ()
        if stage in ("lr_shared", "train_shared", "lr_experts", "lr_dense"):
            wanted = self.trunk_domains
        elif stage == "train_experts":
            wanted = self._expert_reads(str(item))
        elif stage in ("lr_router", "train_router"):
            # Where no adapter is taught a domain, the base answers
            general = self.trunk_domains if self.expert.form == ADAPTER else ()
            wanted = (*self.experts_with_text, *general)
        elif stage == "train_dense":
            wanted = (*(self.trunk_domains if item in FROM_ZERO else ()), *self.dense_domains)
        elif stage == "train_joint":
            wanted = self.joint_domains
        elif stage == "evaluate":
            wanted = self.partition.names
        return tuple(name for name in dict.fromkeys(wanted) if name in self.partition.names)

    def _expert_reads(self, item: str) -> tuple[str, ...]:
        if item in self.expert.imported:
            # For statistics, where its package brings none and no other text is named
            return () if item in self.expert.imported_text else (item,)
        return (item, *(self.trunk_domains if self.partition.overlap else ()))

    def tokenizer_reads(self, _item: None) -> dict:
        """Return what the tokenizer depends on beside the documents that it is made of; where they
        have no labels also what the domains depend on."""
        pretrained = self.tokenizer.pretrained is not None
        named = ("pretrained", "revision") if pretrained else ("vocab_size", "sample_megabytes")
        found = fields(self, tuple(f"tokenizer.{name}" for name in named))
        if not pretrained or self.partition.by != "labels":
            found |= fields(self, _DOCUMENTS_READ)
        if self.partition.by != "labels":
            names = ("by", "count", "difficulty", "sample_documents")
            found |= fields(self, tuple(f"partition.{name}" for name in names))
        return found

    def shards_read(self, _item: str) -> dict:
        """Return what the shards of a domain depend on beside its documents and the tokenizer."""
        return fields(self, _DOCUMENTS_READ)

    def dense_reads(self, item: str) -> dict:
        """Return what a dense baseline's budget, size and training depend on."""
        return fields(self, BASELINE_READS[item]) | {"domains": self.dense_domains}

    def joint_reads(self, item: str) -> dict:
        """Return what a joint model's size and training depend on."""
        read = (*JOINT_READS, *(MIXTURE_READS if item == MOE else ()))
        return fields(self, read) | {"domains": self.joint_domains}

    def read_outside(self, stage: str, item: str | None) -> Iterator[tuple[str, str]]:
        """Yield (setting, path) of what a job reads outside the store, not on the Hub."""
        named = {}
        if stage in ("tokenizer", "preprocess"):
            for entry in self._entries_read(stage, item):
                for path in entry.paths:
                    yield "data.files", path
        if stage == "tokenizer":
            named["tokenizer.pretrained"] = self.tokenizer.pretrained
        if stage == "train_experts" and item in self.expert.imported:
            yield "expert.imported", self.expert.imported[item]
            for path in self.expert.imported_text.get(item, ()):
                yield "expert.imported_text", path
        # A pinned trunk is read by whatever stands on it
        before = ("tokenizer", "preprocess")
        if stage == "train_shared" or (self.trunk.is_pinned and stage not in before):
            named["trunk.init"] = self.trunk.init
        for name, value in named.items():
            # What is neither there nor written as a path is a name on the Hub
            if value and (_is_here(value) or is_folder(value)):
                yield name, value

    def _entries_read(self, stage: str, item: str | None) -> Iterator[FilesConfig]:
        """Yield the entries of data.files that may have documents for a job of text."""
        domains: set[str | None] = {None, item}
        if stage == "tokenizer":
            domains |= set(self.tokenizer_domains)
        for entry in self.data.files if self.data.source == "files" else ():
            if self.partition.by != "labels" or entry.domain in domains:
                yield entry

    def look(self, stage: str, item: str | None, eye: Eye) -> Looked | None:
        """Return what a job reads outside the store as it is now; None where it reads nothing."""
        # What reads files is imported by who looks, and not with the settings
        if stage in ("tokenizer", "preprocess"):
            from ...data.text import looked

            if stage == "tokenizer":
                return looked.look_at_tokenizer(self, eye)
            return looked.look_at_domain(self, str(item), eye)
        if stage in ("lr_shared", "train_shared") and self.trunk.init:
            from ...store import model_sources

            return Looked.of(model_sources.seen("trunk.init", self.trunk.init, eye))
        if stage == "train_experts" and item in self.expert.imported:
            return Looked.of(self._seen_imported(item, eye))
        return None

    def _seen_imported(self, item: str, eye: Eye) -> Iterator[Seen]:
        """Yield what tells of a finished expert, and of the text beside it."""
        from ...data.sources import experts, files

        yield from experts.seen("expert.imported", self.expert.imported[item], eye)
        paths = self.expert.imported_text.get(item, ())
        yield from files.seen_paths("expert.imported_text", paths, eye)

    def paths(self) -> Iterator[tuple[str, str]]:
        """Yield (setting, path) of documents, pretrained parts and where the bundle goes."""
        found = dict.fromkeys(self.read_outside("tokenizer", None))
        for domain in self.partition.names:
            found |= dict.fromkeys(self.read_outside("preprocess", domain))
        yield from found
        yield from self.read_outside("train_shared", None)
        for name in self.expert.imported:
            yield from self.read_outside("train_experts", name)
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
            *_imported(self),
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


# How documents become pieces and splits; which ones there are is told by their print
_DOCUMENTS_READ = tuple(
    f"data.{name}"
    for name in ("seed", "valid_share", "test_share", "max_document_bytes", "megabytes_per_domain")
)


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
    given = {
        "trunk": (cfg.trunk.domains, known),
        "expert": (cfg.expert.domains, (*known, *cfg.expert.imported)),
        "dense": (cfg.dense.domains, known),
        "joint": (cfg.joint.domains, known),
    }
    out = []
    for key, (domains, allowed) in given.items():
        wanted = domains or ()
        unknown = [domain for domain in wanted if domain not in allowed]
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
    beside = cfg.expert.imported.keys() - set(known)
    taught = len([name for name in cfg.experts if name not in beside])
    if taught > len(known):
        out.append(f"expert.domains: {taught} experts, but the partition has {len(known)} domains")
    return out


def _expert_layers(cfg: FfnMoeConfig) -> list[str]:
    if cfg.trunk.init:
        return []  # its own config.json says how many layers it has
    out = []
    for key, section in (("expert", cfg.expert), ("joint", cfg.joint)):
        try:
            section.in_layers(cfg.trunk.layers)
        except ValueError as error:
            out.append(f"{key}.layers: {error}")
    return out


def _durations(cfg: FfnMoeConfig) -> list[str]:
    sections: dict[str, FitConfig] = {
        "trunk": cfg.trunk,
        "expert": cfg.expert,
        "router": cfg.router,
    }
    if cfg.joint.models:
        sections["joint"] = cfg.joint
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


def _imported(cfg: FfnMoeConfig) -> list[str]:
    own = cfg.expert
    out = []
    strange = [name for name in own.imported_text if name not in own.imported]
    if strange:
        out.append(
            f"expert.imported_text: {', '.join(strange)} is not imported; name its package under "
            "expert.imported"
        )
    if not own.imported:
        return out
    left_out = [name for name in own.imported if name not in cfg.experts]
    if left_out:
        out.append(
            f"expert.imported: {', '.join(left_out)} is not among expert.domains; name it there"
        )
    if own.coordinate:
        out.append(
            "expert.imported: a package has no gate of its own; set expert.coordinate to false"
        )
    without = [name for name in own.imported if name not in cfg.partition.names]
    if without and cfg.router.steps != 0:
        out.append(
            f"router.steps: gates would be trained away from {', '.join(without)}, which has no "
            "text here; set router.steps to 0, or name public text of it in data and "
            "partition.domains"
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
    if cfg.joint.models:
        out.append(
            "joint.models: they train from zero, with sizes that a pretrained trunk does not give; "
            "set trunk.init to null, or joint.models to []"
        )
    return out
