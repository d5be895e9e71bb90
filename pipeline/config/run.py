"""What every family's configuration has, and what it tells the stages: jobs, inputs, content of addresses.

Stages ask a run and never look into a family's sections, so a family adds or leaves out stages here alone.
"""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from .base import Name, Section
from .machines import Modal
from .sections import Deploy, Runtime

Job = tuple[str, str | None]  # stage and item


class Run(Section):
    """A whole run, of whatever family."""

    name: Name = Field("run", description="Name of the run in reports")
    family: str = Field("ffn_moe", description="Kind of experts: ffn_moe or lora_vlm")
    seed: int = Field(0, ge=0, description="Seed of weights and batch order")
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Arithmetic of training: auto is bf16 autocast where the processor has it, else fp32"
    )
    deploy: Deploy = Field(Deploy(), description="Where the bundle goes")
    runtime: Runtime = Field(Runtime(), description="How it runs")
    modal: Modal = Field(Modal(), description="Where it runs when that is Modal")

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts, in stack order."""
        raise NotImplementedError

    @property
    def may_keep_int8(self) -> bool:
        """Whether a training may keep 8-bit moments: asked for somewhere, or chosen under a budget."""
        return self.runtime.memory_budget is not None or '"moments":"int8"' in self.model_dump_json()

    def items(self, stage: str) -> tuple[str | None, ...]:
        """Return the jobs of a stage by their items: (None,) when it is one job, () when this family has none."""
        raise NotImplementedError

    def needs(self, stage: str, item: str | None) -> list[Job]:
        """Return the jobs whose artifacts a job reads, in order."""
        raise NotImplementedError

    def content(self, stage: str, item: str | None) -> dict:
        """Return what a job's address holds of this configuration: everything that its result depends on."""
        raise NotImplementedError

    def section(self, stage: str, item: str | None) -> str:
        """Return the dotted name of a training's settings, for messages."""
        raise NotImplementedError

    def paths(self) -> Iterator[tuple[str, str]]:
        """Yield (setting, path) of the files and folders that this run reads or writes outside its store."""
        raise NotImplementedError
