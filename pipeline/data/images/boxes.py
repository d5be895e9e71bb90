"""Boxes in a picture and the text in them: scaled to Qwen3-VL's 0..1000, put in reading order.

Invariant: a Box is x0 < x1, y0 < y1 inside the picture it was checked against, in that picture's
pixels; units of 0..1000 are integers with the same order, whatever the picture is resized to later.
"""

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from . import writing

if TYPE_CHECKING:
    from PIL.Image import Image

# Qwen3-VL's coordinates are thousandths of the picture's sides.
UNITS = 1000

# Two boxes are on one line when they share this much height, as a share of the lower of the two.
_SAME_LINE = 0.5

# Boxes that overlap this far in x, as a share of the narrower one, stand above one another.
_STACKED = 0.5

# A box is held against so many of the latest lines: sorted by their middles, an earlier one is
# too far up, and without a limit a page of n boxes would take n^2 comparisons.
_OPEN_LINES = 3

_BLANK = re.compile(r"[^\S\n]+")

# Controls, format marks such as a BOM or a soft hyphen, lone surrogates.
_INVISIBLE = ("Cc", "Cf", "Cs")

# These format marks stay: Persian, Hindi and emoji are spelled with them.
_JOINERS = "\u200c\u200d"


class BadBox(ValueError):
    """A box that is none; the text says why."""


@dataclass(frozen=True)
class Box:
    """One region, in pixels of its picture, and what it shows or says."""

    x0_px: float
    y0_px: float
    x1_px: float
    y1_px: float
    label: str = ""  # what kind of thing it is
    text: str = ""  # what is written in it

    @property
    def height_px(self) -> float:
        """How far it reaches down, pixels of its picture."""
        return self.y1_px - self.y0_px

    @property
    def width_px(self) -> float:
        """How far it reaches to the right, pixels of its picture."""
        return self.x1_px - self.x0_px


def crop(image: "Image", box: Box, padding: float = 0.0) -> "Image":
    """Return what a picture shows inside a box, and around it by a share of the box's height, as
    far as there is."""
    around_px = padding * box.height_px
    left = math.floor(box.x0_px - around_px)
    top = math.floor(box.y0_px - around_px)
    right = math.ceil(box.x1_px + around_px)
    bottom = math.ceil(box.y1_px + around_px)

    # PIL fills what lies outside with black, which a model would learn from, so edges are clamped.
    left = max(0, left)
    top = max(0, top)
    right = min(image.width, right)
    bottom = min(image.height, bottom)
    return image.crop((left, top, right, bottom))


def units(box: Box, width_px: float, height_px: float) -> list[int]:
    """Return [x0, y0, x1, y1] in thousandths of the picture, at least one unit wide and high."""
    x0, x1 = _span(box.x0_px, box.x1_px, width_px)
    y0, y1 = _span(box.y0_px, box.y1_px, height_px)
    return [x0, y0, x1, y1]


def _span(start: float, end: float, length: float) -> tuple[int, int]:
    low = round(start / length * UNITS)
    high = round(end / length * UNITS)
    if low < high:
        return low, high
    # Rounding made it empty: it grows by a unit, to the left where it stands at the far edge.
    if high < UNITS:
        return low, high + 1
    return low - 1, high


def described(found: Sequence[Box], width_px: float, height_px: float) -> list[dict]:
    """Return [{"bbox_2d": units, "label": ...}], the label being the text where a box has none."""
    entries = []
    for box in found:
        corners = units(box, width_px, height_px)
        entries.append({"bbox_2d": corners, "label": box.label or box.text})
    return entries


def hull(found: Sequence[Box]) -> Box:
    """Return the smallest box around all of these, without label or text."""
    first = found[0]
    x0 = first.x0_px
    y0 = first.y0_px
    x1 = first.x1_px
    y1 = first.y1_px
    for box in found[1:]:
        x0 = min(x0, box.x0_px)
        y0 = min(y0, box.y0_px)
        x1 = max(x1, box.x1_px)
        y1 = max(y1, box.y1_px)
    return Box(x0, y0, x1, y1)


def inside(found: Iterable[Box], outer: Box) -> list[Box]:
    """Return the boxes whose middle lies in another box."""
    return [box for box in found if _has_middle_in(box, outer)]


