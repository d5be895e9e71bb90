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
    right = image.width - x
    bottom = image.height - y
    return image.crop((x, y, right, bottom))


def resize(image: Image.Image) -> Image.Image:
    """Return a picture with three quarters of its width and height."""
    # a side of one pixel stays
    width = max(1, round(image.width * RESIZED))
    height = max(1, round(image.height * RESIZED))
    return image.resize((width, height), Image.Resampling.BICUBIC)


def recompress(image: Image.Image) -> Image.Image:
    """Return a picture as JPEG leaves it."""
    held = io.BytesIO()
    image.save(held, "JPEG", quality=QUALITY)
    again = Image.open(held)
    return again.convert("RGB")


Perturbation = Callable[[Image.Image], Image.Image]

# by the names that the report gives them
PERTURBATIONS: Mapping[str, Perturbation] = {
    "crop": crop,
    "resize": resize,
    "recompression": recompress,
}
