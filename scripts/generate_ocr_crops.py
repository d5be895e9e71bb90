"""Cuts text-heavy regions out of images into OCR examples: a folder that `source: jsonl, ocr: true`
reads as it is.

Invariant: the same images and settings give the same bytes, whatever the number of workers; all
crops of an image carry its group, so preprocess never spreads them over two splits.
"""

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from PIL import Image

from pipeline.data.images import boxes, contact_sheet, images, text_regions
from pipeline.data.images.boxes import Box
from pipeline.errors import ConfigError, DataError, PipelineError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
CROPS, BARE, IMAGES = "crops.jsonl", "untranscribed.jsonl", "images"
_ABOUT = """
Two ways to find regions:
  boxes     the input has them: JSON lines with {"image": path, "boxes": [{"bbox": [x0, y0, x1, y1], "text": ...}]},
            corners in pixels (as fractions of width and height where the row gives those); rows without boxes are
            left out. The transcript of a region is the text of its boxes in reading order.
  detector  they are found by ink and strokes, without a model or a network; good for print on a plain ground. Where
            the input has boxes too, a region takes the text of those inside it; a region without any goes to
            untranscribed.jsonl, to be labelled by hand.

Examples:
  # every line of each receipt, 48 px high, with its transcript
  python scripts/generate_ocr_crops.py receipts/annotations.jsonl crops --size 48
  # the three most text-heavy blocks of four lines, a tenth of their height around them, and a picture to look at
  python scripts/generate_ocr_crops.py receipts/annotations.jsonl crops --lines 4 --count 3 --padding 0.1 \\
      --contact-sheet sheet.png
  # a folder of scans without any boxes
  python scripts/generate_ocr_crops.py scans crops --by detector --workers 4

Then, in loras.json:
  {"name": "ocr", ..., "prompt": "{prompt}", "metric": "cer",
   "dataset": {"source": "jsonl", "path": "crops/crops.jsonl", "ocr": true}}
"""


@dataclass(frozen=True)
class Settings:
    """How regions are chosen and cut."""

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


@dataclass(frozen=True)
class Page:
    """One image to cut crops from, and what is known about it."""

    number: int
    where: str
    image: str
    row: dict


@dataclass(frozen=True)
class Region:
    """A region to be cut out."""

    box: Box
    lines: int
    text: str
    weight: float  # how much text there is: characters, or strokes where nothing is transcribed


def main(words: list[str] | None = None) -> int:
    """Do what the command line says; return its exit status."""
    asked = _arguments(words)
    try:
        return generate(asked)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def generate(asked: argparse.Namespace) -> int:
    """Cut the crops of every image, write rows, report and contact sheet. Raises ConfigError,
    DataError."""
    settings = Settings(**{name: getattr(asked, name) for name in Settings.__dataclass_fields__})
    output = Path(asked.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(
            f"{output} is not an empty folder; give another output, or remove it first"
        )
    pages, root = (
        list(_pages(Path(asked.input), asked.image_field)),
        _root(Path(asked.input), asked.image_root),
    )
    if not pages:
        raise DataError(
            f"{asked.input} has no image; a JSON lines file or a folder of images was wanted"
        )
    (output / IMAGES).mkdir(parents=True, exist_ok=True)
    cut = partial(_cut, settings=settings, root=root, output=output)
    dropped, examples, rows = Counter(), {}, []
    with (
        open(output / CROPS, "w", encoding="utf-8") as crops,
        open(output / BARE, "w", encoding="utf-8") as bare,
    ):
        for page, (made, problems) in zip(pages, _among(cut, pages, asked.workers), strict=True):
            for row in made:
                (crops if row["answer"] else bare).write(json.dumps(row, ensure_ascii=False) + "\n")
            rows += made
            dropped.update(reason for reason, _ in problems)
            for reason, detail in problems:
                examples.setdefault(reason, f"{page.where}: {detail}")
    _conclude(asked, settings, output, len(pages), rows, dropped, examples)
    return 0


def _conclude(
    asked: argparse.Namespace,
    settings: Settings,
    output: Path,
    pages: int,
    rows: list[dict],
    dropped: Counter,
    examples: dict,
) -> None:
    bare = sum(not row["answer"] for row in rows)
    if not bare:
        (output / BARE).unlink()
    about = {
        "settings": asdict(settings),
        "images": pages,
        "crops": len(rows),
        "untranscribed": bare,
        "dropped": dict(sorted(dropped.items())),
        "examples": dict(sorted(examples.items())),
    }
    (output / "report.json").write_text(
        json.dumps(about, indent=1, ensure_ascii=False) + "\n", "utf-8"
    )
    if asked.contact_sheet and rows:
        cells = [(output / row["image"], row["id"], row["answer"]) for row in rows]
        contact_sheet.draw(cells, asked.sheet_crops).save(asked.contact_sheet)
    print(f"{len(rows)} crops of {pages} images in {output}, {bare} of them without a transcript")
    for reason, count in dropped.most_common():
        print(f"  dropped: {count} {reason} ({examples[reason]})")
    if not rows:
        raise DataError(
            f"no region of {asked.input} was kept; loosen --min-height, --min-chars, or try --by detector"
        )


def _pages(source: Path, image_field: str) -> Iterator[Page]:
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
        names = (path.relative_to(source).as_posix() for path in files)
        yield from (Page(number, name, name, {}) for number, name in enumerate(names))
        return
    try:
        text = source.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source} cannot be read: {error}") from None
    seen = {}
    for line_number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row = _parsed(line, f"{source}:{line_number}")
        image = row.get(image_field)
        if not isinstance(image, str):
            raise DataError(
                f"{source}:{line_number} has no path under {image_field!r}; set --image-field"
            )
        if image not in seen or (row.get("boxes") and not seen[image].row.get("boxes")):
            number = (
                seen[image].number if image in seen else len(seen)
            )  # several questions about one image
            seen[image] = Page(number, f"{source.name}:{line_number}", image, row)
    yield from seen.values()


