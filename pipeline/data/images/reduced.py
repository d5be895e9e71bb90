"""Pictures decoded no larger than is needed, and how much memory that takes at most.

Where a picture of a given area is wanted, all that matters of a larger one is its means over small
squares. So a JPEG is decoded at a half, a quarter or an eighth of its size, and of other formats
the means are taken before anything else is done: copies of the whole are what takes memory. What is
kept is still some times as wide and high as wanted, so that the resizing that follows gives nearly
what it gives of the whole; a picture that is not larger than that stays as it is.

Invariant: what `bytes_needed` says of a header is what decoding it takes at most, whatever a file
of that header holds.
"""

import math

from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

# As wide and high as wanted, times this: less would leave out what the resizing after it looks at.
KEPT = 2
# In which means can be taken: a number per band, and no index into a palette.
_OF_TONES = ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr")
# Bytes of a pixel as Pillow holds them; what is not listed has four.
_HELD = {"1": 1, "L": 1, "P": 1}
# Of one that goes through numbers of four bytes on its way to eight bits, and is never reduced.
_HELD_DEEP = 16
# Bytes of a pixel that a decoder has of its own beside Pillow's, all at once: libwebp two canvases
# and their copy, libheif and libavif planes, what they become and its copy, GIF the frame before.
_DECODERS = {"WEBP": 12, "HEIF": 10, "AVIF": 12, "GIF": 8, "TIFF": 6, "PPM": 4, "BMP": 4}
# Of a JPEG in several scans libjpeg holds all coefficients, two bytes each, whatever is made of
# them.
_COEFFICIENT = 2
# Of a TIFF: width and height of a tile; four bands of four bytes.
_TILE_SIZE = (0x0142, 0x0143)
_OF_TILE = 16
# What turning, removing transparency and resizing hold at once of a picture that is small already.
_COPIES = 4
_START_OF_SCAN = b"\xff\xda"
# Of a progressive JPEG; each is gone through for every block of the picture.
MOST_SCANS = 100


class TooManyScans(ValueError):
    """A JPEG that would take minutes to decode, whatever its size."""


def draft(image: Image.Image, area_px: int) -> None:
    """Have a picture that was just opened decoded smaller where its format can do that."""
    scale = _scale(image, area_px)
    if scale < 1:
        image.draft(None, (_side(image.width, scale), _side(image.height, scale)))


def reduced(image: Image.Image, area_px: int) -> Image.Image:
    """Return a decoded picture with means over squares in place of pixels, where enough are left
    of them."""
    factor = _factor(image, area_px)
    if factor < 2:
        return image
    # A colour that stands for transparency is no colour to be mixed with others.
    if "transparency" in image.info and image.mode not in ("LA", "RGBA"):
        image = image.convert("RGBA")
    elif image.mode in ("P", "PA", "1"):
        image = image.convert("RGBA" if image.mode == "PA" else "RGB")
    if image.mode not in _OF_TONES:
        return image
    return image.reduce((min(factor, image.width), min(factor, image.height)))


def bytes_needed(image: Image.Image, data: bytes, area_px: int) -> int:
    """Return how much memory the picture that was just opened takes at most until it is resized to
    that area, beside its file's own bytes. Raises TooManyScans."""
    whole_px = image.width * image.height
    own = 0
    if image.format in ("JPEG", "MPO"):
        scans = data.count(_START_OF_SCAN)
        if scans > MOST_SCANS:
            raise TooManyScans(f"it comes in {scans} scans")
        # A thumbnail in it looks like one more.
        if scans > 1 or image.info.get("progressive"):
            own = _COEFFICIENT * len(image.getbands()) * whole_px
        draft(image, area_px)
    else:
        own = _DECODERS.get(image.format or "", 0) * whole_px + _tile_bytes(image)
        if _is_converted(image):
            own += 4 * whole_px
    if image.mode not in (*_OF_TONES, "P", "PA", "1"):
        return own + _HELD_DEEP * whole_px
    loaded_px = image.width * image.height
    small_px = loaded_px // _factor(image, area_px) ** 2
    return own + _HELD.get(image.mode, 4) * loaded_px + 4 * _COPIES * small_px


def _tile_bytes(image: Image.Image) -> int:
    """Return what a decoder holds of a picture in tiles beside it: one of them, which may be far
    larger than the picture."""
    if not isinstance(image, TiffImageFile):
        return 0
    width, height = (_whole(image.tag_v2.get(tag)) for tag in _TILE_SIZE)
    # as many bytes as the widest pixel has that is decoded, whatever the other tags say
    return _OF_TILE * width * height


def _whole(value: object) -> int:
    # of a file, which says what it likes
    return value if isinstance(value, int) else 0


def _is_converted(image: Image.Image) -> bool:
    """Whether a whole picture is copied in another mode before it is reduced."""
    return image.mode in ("P", "PA", "1", "LA", "RGBA") or "transparency" in image.info


def _scale(image: Image.Image, area_px: int) -> float:
    """Return what a picture's sides may be multiplied by; 1 and more: it is small enough."""
    return KEPT * math.sqrt(area_px / max(1, image.width * image.height))


def _factor(image: Image.Image, area_px: int) -> int:
    """Return how many pixels in a row become one, 1 and more."""
    return max(1, int(1 / _scale(image, area_px)))


def _side(pixels: int, scale: float) -> int:
    return max(1, math.ceil(pixels * scale))
