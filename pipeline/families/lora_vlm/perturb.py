"""Changes to a picture that should not change who answers a question about it.

Invariant: a change is a function of the picture alone, so that evaluations repeat.
"""

import io
from collections.abc import Callable, Mapping

from PIL import Image

CROPPED = 0.05  # cut off each side, share of it
RESIZED = 0.75  # of width and height
QUALITY = 50  # of JPEG: visible on a second look


def crop(image: Image.Image) -> Image.Image:
    """Return a picture without a twentieth of each side."""
    x = round(image.width * CROPPED)
    y = round(image.height * CROPPED)
    return image.crop((x, y, image.width - x, image.height - y))


def resize(image: Image.Image) -> Image.Image:
    """Return a picture with three quarters of its width and height."""
    # a side of one pixel stays
    size = (max(1, round(image.width * RESIZED)), max(1, round(image.height * RESIZED)))
    return image.resize(size, Image.Resampling.BICUBIC)


def recompress(image: Image.Image) -> Image.Image:
    """Return a picture as JPEG leaves it."""
    held = io.BytesIO()
    image.save(held, "JPEG", quality=QUALITY)
    return Image.open(held).convert("RGB")


# by the names that the report gives them
PERTURBATIONS: Mapping[str, Callable[[Image.Image], Image.Image]] = {
    "crop": crop,
    "resize": resize,
    "recompression": recompress,
}
