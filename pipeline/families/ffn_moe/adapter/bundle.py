"""A stack of adapters as a folder: the base as a stock checkpoint, each adapter as PEFT keeps it,
the router; and the same stack opened again from it.

Invariant: what is opened from a bundle is what was measured: the files of the store as they are, on
the base that the adapters were made on.

S layers that are read, C classes, D model width.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from ....errors import DamagedArtifact, PipelineError
from ....hardware import device
from ....model.language_model import LanguageModel
from ....model.pretrained import fitted, mapped
from ....model.trunk import open_tensors
from ....protocols import Progress
from ....store.artifacts import load_tensors, sha256
from ....store.bundle import ABOUT, EARLIER_FORMAT, BundleFile, about, listed, start_ids, write
from ....store.foreign import ForeignFile, check_kind, check_model_files, read_object
from ... import Parts
from ...adapters import peft_io
from ...adapters.base import PIN, ModelRef
from ...report_files import report_files
from ..config import FfnMoeConfig
from ..parts import stored_settings
from ..pretrained import is_pinned, pinned_weights
from ..sections import ADAPTER
from ..stock import DENSE_CLASSES, dense_settings, generation_settings, run_tokenizer, text_start
from .model import base_ref, opened
from .router import SETTINGS, WEIGHTS, TextRouter
from .stack import RequestStack

# folders of the bundle
ADAPTERS = "adapters"
ROUTER = "router"
ADAPTER_FILES = (peft_io.TENSORS, peft_io.SETTINGS, peft_io.ABOUT)
# All that a bundle holds. A library reads some other names too, wherever it finds them.
FILES = re.compile(
    r"experts\.json|made\.json|README\.md|report\.(json|html)|config\.json|pin\.json"
    r"|generation_config\.json|tokenizer(_config)?\.json|model\.safetensors\.index\.json"
    r"|model-base-\d+\.safetensors|router/router\.(json|safetensors)"
    r"|adapters/[^/]+/adapter\.json"
    r"|adapters/[^/]+/adapter/(adapter_config\.json|adapter_model\.safetensors)"
)


def bundle(cfg: FfnMoeConfig, parts: Parts, folder: Path, progress: Progress) -> dict:
    """Write the stack to a folder with tokenizer, report and model card; return metrics.

    Raises MissingArtifact, DamagedArtifact, and what stands in the way of a pinned model.
    """
    settings = stored_settings(parts, "train_shared")
    tokenizer = run_tokenizer(parts)
    start = text_start(cfg, tokenizer)
    stock = dense_settings(settings)
    described = _described(cfg, parts, stock, start)
    texts: dict[str, str | dict] = {
        "config.json": stock,
        "generation_config.json": generation_settings(settings, tokenizer.end_id, start),
        **tokenizer.stock_files(start),
        ABOUT: described,
        PIN: base_ref(cfg, parts).values(),
        **report_files(cfg, parts, described),
    }
    metrics = write(folder, _files(cfg, parts), texts, progress)
    return metrics | {"experts": len(cfg.experts)}


def _described(
    cfg: FfnMoeConfig, parts: Parts, stock: Mapping[str, Any], start: Sequence[int]
) -> dict[str, Any]:
    """Return experts.json."""
    labels = cfg.partition.shown_labels
    experts = []
    for name in cfg.experts:
        entry = {
            "name": name,
            "domain": name,
            "address": parts.manifest("train_experts", name).address,
            "folder": f"{ADAPTERS}/{name}",
        }
        if name in labels:
            entry["label"] = labels[name]
        experts.append(entry)
    return {
        "format": EARLIER_FORMAT,
        "family": cfg.family,
        "form": ADAPTER,
        "run": cfg.name,
        "architecture": stock["architectures"][0],
        "top_k": 1,
        "context_tokens": stock["max_position_embeddings"],
        "prompt_tokens": cfg.router.prompt_tokens,
        "start_ids": list(start),
        "experts": experts,
        "trunk": {"address": parts.manifest("train_shared").address},
        "router": {"address": parts.manifest("train_router").address, "folder": ROUTER},
        "tokenizer": {"address": parts.manifest("tokenizer").address},
        "report": {"address": parts.manifest("evaluate").address},
    }


def _files(cfg: FfnMoeConfig, parts: Parts) -> list[BundleFile]:
    out = []
    for number, (source, digest) in enumerate(_base_files(parts)):
        out.append(BundleFile(f"model-base-{number:03}.safetensors", source, digest))
    for name in cfg.experts:
        folder = parts.folder("train_experts", name)
        known = parts.manifest("train_experts", name).files
        for file in ADAPTER_FILES:
            target = f"{ADAPTERS}/{name}/{file}"
            out.append(BundleFile(target, folder / file, known[file]["sha256"]))
    folder = parts.folder("train_router")
    known = parts.manifest("train_router").files
    for file in (WEIGHTS, SETTINGS):
        out.append(BundleFile(f"{ROUTER}/{file}", folder / file, known[file]["sha256"]))
    return out


def _base_files(parts: Parts) -> list[tuple[Path, str]]:
    """Return the files of the base's tensors with their sums, under the names that they have in a
    stock checkpoint."""
    if is_pinned(parts):
        # Their sums are those of the pin, which has just been compared with them
        return [(path, sha256(path)) for path in pinned_weights(parts)]
    folder = parts.folder("train_shared")
    known = parts.manifest("train_shared").files
    names = ("trunk.safetensors", "dummy.safetensors")
    return [(folder / name, known[name]["sha256"]) for name in names]


def reassemble(folder: Path) -> RequestStack:
    """Build the finished stack, as `assemble` does, from a bundle alone.

    Raises MissingArtifact when the folder is no bundle, DamagedArtifact, NewerStore, MismatchError
    for an adapter of another base.
    """
    described = about(folder)
    try:
        settings = _checked(folder, described)
        base = _base(folder, settings)
        names = tuple(str(entry["name"]) for entry in described["experts"])
        folders = {name: folder / ADAPTERS / name for name in names}
        adapted = opened(base, folders, ModelRef.read(folder))
        weight_SCD = load_tensors(folder / ROUTER / WEIGHTS)["weight"].to(device())
        router = TextRouter.read(folder / ROUTER / SETTINGS, weight_SCD, names)
    except PipelineError:
        raise
    except (OSError, LookupError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        # torch names the tensors that do not fit on lines of their own
        reason = " ".join(str(error).split())
        raise DamagedArtifact(
            f"{folder} does not hold the stack that its {ABOUT} describes: {reason}"
        ) from None
    return RequestStack(adapted, names, router)


def _base(folder: Path, settings: Mapping[str, Any]) -> LanguageModel:
    stored = mapped(sorted(folder.glob("model-base-*.safetensors")))
    trunk, dummy = open_tensors(settings, *fitted(settings, stored), torch.float32)
    base = LanguageModel.of(trunk, dummy)
    ends = read_object(folder, "generation_config.json")
    base.network.generation_config = GenerationConfig.from_dict(ends)
    return base.to(device()).requires_grad_(False).eval()


def _checked(folder: Path, described: Mapping[str, Any]) -> dict[str, Any]:
    """Return the base's settings of a bundle whose files are all such that nothing in them runs.

    Raises ForeignFile, DamagedArtifact, KeyError, TypeError, OSError.
    """
    names = listed(folder)
    for name in sorted(names):
        if not FILES.fullmatch(name):
            raise ForeignFile(f"{name} is no file of such a bundle")
    check_model_files(folder, [name for name in names if "/" not in name])
    settings = read_object(folder, "config.json")
    check_kind(settings, "config.json", DENSE_CLASSES)
    for key in ("top_k", "context_tokens", "prompt_tokens"):
        if type(described[key]) is not int:
            raise ForeignFile(f"{key} is {described[key]!r}")
    for token in start_ids(described):
        if type(token) is not int:
            raise ForeignFile(f"a start of texts is {token!r}")
    for entry in described["experts"]:
        if f"{ADAPTERS}/{entry['name']}/{peft_io.ABOUT}" not in names:
            raise ForeignFile(f"the expert {entry['name']!r} has no folder in it")
    return settings