def _has_middle_in(box: Box, outer: Box) -> bool:
    x = (box.x0_px + box.x1_px) / 2
    y = (box.y0_px + box.y1_px) / 2
    if not outer.x0_px <= x <= outer.x1_px:
        return False
    return outer.y0_px <= y <= outer.y1_px


def as_json(value: object) -> str:
    """Return boxes, or another column of a row, as the JSON that Qwen3-VL answers with."""
    return json.dumps(value, ensure_ascii=False)


def lines(found: Iterable[Box]) -> list[list[Box]]:
    """Return boxes as lines from top to bottom, each in the order that it is read in: from left to
    right, but for what is written in scripts that run to the left.

    A box joins the line that it overlaps in height by at least half of the lower of both, the best
    one first.
    """
    out: list[list[Box]] = []
    in_order = sorted(found, key=_top_to_bottom)
    page_to_the_left = writing.runs_to_the_left(box.text for box in in_order)
    for box in in_order:
        best = None
        best_overlap = -math.inf
        for line in out[-_OPEN_LINES:]:
            overlap = _overlap(box, line)
            if overlap > best_overlap:
                best = line
                best_overlap = overlap
        if best is not None and best_overlap >= _SAME_LINE:
            best.append(box)
        else:
            out.append([box])
    return [_as_read(line, page_to_the_left) for line in out]


def _as_read(line: list[Box], page_to_the_left: bool) -> list[Box]:
    placed = sorted(line, key=_left_to_right)
    order = writing.reading_order([box.text for box in placed], page_to_the_left)
    return [placed[place] for place in order]


def _top_to_bottom(box: Box) -> tuple[float, float]:
    # By middles, not by tops: a capital beside small letters starts higher on the same line.
    return box.y0_px + box.y1_px, box.x0_px


def _left_to_right(box: Box) -> tuple[float, float]:
    return box.x0_px, box.y0_px


def _overlap(box: Box, line: list[Box]) -> float:
    """Return the shared height of a box and the nearest box (in x) of a line, as a share of the
    lower of the two."""

    def gap_px(other: Box) -> float:
        return max(other.x0_px - box.x1_px, box.x0_px - other.x1_px)

    # The nearest one and not the line's hull: lines of a photographed page are slanted.
    near = min(line, key=gap_px)
    left = max(box.x0_px, near.x0_px)
    right = min(box.x1_px, near.x1_px)
    narrower = min(box.width_px, near.width_px)
    if right - left > _STACKED * narrower:
        return 0.0  # one above the other, however tight the lines are

    top = max(box.y0_px, near.y0_px)
    bottom = min(box.y1_px, near.y1_px)
    lower = min(box.height_px, near.height_px)
    return (bottom - top) / lower


def transcript(found: Iterable[Box]) -> str:
    """Return the text of boxes in reading order: a space between boxes of a line, but for scripts
    that have none, and a line break between lines."""
    written = []
    for line in lines(found):
        with_text = [box for box in line if box.text.strip()]
        if with_text:
            written.append(_joined(with_text))
    return clean("\n".join(written))


def _joined(line: Sequence[Box]) -> str:
    text = line[0].text
    for before, box in pairwise(line):
        gap_px = max(box.x0_px - before.x1_px, before.x0_px - box.x1_px)
        # As wide as a character, a gap is one of a table, or of a blank that was meant.
        is_wide = gap_px > min(before.height_px, box.height_px)
        text += " " if is_wide else writing.blank_between(before.text.strip(), box.text.strip())
        text += box.text
    return text


def clean(text: str) -> str:
    """Return text as OCR is trained on it: NFC, no invisible characters, single blanks, no blank
    lines at the ends."""
    text = unicodedata.normalize("NFC", text)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = "".join(filter(_is_kept, text))
    stripped = []
    for line in text.split("\n"):
        line = _BLANK.sub(" ", line)
        stripped.append(line.strip())
    return "\n".join(stripped).strip("\n")


def _is_kept(character: str) -> bool:
    # Line breaks and tabs are controls too, so blanks are asked for first.
    if character.isspace() or character in _JOINERS:
        return True
    return unicodedata.category(character) not in _INVISIBLE
