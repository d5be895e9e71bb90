"""A lora_vlm stack as a folder: adapters as PEFT keeps them, the base or its pin, and the same
stack opened from it.

Invariant: what is opened from a bundle is what was measured: the same adapters on the same pinned
base, with the same calibration, policy and limits. A base from the Hub is not copied; a built one
or a folder is.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from ... import report
from ...config.task_data import ImageLimitsConfig
from ...errors import DamagedArtifact
from ...protocols import Progress
from ...store.artifacts import sha256
from ...store.bundle import ABOUT, FORMAT, BundleFile, about, write
from ..lora_vlm.base import BUILT, open_base
from ..lora_vlm.base import _located as located
from ..lora_vlm.config import LoraVlmConfig
from .base import ModelRef
from .inference import GenerationLimits
from .peft_io import ABOUT as ADAPTER
from .peft_io import SETTINGS, TENSORS
from .router import CALIBRATION, Calibration
from .stack import ROUTER, AdapterStack, ExpertInfo, Policy, limits_of, policy_of, put_together

ADAPTERS, PROCESSOR = "adapters", "processor"  # folders of the bundle
PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)


def bundle(cfg: LoraVlmConfig, parts, folder: Path, progress: Progress) -> dict:
    """Write the stack to a folder with its report and model card; return metrics.

    Raises MissingArtifact, DamagedArtifact, or DataError when the base cannot be found.
    """
    base = parts.folder("train_shared")
    pin = ModelRef.read(base)
    inside = (
        replace(pin, source="built", model=BUILT) if pin.files else pin
    )  # its files go along, under that name
    described = _described(cfg, parts, inside)
    tables = report.read((parts.folder("evaluate") / "report.json").read_text("utf-8"))
    texts = {
        ABOUT: described,
        "pin.json": inside.values(),
        "README.md": report.card(tables, described),
    }
    pieces = [*_adapters(cfg, parts), *_base(pin, located(pin, base)), *_report(parts)]
    return write(folder, pieces, texts, progress) | {"experts": len(cfg.experts)}


def reassemble(folder: Path) -> AdapterStack:
    """Build the finished stack, as `assemble` does, from a bundle alone.

    Raises MissingArtifact when the folder is no bundle, DamagedArtifact, NewerStore, MismatchError,
    or DataError when a base from the Hub cannot be had.
    """
    described = about(folder)
    try:
        kept = described["base"]
        settings = _Base(kept["dtype"], kept["attn"], ImageLimitsConfig(**kept["image"]))
        members = [
            ExpertInfo(**{key: entry[key] for key in ExpertInfo.__dataclass_fields__})
            for entry in described["experts"]
        ]
        policy, limits = Policy(**described["policy"]), GenerationLimits(**described["limits"])
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedArtifact(
            f"{folder} does not hold the stack that its {ABOUT} describes: {error}"
        ) from None
    opened = open_base(folder, settings)
    places = {name: folder / ADAPTERS / name for name in (*(m.name for m in members), ROUTER)}
    return put_together(opened, places, members, Calibration.read(places[ROUTER]), policy, limits)


class _Base:
    """What opening a base asks of its settings."""

    def __init__(self, dtype: str, attn: str, image: ImageLimitsConfig):
        self.dtype, self.attn, self.image = dtype, attn, image


def _described(cfg: LoraVlmConfig, parts, pin: ModelRef) -> dict:
    """Return experts.json."""
    base = cfg.loras.base
    members = [ExpertInfo.of(cfg.loras.entry(name)) for name in cfg.experts]
    return {
        "format": FORMAT,
        "family": cfg.family,
        "run": cfg.name,
        "serves": "chat",
        "architecture": "Qwen3VLForConditionalGeneration",
        "base": {
            "model": pin.model,
            "revision": pin.revision,
            "digest": pin.digest,
            "dtype": base.dtype,
            "attn": base.attn,
            "image": base.image.model_dump(mode="json"),
            "address": parts.manifest("train_shared").address,
        },
        "experts": [
            asdict(m)
            | {
                "address": parts.manifest("train_experts", m.name).address,
                "folder": f"{ADAPTERS}/{m.name}",
            }
            for m in members
        ],
        "router": {
            "address": parts.manifest("train_router").address,
            "folder": f"{ADAPTERS}/{ROUTER}",
        },
        "policy": asdict(policy_of(cfg)),
        "limits": asdict(limits_of(cfg)),
        "routing": {"address": parts.manifest("routing").address},
        "report": {"address": parts.manifest("evaluate").address},
    }


def _adapters(cfg: LoraVlmConfig, parts) -> Iterator[BundleFile]:
    for name in (*cfg.experts, ROUTER):
        stage, item = ("train_router", None) if name == ROUTER else ("train_experts", name)
        folder, files = parts.folder(stage, item), parts.manifest(stage, item).files
        for file in (TENSORS, SETTINGS, ADAPTER, *([CALIBRATION] if name == ROUTER else [])):
            yield BundleFile(f"{ADAPTERS}/{name}/{file}", folder / file, files[file]["sha256"])


def _base(pin: ModelRef, where: Path) -> Iterator[BundleFile]:
    """Yield the base's own files where they go along, else those that make its requests, to look
    at."""
    if pin.files:
        yield from (
            BundleFile(f"{BUILT}/{name}", where / name, digest)
            for name, digest in pin.files.items()
        )
        return
    for name in PROCESSOR_FILES:
        if (where / name).is_file():
            yield BundleFile(f"{PROCESSOR}/{name}", where / name, sha256(where / name))


def _report(parts) -> Iterator[BundleFile]:
    folder, files = parts.folder("evaluate"), parts.manifest("evaluate").files
    for name in ("report.json", "report.html"):
        yield BundleFile(name, folder / name, files[name]["sha256"])
