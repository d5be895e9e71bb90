"""FFN experts of a language model: the functions that its stages and its server ask for."""

from collections.abc import Mapping
from pathlib import Path

from ...data.sources.text import look
from ...data.text import prepare as text
from ...data.text.distributed import encode, scan
from ...data.text.tokenizer import look as check_tokenizer
from ...errors import DataError
from ...protocols import Progress
from ...report import LanguageReport
from ...store.model_sources import on_this_machine
from ...train.flops import JobCost
from .. import ExportWish, Parts
from . import cost as ffn_cost
from .bundle import bundle, reassemble
from .config import FfnMoeConfig
from .preflight import preflight
from .stack import assemble
from .train import dense, expert, router, shared

__all__ = [
    "assemble",
    "bundle",
    "check_export",
    "cost",
    "dense",
    "encode",
    "expert",
    "export",
    "look_at_documents",
    "measure",
    "preflight",
    "prepare",
    "reassemble",
    "router",
    "scan",
    "shared",
]


def prepare(cfg: FfnMoeConfig, parts: Parts, folder: Path, progress: Progress) -> dict:
    """Write tokenizer, domains and shards to folder; return metrics. Raises DataError, and
    ConfigError for a trunk that could not be trained on them."""
    for note in preflight(cfg, on_this_machine):
        progress(note, None)
    return text.prepare(cfg, folder, progress, parts.jobs_folder("preprocess"))


def look_at_documents(cfg: FfnMoeConfig) -> None:
    """Raise DataError when documents or the tokenizer are not where the settings say; nothing is
    read."""
    problems = []
    for check in (look, check_tokenizer):
        try:
            check(cfg)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("; ".join(problems))


def cost(
    cfg: FfnMoeConfig,
    stage: str,
    item: str | None,
    made: Mapping[tuple[str, str | None], dict],
    bf16: bool,
) -> JobCost | None:
    """Return what a training job will spend; tokens are None for a duration in epochs until
    preprocess is done.

    None for a pretrained trunk that is not on this machine yet.
    """
    # Nothing is opened for an estimate: what preprocess has counted stands in its metrics
    prepared = made.get(("preprocess", None))
    tokens = prepared["tokens"]["train"] if prepared else None
    return ffn_cost.cost(cfg, stage, item, tokens, bf16)


def measure(cfg: FfnMoeConfig, parts: Parts, progress: Progress) -> LanguageReport:
    """Return the report; see evaluate."""
    # Here, as no training needs what the report brings along
    from .evaluate import tables

    return tables(cfg, parts, progress)


def check_export(cfg: FfnMoeConfig, wish: ExportWish) -> None:
    """Raise ConfigError for what no run of these settings can be exported as."""
    from .export.formats import check

    check(cfg, wish)


def export(
    cfg: FfnMoeConfig, parts: Parts, wish: ExportWish, folder: Path, progress: Progress
) -> None:
    """Write what is wanted to an empty folder; see export/formats.py."""
    from .export.formats import export

    export(cfg, parts, wish, folder, progress)
