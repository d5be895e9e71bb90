"""Boxes in a picture and the text in them: checked, scaled to Qwen3-VL's 0..1000, put in reading
order.

Invariant: a Box is x0 < x1, y0 < y1 inside the picture it was checked against, in that picture's
pixels; units of 0..1000 are integers with the same order, whatever the picture is resized to later.
"""

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

Size = tuple[float, float]  # width and height
UNITS = 1000  # Qwen3-VL's coordinates: thousandths of the picture's sides
_SAME_LINE = 0.5  # overlap in height, of the lower of two boxes, that puts them on one line
_BLANK = re.compile(r"[^\S\n]+")
_INVISIBLE = (
    "Cc",
    "Cf",
    "Cs",
)  # controls, format marks such as a BOM or a soft hyphen, lone surrogates
_JOINERS = "\u200c\u200d"  # format marks that Persian, Hindi and emoji are spelled with
_CORNERS = ("bbox", "bbox_2d", "box")


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


def read(raw: object, frame_px: Size, size_px: Size | None = None, form: str = "xyxy") -> list[Box]:
    """Return the boxes of a row, cut to a frame and scaled to a picture of another size, if given.
    Raises BadBox.

    raw is a list of {"bbox": corners, "label" and "text" if any} or of bare corners, in pixels of
    the frame; corners are [x0, y0, x1, y1] (with form xywh: x, y, width, height) or the points of a
    polygon, flat or in pairs.
    """
    if raw is None:
        return []
    if not isinstance(raw, list | tuple):
        raise BadBox(f"boxes are {type(raw).__name__}, a list was wanted")
    found = [_box(entry, *frame_px, form) for entry in raw]
    return found if size_px is None else [_scaled(box, frame_px, size_px) for box in found]


def frame(width: object, height: object, size_px: Size) -> Size:
    """Return the size that boxes are given for: what the row says, or else the upright picture's.
    Raises BadBox.

    They may differ in scale, as when a picture has been made smaller, and not in shape, as when it
    has been turned.
    """
    if not all(isinstance(side, int | float) and 0 < side < math.inf for side in (width, height)):
        return size_px
    # one pixel of rounding on either side
    if abs(width * size_px[1] - height * size_px[0]) > max(width, size_px[0]) + max(
        height, size_px[1]
    ):
        raise BadBox(
            f"width and height say {width:g} x {height:g}, the upright picture has {size_px[0]} x {size_px[1]} px, so "
            "boxes cannot be placed"
        )
    return width, height


def _box(entry: object, width_px: float, height_px: float, form: str) -> Box:
    about = entry if isinstance(entry, dict) else {"bbox": entry}
    corners = next((about[key] for key in _CORNERS if key in about), None)
    x0, y0, x1, y1 = _extent(corners, form)
    if x1 <= x0 or y1 <= y0:
        raise BadBox(f"{corners} has no area; [x0, y0, x1, y1] was wanted")
    x0, x1 = max(x0, 0.0), min(x1, width_px)
    y0, y1 = max(y0, 0.0), min(y1, height_px)
    if x1 <= x0 or y1 <= y0:
        raise BadBox(f"{corners} lies outside the picture of {width_px:g} x {height_px:g} px")
    label, text = about.get("label"), about.get("text")
    return Box(
        x0, y0, x1, y1, "" if label is None else str(label), "" if text is None else str(text)
    )


def _extent(corners: object, form: str) -> tuple[float, float, float, float]:
    try:
        flat = [
            float(n)
            for point in corners
            for n in (point if isinstance(point, list | tuple) else (point,))
        ]
    except (TypeError, ValueError):
        raise BadBox(f"{corners!r} is not a list of numbers") from None
    if len(flat) < 4 or len(flat) % 2 or not all(map(math.isfinite, flat)):
        raise BadBox(f"{corners!r} is neither [x0, y0, x1, y1] nor a polygon's points")
    if len(flat) == 4:
        x, y, *far = flat
        return (x, y, *far) if form == "xyxy" else (x, y, x + far[0], y + far[1])
    return min(flat[::2]), min(flat[1::2]), max(flat[::2]), max(flat[1::2])


def _scaled(box: Box, frame_px: Size, size_px: Size) -> Box:
    across, down = size_px[0] / frame_px[0], size_px[1] / frame_px[1]
    return replace(
        box,
        x0_px=box.x0_px * across,
        x1_px=box.x1_px * across,
        y0_px=box.y0_px * down,
        y1_px=box.y1_px * down,
    )


