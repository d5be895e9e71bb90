"""One export: of which run, what, and where it goes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
