"""The kinds of experts. A family is a module with the functions of the Family protocol.

No stage asks which family it runs.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..protocols import Progress

if TYPE_CHECKING:
    import torch

    from ..config.run import RunConfig
    from ..report import Report
    from ..store.artifacts import Manifest
    from ..train.flops import JobCost
    from ..train.loop import NoTraining, Task

NAMES = ("ffn_moe", "lora_vlm")
PRELOAD = {  # what every job of a family imports, so that local ones are forked with it
    "ffn_moe": ["pipeline.families.ffn_moe.family", "transformers.models.qwen3.modeling_qwen3"],
    "lora_vlm": [
        "pipeline.families.lora_vlm.family",
        "transformers.models.qwen3_vl.modeling_qwen3_vl",
    ],
}


class Parts(Protocol):
    """What earlier stages of a run left behind, loaded on asking."""

    cfg: "RunConfig"

    def folder(self, stage: str, item: str | None = None) -> Path:
        """Where an artifact is. Raises MissingArtifact."""

    def manifest(self, stage: str, item: str | None = None) -> "Manifest":
        """An artifact's manifest. Raises MissingArtifact."""

    def tensors(self, stage: str, name: str, item: str | None = None) -> "dict[str, torch.Tensor]":
        """A file's tensors after a check of their hash. Raises MissingArtifact or DamagedArtifact."""


class Family(Protocol):
    """What a kind of experts has to say."""

    def scan(
        self,
        cfg: "RunConfig",
        jobs_folder: Path,
        jobs: int,
        progress: Progress,
    ) -> int:
        """Split preprocess into at most that many jobs and note in jobs_folder what they need;
        return how many there are."""

    def encode(
        self,
        cfg: "RunConfig",
        jobs_folder: Path,
        number: int,
        progress: Progress,
    ) -> None:
        """Do one of those jobs, unless it is done; nothing else writes to its folder in jobs_folder."""

    def prepare(
        self,
        cfg: "RunConfig",
        folder: Path,
        progress: Progress,
        jobs_folder: Path,
        item: str | None,
    ) -> dict:
        """Write the data of an item of preprocess to folder, from jobs_folder where there was a
        scan; return metrics."""

    def shared(self, cfg: "RunConfig", parts: Parts) -> "Task | NoTraining":
        """The training of what every expert stands on, or how it is written when it needs none."""

    def expert(self, cfg: "RunConfig", parts: Parts, item: str) -> "Task":
        """One expert's training."""

    def route_data(
        self,
        cfg: "RunConfig",
        parts: Parts,
        folder: Path,
        progress: Progress,
    ) -> dict:
        """Write what the router learns from to folder; return metrics. Only where `routing` has a
        job."""

    def router(self, cfg: "RunConfig", parts: Parts) -> "Task":
        """The router's training."""

    def dense(self, cfg: "RunConfig", parts: Parts, item: str) -> "Task":
        """One dense baseline's training."""

    def cost(
        self,
        cfg: "RunConfig",
        stage: str,
        item: str | None,
        made: Mapping[tuple[str, str | None], dict],
        bf16: bool,
    ) -> "JobCost | None":
        """What a training will spend, as far as the metrics of finished jobs tell; None for what
        needs no training."""

    def assemble(self, cfg: "RunConfig", parts: Parts) -> Any:
        """The finished stack; what is measured is what is served."""

    def measure(self, cfg: "RunConfig", parts: Parts, progress: Progress) -> "Report":
        """The report."""

    def bundle(
        self,
        cfg: "RunConfig",
        parts: Parts,
        folder: Path,
        progress: Progress,
    ) -> dict:
        """Write the stack to a folder that stock tools load; return metrics."""

    def reassemble(self, folder: Path) -> Any:
        """The finished stack again, from a bundle alone."""


def family(name: str) -> Family:
    """Return the family's module; importing it brings torch."""
    return import_module(f".{name}.family", __name__)
