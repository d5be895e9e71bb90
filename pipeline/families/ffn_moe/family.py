"""FFN experts of a language model: the functions that its stages and its server ask for."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...data.sources.text import look
from ...data.text import prepare as text
from ...data.text.figures import training_tokens
from ...data.text.pretrained_tokenizer import look as check_tokenizer
from ...data.text.survey import Survey, survey
from ...errors import DataError
from ...protocols import Progress
from ...report import LanguageReport
from ...store.bundle import about
from ...store.model_sources import on_this_machine
from ...train.flops import JobCost
from ...train.loop import NoTraining, Task
from .. import ExportWish, PackWish, Parts
from . import cost as ffn_cost
from .bundle import bundle as bundle_mixture
from .bundle import reassemble as reassemble_mixture
from .config import FfnMoeConfig
from .imported import imported
from .imported import look_at_package as look_at_networks
from .joint.cost import joint_cost
from .joint.train import joint
from .lr_search import lr_dense, lr_experts, lr_joint, lr_router, lr_shared
from .preflight import preflight
from .sections import ADAPTER
from .stack import assemble as assemble_mixture
from .train import dense, shared
from .train import expert as ffn_expert
from .train import router as gates

if TYPE_CHECKING:
    from .adapter.stack import RequestStack
    from .stack import FfnStack

__all__ = [
    "assemble",
    "bundle",
    "check_export",
    "check_kit",
    "check_pack",
    "cost",
    "dense",
    "expert",
    "export",
    "joint",
    "look_at_documents",
    "look_at_package",
    "lr_dense",
    "lr_experts",
    "lr_joint",
    "lr_router",
    "lr_shared",
    "measure",
    "pack",
    "preflight",
    "prepare",
    "reassemble",
    "router",
    "shared",
    "tokenizer",
    "write_kit",
    "writing_cost",
]


def tokenizer(cfg: FfnMoeConfig, parts: Parts, folder: Path, progress: Progress) -> dict:
    """Write the tokenizer to folder, and the domains where documents have no labels; return
    metrics. Raises DataError, and ConfigError for a trunk that could not be trained on them."""
    for note in preflight(cfg, on_this_machine):
        progress(note, None)
    return text.make_tokenizer(cfg, _surveyed(cfg, parts), folder, progress)


def prepare(cfg: FfnMoeConfig, parts: Parts, folder: Path, progress: Progress, item: str) -> dict:
    """Write the shards of a domain to folder; return metrics. Raises DataError."""
    found = _surveyed(cfg, parts)
    return text.prepare(cfg, found, item, parts.folder("tokenizer"), folder, progress)


def _surveyed(cfg: FfnMoeConfig, parts: Parts) -> Survey:
    return survey(cfg, parts.eye())


def look_at_documents(cfg: FfnMoeConfig, _item: str | None = None) -> None:
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
    prepared = [made[job] for job in made if job[0] == "preprocess"]
    tokens = training_tokens(prepared) if prepared else None
    if stage in ("lr_joint", "train_joint"):
        return joint_cost(cfg, stage, str(item), tokens, bf16)
    return ffn_cost.cost(cfg, stage, item, tokens, bf16)


def writing_cost(
    cfg: FfnMoeConfig, made: Mapping[tuple[str, str | None], dict], wish: ExportWish | None
) -> JobCost | None:
    """Return what writing the run's bundle takes, or an export; see export/cost.py."""
    from .export.cost import writing_cost as of_files

    return of_files(cfg, made, wish)


# What follows is of one form of experts or the other. An adapter's modules are imported where a run
# has them: PEFT takes a second, and no other run needs it


def expert(cfg: FfnMoeConfig, parts: Parts, item: str) -> Task | NoTraining:
    """Return one expert's training, or how it is imported; see train, imported, adapter.train."""
    if cfg.expert.form != ADAPTER:
        make = imported if item in cfg.expert.imported else ffn_expert
        return make(cfg, parts, item)
    if item in cfg.expert.imported:
        from .adapter.imported import imported as of_another

        return of_another(cfg, parts, item)
    from .adapter.train import expert as adapter

    return adapter(cfg, parts, item)


def look_at_package(cfg: FfnMoeConfig, item: str) -> None:
    """Raise DataError for an imported expert that is not there or is none; see imported and
    adapter.imported."""
    if cfg.expert.form != ADAPTER:
        look_at_networks(cfg, item)
    elif item in cfg.expert.imported:
        from .adapter.imported import look_at_adapter

        look_at_adapter(cfg, item)


def router(cfg: FfnMoeConfig, parts: Parts) -> Task | NoTraining:
    """Return the gates' training, or how the router of adapters is made without any."""
    if cfg.expert.form != ADAPTER:
        return gates(cfg, parts)
    from .adapter.router import router as of_texts

    return of_texts(cfg, parts)


def measure(cfg: FfnMoeConfig, parts: Parts, progress: Progress) -> LanguageReport:
    """Return the report; see evaluate and adapter.evaluate."""
    # Here, as no training needs what the report brings along
    if cfg.expert.form == ADAPTER:
        from .adapter.evaluate import tables as of_adapters

        return of_adapters(cfg, parts, progress)
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


def write_kit(cfg: FfnMoeConfig, parts: Parts, domain: str, folder: Path) -> None:
    """Write what somebody needs to train one expert elsewhere; see kit."""
    from .kit import write_kit

    write_kit(cfg, parts, domain, folder)


def check_kit(cfg: FfnMoeConfig, parts: Parts, kit: Path) -> None:
    """Raise MismatchError where trunk, tokenizer or kind of expert are not a kit's; see kit."""
    from .kit import check_kit

    check_kit(cfg, parts, kit)


def check_pack(cfg: FfnMoeConfig, _wish: PackWish) -> None:
    """Raise ConfigError for experts that no package holds; see packing."""
    from .packing import check_packable

    check_packable(cfg)


def pack(
    cfg: FfnMoeConfig, parts: Parts, item: str, wish: PackWish, folder: Path, kit: Path
) -> None:
    """Write a kit's trained expert to an empty folder; see packing and adapter.packing."""
    if cfg.expert.form == ADAPTER:
        from .adapter.packing import pack as of_adapter
        from .kit import public_statistics

        of_adapter(cfg, parts, item, wish, folder, public_statistics(kit))
        return
    from .kit import centre_of
    from .packing import pack

    pack(cfg, parts, item, wish, folder, centre_of(kit))


def bundle(cfg: FfnMoeConfig, parts: Parts, folder: Path, progress: Progress) -> dict:
    """Write the stack to a folder; return metrics. See bundle and adapter.bundle."""
    if cfg.expert.form == ADAPTER:
        from .adapter.bundle import bundle as of_adapters

        return of_adapters(cfg, parts, folder, progress)
    return bundle_mixture(cfg, parts, folder, progress)


def assemble(cfg: FfnMoeConfig, parts: Parts) -> "FfnStack | RequestStack":
    """Return the finished stack; see stack and adapter.stack."""
    if cfg.expert.form != ADAPTER:
        return assemble_mixture(cfg, parts)
    from .adapter.stack import assemble as of_adapters

    return of_adapters(cfg, parts)


def reassemble(folder: Path) -> "FfnStack | RequestStack":
    """Return the finished stack again, from a bundle alone."""
    if about(folder).get("form") == ADAPTER:
        from .adapter.bundle import reassemble as of_adapters

        return of_adapters(folder)
    return reassemble_mixture(folder)
