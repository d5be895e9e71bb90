"""Boxes as other formats write them: as corners, a corner and a size, or a middle and a size; in
pixels, thousandths or fractions; with names beside them or in a list of their own.

Invariant: what is said of a format counts, and what contradicts it is a BadBox that names the
setting; nothing is guessed that another format would read as another box.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..drop_stats import shortened
from .boxes import UNITS, BadBox, Box

Size = tuple[float, float]  # width and height

# Where formats put corners, names and texts.
_CORNERS = ("bbox", "bbox_2d", "box", "bboxes", "boxes", "polygon", "points", "quad", "bndbox")
LABELS = (
    *("label", "category", "category_name", "class_name", "class", "name", "labels", "categories"),
    *("class_names", "classes", "names", "category_id", "class_id", "label_id"),
    "rectanglelabels",
)
TEXTS = ("text", "transcription", "word", "texts", "transcriptions", "words", "tokens")

# Corners under names of their own say which they are.
_NAMED = {
    "xyxy": (
        ("xmin", "ymin", "xmax", "ymax"),
        ("x_min", "y_min", "x_max", "y_max"),
        ("x0", "y0", "x1", "y1"),
        ("x1", "y1", "x2", "y2"),
        ("left", "top", "right", "bottom"),
    ),
    "xywh": (
        ("x", "y", "width", "height"),
        ("x", "y", "w", "h"),
        ("left", "top", "width", "height"),
    ),
    "cxcywh": (
        ("cx", "cy", "w", "h"),
        ("cx", "cy", "width", "height"),
        ("x_center", "y_center", "width", "height"),
    ),
}

# Qwen3-VL's own key, and Qwen2.5-VL's: thousandths for the one, pixels for the other.
_AMBIGUOUS = "bbox_2d"

# LabelMe has points of other shapes under the same name as those of a polygon.
_NO_AREAS = ("circle", "line", "linestrip", "point", "points")

# What Label Studio writes beside x, y, width and height, which it counts in hundredths.
_OF_HUNDREDTHS = ("original_width", "original_height", "rectanglelabels")

# Annotation tools let boxes reach over the edge a little, boxes of another scale reach far over it.
_OVER = 0.1

_SHOWN = 120  # characters of what is no box, in a message


@dataclass(frozen=True)
class BoxFault:
    """One entry of a row's boxes that is no box."""

    number: int  # of the entry, from 1
    of: int  # entries of the row
    detail: str
    lost_text: bool  # whether it says a text that no box has now

    def __str__(self) -> str:
        return f"box {self.number} of {self.of}: {self.detail}"


