"""What every family's configuration has, and what its table of stages says of a run: jobs, inputs,
content of addresses.

Whoever carries out a run asks these methods and never looks into a family's sections.
"""

import zlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ..protocols import Eye, Looked
from .base import Bytes, Name, Section, hidden
from .machines import ModalConfig, TrainerConfig, WorkerConfig
from .paths import path_field
from .serving import ServeConfig
from .stage import Stage, fields

JobKey = tuple[str, str | None]  # stage and item


def source_key(stage: str, item: str | None) -> str:
    """Return what a job is called in RunConfig.identity."""
    return f"{stage}/{item or ''}"


class DeployConfig(Section):
    """What the bundle holds beside the stack, and what becomes of it."""

    # A text: which models a run trains, its family knows
    dense: str | None = Field(
        None,
        min_length=1,
        description="One of dense.baselines that goes into the bundle, to be asked beside the "
        "stack as `dense` (ffn_moe): a whole model more to hold and to serve; none: no such model",
    )
    upload: str | None = path_field(
        "target",
        None,
        min_length=1,
        description="Folder or fsspec URL (s3://bucket/path) for checked copies, one beside "
        "another, of which latest.json names the last; none: no copy",
    )
    keep: int = Field(
        3,
        ge=0,
        description="Former bundles kept at deploy.upload, and named on Modal, beside the last one",
    )


class RuntimeConfig(Section):
    """How a run is carried out; no result depends on it, so no address does."""

    threads: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="Processor threads per job; auto: measured as a job starts, lowered when the "
        "machine gets busy, 0: all cores over the parallel jobs (give a number where two runs must "
        "agree bit for bit)",
    )
    memory_budget: Bytes | None = Field(
        None,
        description="Most memory of a job above the level after imports, such as 350MB or 8GB; "
        "none: no limit, but on a GPU its own memory",
    )
    save_every_s: float = Field(60.0, gt=0, description="Seconds between checkpoints")
    log_every_steps: int = Field(10, ge=1, description="Steps between history rows")
    # off writes history rows to the store alone, which the report is made of in any case.
    wandb: Literal["off", "offline", "online"] = Field(
        "off", description="Also log to Weights & Biases"
    )
    wandb_project: str = Field("moleforge", description="Project name there")
    wandb_group: str | None = Field(
        None, description="Group of runs there; `experiments` gives its trials the name of its file"
    )

    def most_threads(self, share: int) -> int:
        """Return the threads of a job whose share of the cores is that many; auto may settle for
        fewer."""
        if self.threads == "auto" or self.threads == 0:
            return max(1, share)
        return self.threads


