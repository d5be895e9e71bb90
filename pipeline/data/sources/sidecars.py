"""Text files beside pictures: an answer, or what sets for detection and OCR write there instead,
known by its lines."""

import re

from . import SkippedRow

_NUMBER = r"-?\d+(?:\.\d+)?"

# Of ICDAR and SROIE: the four corners of a line of text, and the text.
_CORNERS_AND_TEXT = re.compile(rf"((?:{_NUMBER}\s*,\s*){{7}}{_NUMBER})\s*,\s*(\S.*)?")
# Of ICDAR 2013: left, top, right, bottom and the text, in quotes where blanks stand between.
_BOX_AND_TEXT = re.compile(
    rf'((?:{_NUMBER}\s*,\s*){{3}}{_NUMBER})\s*,\s*("?[^\d\s,].*)|((?:{_NUMBER}\s+){{4}})(".*")'
)
# Of DOTA: corners, a class, how hard it is.
_CORNERS_AND_CLASS = re.compile(rf"((?:{_NUMBER}\s+){{8}})([A-Za-z]\S*)\s+[0-2]")
# Of YOLO: the number of a class, then a middle and a size, or a polygon's points, as fractions.
_FRACTION = r"(?:[01](?:\.\d+)?|\.\d+|\d(?:\.\d+)?e-\d+)"
_CLASS_AND_FRACTIONS = re.compile(rf"(\d+)((?:\s+{_FRACTION}){{4,}})")

# Illegible, as ICDAR marks it.
_ILLEGIBLE = "###"

# Files of other kinds under the name of a text.
_OTHERS = (
    (re.compile(r"\A\s*(?:<\?xml|<annotation\b|<alto\b|<PcGts\b)"), "XML"),
    (re.compile(r"\A\s*<!DOCTYPE html[\s\S]*class=['\"]ocr_", re.I), "hOCR"),
    (re.compile(r"\A\{\\rtf"), "rich text"),
    (re.compile(r"\Alevel\tpage_num\t"), "a table of Tesseract's"),
    (re.compile(r"\Aversion https://git-lfs"), "a pointer of Git LFS, not the file; fetch it"),
    (re.compile(r"\x00"), "bytes that are no text"),
)


def columns(name: str, text: str) -> dict | SkippedRow:
    """Return the columns that a text file beside a picture gives: its answer, or boxes where its
    lines are those of a format of boxes; why it gives none otherwise."""
    for pattern, what in _OTHERS:
        if pattern.search(text):
            return SkippedRow(
                "annotation of another format",
                f"{name} holds {what}; a plain text is an answer, and a .json beside the picture "
                "has columns of any name",
            )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for read in (_corners_and_text, _box_and_text, _corners_and_class, _class_and_fractions):
        boxes = [read(line) for line in lines]
        known = sum(box is not None for box in boxes)
        # A text has at most single lines that look so.
        if not lines or 5 * known < 4 * len(lines):
            continue
        if known < len(lines):
            odd = lines[boxes.index(None)]
            detail = f"{name}: {odd[:60]!r} is not written as its other {known} lines of boxes are"
            return SkippedRow("bad annotation", detail)
        return {"boxes": boxes}
    return {"answer": text}


def _corners_and_text(line: str) -> dict | None:
    found = _CORNERS_AND_TEXT.fullmatch(line)
    if found is None:
        return None
    return {"bbox": _numbers(found[1]), "text": _legible(found[2] or "")}


def _box_and_text(line: str) -> dict | None:
    found = _BOX_AND_TEXT.fullmatch(line)
    if found is None:
        return None
    # By name, so that no setting reads them otherwise.
    x0, y0, x1, y1 = _numbers(found[1] or found[3])
    named = {"xmin": x0, "ymin": y0, "xmax": x1, "ymax": y1}
    return {"bbox": named, "text": _legible(_unquoted(found[2] or found[4]))}


def _corners_and_class(line: str) -> dict | None:
    found = _CORNERS_AND_CLASS.fullmatch(line)
    if found is None:
        return None
    return {"bbox": _numbers(found[1]), "label": found[2]}


def _class_and_fractions(line: str) -> dict | None:
    found = _CLASS_AND_FRACTIONS.fullmatch(line)
    if found is None:
        return None
    numbers = _numbers(found[2])
    box: dict = {"label": int(found[1]), "bbox": numbers}
    if len(numbers) in (4, 5):
        # The fifth is how sure a detector was.
        cx, cy, w, h = numbers[:4]
        box["bbox"] = {"cx": cx, "cy": cy, "w": w, "h": h}
    return box


def _numbers(text: str) -> list[float]:
    return [float(number) for number in re.split(r"[\s,]+", text.strip())]


def _unquoted(text: str) -> str:
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] == '"':
        return text[1:-1]
    return text


def _legible(text: str) -> str:
    return "" if text.strip() == _ILLEGIBLE else text.strip()
