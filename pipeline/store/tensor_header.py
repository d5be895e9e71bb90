"""The header of a safetensors file that anyone may have made, held against what must be in it
before a number of it is read.

Invariant: what passes here is a file of exactly the tensors that are wanted, one after another,
and of nothing else: no padding, no hole, no word of its maker's.
"""

from collections.abc import Mapping
from math import prod
from typing import Any, BinaryIO

from .foreign import ForeignFile
from .reading import parse_object

METADATA = "__metadata__"
# All that save_tensors writes there; more could carry anything
KNOWN_METADATA: tuple[dict[str, str], ...] = ({}, {"format": "pt"})
LENGTH_BYTES = 8
# Of some hundred bytes a tensor; a model of a hundred layers has a few hundred of them
HEADER_BYTES = 4 << 20
FLOATS = ("F32", "F16", "BF16")
WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8}
# By name: dtype as safetensors calls it, and shape
Wanted = Mapping[str, tuple[str, tuple[int, ...]]]
_SHOWN = 3


def check_tensors(file: BinaryIO, name: str, size: int, wanted: Wanted) -> None:
    """Raise ForeignFile unless a file of so many bytes holds the tensors that are wanted and
    nothing else; OSError. Reads the header alone."""
    header, end = _header(file, name, size)
    metadata = header.pop(METADATA, {})
    if metadata not in KNOWN_METADATA:
        raise ForeignFile(
            f"{name} holds words beside its tensors ({METADATA}); write it anew without"
        )
    missing = sorted(wanted.keys() - header.keys())
    strange = sorted(header.keys() - wanted.keys())
    if missing or strange:
        which = "lacks" if missing else "holds more than an expert here:"
        raise ForeignFile(f"{name} {which} {_shown(missing or strange)}")
    at = 0
    for tensor, entry in sorted(header.items(), key=_start):
        at = _next(name, tensor, entry, wanted[tensor], at)
    if end + at > size:
        raise ForeignFile(
            f"{name} has {size:,} bytes, and its tensors take {end + at:,}: it is torn; copy it "
            "again"
        )
    if end + at != size:
        raise ForeignFile(
            f"{name} has {size:,} bytes, and its tensors take {end + at:,}; nothing may stand "
            "behind them"
        )


def found_tensors(file: BinaryIO, name: str, size: int) -> Wanted:
    """Return dtype and shape of each tensor that the header of a file of so many bytes tells of, to
    be held against what is wanted of them. Raises ForeignFile, OSError."""
    header, _ = _header(file, name, size)
    header.pop(METADATA, None)
    found = {}
    for tensor, entry in header.items():
        fields = entry if isinstance(entry, dict) else {}
        dtype, shape = fields.get("dtype"), fields.get("shape")
        whole = isinstance(shape, list) and all(type(each) is int for each in shape)
        if dtype not in WIDTHS or not isinstance(shape, list) or not whole:
            text = ascii(f"{tensor[:60]} as {dtype} {shape}"[:120]).strip("'")
            raise ForeignFile(
                f"{name} has {text}, and adapters here are {', '.join(FLOATS)}; save it in one of "
                "these"
            )
        found[tensor] = (str(dtype), tuple(shape))
    return found


def _header(file: BinaryIO, name: str, size: int) -> tuple[dict[str, Any], int]:
    """Return what a header says, and where it ends."""
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    if size < LENGTH_BYTES or length > size - LENGTH_BYTES:
        raise ForeignFile(f"{name} is torn, or no safetensors file; copy it again")
    if length > HEADER_BYTES:
        raise ForeignFile(f"{name} has a header of {length:,} bytes, over {HEADER_BYTES:,}")
    try:
        return parse_object(file.read(length)), LENGTH_BYTES + length
    except ValueError as error:
        said = ascii(str(error)[:120])
        raise ForeignFile(f"{name} has no safetensors header: {said}") from None


def _start(item: tuple[str, Any]) -> int:
    offsets = item[1].get("data_offsets") if isinstance(item[1], dict) else None
    if not isinstance(offsets, list) or not all(type(each) is int for each in offsets):
        return -1  # refused when its turn comes
    return offsets[0] if offsets else -1


def _next(name: str, tensor: str, entry: Any, wanted: tuple[str, tuple[int, ...]], at: int) -> int:
    """Return where the tensor after this one must start. Raises ForeignFile."""
    dtype, shape = wanted
    fields = entry if isinstance(entry, dict) else {}
    found = fields.get("dtype"), fields.get("shape")
    if found != (dtype, list(shape)):
        text = ascii(f"{found[0]} {found[1]}"[:60]).strip("'")
        raise ForeignFile(f"{name} has {tensor} as {text}, and here it is {dtype} {list(shape)}")
    end = at + WIDTHS[dtype] * prod(shape)
    if fields != {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}:
        raise ForeignFile(f"{name} says of {tensor} that it lies elsewhere than it can")
    return end


def _shown(names: list[str]) -> str:
    more = len(names) - _SHOWN
    # As their maker wrote them they may be anything, also what moves a terminal's cursor
    text = ", ".join(ascii(name[:60]).strip("'") for name in names[:_SHOWN])
    return f"{text} and {more} more" if more > 0 else text
