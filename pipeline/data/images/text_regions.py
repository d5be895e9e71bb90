"""Where a picture has text, found without a model: ink against its surroundings, joined along
lines, judged by strokes.

Invariant: a pure function of the pixels; boxes lie inside the picture, in reading order. Good for
print on a plain ground (receipts, pages, forms, screens); handwriting and lettering in photographs
need given boxes. Legend: H height and W width of a picture, px.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import boxes
from .boxes import Box

if TYPE_CHECKING:
    from PIL.Image import Image

LOOKED_AT_PX = 2_000_000  # larger pictures are searched at this area
_AROUND = 41  # pixels of surroundings that ink is compared with
_LEAST_CONTRAST = 16  # grey levels
_JOIN = 1.2  # gap, in heights of a letter, that is bridged within a line
_DENSITY = (0.06, 0.75)  # share of ink in a region of text
_LEAST_STROKES = 0.4  # crossings from ground to ink per row and letter height of width
_LEAST_CROSSINGS = 1.2  # per row; a blot has one
_TALLEST = 0.25  # of the picture's height; what is higher is no line
_LOW_PX = 64  # and what is lower may be one in any picture
_STEEP = 0.35  # step at the edge of a stroke, share of the contrast between ink and ground


@dataclass(frozen=True)
class Region:
    """A line of text, or part of one."""

    box: Box
    # crossings from ground to ink along a row, summed over its rows: how much text there is
    strokes: float


def find(image: "Image", min_height_px: float = 6) -> list[Region]:
    """Return the lines of text of an RGB or grey picture in reading order."""
    from scipy import ndimage

    scale = min(1.0, (LOOKED_AT_PX / (image.width * image.height)) ** 0.5)
    small = image.convert("L")
    if scale < 1:
        small = small.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
    grey_HW, most_px = np.asarray(small, np.float32), max(_LOW_PX, _TALLEST * small.height)
    ink_HW = _ink(grey_HW)
    letter_px = _letter_height(ink_HW, min_height_px * scale, most_px)
    if letter_px is None:
        return []
    gap = max(1, round(_JOIN * letter_px))
    joined_HW = ndimage.binary_closing(np.pad(ink_HW, gap), np.ones((1, gap), bool))[
        gap:-gap, gap:-gap
    ]
    areas = ndimage.find_objects(ndimage.label(joined_HW)[0])
    found = {}
    for area in areas:
        strokes = _strokes(ink_HW[area], letter_px, min_height_px * scale, most_px)
        if strokes and _steepness(grey_HW[area], ink_HW[area]) >= _STEEP:
            rows, columns = area
            box = Box(
                columns.start / scale, rows.start / scale, columns.stop / scale, rows.stop / scale
            )
            found[box] = strokes
    return [Region(box, found[box]) for line in boxes.lines(found) for box in line]


def _ink(grey_HW: np.ndarray) -> np.ndarray:
    """Return where a pixel stands out from its surroundings, on the side (dark or light) that is
    rarer."""
    from scipy import ndimage

    ground_HW = ndimage.uniform_filter(grey_HW, _AROUND, mode="nearest")
    apart_HW = ground_HW - grey_HW
    least = max(_LEAST_CONTRAST, 1.2 * float(apart_HW.std()))
    dark_HW, light_HW = apart_HW > least, apart_HW < -least
    return dark_HW if dark_HW.sum() >= light_HW.sum() else light_HW


def _letter_height(ink_HW: np.ndarray, least_px: float, most_px: float) -> float | None:
    """Return the median height of what may be letters; None where there are none."""
    from scipy import ndimage

    areas = ndimage.find_objects(ndimage.label(ink_HW, np.ones((3, 3), int))[0])
    sizes = [(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in areas]
    heights = [high for high, wide in sizes if least_px <= high <= most_px and wide <= 6 * high]
    return float(np.median(heights)) if heights else None


def _strokes(ink_HW: np.ndarray, letter_px: float, least_px: float, most_px: float) -> float:
    """Return how many strokes an area of ink has; 0 when it is not text."""
    high, wide = ink_HW.shape
    if (
        high < max(least_px, 0.5 * letter_px)
        or high > min(most_px, 3 * letter_px)
        or wide < letter_px
    ):
        return 0
    if not _DENSITY[0] <= ink_HW.mean() <= _DENSITY[1]:
        return 0
    crossings = float((ink_HW[:, 1:] & ~ink_HW[:, :-1]).sum() + ink_HW[:, 0].sum())
    return (
        crossings
        if crossings / high >= max(_LEAST_CROSSINGS, _LEAST_STROKES * wide / letter_px)
        else 0
    )


def _steepness(grey_HW: np.ndarray, ink_HW: np.ndarray) -> float:
    """Return the step over two pixels at the edges of strokes, as a share of the contrast of ink
    and ground."""
    contrast = abs(float(np.median(grey_HW[ink_HW])) - float(np.median(grey_HW[~ink_HW])))
    edges_HW = ink_HW[:, 1:-1] != ink_HW[:, :-2]
    steps_HW = np.abs(grey_HW[:, 2:] - grey_HW[:, :-2])[edges_HW]
    return float(np.median(steps_HW)) / max(contrast, 1.0) if steps_HW.size else 0.0
