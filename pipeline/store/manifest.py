"""What is written down of an artifact: what it is, what it was made from, what is in it.

Invariant: a manifest is sealed. A bit that changed in it is damage of its own, and never makes
another artifact, which it names, look wrong.
"""

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .reading import as_kind, damaged, read_bytes, sealed, unsealed

NAME = "manifest.json"
INDENT = 1


@dataclass(frozen=True)
class Manifest:
    """What an artifact is, where it came from, and the sha256 and size of every file in it."""

    address: str
    stage: str
    item: str | None
    inputs: dict[str, str]  # address -> digest of what was read
    files: dict[str, dict]  # relative path -> {"sha256": hex, "bytes": n}
    metrics: dict = field(default_factory=dict)
    made: dict = field(default_factory=dict)  # time, seconds, packages, hardware

    @property
    def digest(self) -> str:
        """Hash of the files' contents: equal digests, equal artifacts (run.json and made.json only
        tell of the run that made it)."""
        lines = ""
        for name in sorted(self.files):
            if name not in ("run.json", "made.json"):
                lines += f"{name} {self.files[name]['sha256']}\n"
        return hashlib.sha256(lines.encode()).hexdigest()

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(entry["bytes"] for entry in self.files.values())

    def text(self) -> str:
        """Return what manifest.json holds."""
        return sealed(asdict(self), INDENT)


def read(folder: Path) -> Manifest:
    """Return the manifest of the artifact in a folder that has its address for a name.

    Raises DamagedArtifact or UnreadableFile.
    """
    path = folder / NAME
    data = read_bytes(path)
    try:
        manifest = _typed(unsealed(data, INDENT))
    except ValueError as error:
        raise damaged(path, f"is torn or its bytes have changed ({error})") from None
    if manifest.address != folder.name:
        raise damaged(path, f"is that of {manifest.address}, whose files belong elsewhere")
    return manifest


def _typed(values: dict[str, Any]) -> Manifest:
    """Return the manifest of values as JSON has them. Raises ValueError."""
    manifest = as_kind(Manifest, values)
    for name, entry in manifest.files.items():
        kinds = {key: type(value) for key, value in entry.items()}
        if kinds != {"sha256": str, "bytes": int}:
            raise ValueError(f"files.{name} is not a sum and a size")
    return manifest