class RunConfig(Section):
    """A whole run, of whatever family."""

    stages: ClassVar[dict[str, Stage]] = {}  # the family's table, in the order of a run
    # What flags stand for, by their names: settings, with {} for what was typed
    shorthands: ClassVar[Mapping[str, tuple[str, ...]]] = {"bucket": ("modal.bucket={}",)}

    name: Name = Field("run", description="Name of the run in reports")
    # A text and no choice of names: this layer knows no family, families/load.py refuses others.
    family: str = Field("ffn_moe", description="Kind of experts: ffn_moe or lora_vlm")
    seed: int = Field(0, ge=0, description="Seed of weights and batch order")
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Arithmetic of training: auto is bf16 where this GPU or processor has it, on "
        "Modal where all GPUs that train have it, else fp32; addresses hold which it is",
    )
    deploy: DeployConfig = Field(
        DeployConfig(), description="What else the bundle holds, and where it goes"
    )
    runtime: RuntimeConfig = Field(RuntimeConfig(), description="How it runs")
    serve: ServeConfig = Field(ServeConfig(), description="What the server of the bundle takes on")
    modal: ModalConfig = Field(ModalConfig(), description="Where it runs when that is Modal")
    # No setting: by job the print of what it reads outside the store, put here by whoever looks, as
    # `dtype: auto` is settled, so that every process and container of a run goes by one look.
    identity: dict[str, str] | None = hidden(None)

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts, in stack order."""
        raise NotImplementedError

    @property
    def may_keep_int8(self) -> bool:
        """Whether a training may keep 8-bit moments: asked for somewhere, or chosen in a budget."""
        if self.runtime.memory_budget is not None:
            return True
        # Looked for in the text of all settings: which sections are trained, the family knows.
        return '"moments":"int8"' in self.model_dump_json()

    def seed_of(self, *names: str) -> int:
        """Return a seed of its own for each purpose, whatever random numbers the others drew.

        A checksum rather than `hash`, which differs from one process to the next.
        """
        return zlib.crc32("/".join((str(self.seed), *names)).encode())

    def items(self, stage: str) -> tuple[str | None, ...]:
        """Return the jobs of a stage by their items: (None,) when it is one job, () when this
        family has none."""
        row = self.stages.get(stage)
        if row is None:
            return ()
        if row.when is not None and not getattr(self, row.when):
            return ()
        if row.items is None:
            return (None,)
        found: Any = self
        for name in row.items.split("."):
            found = getattr(found, name)
        return tuple(found)

    def needs(self, stage: str, item: str | None) -> list[JobKey]:
        """Return the jobs whose artifacts a job reads, in order."""
        row = self.stages[stage]
        found: list[JobKey] = []
        for need in row.needs:
            found += [(need, each) for each in self.needed_items(stage, item, need)]
        return found

    def needed_items(self, stage: str, item: str | None, need: str) -> tuple[str | None, ...]:
        """Return the jobs of another stage that a job reads, in order."""
        known = self.items(need)
        if need not in self.stages[stage].needs_own:
            return known
        own = self.own_item(need, item)
        return (own,) if own in known else ()

    def own_item(self, need: str, item: str | None) -> str | None:
        """Return which job of a stage is an item's own, where others are not read."""
        return item

    def content(self, stage: str, item: str | None) -> dict:
        """Return what a job's address holds of this configuration: everything that its result
        depends on."""
        found = self.read_settings(stage, item)
        source = (self.identity or {}).get(source_key(stage, item))
        return found if source is None else found | {"source": source}

    def read_settings(self, stage: str, item: str | None) -> dict:
        """Return the settings that a job reads."""
        row = self.stages[stage]
        found = fields(self, row.reads)
        if row.reads_also is not None:
            found |= getattr(self, row.reads_also)(item)
        return found

    def look(self, stage: str, item: str | None, eye: Eye) -> Looked | None:
        """Return what a job reads outside the store as it is now, and the print of it that its
        address holds; None for one that reads nothing there. Raises nothing that a file could be
        the cause of."""
        raise NotImplementedError

    def reads_through(self, stage: str, item: str | None) -> tuple[JobKey, ...]:
        """Return the jobs of which a job reads anew what they have read outside the store, as their
        artifacts only name it."""
        return ()

    def section(self, stage: str, item: str | None) -> str:
        """Return the dotted name of a training's settings, for messages."""
        return self.stages[stage].setting_name(item)

    def rate_setting(self, stage: str, item: str | None) -> str:
        """Return the dotted name of the setting that is a training's learning rate."""
        return f"{self.section(stage, item)}.lr"

    def machine(self, stage: str) -> TrainerConfig | WorkerConfig:
        """Return the container of a stage on Modal."""
        return getattr(self.modal, self.stages[stage].machine or stage)

    def read_outside(self, stage: str, item: str | None) -> Iterator[tuple[str, str]]:
        """Yield (setting, path) of what a job reads outside the store, not on the Hub."""
        raise NotImplementedError

    def paths(self) -> Iterator[tuple[str, str]]:
        """Yield (setting, path) of the files and folders that this run reads or writes outside its
        store."""
        raise NotImplementedError