@dataclass(frozen=True)
class BoxFormat:
    """How a source writes its boxes."""

    form: str = "xyxy"  # xyxy, xywh or cxcywh
    units: str | None = None  # pixels, thousandths or fractions; None: nobody said, so pixels
    class_names: Sequence[str] = ()  # by number

    def frame(self, width: object, height: object, size_px: Size) -> Size:
        """Return the size that boxes are given for: that of their units, what the row says, or the
        upright picture's.

        A row's may differ from the picture's in scale, as when a picture has been made smaller, and
        not in shape, as when it has been turned. Raises BadBox.
        """
        if self.units == "thousandths":
            return UNITS, UNITS
        if self.units == "fractions":
            return 1, 1
        # Tables of text have numbers as text.
        width = _length(width)
        height = _length(height)
        if width is None or height is None:
            return size_px
        # Of layout models: every page is said to be 1000 by 1000.
        if width == height == UNITS:
            return width, height
        upright_width, upright_height = size_px
        # Shapes are compared by cross-multiplying, with one pixel of rounding on either side.
        apart = abs(width * upright_height - height * upright_width)
        rounding = max(width, upright_width) + max(height, upright_height)
        if apart > rounding:
            raise BadBox(
                f"width and height say {width:g} x {height:g}, the upright picture has "
                f"{upright_width} x {upright_height} px, so boxes cannot be placed"
            )
        return width, height

    def parse(self, raw: object, frame_px: Size, size_px: Size | None = None) -> list[Box]:
        """Return the boxes of a row as parse_each does. Raises BadBox for the first that is
        none."""
        found, faults = self.parse_each(raw, frame_px, size_px)
        for fault in faults:
            raise BadBox(str(fault))
        return found

    def parse_each(
        self,
        raw: object,
        frame_px: Size,
        size_px: Size | None = None,
        beside: Mapping[str, Sequence] | None = None,
        keep_text: bool = False,
    ) -> tuple[list[Box], list[BoxFault]]:
        """Return the boxes of a row, cut to a frame and scaled to a picture of another size, if
        given, and what is wrong with each of the others.

        raw is a list of {"bbox": corners, "label" and "text" if any}, of bare corners, or an object
        of such lists; `beside` has lists of as many labels and texts. Corners are four numbers in
        the format's form, the same under names, or the points of a polygon, flat or in pairs. With
        keep_text a box without area that has a text is a fault and stays, a pixel wide or high:
        what it says still has a place among the rest. Raises BadBox when raw is no such list.
        """
        entries = _entries(raw, beside or {})
        found = []
        faults = []
        for number, entry in enumerate(entries, 1):
            text = str(_first(entry, TEXTS) or "").strip()
            box: Box | None
            try:
                box = self._box(entry, frame_px)
            except BadBox as error:
                box = self._as_line(entry, frame_px) if keep_text and text else None
                fault = BoxFault(number, len(entries), str(error), bool(text) and box is None)
                faults.append(fault)
                if box is None:
                    continue
            if size_px is not None:
                box = _scaled(box, frame_px, size_px)
            found.append(box)
        return found, faults

    def _as_line(self, entry: Mapping, frame_px: Size) -> Box | None:
        """Return an entry without area as a box of one pixel across; None when that is not all that
        is wrong with it."""
        _, corners = _corners(entry)
        try:
            form, flat = _numbers(corners, self.form)
            x0, y0, x1, y1 = _extent(flat, form)
        except BadBox:
            return None
        width_px, height_px = frame_px
        is_inside = 0 <= x0 <= width_px and 0 <= y0 <= height_px
        if x1 < x0 or y1 < y0 or not is_inside:
            return None
        # A frame of fractions is 1 wide, and a thousandth of it is what a pixel would be.
        wide = min(1.0, width_px / UNITS)
        high = min(1.0, height_px / UNITS)
        x0 = min(x0, width_px - wide)
        y0 = min(y0, height_px - high)
        box = Box(x0, y0, min(width_px, max(x1, x0 + wide)), min(height_px, max(y1, y0 + high)))
        return self._described(box, entry)

    def _box(self, entry: Mapping, frame_px: Size) -> Box:
        _check_kind(entry)
        key, corners = _corners(entry)
        if key == _AMBIGUOUS and self.units is None and frame_px != (UNITS, UNITS):
            raise BadBox(
                f"{_AMBIGUOUS} is in thousandths for some models and in pixels for others; say "
                "which in dataset.box_units"
            )
        form, flat = _numbers(corners, self.form)
        x0, y0, x1, y1 = _extent(flat, form)
        if x1 <= x0 or y1 <= y0:
            raise BadBox(f"{_shown(corners)} has no area as {form}; see dataset.box_format")
        self._check_scale(corners, (x0, y0, x1, y1), frame_px)

        width_px, height_px = frame_px
        x0 = max(x0, 0.0)
        y0 = max(y0, 0.0)
        x1 = min(x1, width_px)
        y1 = min(y1, height_px)
        if x1 <= x0 or y1 <= y0:
            where = f"the picture of {width_px:g} x {height_px:g} px"
            raise BadBox(f"{_shown(corners)} lies outside {where}")
        return self._described(Box(x0, y0, x1, y1), entry)

    def _described(self, box: Box, entry: Mapping) -> Box:
        label = _first(entry, LABELS)
        if label is None:
            label = _only_label(entry)
        text = _first(entry, TEXTS)
        return replace(box, label=self._name(label), text="" if text is None else str(text))

    def _check_scale(
        self,
        corners: object,
        extent: tuple[float, float, float, float],
        frame_px: Size,
    ) -> None:
        """Raise BadBox for what cannot be in the units that it is said to be in."""
        width_px, height_px = frame_px
        units = self.units or "pixels"
        # Shares reach over an edge a little, too.
        if units == "pixels" and max(extent) <= 1 + _OVER < min(frame_px):
            raise BadBox(
                f"{_shown(corners)} is less than a pixel; where boxes are shares of the sides, set "
                "dataset.box_units to fractions"
            )
        x0, y0, x1, y1 = extent
        over = x1 > (1 + _OVER) * width_px or y1 > (1 + _OVER) * height_px
        # What reaches over two edges across from one another is drawn too large, on any scale.
        across = (x0 < 0 and x1 > width_px) or (y0 < 0 and y1 > height_px)
        if over and not across:
            raise BadBox(
                f"{_shown(corners)} reaches beyond {width_px:g} x {height_px:g}, so it is not in "
                f"{units} as {self.form}; set dataset.box_units or box_format, or give the width "
                "and height that boxes are of"
            )

    def _number(self, label: object) -> object:
        """Return the number of a class that a table has as text or with a point; others as they
        are."""
        if not self.class_names or label in self.class_names:
            return label
        if isinstance(label, float) and label.is_integer():
            return int(label)
        if isinstance(label, str) and label.strip().isdecimal():
            return int(label)
        return label

    def _name(self, label: object) -> str:
        if label is None:
            return ""
        label = self._number(label)
        if isinstance(label, bool) or not isinstance(label, int):
            return str(label)
        if not self.class_names:
            return str(label)
        if not 0 <= label < len(self.class_names):
            raise BadBox(
                f"class {label} has no name: dataset.class_names has {len(self.class_names)}, "
                "the first is that of class 0"
            )
        return self.class_names[label]


