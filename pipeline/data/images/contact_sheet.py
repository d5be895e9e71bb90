"""Many small pictures on one sheet with what is said of them below, for a person to look over.

Invariant: the same pictures and captions give the same sheet.
"""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_CELL_PX = (320, 110)
_CAPTION_PX = 30
_COLUMNS = 4
_CHARS = 200  # of a caption that are looked at
Cell = tuple[Path, str, str]  # picture, title, caption


def draw(cells: Sequence[Cell], most: int = 60) -> Image.Image:
    """Return a sheet of at most so many cells, evenly chosen from all; a missing caption is said in
    red."""
    count = min(most, len(cells))
    shown = [cells[i * len(cells) // count] for i in range(count)]
    wide, step = _CELL_PX[0], _CELL_PX[1] + _CAPTION_PX
    sheet = Image.new("RGB", (_COLUMNS * wide, max(1, -(-count // _COLUMNS)) * step), "white")
    pen = ImageDraw.Draw(sheet)
    for place, cell in enumerate(shown):
        corner = place % _COLUMNS * wide, place // _COLUMNS * step
        pen.rectangle([*corner, corner[0] + wide - 1, corner[1] + step - 1], outline="lightgrey")
        _fill(sheet, pen, corner, cell)
    return sheet


def _fill(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, corner: tuple[int, int], cell: Cell
) -> None:
    (x, y), (path, title, caption), font = corner, cell, ImageFont.load_default(size=11)
    wide, high = _CELL_PX
    with Image.open(path) as picture:
        picture.thumbnail((wide - 8, high - 8))
        sheet.paste(picture, (x + 4, y + 4))
    said = caption.replace("\n", " / ")[:_CHARS]
    while font.getlength(said) > wide - 8:
        said = said.removesuffix("…")[:-1] + "…"
    while font.getlength(title) > wide - 8:
        title = title[1:]
    pen.text((x + 4, y + high), title, font=font, fill="grey")
    pen.text(
        (x + 4, y + high + 13),
        said or "(no transcript)",
        font=font,
        fill="black" if said else "red",
    )
