"""Cuts text-heavy regions out of images into OCR examples: a folder that `source: jsonl, ocr: true`
reads as it is.

Invariant: the same images and settings give the same bytes, whatever the number of workers; all
crops of an image carry its group, so preprocess never spreads them over two splits.
"""

import argparse
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from multiprocessing import get_context
from pathlib import Path

# Run by its path, so that the folder above is not where Python looks for modules.
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from PIL import Image

from pipeline.data.drop_stats import DropStats
from pipeline.data.images import boxes, contact_sheet, images, text_regions
from pipeline.data.images.box_formats import BoxFault, BoxFormat
from pipeline.data.images.boxes import Box
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.store.artifacts import write_text
from pipeline.store.room import PART, writing
from scripts.ocr_options import Settings, arguments
from scripts.ocr_pages import Page, read_pages

IMAGES = "images"
CROPS = "crops.jsonl"
UNTRANSCRIBED = "untranscribed.jsonl"

# A region is dropped, or a whole image: the reason, for counting, and the detail.
Dropped = tuple[str, str]

# Not faults of the input: they come of what is asked for.
_HARMLESS = ("no boxes", "no text", "too low", "wrong length")


@dataclass
class CutPage:
    """What became of a page."""

    rows: list[dict] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    boxes: int = 0  # that its row has
    bad_boxes: list[str] = field(default_factory=list)  # what is wrong with some of them


@dataclass(frozen=True)
class Region:
    """A region to be cut out."""

    box: Box
    lines: int
    text: str
    weight: float  # how much text there is: characters, or strokes where nothing is transcribed


