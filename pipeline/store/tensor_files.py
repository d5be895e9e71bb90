"""Safetensors files written one tensor after another, and copied so without being opened."""

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artifacts import set_mode
from .room import writing

if TYPE_CHECKING:
    import torch

METADATA = "__metadata__"  # the one entry of a safetensors header that is no tensor
# transformers before 5 insists on the format
OF_TORCH = {"format": "pt"}


def pack_header(entries: Mapping[str, Any]) -> bytes:
    """Return a safetensors header, padded so that the payload stays aligned to eight bytes."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_one_by_one(
    path: Path,
    stored: Mapping[str, tuple[tuple[int, ...], "torch.dtype"]],
    tensors: Iterable[tuple[str, "torch.Tensor"]],
) -> None:
    """Write a safetensors file of tensors that come one after another and are let go: name -> shape
    and dtype in the order in which they come. Raises DiskFull."""
    import torch

    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    names[torch.float64] = "F64"
    entries: dict[str, Any] = {METADATA: OF_TORCH}
    at = 0
    for name, (shape, dtype) in stored.items():
        end = at + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    with writing(path):
        with path.open("wb") as file:
            file.write(pack_header(entries))
            for wanted, (name, tensor) in zip(stored, tensors, strict=True):
                # A mistake of ours: the header would name another's bytes
                assert wanted == name  # noqa: S101
                # numpy knows no bf16
                raw = tensor.contiguous().view(torch.uint8).numpy()
                file.write(raw.data)
        set_mode(path)
