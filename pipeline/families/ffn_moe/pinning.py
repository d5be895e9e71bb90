"""What stands for the trunk's training where a pretrained trunk is taken as it is: a pin, the
trunk's settings and the dummy's statistics.

B sequences, T tokens, N = B*T.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...data.text.mixture import DomainMixture
from ...hardware import device, uses_bf16
from ...model.experts import Expert
from ...model.trunk import Trunk, open_tensors
from ...store.artifacts import save_tensors, write_text
from .. import Parts
from .config import FfnMoeConfig
from .parts import feature_statistics, token_losses
from .pretrained import check_vocabulary, pin_pretrained


def write_pin(
    cfg: FfnMoeConfig,
    parts: Parts,
    rows: DomainMixture,
    held_out: Sequence[torch.Tensor],
    folder: Path,
) -> dict[str, Any]:
    """Write to folder which model the trunk is, its settings and the statistics of rows; return
    metrics, the loss on held_out, batches of ids_BT, among them.

    Raises DataError, MismatchError, UnreadableFile and DiskFull.
    """
    started_s = time.monotonic()
    pin, checkpoint = pin_pretrained(cfg, folder, parts.file_sum, parts.progress)
    trunk, dummy = open_tensors(
        checkpoint.settings, checkpoint.trunk, checkpoint.dummy, torch.float32
    )
    check_vocabulary(cfg, rows.shards.vocab_size, len(trunk.head))
    trunk, dummy = trunk.to(device()), dummy.to(device())
    nats = _validated(cfg, parts, trunk, dummy, held_out)
    statistics = feature_statistics(
        cfg, trunk, dummy, rows, cfg.trunk.statistics_tokens, progress=parts.progress
    )
    save_tensors(folder / "statistics.safetensors", statistics.tensors())
    write_text(folder / "trunk.json", json.dumps(checkpoint.settings, indent=1, sort_keys=True))
    return {
        "steps": 0,
        "tokens": 0,
        "valid_nats": nats,
        "seconds": time.monotonic() - started_s,
        "parameters": checkpoint.parameters,
        "source": pin.source,
        "revision": pin.revision,
        "dtype": pin.dtype,
        "decoded": pin.decoded,
        "pinned_bytes": sum(file.bytes for file in pin.files),
    }


def _validated(
    cfg: FfnMoeConfig,
    parts: Parts,
    trunk: Trunk,
    dummy: Expert,
    held_out: Sequence[torch.Tensor],
) -> float:
    """Return mean nats of the held-out batches, by progress."""

    def told(done: float) -> None:
        parts.progress("loss on the validation set", done)

    nats_N = token_losses(trunk, dummy, held_out, uses_bf16(cfg.dtype), told=told)
    return nats_N.mean().item()