def main(words: list[str] | None = None) -> int:
    """Do what the command line says; return its exit status."""
    asked = arguments(words)
    try:
        generate(asked)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def generate(asked: argparse.Namespace) -> None:
    """Cut the crops of every image, write rows, report and contact sheet. Raises ConfigError,
    DataError, DiskFull."""
    settings = Settings(**{each.name: getattr(asked, each.name) for each in fields(Settings)})
    source = Path(asked.input)
    output = Path(asked.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(
            f"{output} is not an empty folder; give another output, or remove it first"
        )
    stats = DropStats(_HARMLESS)
    box_stats = DropStats()
    pages = list(read_pages(source, asked.image_field, stats))
    if not pages and not stats.total:
        raise DataError(
            f"{asked.input} has no image; a JSON lines file or a folder of images was wanted"
        )
    # Under another name until it is whole, so that the same command begins again after it was ended
    part = output.with_name(output.name + PART)
    shutil.rmtree(part, ignore_errors=True)
    with writing(part):
        rows = _cut_all(asked, settings, pages, part, stats, box_stats)
        _write_report(settings, part, rows, stats, box_stats)
        part.rename(output)
    _finish(asked, output, rows, stats, box_stats)


def _cut_all(
    asked: argparse.Namespace,
    settings: Settings,
    pages: list[Page],
    output: Path,
    stats: DropStats,
    box_stats: DropStats,
) -> list[dict]:
    """Write the crops of all pages and their rows, count what is dropped; return the rows."""
    (output / IMAGES).mkdir(parents=True)
    root = _root(Path(asked.input), asked.image_root)
    cut = partial(_cut, settings=settings, root=root, output=output)
    rows: list[dict] = []
    with (
        open(output / CROPS, "w", encoding="utf-8") as crops,
        open(output / UNTRANSCRIBED, "w", encoding="utf-8") as untranscribed,
    ):
        # In the order of pages, whoever cut them: the number of workers changes nothing.
        for page, found in zip(pages, _mapped(cut, pages, asked.workers), strict=True):
            for row in found.rows:
                file = crops if row["answer"] else untranscribed
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            rows += found.rows
            for reason, detail in found.dropped:
                stats.drop(reason, page.where, detail)
            box_stats.seen += found.boxes
            for detail in found.bad_boxes:
                box_stats.drop("bad box", page.where, detail)
    return rows


def _write_report(
    settings: Settings,
    output: Path,
    rows: list[dict],
    stats: DropStats,
    box_stats: DropStats,
) -> None:
    bare = sum(not row["answer"] for row in rows)
    if not bare:
        (output / UNTRANSCRIBED).unlink()
    about = {
        "settings": asdict(settings),
        "images": stats.seen,
        "crops": len(rows),
        "untranscribed": bare,
        "dropped": dict(sorted(stats.counts.items())),
        "examples": dict(sorted(stats.examples.items())),
        "boxes": box_stats.as_json(),
    }
    report = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
    write_text(output / "report.json", report)


def _finish(
    asked: argparse.Namespace,
    output: Path,
    rows: list[dict],
    stats: DropStats,
    box_stats: DropStats,
) -> None:
    """Draw the contact sheet, print what was done. Raises DataError when no region was kept, or too
    much of the input is bad, and DiskFull."""
    if asked.contact_sheet and rows:
        cells = [(output / row["image"], row["id"], row["answer"]) for row in rows]
        contact_sheet.save(cells, Path(asked.contact_sheet), asked.sheet_crops)
    bare = sum(not row["answer"] for row in rows)
    print(f"{len(rows)} crops of {stats.seen} images in {output}, {bare} without a transcript")
    for each in (stats, box_stats):
        for reason, count in each.counts.most_common():
            print(f"  dropped: {count} {reason} ({each.examples[reason][0]})")
    remedy = "Mend them, or raise --max-bad-share"
    for what, each in (("images", stats), ("boxes", box_stats)):
        each.check(
            asked.max_bad_share, f"{what} of {asked.input} are bad", "--max-bad-share", remedy
        )
    if not rows:
        raise DataError(
            f"no region of {asked.input} was kept; loosen --min-height, --min-chars, or try "
            "--by detector"
        )


def _root(source: Path, given: str | None) -> Path:
    """Return the folder that image paths start at and stay in."""
    if given:
        return Path(given)
    return source if source.is_dir() else source.parent


def _mapped(
    cut: Callable[[Page], CutPage],
    pages: list[Page],
    workers: int,
) -> Iterator[CutPage]:
    if workers <= 1:
        yield from map(cut, pages)
        return
    # Spawned: a fork would copy locks that threads of this process may hold.
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield from pool.map(cut, pages, chunksize=4)


def _cut(
    page: Page,
    settings: Settings,
    root: Path,
    output: Path,
) -> CutPage:
    """Write the crops of one image; return their rows, and what was dropped."""
    out = CutPage()
    try:
        source = page.image if page.content is None else page.content
        image = images.open_checked(source, root)
        given, faults = _given(page, image, settings)
    except images.BadImage as error:
        return CutPage(dropped=[(error.reason, str(error))])
    except boxes.BadBox as error:
        return CutPage(dropped=[("bad box", str(error))])
    out.boxes = len(given) + len(faults)
    out.bad_boxes = [str(fault) for fault in faults]
    if settings.by == "detector":
        found = _detected(image, given, settings)
    elif given:
        found = _from_boxes(given, settings)
    elif faults:
        return out
    else:
        return CutPage(dropped=[("no boxes", "use --by detector for such images")])

    kept, out.dropped = _filtered(found, settings)
    # Of the whole image: crops of one page must not be in two splits.
    group = f"sha256:{images.digest(image)}"
    for number, region in enumerate(_chosen(kept, settings, page)):
        out.rows.append(_write(page, number, region, image, group, settings, output))
    return out


def _given(page: Page, image: Image.Image, settings: Settings) -> tuple[list[Box], list[BoxFault]]:
    """Return the row's boxes in the upright image's pixels, and what is wrong with the others.
    Raises BadBox where none can be placed."""
    form = BoxFormat()
    frame_px = form.frame(page.row.get("width"), page.row.get("height"), image.size)
    # Beside others of its line, or found by its ink, what a box without height says is seen.
    keep_text = settings.by == "detector" or settings.lines > 0
    return form.parse_each(page.row.get("boxes"), frame_px, image.size, keep_text=keep_text)


def _from_boxes(given: list[Box], settings: Settings) -> list[Region]:
    """Return regions of so many lines each, every given box by itself when lines is 0."""
    lines = boxes.lines(given)
    regions = []
    if not settings.lines:
        for line in lines:
            regions += [_region([[box]]) for box in line]
        return regions
    for first in range(0, len(lines), settings.lines):
        regions.append(_region(lines[first : first + settings.lines]))
    return regions


def _detected(image: Image.Image, given: list[Box], settings: Settings) -> list[Region]:
    """Return regions that ink and strokes show, widened to the given boxes that they hold the
    middle of."""
    found = text_regions.find(image, settings.min_height_px)
    strokes = {region.box: region.strokes for region in found}
    regions = []
    for region in _from_boxes(list(strokes), settings):
        held = boxes.inside(given, region.box)
        regions.append(
            Region(
                box=boxes.hull([region.box, *held]),
                lines=region.lines,
                text=boxes.transcript(held),
                weight=sum(strokes[box] for box in boxes.inside(strokes, region.box)),
            )
        )
    return regions


def _region(lines: list[list[Box]]) -> Region:
    every_box = []
    texts = []
    for line in lines:
        every_box += line
        text = boxes.transcript(line)
        if text:
            texts.append(text)
    text = "\n".join(texts)
    return Region(boxes.hull(every_box), len(lines), text, weight=len(text))


def _filtered(found: list[Region], settings: Settings) -> tuple[list[Region], list[Dropped]]:
    """Return the regions that the settings allow, and why the others are dropped."""
    kept = []
    dropped = []
    for region in found:
        chars = len(region.text)
        height_px = region.box.height_px / region.lines
        if height_px < settings.min_height_px:
            detail = f"{height_px:.0f} px a line, --min-height is {settings.min_height_px:g}"
            dropped.append(("too low", detail))
        elif settings.by == "boxes" and not chars:
            dropped.append(("no text", "its boxes have none"))
        # What a detector found without a text is to be labelled by hand, however long it is.
        elif chars and not settings.min_chars <= chars <= settings.max_chars:
            wanted = f"{settings.min_chars} to {settings.max_chars} wanted"
            dropped.append(("wrong length", f"{chars} characters, {wanted}"))
        else:
            kept.append(region)
    return kept, dropped


def _chosen(kept: list[Region], settings: Settings, page: Page) -> list[Region]:
    """Return the regions to cut, in reading order."""
    if not settings.count or len(kept) <= settings.count:
        return kept
    order = list(range(len(kept)))
    if settings.pick == "random":
        # By the image's own name and not by a common generator, which workers could not share.
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
    """Write one crop; return its row."""
    # The padding is of a line's height, and the box's is that of all its lines.
    crop = boxes.crop(image, region.box, settings.padding / region.lines)
    if settings.size_px:
        height_px = settings.size_px * region.lines
        width_px = max(1, round(crop.width * height_px / crop.height))
        crop = crop.resize((width_px, height_px), Image.Resampling.LANCZOS)
    name = f"{IMAGES}/{page.number:06d}-{number:03d}.png"
    with writing(output / name):
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
    box = region.box
    corners = (box.x0_px, box.y0_px, box.x1_px, box.y1_px)
    # Where it was cut from, for a person to look at.
    row["from"] = {"image": page.image, "bbox": [round(corner, 1) for corner in corners]}
    return row


if __name__ == "__main__":
    sys.exit(main())
