"""Many small pictures on one sheet with what is said of them below, for a person to look over.

Invariant: the same pictures and captions give the same sheet.
"""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ...errors import DataError
from ...store.room import PART, writing

Cell = tuple[Path, str, str]  # picture, title, caption

_COLUMNS = 4
_CELL_WIDTH_PX = 320
_PICTURE_HEIGHT_PX = 110
_CAPTION_HEIGHT_PX = 30
_MARGIN_PX = 4
_FONT_PX = 11
_LINE_PX = 13

# A caption is shortened a letter at a time, and measuring is slow: what is certainly too long for
# a cell is cut off first.
_CAPTION_CHARS = 200


def draw(cells: Sequence[Cell], most: int = 60) -> Image.Image:
    """Return a sheet of at most so many cells, evenly chosen from all; a missing caption is said in
    red."""
    count = min(most, len(cells))
    rows = -(-count // _COLUMNS)
    row_px = _PICTURE_HEIGHT_PX + _CAPTION_HEIGHT_PX

    # A sheet of no cells is still a picture: Pillow does not save one of no height.
    height_px = max(1, rows) * row_px
    sheet = Image.new("RGB", (_COLUMNS * _CELL_WIDTH_PX, height_px), "white")
    pen = ImageDraw.Draw(sheet)
    for place in range(count):
        row, column = divmod(place, _COLUMNS)
        left = column * _CELL_WIDTH_PX
        top = row * row_px
        right = left + _CELL_WIDTH_PX - 1
        bottom = top + row_px - 1
        pen.rectangle([left, top, right, bottom], outline="lightgrey")

        # Evenly from all of them, as neighbours are often of one page.
        cell = cells[place * len(cells) // count]
        _fill(sheet, pen, left, top, cell)
    return sheet


def save(cells: Sequence[Cell], file: Path, most: int = 60) -> None:
    """Draw a sheet into a file, in the format that its name ends in. Raises DataError for a name
    that tells none, DiskFull."""
    kind = Image.registered_extensions().get(file.suffix.lower())
    if kind not in Image.SAVE:
        raise DataError(f"{file}: a contact sheet is a picture; let its name end in .png")
    # In memory first: Pillow's own writing loses what the system says of a full disk
    whole = io.BytesIO()
    draw(cells, most).save(whole, kind)
    part = file.with_name(file.name + PART)
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(whole.getvalue())
        part.replace(file)


def _fill(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    left: int,
    top: int,
    cell: Cell,
) -> None:
    path, title, caption = cell
    wide = _CELL_WIDTH_PX - 2 * _MARGIN_PX
    high = _PICTURE_HEIGHT_PX - 2 * _MARGIN_PX
    left += _MARGIN_PX
    with Image.open(path) as picture:
        picture.thumbnail((wide, high))
        sheet.paste(picture, (left, top + _MARGIN_PX))

    font = ImageFont.load_default(size=_FONT_PX)
    shown = caption.replace("\n", " / ")[:_CAPTION_CHARS]
    while font.getlength(shown) > wide:
        shown = shown.removesuffix("…")[:-1] + "…"
    # Of a title the end tells more: the beginning is often the same for all.
    while font.getlength(title) > wide:
        title = title[1:]

    title_top = top + _PICTURE_HEIGHT_PX
    pen.text((left, title_top), title, font=font, fill="grey")
    caption_top = title_top + _LINE_PX
    if shown:
        pen.text((left, caption_top), shown, font=font, fill="black")
    else:
        pen.text((left, caption_top), "(no transcript)", font=font, fill="red")
