"""How Adam's moments are kept between steps: plain, or in 8 bits a block at a time.

P elements of a piece, a whole number of blocks unless it is the last.
"""

from contextlib import suppress
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..errors import ConfigError

BLOCK = 256  # elements that share a scale, as in 8-bit Adam (2110.02861)
SCALE = "_scale"  # suffix of the name under which scales are stored


class FullPrecision:
    """A moment in a dtype of its own; fp32 is updated in place."""

    def __init__(self, like: Tensor, dtype: torch.dtype):
        self.kept = torch.zeros_like(like, dtype=dtype).view(-1)

    def read(self, piece: slice) -> Tensor:
        """Return moment_P in fp32."""
        return self.kept[piece].float()

    def write(self, piece: slice, moment_P: Tensor) -> None:
        """Keep moment_P."""
        kept = self.kept[piece]
        # fp32 that was read is what is kept, and the optimizer has changed it in place
        if kept.data_ptr() != moment_P.data_ptr():
            kept.copy_(moment_P)

    def tensors(self) -> dict[str, Tensor]:
        """Return what is kept, by a suffix of its name."""
        return {"": self.kept}


class Quantized8bit:
    """A moment in bitsandbytes' dynamic 8-bit code, with a scale per block."""

    def __init__(self, like: Tensor, signed: bool):
        numbers = like.numel()
        blocks = -(-numbers // BLOCK)
        # all numbers that a byte can name, finer near zero
        code = _library().create_dynamic_map(signed=signed)
        self.code = code.to(like.device)
        self.kept = torch.zeros(numbers, dtype=torch.uint8, device=like.device)
        self.scale = torch.zeros(blocks, device=like.device)

    def read(self, piece: slice) -> Tensor:
        """Return moment_P in fp32."""
        return _library().dequantize_blockwise(
            self.kept[piece],
            absmax=self.scale[_blocks(piece)],
            code=self.code,
            blocksize=BLOCK,
        )

    def write(self, piece: slice, moment_P: Tensor) -> None:
        """Keep moment_P, rounded to the nearest code of its block."""
        kept, state = _library().quantize_blockwise(moment_P, code=self.code, blocksize=BLOCK)
        self.kept[piece].copy_(kept)
        self.scale[_blocks(piece)].copy_(state.absmax)

    def tensors(self) -> dict[str, Tensor]:
        """Return what is kept, by a suffix of its name."""
        return {"": self.kept, SCALE: self.scale}


Moment = FullPrecision | Quantized8bit


def new_moment(kind: str, like: Tensor, signed: bool) -> Moment:
    """Return a moment of zeros for a tensor of any shape, kept as fp32, bf16 or int8; one that
    cannot be negative has finer steps in int8."""
    if kind == "int8":
        return Quantized8bit(like, signed)
    return FullPrecision(like, torch.bfloat16 if kind == "bf16" else torch.float32)


def _blocks(piece: slice) -> slice:
    """Return which scales belong to a piece; the last block may be short."""
    return slice(piece.start // BLOCK, -(-piece.stop // BLOCK))


def import_int8() -> None:
    """Import the library for 8-bit moments where it is installed."""
    with suppress(ConfigError):
        _library()


@cache
def _library() -> ModuleType:
    """Import bitsandbytes when it is needed, without its remarks about kernels for other devices.

    Raises ConfigError.
    """
    try:
        import bitsandbytes.functional
    except ImportError:
        raise ConfigError(
            "moments: int8 needs bitsandbytes, which is not here: install it with "
            "`pip install bitsandbytes`, or set moments to bf16"
        ) from None
    return bitsandbytes.functional