def cut(image: "Image", box: Box, padding: float = 0.0) -> "Image":
    """Return what a picture shows inside a box, and around it by a share of the box's height, as
    far as there is."""
    around_px = padding * box.height_px
    left, top = max(0, math.floor(box.x0_px - around_px)), max(0, math.floor(box.y0_px - around_px))
    right, bottom = math.ceil(box.x1_px + around_px), math.ceil(box.y1_px + around_px)
    return image.crop((left, top, min(image.width, right), min(image.height, bottom)))


def units(box: Box, width_px: float, height_px: float) -> list[int]:
    """Return [x0, y0, x1, y1] in thousandths of the picture, at least one unit wide and high."""
    x0, x1 = _span(box.x0_px, box.x1_px, width_px)
    y0, y1 = _span(box.y0_px, box.y1_px, height_px)
    return [x0, y0, x1, y1]


def _span(start: float, end: float, length: float) -> tuple[int, int]:
    low, high = round(start / length * UNITS), round(end / length * UNITS)
    if low == high:
        low, high = (low, high + 1) if high < UNITS else (low - 1, high)
    return low, high


def described(found: Sequence[Box], width_px: float, height_px: float) -> list[dict]:
    """Return [{"bbox_2d": units, "label": ...}], the label being the text where a box has no label."""
    return [
        {"bbox_2d": units(box, width_px, height_px), "label": box.label or box.text}
        for box in found
    ]


def hull(found: Sequence[Box]) -> Box:
    """Return the smallest box around all of these, without label or text."""
    return Box(
        min(box.x0_px for box in found),
        min(box.y0_px for box in found),
        max(box.x1_px for box in found),
        max(box.y1_px for box in found),
    )


def inside(found: Iterable[Box], outer: Box) -> list[Box]:
    """Return the boxes whose middle lies in another box."""
    middles = ((box, (box.x0_px + box.x1_px) / 2, (box.y0_px + box.y1_px) / 2) for box in found)
    return [
        box
        for box, x, y in middles
        if outer.x0_px <= x <= outer.x1_px and outer.y0_px <= y <= outer.y1_px
    ]


def as_json(entries: list[dict]) -> str:
    """Return boxes as the answer Qwen3-VL writes."""
    return json.dumps(entries, ensure_ascii=False)


def lines(found: Iterable[Box]) -> list[list[Box]]:
    """Return boxes as lines from top to bottom, each from left to right.

    A box joins the line that it overlaps in height by at least half of the lower of both, the best
    one first.
    """
    out: list[list[Box]] = []
    for box in sorted(found, key=lambda box: (box.y0_px + box.y1_px, box.x0_px)):
        best = max(out[-3:], key=lambda line: _overlap(box, line), default=None)
        if best is not None and _overlap(box, best) >= _SAME_LINE:
            best.append(box)
        else:
            out.append([box])
    return [sorted(line, key=lambda box: (box.x0_px, box.y0_px)) for line in out]


def _overlap(box: Box, line: list[Box]) -> float:
    """Return the shared height of a box and the box of a line that is nearest in x, of the lower of
    the two."""
    near = min(line, key=lambda other: max(other.x0_px - box.x1_px, box.x0_px - other.x1_px))
    shared = min(box.y1_px, near.y1_px) - max(box.y0_px, near.y0_px)
    beside = min(box.x1_px, near.x1_px) - max(box.x0_px, near.x0_px)
    if beside > 0.5 * min(box.width_px, near.width_px):
        return 0.0  # one above the other, however tight the lines are
    return shared / min(box.height_px, near.height_px)


def transcript(found: Iterable[Box]) -> str:
    """Return the text of boxes in reading order: a space between boxes of a line, a line break
    between lines."""
    written = (" ".join(box.text for box in line if box.text.strip()) for line in lines(found))
    return clean("\n".join(line for line in written if line))


def clean(text: str) -> str:
    """Return text as OCR is trained on it: NFC, no invisible characters, single blanks, no blank
    lines at the ends."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    text = "".join(
        c for c in text if c.isspace() or c in _JOINERS or unicodedata.category(c) not in _INVISIBLE
    )
    return "\n".join(_BLANK.sub(" ", line).strip() for line in text.split("\n")).strip("\n")
