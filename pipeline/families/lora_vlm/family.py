"""LoRA experts on a vision-language model: what each stage does, as the rows of the table name it.

Invariant: the base is never written to and never trained; every training starts from the same
pinned base and leaves one adapter, which knows the base that it belongs to.
"""

from pathlib import Path

from ...data.sources import synthetic
from ...protocols import Progress
from ...report import RequestReport
from ...store.model_files import FindModel
from ...train.loop import NoTraining, Task
from ...train.lr_search import Search
from .. import ExportWish, PackWish, Parts
from ..adapters import base as adapters_base
from ..adapters import stack
from ..adapters.base import LoadedBase
from ..adapters.imported import imported, look_at_adapter
from ..adapters.rates import known, search_for
from ..adapters.rows import look_at_routing, look_at_task, prepare_task
from ..adapters.rows import make_routing_set as route_data
from ..adapters.sections import AdapterRouterConfig
from ..adapters.stack import AdapterStack
from ..adapters.train import expert_task, router_task
from .base import QWEN3_VL, open_base, settings_of, write
from .config import LoraVlmConfig
from .cost import cost, writing_cost
from .vision import Images

__all__ = [
    "assemble",
    "bundle",
    "check_export",
    "cost",
    "expert",
    "export",
    "look_at_adapter",
    "look_at_routing",
    "look_at_task",
    "lr_expert",
    "lr_router",
    "measure",
    "preflight",
    "prepare",
    "reassemble",
    "route_data",
    "router",
    "shared",
    "writing_cost",
]


def preflight(cfg: LoraVlmConfig, find: FindModel) -> list[str]:
    """Return what a person should know of the base before a run. Raises ConfigError for one that no
    adapter could be trained on."""
    return adapters_base.preflight(cfg, find, QWEN3_VL)


def prepare(cfg: LoraVlmConfig, _parts: Parts, folder: Path, progress: Progress, item: str) -> dict:
    """Write one task's rows and pictures to folder; return metrics. Raises DataError."""
    return prepare_task(cfg, item, folder, progress, cfg.loras.base.image)


def shared(cfg: LoraVlmConfig, _parts: Parts) -> NoTraining:
    """Return how the base is pinned; one of given sizes is built. It needs no training."""
    base = cfg.loras.base
    instruction = AdapterRouterConfig.model_fields["instruction"].default
    own = base.build.text if base.build else ()
    # what comes once makes no entry of the tokenizer, so the router's own words come three times
    corpus = [*synthetic.corpus(), *own]
    corpus += [instruction] * 3
    return NoTraining(lambda folder: write(base, corpus, folder))


def lr_expert(cfg: LoraVlmConfig, parts: Parts, item: str) -> Search:
    """Return the search for the rate of one expert's adapter."""
    return search_for(cfg, item, lambda tried: expert_task(tried, parts, item, _base(cfg, parts)))


def expert(cfg: LoraVlmConfig, parts: Parts, item: str) -> Task | NoTraining:
    """Return one expert's training: its adapter on its own task's rows, some asked in neutral
    words; or how it is imported."""
    if item in cfg.imported:
        return imported(cfg, parts, item, lambda: _base(cfg, parts))
    return expert_task(known(cfg, parts, "train_experts", item), parts, item, _base(cfg, parts))


def lr_router(cfg: LoraVlmConfig, parts: Parts) -> Search:
    """Return the search for the rate of the router's adapter."""
    return search_for(cfg, None, lambda tried: router_task(tried, parts, _base(cfg, parts)))


def router(cfg: LoraVlmConfig, parts: Parts) -> Task:
    """Return the router's training: its adapter answers each request of the routing set with a
    label."""
    return router_task(known(cfg, parts, "train_router"), parts, _base(cfg, parts))


def assemble(cfg: LoraVlmConfig, parts: Parts) -> AdapterStack:
    """Build the finished stack from its parts.

    Raises MissingArtifact, DamagedArtifact, or MismatchError for parts made on another base.
    """
    return stack.assemble(cfg, parts, _base(cfg, parts))


def measure(cfg: LoraVlmConfig, parts: Parts, progress: Progress) -> RequestReport:
    """Return the report."""
    # here and below: what only the last stages need is no part of a training's memory
    from ..adapters.evaluate import evaluate

    return evaluate(cfg, parts, progress, assemble(cfg, parts))


def bundle(cfg: LoraVlmConfig, parts: Parts, folder: Path, progress: Progress) -> dict:
    """Write adapters, router and pin to folder; return metrics."""
    from ..adapters import bundle as bundles

    # what open_base reads of the settings
    opening = cfg.loras.base.model_dump(mode="json", include={"dtype", "attn", "image"})
    return bundles.bundle(
        cfg,
        parts,
        folder,
        progress,
        kind=QWEN3_VL,
        opening=opening,
        media_name=Images.name,
    )


def check_export(cfg: LoraVlmConfig, wish: ExportWish) -> None:
    """Raise ConfigError for any format but the adapters that the experts are."""
    from ..adapters.export import check

    check(cfg, wish)


def export(
    cfg: LoraVlmConfig, parts: Parts, wish: ExportWish, folder: Path, progress: Progress
) -> None:
    """Write the experts' adapters and the router's to an empty folder."""
    from ..adapters.export import export

    image = cfg.loras.base.image
    note = (
        f"Pictures of an area below {image.min_pixels:,} or above {image.max_pixels:,} px were "
        "fitted to it before the processor had them, sides in proportion (Pillow's LANCZOS). "
        "Do so too: the processor alone makes other tokens of them, so that answers may differ."
    )
    export(cfg, parts, wish, folder, progress, QWEN3_VL, [note])


def write_kit(cfg: LoraVlmConfig, parts: Parts, domain: str, folder: Path) -> None:
    """Write what somebody needs to train one adapter elsewhere; see adapters/kit.py."""
    from ..adapters.kit import write_kit

    write_kit(cfg, parts, domain, folder, QWEN3_VL)


def check_kit(_cfg: LoraVlmConfig, parts: Parts, kit: Path) -> None:
    """Raise MismatchError where the base is not a kit's; see adapters/kit.py."""
    from ..adapters.kit import check_kit
    from ..kit_files import read_kit

    check_kit(parts, read_kit(kit))


def check_pack(cfg: LoraVlmConfig, wish: PackWish) -> None:
    """Raise ConfigError for noise, as there are no statistics; see adapters/packing.py."""
    from ..adapters.packing import check_pack

    check_pack(cfg, wish)


def pack(
    cfg: LoraVlmConfig, parts: Parts, item: str, wish: PackWish, folder: Path, _kit: Path
) -> None:
    """Write a kit's trained adapter to an empty folder; see adapters/packing.py."""
    from ..adapters.packing import pack

    pack(cfg, parts, item, wish, folder)


def reassemble(folder: Path) -> AdapterStack:
    """Build the finished stack from a bundle alone.

    Raises MissingArtifact when the folder is no bundle, DamagedArtifact, NewerStore, MismatchError,
    or DataError when a base from the Hub cannot be had.
    """
    from ..adapters import bundle as bundles

    try:
        settings = settings_of(bundles.base_in(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise bundles.damaged(folder, error) from None
    return bundles.reassemble(folder, open_base(folder, settings))


def _base(cfg: LoraVlmConfig, parts: Parts) -> LoadedBase:
    return open_base(parts.folder("train_shared"), cfg.loras.base)
