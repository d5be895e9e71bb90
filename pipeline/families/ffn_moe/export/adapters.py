"""Low-rank experts as adapters that PEFT puts on the trunk, each in a folder of its own; full ones
compressed to such.
"""

import json
from typing import Any

from torch import Tensor

from .... import report
from ....model.low_rank import PROJECTIONS
from ....store.artifacts import write_text
from ....store.reading import read_object
from ....store.streamed import Streamed, write_tensors
from ... import Parts
from ...adapters.peft_io import SETTINGS, TENSORS, lora_settings
from ..config import FfnMoeConfig
from ..fingerprint import trunk_tensors as stored_tensors
from ..parts import EXPERT, expert_layers
from ..sections import ADAPTER
from ..stock import DENSE_CLASSES, dense_settings
from .checkpoint import write_checkpoint
from .compressing import Compressing
from .job import Job, on_the_hub
from .tensors import PREFIX, streamed

ADAPTERS = "adapters"  # a folder of the export
BASE = "base"  # and the trunk's, where the Hub does not have it


def write_adapters(job: Job, parts: Parts) -> tuple[dict[str, Any], dict[str, str]]:
    """Write a run's experts, and the trunk that they stand on where the Hub does not have it;
    return what the card says of them, and sums of files by name.

    Raises MissingArtifact, DamagedArtifact, DiskFull.
    """
    cfg = job.cfg
    on_hub = on_the_hub(cfg)
    base, revision = on_hub or (BASE, None)
    addresses = {"trunk": parts.manifest("train_shared").address}
    names = (job.wish.expert,) if job.wish.expert else cfg.experts
    compressed = Compressing(job, parts) if job.wish.rank else None
    sums = {}
    notes = []
    ranks = set()
    for name in names:
        addresses[f"expert {name}"] = parts.manifest("train_experts", name).address
        if compressed:
            settings = _settings(job, base, revision, rank=compressed.rank, scale=1.0)
            stored, kept = compressed.tensors(name)
            notes.append(kept)
        else:
            settings, stored = _stored(job, parts, name, base, revision)
        ranks.add(settings["r"])
        folder = job.folder / ADAPTERS / name
        folder.mkdir(parents=True)
        write_text(folder / "adapter_config.json", json.dumps(settings, indent=1) + "\n")
        tensors = {key: Streamed.of(tensor) for key, tensor in stored.items()}
        file = f"{ADAPTERS}/{name}/adapter_model.safetensors"
        sums[file] = write_tensors(job.folder / file, tensors, job.progress)
        # Before the next one is compressed
        del stored, tensors
    if on_hub is None:
        sums |= _write_base(job, parts)
    kind = DENSE_CLASSES[job.settings["model_type"]]
    first = f"{ADAPTERS}/{names[0]}"
    # One that was trained elsewhere may have another than those that are trained here
    shown = " and ".join(map(str, sorted(ranks)))
    rank = f"rank {shown}" if len(ranks) == 1 else f"the ranks {shown}"
    count = "1 expert" if len(names) == 1 else f"{len(names)} experts"
    about = {
        "what": f"{count} as PEFT adapters of {rank} on {_where(cfg)} of a frozen `{kind}`, "
        "made with MoleForge.",
        "parts": addresses,
        "row": "of each expert",
        "library": "peft",
        "tags": ["lora"],
        "example": "adapters_example.md",
        "use": report.stock_base(base, revision, first, kind),
        "notes": [
            "An adapter answers for its own domain. The router, which picks between them, is in "
            "the run's bundle and not here.",
            *notes,
        ],
    }
    return about, sums


def _where(cfg: FfnMoeConfig) -> str:
    if cfg.expert.form != ADAPTER:
        return "the feed-forward networks"
    everywhere = cfg.expert.layers == "all" and not cfg.expert.imported
    return "all linear layers" if everywhere else "linear layers"


def _stored(
    job: Job, parts: Parts, name: str, base: str, revision: str | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return an expert's adapter_config.json on a base, and its tensors by PEFT's names."""
    if job.cfg.expert.form == ADAPTER:
        settings = read_object(parts.folder("train_experts", name) / SETTINGS)
        settings |= {"base_model_name_or_path": base, "revision": revision}
        return settings, parts.tensors("train_experts", TENSORS, name)
    stored = parts.tensors("train_experts", EXPERT, name)
    tensors = {f"{PREFIX}{key}": tensor for key, tensor in stored.items()}
    expert = job.cfg.expert
    return _settings(job, base, revision, expert.delta_rank, expert.delta_scale), tensors


def _settings(job: Job, base: str, revision: str | None, rank: int, scale: float) -> dict[str, Any]:
    """Return the adapter_config.json of deltas on feed-forward networks."""
    count = job.settings["num_hidden_layers"]
    layers = list(expert_layers(job.cfg, count))
    return lora_settings(
        rank=rank,
        alpha=scale * rank,
        modules=list(PROJECTIONS),
        layers=layers if len(layers) < count else None,
        base=base,
        revision=revision,
    )


def _write_base(job: Job, parts: Parts) -> dict[str, str]:
    """Write the trunk with its own networks as a checkpoint; return sums of files by name."""
    folder = job.folder / BASE
    folder.mkdir()
    # Opened to compute with, its norms would be in fp32, and then all of it
    tensors = streamed(stored_tensors(parts))
    sums, _ = write_checkpoint(job, folder, dense_settings(job.settings), tensors)
    return {f"{BASE}/{name}": digest for name, digest in sums.items()}
