"""A run's adapters outside its store: in PEFT's own format, each in a folder of its own, with the
base they stand on or what makes its requests.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ... import report
from ...errors import ConfigError
from ...protocols import Progress
from ...store.bundle import write
from .. import ExportWish, Parts
from .base import BUILT, PIN, ModelKind, ModelRef, locate
from .bundle import ADAPTERS, adapter_files, base_files
from .config import AdapterRunConfig
from .stack import ROUTER


def check(cfg: AdapterRunConfig, wish: ExportWish) -> None:
    """Raise ConfigError for any format but the adapters that the experts are."""
    if wish.format != "adapters":
        raise ConfigError(
            f"--format {wish.format}: the experts of a {cfg.family} run are adapters on one base, "
            "chosen for a whole request, which no single network holds; use --format adapters"
        )
    if wish.rank:
        raise ConfigError(
            f"--rank: the experts of a {cfg.family} run are adapters already; export them"
        )
    if wish.dense or wish.dtype or wish.expert:
        raise ConfigError(
            "--format adapters has all adapters of the run, as they are stored; leave --expert, "
            "--dense and --dtype out"
        )


def export(
    cfg: AdapterRunConfig,
    parts: Parts,
    wish: ExportWish,
    folder: Path,
    progress: Progress,
    kind: ModelKind,
    notes: Sequence[str] = (),
) -> None:
    """Write the experts' adapters and the router's to an empty folder, with a card, which has the
    notes, and SHA256SUMS.

    Raises ConfigError, MissingArtifact, DamagedArtifact, DataError when the base cannot be found.
    """
    check(cfg, wish)
    of_base = parts.folder("train_shared")
    pin = ModelRef.read(of_base)
    files = [*adapter_files(cfg, parts), *base_files(pin, locate(pin, of_base, kind))]
    about = _about(cfg, parts, pin, kind)
    about["notes"] += notes
    texts: dict[str, str | dict[str, Any]] = {
        PIN: pin.values(),
        "README.md": report.export_card(None, about),
    }
    write(folder, files, texts, progress)


def _about(cfg: AdapterRunConfig, parts: Parts, pin: ModelRef, kind: ModelKind) -> dict[str, Any]:
    """Return what the card says."""
    addresses = {"base": parts.manifest("train_shared").address}
    for name in cfg.experts:
        addresses[f"expert {name}"] = parts.manifest("train_experts", name).address
    addresses["router"] = parts.manifest("train_router").address
    first = f"{ADAPTERS}/{cfg.experts[0]}/adapter"
    # One from a folder, or built, goes along; one of the Hub is fetched by its revision
    name = BUILT if pin.files else pin.model
    revision = None if pin.files else pin.revision
    return {
        "run": cfg.name,
        "what": f"{len(cfg.experts)} LoRA adapters, each for one task, and the router's, on a "
        f"frozen {kind.name}, made with MoleForge.",
        "parts": addresses,
        "library": "peft",
        "tags": ["lora"],
        "example": "requests_example.md",
        "use": report.stock_base(name, revision, first, kind.model_class.__name__),
        "notes": [f"The router's adapter, in {ADAPTERS}/{ROUTER}, answers with an expert's label."],
    }
