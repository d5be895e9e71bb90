"""Tensors that are read or computed when their turn comes to be written, so that writing a model
needs room for one of them and not for a second model.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from ..protocols import Progress
from .room import writing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# What safetensors calls the dtypes of weights.
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Streamed:
    """A tensor that is to be written: its shape and dtype, and what reads it."""

    shape: tuple[int, ...]
    dtype: "torch.dtype"
    read: "Callable[[], Tensor]"

    @classmethod
    def of(cls, tensor: "Tensor") -> "Streamed":
        """Return a tensor of any shape, there or mapped from a file, as one to be written."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.detach)

    def to(self, dtype: "torch.dtype") -> "Streamed":
        """Return the same tensor, rounded to a dtype when it is read."""
        return replace(self, dtype=dtype, read=lambda: self.read().to(dtype))

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return prod(self.shape) * self.dtype.itemsize


def raw_bytes(tensor: "Tensor") -> memoryview:
    """Return the bytes of a tensor of any shape, in order."""
    import torch

    # numpy knows no bf16, and every dtype is bytes
    return tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data


def write_tensors(path: Path, tensors: Mapping[str, Streamed], progress: Progress) -> str:
    """Write a safetensors file one tensor after another; return its sha256. Raises DiskFull."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": NAMES[str(tensor.dtype).removeprefix("torch.")],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the payload stays aligned
    digest = hashlib.sha256()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), path.open("wb") as file:

        def write(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)

        write(len(text).to_bytes(8, "little"))
        write(text)
        done = 0
        for tensor in tensors.values():
            progress(f"writing {path.name}", done / max(at, 1))
            write(raw_bytes(tensor.read()))
            done += tensor.nbytes
    return digest.hexdigest()
