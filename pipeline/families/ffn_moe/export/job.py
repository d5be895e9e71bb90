"""One export: of which run, what, and where it goes; whether the Hub has what it stands on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....config.base import is_folder
from ....data.text.tokenizer import Tokenizer
from ....protocols import Progress
from ... import ExportWish
from ..config import FfnMoeConfig


@dataclass(frozen=True)
class Job:
    """What is to be written, and where."""

    cfg: FfnMoeConfig
    wish: ExportWish
    settings: Mapping[str, Any]  # Hugging Face config fields of the trunk
    tokenizer: Tokenizer
    start: tuple[int, ...]  # tokens that lead a text
    folder: Path
    progress: Progress


def on_the_hub(cfg: FfnMoeConfig) -> tuple[str, str] | None:
    """Return name and revision of the trunk on the Hub, None where it is not there as it is."""
    name = cfg.trunk.init
    revision = cfg.trunk.revision
    if name is None or revision is None or cfg.trunk.steps != 0:
        return None
    # A package's, a file's or a folder's, which others do not have
    here = ":" in name or name.endswith(".gguf") or is_folder(name)
    return None if here or Path(name).expanduser().exists() else (name, revision)
