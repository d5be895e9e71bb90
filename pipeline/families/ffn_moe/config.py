"""The configuration of an ffn_moe run: what each of its jobs reads."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, model_validator

from ...config.base import DURATIONS, PACKAGE, is_folder
from ...config.fit import SEARCHED
from ...config.run import JobKey
from ...config.stage import Stage, fields
from ...config.text_data import FilesConfig
from ...protocols import Eye, Looked, Seen
from .joint.section import MOE
from .run_sections import FfnMoeSectionsConfig
from .section_rules import problems_of
from .sections import ADAPTER
from .stages import (
    BASELINE_READS,
    FROM_ZERO,
    JOINT_READS,
    MIXTURE_READS,
    MODEL_STAGES,
    STACK,
    STACK_STAGES,
    STAGES,
)

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


class FfnMoeConfig(FfnMoeSectionsConfig):
    """A whole run of FFN experts."""

    stages: ClassVar[dict[str, Stage]] = STAGES
    shorthands: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **FfnMoeSectionsConfig.shorthands,
        **_SHORTHANDS,
    }

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

    def needs(self, stage: str, item: str | None) -> list[JobKey]:
        """Return the jobs whose artifacts a job reads, in order."""
        found = super().needs(stage, item)
        if stage == "train_experts" and item in self.expert.imported:
            # Nothing is trained, so no rate is
            return [job for job in found if job[0] != "lr_experts"]
        if stage == "score":
            return [job for job in found if _is_of_model(str(item), job)]
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
    def searches_dense(self) -> tuple[str, ...]:
        """The searches for continued baselines' rates: one for each choice of weights."""
        lr = self.dense.lr or self.expert.lr
        if lr != SEARCHED:
            return ()
        continued = [name for name in self.dense.baselines if name not in FROM_ZERO]
        kinds = [self.own_item("lr_dense", name) for name in continued]
        return tuple(kind for kind in ("all", "ffn") if kind in kinds)

    def rate_setting(self, stage: str, item: str | None) -> str:
        """Return the setting that is a training's rate: continued baselines may have their own."""
        if stage == "train_dense" and item not in FROM_ZERO and self.dense.lr is not None:
            return "dense.lr"
        return super().rate_setting(stage, item)

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
        if stage == "deploy" and need == "train_dense":
            return (self.deploy.dense,) if self.deploy.dense else ()
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
        elif stage in ("lr_joint", "train_joint"):
            wanted = self.joint_domains
        elif stage in ("score", "evaluate"):
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
        problems = problems_of(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self


# How documents become pieces and splits; which ones there are is told by their print
_DOCUMENTS_READ = tuple(
    f"data.{name}"
    for name in ("seed", "valid_share", "test_share", "max_document_bytes", "megabytes_per_domain")
)


def _is_of_model(item: str, job: JobKey) -> bool:
    """Whether a model is measured on a job's text, or made of its result."""
    if job[0] == "preprocess":
        return True
    if item == STACK:
        return job[0] in STACK_STAGES
    kind, _, name = item.partition("_")
    return job == (MODEL_STAGES[kind], name)


def _values(raw: Any, section: str) -> dict[str, Any]:
    """Return what is given of a section's settings, before they are checked."""
    given = raw.get(section) if isinstance(raw, dict) else None
    if isinstance(given, BaseModel):
        return given.model_dump()
    return given if isinstance(given, dict) else {}


def _is_here(name: str) -> bool:
    """Whether a model's name means something of this machine."""
    return name.startswith(PACKAGE) or Path(name).exists()
