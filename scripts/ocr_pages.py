"""Pages for generate_ocr_crops.py: the images of a folder, or of a file's rows, each once."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.config.task_data import TaskDataConfig
from pipeline.data.drop_stats import DropStats
from pipeline.data.images.formats import SUFFIXES
from pipeline.data.images.inline import bytes_in
from pipeline.data.sources import SkippedRow, image_folders, task_files
from pipeline.data.sources.columns import listed, structured, value_at
from pipeline.errors import DataError


@dataclass(frozen=True)
class Page:
    """One image to cut crops from, and what is known about it."""

    number: int
    where: str
    image: str
    row: dict
    content: bytes | None = None  # of a picture that stands in its row


def read_pages(source: Path, image_field: str, stats: DropStats) -> Iterator[Page]:
    """Yield every image of a folder or of a file's rows once; rows that have none are counted.

    Raises DataError for a file that cannot be read.
    """
    if source.is_dir():
        yield from _of_folder(source, stats)
        return

    # Several questions about one image are one page, and the first row with boxes says them.
    pages: dict[str, Page] = {}
    data = TaskDataConfig(source="jsonl", path=str(source), image_field=image_field)
    if not source.is_file():
        raise DataError(f"{source} cannot be read: it is no file")
    for where, row in task_files.rows_of("input", data, source, source.parent):
        if isinstance(row, SkippedRow):
            stats.seen += 1
            stats.drop(row.reason, where, row.detail)
            continue
        image = value_at(row, image_field)
        if not isinstance(image, str) or not image:
            stats.seen += 1
            detail = f"no path under {image_field!r} of {listed(row)}; set --image-field"
            stats.drop("no picture", where, detail)
            continue
        try:
            content = bytes_in(image)
        except ValueError as error:
            stats.seen += 1
            stats.drop("no picture", where, str(error))
            continue
        row["boxes"] = structured(row.get("boxes"))
        known = pages.get(image)
        if known is None:
            stats.seen += 1
            name = image if content is None else where
            pages[image] = Page(len(pages), where, name, row, content)
        elif row["boxes"] and not known.row.get("boxes"):
            pages[image] = replace(known, where=where, row=row)
    yield from pages.values()


def _of_folder(source: Path, stats: DropStats) -> Iterator[Page]:
    files = sorted(image_folders.files(source))
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
    known = {path.with_suffix("") for path in pictures}
    for number, path in enumerate(pictures):
        stats.seen += 1
        name = path.relative_to(source).as_posix()
        yield Page(number, name, name, {})
    for path in files:
        # Beside a picture of its name it is what that was made from.
        if image_folders.is_unread(path.name) and path.with_suffix("") not in known:
            why = image_folders.unread(path)
            stats.seen += 1
            stats.drop(why.reason, path.relative_to(source).as_posix(), why.detail)
