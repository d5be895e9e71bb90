"""The command line of generate_ocr_crops.py."""

import argparse
from dataclasses import dataclass

_ABOUT = """
Two ways to find regions:
  boxes     the input has them: JSON lines (or an array, or a table) with
            {"image": path, "boxes": [{"bbox": [x0, y0, x1, y1], "text": ...}]},
            corners in pixels (as fractions of width and height where the row gives those); rows
            without boxes are left out. The transcript of a region is the text of its boxes in
            reading order.
  detector  they are found by ink and strokes, without a model or a network; good for print on a
            plain ground. Where the input has boxes too, a region takes the text of those inside
            it; a region without any goes to untranscribed.jsonl, to be labelled by hand.

Examples:
  # every line of each receipt, 48 px high, with its transcript
  python scripts/generate_ocr_crops.py receipts/annotations.jsonl crops --size 48
  # the three most text-heavy blocks of four lines, a tenth of their height around them, and a
  # picture to look at
  python scripts/generate_ocr_crops.py receipts/annotations.jsonl crops --lines 4 --count 3 \\
      --padding 0.1 --contact-sheet sheet.png
  # a folder of scans without any boxes
  python scripts/generate_ocr_crops.py scans crops --by detector --workers 4

Then, in loras.json:
  {"name": "ocr", ..., "prompt": "{prompt}", "metric": "cer",
   "dataset": {"source": "jsonl", "path": "crops/crops.jsonl", "ocr": true}}
"""


@dataclass(frozen=True)
class Settings:
    """How regions are chosen and cut; each field is the option of the command line."""

    by: str  # boxes or detector
    lines: int  # per crop; 0: each box or region by itself
    size_px: int  # height per line; 0: as cut
    padding: float  # share of a line's height
    count: int  # most crops of an image; 0: all
    pick: str  # most or random
    seed: int
    min_height_px: float
    min_chars: int
    max_chars: int
    prompt: str


def arguments(words: list[str] | None) -> argparse.Namespace:
    """Return what a command line says; the fields of Settings among it."""
    parser = argparse.ArgumentParser(
        description="Cut text-heavy regions out of images into OCR examples.",
        epilog=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "input",
        help="JSON lines with images and, for --by boxes, their boxes; or a folder of images",
    )
    add("output", help="new folder for crops.jsonl, images/ and report.json")
    add(
        "--by",
        choices=("boxes", "detector"),
        default="boxes",
        help="what finds the regions (default boxes)",
    )
    add(
        "--lines",
        type=_whole,
        default=1,
        help="text lines per crop; 0: each box by itself (default 1)",
    )
    add(
        "--size",
        dest="size_px",
        type=_whole,
        default=0,
        help="height of a line in px; 0: as it is (default)",
    )
    add(
        "--padding",
        type=_amount,
        default=0.15,
        help="what is kept around it, share of a line's height (.15)",
    )
    add("--count", type=_whole, default=0, help="most crops of an image; 0: all (default)")
    add(
        "--pick",
        choices=("most", "random"),
        default="most",
        help="which of them: those with most text (default)",
    )
    add("--seed", type=int, default=0, help="seed of --pick random (default 0)")
    add(
        "--min-height",
        dest="min_height_px",
        type=_amount,
        default=8,
        help="least height of a line, px (default 8)",
    )
    add("--min-chars", type=_whole, default=1, help="shortest transcript (default 1)")
    add("--max-chars", type=_whole, default=4000, help="longest transcript (default 4000)")
    add("--prompt", default="Read the text in the image.", help="prompt of every row")
    add("--image-field", default="image", help="key of the image's path (default image)")
    add(
        "--image-root",
        help="folder that image paths start at and stay in (default: that of the input)",
    )
    add(
        "--max-bad-share",
        type=_amount,
        default=0.05,
        help="share of bad images or boxes above which it ends in an error (default .05)",
    )
    add("--contact-sheet", help="also write this PNG, to look at")
    add("--sheet-crops", type=_whole, default=60, help="crops on it (default 60)")
    add("--workers", type=_whole, default=1, help="processes; the result is the same (default 1)")
    return parser.parse_args(words)


def _whole(text: str) -> int:
    # int() would also take -1 and 1_000.
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    # The upper end is for inf, which float() takes too.
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return value