def _length(value: object) -> float | None:
    """Return a side's length, also of a text; None for what is none."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if 0 < found < math.inf else None


def _check_kind(entry: Mapping) -> None:
    """Raise BadBox for what stands among boxes and marks something else."""
    if entry.get("shape_type") in _NO_AREAS:
        raise BadBox(f"a {entry['shape_type']} is no box; draw a rectangle or polygon around it")
    if entry.get("iscrowd") in (1, True):
        raise BadBox("it marks a crowd (iscrowd), which is no single object")
    if any(key in entry for key in _OF_HUNDREDTHS):
        raise BadBox(
            "Label Studio counts boxes in hundredths of the sides; divide by 100, leave out "
            f"{' and '.join(_OF_HUNDREDTHS[:2])} and set dataset.box_units to fractions"
        )


def _entries(raw: object, beside: Mapping[str, Sequence]) -> list[Mapping]:
    """Return boxes as an object each, with what lists beside them say. Raises BadBox."""
    if raw is None:
        return []
    if isinstance(raw, Mapping):
        return _transposed(raw)
    if not isinstance(raw, list | tuple):
        raise BadBox(
            f"boxes are {type(raw).__name__}, a list was wanted; write them as JSON, as in "
            "[[x0, y0, x1, y1]], and a row for each picture"
        )
    # One box as four bare numbers.
    if len(raw) == 4 and all(map(_is_number, raw)):
        raw = [raw]
    for key, values in beside.items():
        if len(values) != len(raw):
            raise BadBox(f"there are {len(raw)} boxes and {len(values)} in {key} beside them")
    entries: list[Mapping] = []
    for number, entry in enumerate(raw):
        about = dict(entry) if isinstance(entry, Mapping) else {"bbox": entry}
        for key, values in beside.items():
            about.setdefault(key, values[number])
        entries.append(about)
    return entries


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _transposed(raw: Mapping) -> list[Mapping]:
    """Return an object of lists, one entry a box, as a list of objects. Raises BadBox."""
    key, corners = _corners(raw)
    if not isinstance(corners, list | tuple) or any(map(_is_number, corners)):
        raise BadBox("boxes are one object, a list of boxes was wanted")
    columns = {}
    for name, values in raw.items():
        if isinstance(values, list | tuple):
            if name in (*LABELS, *TEXTS) and len(values) != len(corners):
                raise BadBox(f"{key} has {len(corners)} boxes and {name} {len(values)} entries")
            if len(values) == len(corners):
                columns[name] = values
    return [
        {name: values[number] for name, values in columns.items()} for number in range(len(corners))
    ]


def _corners(entry: Mapping) -> tuple[str, object]:
    """Return the key that corners are under, "" for names of their own, and the corners."""
    for key in _CORNERS:
        if entry.get(key) is not None:
            return key, entry[key]
    return "", entry


def _first(entry: Mapping, keys: Iterable[str]) -> object:
    """Return what stands under the first of some keys that an entry has."""
    for key in keys:
        value = entry.get(key)
        if value is not None and not isinstance(value, list | tuple | dict):
            return value
    return None


def _only_label(entry: Mapping) -> object:
    """Return the label of an entry that has it in a list, or in an object of its own; None where it
    has none. Raises BadBox for several."""
    for key in LABELS:
        value = entry.get(key)
        if isinstance(value, list | tuple) and value:
            if len(value) > 1:
                raise BadBox(f"it has {len(value)} labels in {key}, one was wanted")
            value = value[0]
        if isinstance(value, Mapping):
            value = _first(value, ("name", "label", "id"))
        if value is not None and not isinstance(value, list | tuple):
            return value
    return None


def _numbers(corners: object, form: str) -> tuple[str, list[float]]:
    """Return the form of corners and their numbers, points taken apart. Raises BadBox."""
    if isinstance(corners, Mapping):
        form, corners = _named(corners)
    flat: list[float] = []
    in_points = 0
    try:
        if isinstance(corners, str) or not isinstance(corners, Iterable):
            raise TypeError
        for point in corners:
            if isinstance(point, list | tuple):
                flat.extend(float(number) for number in point)
                in_points += 1
            elif isinstance(point, Mapping):
                flat += [float(point["x"]), float(point["y"])]
                in_points += 1
            else:
                flat.append(float(point))
    except (TypeError, ValueError, KeyError, OverflowError):
        raise BadBox(f"{_shown(corners)} is not a list of numbers") from None
    in_pairs = len(flat) >= 4 and len(flat) % 2 == 0
    if not in_pairs or not all(map(math.isfinite, flat)):
        raise BadBox(f"{_shown(corners)} is neither four numbers nor a polygon's points")
    if in_points == 2 and len(flat) == 4:
        # Two opposite corners, in the order in which somebody drew them.
        xs = sorted(flat[::2])
        ys = sorted(flat[1::2])
        return "xyxy", [xs[0], ys[0], xs[1], ys[1]]
    return form, flat


def _shown(corners: object) -> str:
    return shortened(repr(corners), _SHOWN)


def _named(corners: Mapping) -> tuple[str, list]:
    """Return the form and the values of corners under names. Raises BadBox."""
    # Some write XMin.
    by_name = {str(name).lower(): value for name, value in corners.items()}
    for form, spellings in _NAMED.items():
        for names in spellings:
            if all(by_name.get(name) is not None for name in names):
                return form, [by_name[name] for name in names]
    known = ", ".join(map(str, corners))
    raise BadBox(
        f"no corners are among {known}; name them {_CORNERS[0]} (four numbers) or "
        f"{' '.join(_NAMED['xyxy'][0])}"
    )


def _extent(flat: Sequence[float], form: str) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of four numbers in a form, or of a polygon's points."""
    if len(flat) > 4:
        # Of a polygon, the box around it: x and y take turns.
        xs = flat[::2]
        ys = flat[1::2]
        return min(xs), min(ys), max(xs), max(ys)
    x, y, far_x, far_y = flat
    if form == "xyxy":
        return x, y, far_x, far_y
    if form == "xywh":
        return x, y, x + far_x, y + far_y
    return x - far_x / 2, y - far_y / 2, x + far_x / 2, y + far_y / 2


def _scaled(box: Box, frame_px: Size, size_px: Size) -> Box:
    width_px, height_px = size_px
    frame_width_px, frame_height_px = frame_px
    across = width_px / frame_width_px
    down = height_px / frame_height_px
    return replace(
        box,
        x0_px=box.x0_px * across,
        x1_px=box.x1_px * across,
        y0_px=box.y0_px * down,
        y1_px=box.y1_px * down,
    )
