"""The frozen model under every adapter: which one it is, and what it is once opened."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import PreTrainedModel, ProcessorMixin

from ...errors import DamagedArtifact


@dataclass(frozen=True)
class ModelRef:
    """Which model a run stands on."""

    source: str  # built, folder or hub
    model: str  # name or folder as configured; BUILT for a built one
    revision: str | None = None  # the Hub's commit
    files: dict[str, str] = field(
        default_factory=dict
    )  # name -> sha256, unless the Hub's commit says it all

    @property
    def digest(self) -> str:
        """Equal digests, equal weights: a folder may be moved, a Hub model renamed nowhere."""
        known = [self.model, self.revision] if self.source == "hub" else sorted(self.files.items())
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def values(self) -> dict:
        """Return what pin.json holds."""
        return asdict(self) | {"digest": self.digest}

    @classmethod
    def read(cls, folder: Path) -> "ModelRef":
        """Read folder/pin.json. Raises DamagedArtifact."""
        try:
            raw = json.loads((folder / "pin.json").read_text("utf-8"))
            digest, pin = raw.pop("digest"), cls(**raw)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedArtifact(
                f"{folder / 'pin.json'} cannot be read ({error}); run train_shared again"
            ) from None
        if digest != pin.digest:
            raise DamagedArtifact(
                f"{folder / 'pin.json'} does not match its own digest; run train_shared again"
            )
        return pin


@dataclass(frozen=True)
class LoadedBase:
    """A base ready for adapters: frozen, in evaluation mode, on the device."""

    model: PreTrainedModel
    processor: ProcessorMixin
    pin: ModelRef
