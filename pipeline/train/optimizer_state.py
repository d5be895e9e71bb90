"""How Adam's moments are kept between steps: plain, or in 8 bits a block at a time.

P elements of a piece, a whole number of blocks unless it is the last.
"""

import importlib.util
from collections.abc import Callable
from functools import cache

import torch

from ..errors import ConfigError

BLOCK = 256  # elements that share a scale, as in 8-bit Adam (2110.02861)
SCALE = "_scale"  # suffix of the name under which scales are stored


class FullPrecision:
    """A moment in a dtype of its own; fp32 is updated in place."""

    def __init__(self, like: torch.Tensor, dtype: torch.dtype):
        self.kept = torch.zeros_like(like, dtype=dtype).view(-1)

    def read(self, piece: slice) -> torch.Tensor:
        """Return moment_P in fp32."""
        return self.kept[piece].float()

    def write(self, piece: slice, moment_P: torch.Tensor) -> None:
        """Keep moment_P."""
        kept = self.kept[piece]
        if kept.data_ptr() != moment_P.data_ptr():
            kept.copy_(moment_P)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what is kept, by a suffix of its name."""
        return {"": self.kept}


class Quantized8bit:
    """A moment in bitsandbytes' dynamic 8-bit code, with a scale per block."""

    def __init__(self, like: torch.Tensor, signed: bool):
        self.code = _library().create_dynamic_map(signed=signed).to(like.device)
        self.kept = torch.zeros(like.numel(), dtype=torch.uint8, device=like.device)
        self.scale = torch.zeros(-(-like.numel() // BLOCK), device=like.device)

    def read(self, piece: slice) -> torch.Tensor:
        """Return moment_P in fp32."""
        kept, scale = self.kept[piece], self.scale[_blocks(piece)]
        return _library().dequantize_blockwise(kept, absmax=scale, code=self.code, blocksize=BLOCK)

    def write(self, piece: slice, moment_P: torch.Tensor) -> None:
        """Keep moment_P, rounded to the nearest code of its block."""
        kept, state = _library().quantize_blockwise(moment_P, code=self.code, blocksize=BLOCK)
        self.kept[piece].copy_(kept)
        self.scale[_blocks(piece)].copy_(state.absmax)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what is kept, by a suffix of its name."""
        return {"": self.kept, SCALE: self.scale}


KINDS: dict[str, Callable[[torch.Tensor, bool], FullPrecision | Quantized8bit]] = {
    "fp32": lambda like, _signed: FullPrecision(like, torch.float32),
    "bf16": lambda like, _signed: FullPrecision(like, torch.bfloat16),
    "int8": Quantized8bit,
}


def _blocks(piece: slice) -> slice:
    return slice(piece.start // BLOCK, -(-piece.stop // BLOCK))


def import_int8() -> None:
    """Import the library for 8-bit moments where it is installed."""
    if importlib.util.find_spec("bitsandbytes"):
        _library()


@cache
def _library():
    """Import bitsandbytes when it is needed, without its remarks about kernels for other devices.

    Raises ConfigError.
    """
    try:
        import bitsandbytes.functional
    except ImportError:
        wanted = "install it with `pip install bitsandbytes`, or set moments to bf16"
        raise ConfigError(
            f"moments: int8 needs bitsandbytes, which is not here: {wanted}"
        ) from None

    return bitsandbytes.functional