def _parsed(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: an object was wanted, found {type(row).__name__}")
    return row


def _root(source: Path, given: str | None) -> Path:
    return Path(given) if given else source if source.is_dir() else source.parent


def _among(cut: partial, pages: list[Page], workers: int) -> Iterator:
    if workers <= 1:
        yield from map(cut, pages)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield from pool.map(cut, pages, chunksize=4)


def _cut(
    page: Page, settings: Settings, root: Path, output: Path
) -> tuple[list[dict], list[tuple[str, str]]]:
    """Write the crops of one image; return their rows and (reason, detail) of what was dropped."""
    try:
        image = images.open_checked(page.image, root)
    except images.BadImage as error:
        return [], [(error.reason, str(error))]
    try:
        given = _given(page, image)
    except boxes.BadBox as error:
        return [], [("bad box", str(error))]
    if settings.by == "boxes" and not given:
        return [], [("no boxes", "use --by detector for such images")]
    found = (
        _from_boxes(given, settings)
        if settings.by == "boxes"
        else _detected(image, given, settings)
    )
    kept, dropped = _filtered(found, settings)
    chosen = _chosen(kept, settings, page)
    group = f"sha256:{images.digest(image)}"
    return [
        _write(page, number, each, image, group, settings, output)
        for number, each in enumerate(chosen)
    ], dropped


def _given(page: Page, image: Image.Image) -> list[Box]:
    """Return the row's boxes in the upright image's pixels."""
    frame_px = boxes.frame(page.row.get("width"), page.row.get("height"), image.size)
    return boxes.parse(page.row.get("boxes"), frame_px, image.size)


def _from_boxes(given: list[Box], settings: Settings) -> list[Region]:
    """Return regions of so many lines each, every given box by itself when lines is 0."""
    lines = boxes.lines(given)
    if not settings.lines:
        return [_region([[box]]) for line in lines for box in line]
    return [
        _region(lines[first : first + settings.lines])
        for first in range(0, len(lines), settings.lines)
    ]


def _detected(image: Image.Image, given: list[Box], settings: Settings) -> list[Region]:
    """Return regions that ink and strokes show, widened to the given boxes that they hold the
    middle of."""
    strokes = {each.box: each.strokes for each in text_regions.find(image, settings.min_height_px)}
    out = []
    for each in _from_boxes(list(strokes), settings):
        held = boxes.inside(given, each.box)
        weight = sum(strokes[box] for box in boxes.inside(strokes, each.box))
        out.append(
            Region(boxes.hull([each.box, *held]), each.lines, boxes.transcript(held), weight)
        )
    return out


def _region(lines: list[list[Box]]) -> Region:
    text = "\n".join(filter(None, (boxes.transcript(line) for line in lines)))
    return Region(boxes.hull([box for line in lines for box in line]), len(lines), text, len(text))


def _filtered(
    found: list[Region], settings: Settings
) -> tuple[list[Region], list[tuple[str, str]]]:
    kept, dropped = [], []
    for each in found:
        chars, height_px = len(each.text), each.box.height_px / each.lines
        if height_px < settings.min_height_px:
            dropped.append(
                (
                    "too low",
                    f"{height_px:.0f} px a line, --min-height is {settings.min_height_px:g}",
                )
            )
        elif settings.by == "boxes" and not chars:
            dropped.append(("no text", "its boxes have none"))
        elif chars and not settings.min_chars <= chars <= settings.max_chars:
            dropped.append(
                (
                    "wrong length",
                    f"{chars} characters, {settings.min_chars} to {settings.max_chars} wanted",
                )
            )
        else:
            kept.append(each)
    return kept, dropped


def _chosen(kept: list[Region], settings: Settings, page: Page) -> list[Region]:
    """Return the regions to cut, in reading order."""
    if not settings.count or len(kept) <= settings.count:
        return kept
    order = list(range(len(kept)))
    if settings.pick == "random":
        random.Random(f"{settings.seed}:{page.image}").shuffle(order)
    else:
        order.sort(key=lambda i: -kept[i].weight)
    return [kept[i] for i in sorted(order[: settings.count])]


def _write(
    page: Page,
    number: int,
    region: Region,
    image: Image.Image,
    group: str,
    settings: Settings,
    output: Path,
) -> dict:
    crop = boxes.crop(image, region.box, settings.padding / region.lines)
    if settings.size_px:
        high = settings.size_px * region.lines
        crop = crop.resize(
            (max(1, round(crop.width * high / crop.height)), high), Image.Resampling.LANCZOS
        )
    name = f"{IMAGES}/{page.number:06d}-{number:03d}.png"
    (output / name).write_bytes(images.png(crop))
    row = {
        "id": f"{page.row.get('id', page.image)}/{number}",
        "image": name,
        "prompt": settings.prompt,
        "answer": region.text,
        "width": crop.width,
        "height": crop.height,
        "group": group,
    }
    if page.row.get("split"):
        row["split"] = page.row["split"]
    box = [
        round(x, 1)
        for x in (region.box.x0_px, region.box.y0_px, region.box.x1_px, region.box.y1_px)
    ]
    return row | {"from": {"image": page.image, "bbox": box}}


def _arguments(words: list[str] | None) -> argparse.Namespace:
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
    add("--contact-sheet", help="also write this PNG, to look at")
    add("--sheet-crops", type=_whole, default=60, help="crops on it (default 60)")
    add("--workers", type=_whole, default=1, help="processes; the result is the same (default 1)")
    return parser.parse_args(words)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return value


if __name__ == "__main__":
    sys.exit(main())
