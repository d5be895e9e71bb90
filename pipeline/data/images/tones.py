"""Pictures of more grey levels than eight bits have, as they are to be seen.

Scanners, microscopes, thermal and depth cameras write 10 to 16 bits, or fractions. How many of the
bits are used is not in the file, so it is read off the brightest point: taken for 16 bits, what has
12 would be nearly black.

H height, W width.
"""

import numpy as np
from PIL import Image

DEEP = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")

# What cameras and files have, the fewest first.
_BITS = (8, 10, 12, 14, 16)


class UnknownTones(ValueError):
    """Values that are no tones; the text says which they are."""


def eight_bits(image: Image.Image) -> Image.Image:
    """Return a deep grey picture in eight bits, black where its values are 0. Raises UnknownTones
    for values that are negative, above 16 bits, or no numbers."""
    wide = image if image.mode == "F" else image.convert("I")
    low, high = _extrema(wide)
    # NaN is in no range.
    if not (0 <= low <= high < 1 << _BITS[-1]):
        raise UnknownTones(
            f"its values reach from {low:g} to {high:g}; grey of up to 16 bits, or of 0 to 1, is "
            "read. Save it as an 8-bit picture"
        )
    if wide.mode == "F" and high <= 1:
        return wide.point(lambda value: value * 255).convert("L")
    bits = next(bits for bits in _BITS if high < 1 << bits)
    scale = 1 << (bits - _BITS[0])
    return wide.point(lambda value: value / scale).convert("L")


def _extrema(image: Image.Image) -> tuple[float, float]:
    # Pillow's own extrema pass over NaN.
    values_HW = np.asarray(image)
    return float(values_HW.min()), float(values_HW.max())
