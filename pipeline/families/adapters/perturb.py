"""Changes to a request that should not change who answers it: other words, and pictures a little
different.

Invariant: a change is a function of the request alone, so a repeated evaluation makes the same
ones.
"""

import io
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace

from PIL import Image

from ...config.routing_set import RoutingSetConfig
from .eval_data import EvalRequest

CROPPED, RESIZED = 0.05, 0.75  # cut off each side; of each side
QUALITY = 50  # of JPEG
OWN = "{prompt}"  # in a wording: the request's own words


def cropped(image: Image.Image) -> Image.Image:
    """Return a picture without a twentieth of each side."""
    x, y = round(image.width * CROPPED), round(image.height * CROPPED)
    return image.crop((x, y, image.width - x, image.height - y))


def resized(image: Image.Image) -> Image.Image:
    """Return a picture with three quarters of its width and height."""
    size = (max(1, round(image.width * RESIZED)), max(1, round(image.height * RESIZED)))
    return image.resize(size, Image.Resampling.BICUBIC)


def recompressed(image: Image.Image) -> Image.Image:
    """Return a picture as JPEG leaves it."""
    held = io.BytesIO()
    image.save(held, "JPEG", quality=QUALITY)
    return Image.open(held).convert("RGB")


PICTURES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "crop": cropped,
    "resize": resized,
    "recompression": recompressed,
}


def with_pictures(asked: EvalRequest, change: Callable[[Image.Image], Image.Image]) -> EvalRequest:
    """Return a request whose pictures are changed when they are opened."""
    return replace(asked, open=lambda: [change(image) for image in asked.open()])


def reworded(asked: EvalRequest, dataset: RoutingSetConfig) -> EvalRequest | None:
    """Return a request in other words for the same thing, held-out ones first; None where there are
    none."""
    wording = dataset.neutral if asked.ambiguous else dataset.paraphrases.get(asked.expert)
    for texts in (wording.held, wording.seen) if wording else ():
        other = sorted(text for text in texts if text != asked.prompt and OWN not in text)
        if other:
            return replace(asked, prompt=other[zlib.crc32(asked.prompt.encode()) % len(other)])
    return None


def reordered(instruction: str, labels: Mapping[str, str]) -> str | None:
    """Return the router's instruction with its lines about the labels in reverse; None unless it
    has one for each."""
    lines = instruction.splitlines()
    about = [
        i for i, line in enumerate(lines) if any(_tells(line, label) for label in labels.values())
    ]
    if len(about) < len(labels) or len(labels) < 2:
        return None
    turned = dict(zip(about, [lines[i] for i in reversed(about)], strict=True))
    return "\n".join(turned.get(i, line) for i, line in enumerate(lines))


def _tells(line: str, label: str) -> bool:
    return re.match(rf"\W*{re.escape(label)}\s*[:.)=\-–]", line) is not None
