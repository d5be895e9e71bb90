"""The kinds of experts. A family is a module with the functions of the Family protocol.

No stage asks which family it runs.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from ..config import Config
    from ..store import Manifest
    from ..train import Task

MODULES = {"ffn_moe": "ffn_moe"}


class Parts(Protocol):
    """What earlier stages of a run left behind, loaded on asking."""

    cfg: "Config"

    def folder(self, stage: str, item: str | None = None) -> Path:
        """Where an artifact is. Raises MissingArtifact."""

    def manifest(self, stage: str, item: str | None = None) -> "Manifest":
        """An artifact's manifest. Raises MissingArtifact."""

    def tensors(self, stage: str, name: str, item: str | None = None) -> "dict[str, torch.Tensor]":
        """A file's tensors after a check of their hash. Raises MissingArtifact or DamagedArtifact."""


class Family(Protocol):
    """What a kind of experts has to say."""

    def survey(self, cfg: "Config", parts: Path, jobs: int, say: Callable[[str, float | None], None]) -> int:
        """Split preprocess into at most that many jobs and note in parts what they need; return how many there are."""

    def encode(self, cfg: "Config", parts: Path, number: int, say: Callable[[str, float | None], None]) -> None:
        """Do one of those jobs, unless it is done; only this writes to its folder in parts."""

    def prepare(self, cfg: "Config", folder: Path, say: Callable[[str, float | None], None], parts: Path) -> dict:
        """Write tokenizer and data to folder, from parts where there was a survey; return metrics."""

    def shared(self, cfg: "Config", parts: Parts) -> "Task":
        """The trunk's training."""

    def expert(self, cfg: "Config", parts: Parts, item: str) -> "Task":
        """One expert's training."""

    def router(self, cfg: "Config", parts: Parts) -> "Task":
        """The gates' training."""

    def dense(self, cfg: "Config", parts: Parts, item: str) -> "Task":
        """One dense baseline's training."""

    def assemble(self, cfg: "Config", parts: Parts) -> Any:
        """The finished stack; what is measured is what is served."""

    def measure(self, cfg: "Config", parts: Parts, say: Callable[[str, float | None], None]) -> dict:
        """The report's tables."""

    def bundle(self, cfg: "Config", parts: Parts, folder: Path, say: Callable[[str, float | None], None]) -> dict:
        """Write the stack to a folder that stock tools load; return metrics."""

    def reassemble(self, folder: Path) -> Any:
        """The finished stack again, from a bundle alone."""


def family(name: str) -> Family:
    """Return the family's module; importing it brings torch."""
    return import_module(f".{MODULES[name]}", __name__)
