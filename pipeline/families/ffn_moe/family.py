"""FFN experts of a language model: the functions that the stages ask for."""

from collections.abc import Mapping
from pathlib import Path

from ...data.text import prepare as text
from ...data.text.distributed import encode, scan
from ...errors import PipelineError
from ...protocols import Progress
from ...train.flops import JobCost
from . import cost as ffn_cost
from .bundle import bundle, reassemble
from .config import FfnMoeConfig
from .stack import assemble
from .train import dense, expert, router, shared

__all__ = [
    "assemble",
    "bundle",
    "cost",
    "dense",
    "encode",
    "expert",
    "measure",
    "prepare",
    "reassemble",
    "route_data",
    "router",
    "scan",
    "shared",
]


def prepare(
    cfg: FfnMoeConfig, folder: Path, progress, jobs_folder: Path, _item: None = None
) -> dict:
    """Write tokenizer, domains and shards to folder; return metrics. Raises DataError."""
    return text.prepare(cfg, folder, progress, jobs_folder)


def route_data(_cfg: FfnMoeConfig, _parts, _folder: Path, _progress) -> dict:
    """Raise PipelineError: these gates learn from the domains' own text, and `routing` has no job."""
    raise PipelineError(
        "ffn_moe makes no routing set: this is a fault of the stages, please report it"
    )


def cost(
    cfg: FfnMoeConfig, stage: str, item: str | None, made: Mapping[tuple, dict], bf16: bool
) -> JobCost | None:
    """Return what a training job will spend; tokens are None for a duration in epochs until
    preprocess is done.

    None for a pretrained trunk that is not on this machine yet.
    """
    prepared = made.get(("preprocess", None))
    return ffn_cost.cost(cfg, stage, item, prepared and prepared["tokens"]["train"], bf16)


def measure(cfg: FfnMoeConfig, parts, progress: Progress) -> dict:
    """Return the report's tables; see ffn_tables."""
    from .evaluate import tables

    return tables(cfg, parts, progress)
