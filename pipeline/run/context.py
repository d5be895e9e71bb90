"""One job of a run, and what earlier stages left in the store, as that job reads it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ..config.run import RunConfig
from ..config.stage import Stage
from ..families import stage_function
from ..protocols import Eye, Progress, quiet
from ..store.artifacts import Manifest, Reader, Store
from ..store.history import History, read
from ..store.lineage import Lineage
from .identity import eye_of
from .stages import Addresses, label

if TYPE_CHECKING:
    import torch


@dataclass
class StoredParts:
    """A run's parts, loaded on asking and checked to belong together.

    For one job: it remembers what it has checked, so it is made after the store was refreshed and
    thrown away with the job. It keeps no tensors alive.
    """

    cfg: RunConfig
    store: Store
    progress: Progress = quiet
    addresses: Addresses = field(init=False)
    reader: Reader = field(init=False)
    lineage: Lineage = field(init=False)

    def __post_init__(self) -> None:
        self.addresses = Addresses(self.cfg)
        self.cfg = self.addresses.cfg
        self.reader = Reader(self.store, self.progress)
        self.lineage = Lineage(self.store, self.reader.recorded)

    def folder(self, stage: str, item: str | None = None) -> Path:
        """Where an artifact is, its files checked. Raises MissingArtifact, DamagedArtifact,
        StaleArtifact."""
        return self.reader.folder(self.manifest(stage, item).address)

    def manifest(self, stage: str, item: str | None = None) -> Manifest:
        """An artifact's manifest, its own inputs checked. Raises MissingArtifact, DamagedArtifact,
        StaleArtifact."""
        manifest = self.reader.manifest(self.addresses.of(stage, item))
        # An input that was made again has the same address; only its bytes tell
        self.lineage.check(manifest.address)
        return manifest

    def tensors(self, stage: str, name: str, item: str | None = None) -> "dict[str, torch.Tensor]":
        """A file's tensors. Raises MissingArtifact, DamagedArtifact, StaleArtifact."""
        return self.reader.tensors(self.manifest(stage, item).address, name)

    def file_sum(self, path: Path, expected: str = "") -> str:
        """The sha256 of a file outside the store, read once on a machine. Raises OSError,
        UnreadableFile."""
        return self.reader.file_sum(path, expected)

    def eye(self) -> Eye:
        """What looks at files outside the store, as this job's command did."""
        return eye_of(self.store, self.progress)

    def history(self, stage: str, item: str | None = None) -> History:
        """The history of a training job that is done. Raises UnreadableFile and what `manifest`
        does."""
        manifest = self.manifest(stage, item)
        return read(self.store.history(manifest.address), manifest.metrics["steps"])


@dataclass(frozen=True)
class JobContext:
    """One job, about to be done: what it is, what it reads and who hears of it."""

    stage: str
    item: str | None
    parts: StoredParts
    address: str
    progress: Progress
    console: Console | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)  # address -> digest, when it begins

    @property
    def cfg(self) -> RunConfig:
        """The run's configuration."""
        return self.parts.cfg

    @property
    def store(self) -> Store:
        """Where inputs are and the result goes."""
        return self.parts.store

    @property
    def row(self) -> Stage:
        """The stage's row of the family's table."""
        return self.cfg.stages[self.stage]

    @property
    def folder(self) -> Path:
        """The artifact's folder."""
        return self.store.folder(self.address)

    @property
    def name(self) -> str:
        """The stage and the item, for people."""
        return label(self.stage, self.item)

    def function(self) -> Callable[..., Any]:
        """Return the stage's function, imported; it is given the item last where there are
        several jobs."""
        # Only now: addresses, plans and --help must not wait for torch
        function = stage_function(self.cfg.family, self.row.function)
        if self.item is None:
            return function

        def of_item(*args: object) -> Any:
            return function(*args, self.item)

        return of_item
