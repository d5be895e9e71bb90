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

# Larger pictures are searched at this area: letters stay readable, and the time stays bounded.
LOOKED_AT_PX = 2_000_000

# Ink is compared with the mean of so many pixels around it; wider than a letter, narrower than the
# shadows of a photographed page.
_AROUND_PX = 41

# Least step between ink and ground, in grey levels and in standard deviations of the picture.
_LEAST_CONTRAST = 16
_LEAST_DEVIATIONS = 1.2

# Gap that is bridged within a line, in heights of a letter: a blank is about half of one.
_JOIN = 1.2

# Share of ink in a region of text; below it is dirt, above it a bar or a filled box.
_LEAST_INK = 0.06
_MOST_INK = 0.75

# Crossings from ground to ink along a row: per letter height of width, and at all, as a blot or a
# rule has one.
_LEAST_STROKES = 0.4
_LEAST_CROSSINGS = 1.2

# What is higher than this share of the picture is no line of text; in a small picture, such as a
# crop of one word, what is lower than so many pixels may be one all the same.
_TALLEST = 0.25
_LOW_PX = 64

# Step at the edge of a stroke, as a share of the contrast between ink and ground: print is sharp,
# the texture of cloth or wood is not.
_STEEP = 0.35

# A letter is at most so many times as wide as high; a rule under a heading is wider.
_WIDEST_LETTER = 6


@dataclass(frozen=True)
class Region:
    """A line of text, or part of one."""

    box: Box
    # crossings from ground to ink along a row, summed over its rows: how much text there is
    strokes: float


def find(image: "Image", min_height_px: float = 6) -> list[Region]:
    """Return the lines of text of an RGB or grey picture in reading order."""
    # scipy takes .2 s to import, and most of what imports this module never looks for text.
    from scipy import ndimage

    small, scale = _searched(image)
    grey_HW = np.asarray(small, np.float32)
    ink_HW = _ink(grey_HW)
    least_px = min_height_px * scale
    most_px = max(_LOW_PX, _TALLEST * small.height)
    letter_px = _letter_height(ink_HW, least_px, most_px)
    if letter_px is None:
        return []

    # Closing joins the letters of a line. Padded, as at the edges it would take ink away.
    gap = max(1, round(_JOIN * letter_px))
    padded_HW = np.pad(ink_HW, gap)
    joined_HW = ndimage.binary_closing(padded_HW, np.ones((1, gap), bool))
    joined_HW = joined_HW[gap:-gap, gap:-gap]
    labels_HW, _ = ndimage.label(joined_HW)

    found: dict[Box, float] = {}
    for area in ndimage.find_objects(labels_HW):
        strokes = _strokes(ink_HW[area], letter_px, least_px, most_px)
        if not strokes:
            continue
        if _steepness(grey_HW[area], ink_HW[area]) < _STEEP:
            continue
        rows, columns = area
        box = Box(
            x0_px=columns.start / scale,
            y0_px=rows.start / scale,
            x1_px=columns.stop / scale,
            y1_px=rows.stop / scale,
        )
        found[box] = strokes

    regions = []
    for line in boxes.lines(found):
        for box in line:
            regions.append(Region(box, found[box]))
    return regions


def _searched(image: "Image") -> tuple["Image", float]:
    """Return the grey picture that is searched, and its scale: 1, or less for a large picture."""
    area = image.width * image.height
    scale = min(1.0, (LOOKED_AT_PX / area) ** 0.5)
    small = image.convert("L")
    if scale == 1.0:
        return small, scale
    width = max(1, int(image.width * scale))
    height = max(1, int(image.height * scale))
    return small.resize((width, height)), scale


def _ink(grey_HW: np.ndarray) -> np.ndarray:
    """Return where a pixel stands out from its surroundings, on the side (dark or light) that has
    more such pixels."""
    from scipy import ndimage

    ground_HW = ndimage.uniform_filter(grey_HW, _AROUND_PX, mode="nearest")
    apart_HW = ground_HW - grey_HW
    # Grain is in every pixel and letters are in few, so the deviation measures the grain.
    deviation = float(apart_HW.std())
    least = max(_LEAST_CONTRAST, _LEAST_DEVIATIONS * deviation)
    dark_HW = apart_HW > least
    light_HW = apart_HW < -least
    # The mean beside ink is pulled towards it, so ground stands out there too, on the other side,
    # but by less: fewer of its pixels pass.
    if dark_HW.sum() >= light_HW.sum():
        return dark_HW
    return light_HW


def _letter_height(ink_HW: np.ndarray, least_px: float, most_px: float) -> float | None:
    """Return the median height of what may be letters; None where there are none."""
    from scipy import ndimage

    # With diagonal neighbours: a thin slanted stroke is one letter and not a row of dots.
    labels_HW, _ = ndimage.label(ink_HW, np.ones((3, 3), int))
    heights = []
    for rows, columns in ndimage.find_objects(labels_HW):
        high = rows.stop - rows.start
        wide = columns.stop - columns.start
        if least_px <= high <= most_px and wide <= _WIDEST_LETTER * high:
            heights.append(high)
    if not heights:
        return None
    return float(np.median(heights))


def _strokes(ink_HW: np.ndarray, letter_px: float, least_px: float, most_px: float) -> float:
    """Return how many strokes an area of ink has; 0 when it is not text."""
    high, wide = ink_HW.shape
    lowest = max(least_px, 0.5 * letter_px)
    highest = min(most_px, 3 * letter_px)
    if not lowest <= high <= highest or wide < letter_px:
        return 0
    if not _LEAST_INK <= ink_HW.mean() <= _MOST_INK:
        return 0
    # Ink in the first column was entered too, from the ground outside of the area.
    entered_HW = ink_HW[:, 1:] & ~ink_HW[:, :-1]
    crossings = float(entered_HW.sum() + ink_HW[:, 0].sum())
    wanted = max(_LEAST_CROSSINGS, _LEAST_STROKES * wide / letter_px)
    if crossings / high < wanted:
        return 0
    return crossings


def _steepness(grey_HW: np.ndarray, ink_HW: np.ndarray) -> float:
    """Return the step over two pixels at the edges of strokes, as a share of the contrast of ink
    and ground."""
    ink = float(np.median(grey_HW[ink_HW]))
    ground = float(np.median(grey_HW[~ink_HW]))
    edges_HW = ink_HW[:, 1:-1] != ink_HW[:, :-2]
    steps_HW = np.abs(grey_HW[:, 2:] - grey_HW[:, :-2])
    steps = steps_HW[edges_HW]
    if not steps.size:
        return 0.0
    # Less than a grey level of contrast is none; the quotient would be noise.
    contrast = max(abs(ink - ground), 1.0)
    return float(np.median(steps)) / contrast
