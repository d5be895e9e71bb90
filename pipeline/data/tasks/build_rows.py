"""One record to task rows: its pictures stored, its boxes in 0..1000, its templates filled, its
text checked.

Invariant: what comes out depends on the record and the settings alone, so any process may do any
record.
"""

import string
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from ...config.task_data import ImageLimitsConfig, TaskConfig
from ...errors import ConfigError
from ..images import boxes
from ..images import images as pictures
from ..images.boxes import BadBox, Box
from ..images.images import BadImage, ImageSource, StoredImage
from ..sources import SkippedRow
from ..sources.tasks import Record, column, dataset_name, root
from .groups import text_key
from .rows import IMAGES, TaskRow

_REMEMBERED = 64  # pictures of a process that need no second look


@dataclass(frozen=True)
class Made:
    """A task row whose split and group are still to be settled."""

    row: TaskRow  # split is "" where the source gives none, group is ""
    keys: tuple[
        str, ...
    ]  # of what must not be in two splits: digests of pictures, a document's name
    resized: int = 0  # 1 when a picture of it was
    unboxed: int = 0  # 1 when its boxes were left out, being wrong and not needed


@dataclass(frozen=True)
class Lost:
    """Why a record became no row."""

    reason: str
    where: str
    detail: str


class _Unusable(Exception):
    """A record that becomes no row."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclass
class RowBuilder:
    """Makes rows of one task into one folder; travels to other processes."""

    entry: TaskConfig
    limits: ImageLimitsConfig
    folder: Path
    seen: OrderedDict = field(default_factory=OrderedDict)

    def __post_init__(self):
        self.root = root(self.entry.dataset)
        named = {
            name
            for what in ("prompt", "answer")
            for _, name in template_parts(getattr(self.entry, what), what)
        }
        self.boxed = bool(named & {"boxes_json", "text"}) or self._cuts

    def shape(self, record: Record) -> list[Made | Lost]:
        """Return what became of a record: its row or rows, or why there is none."""
        if isinstance(record.found, SkippedRow):
            return [Lost(record.found.reason, record.where, record.found.detail)]
        try:
            return self._regions(record) if self._cuts else [self._row(record)]
        except _Unusable as error:
            return [Lost(error.reason, record.where, str(error))]
        except BadImage as error:
            return [Lost(error.reason, record.where, str(error))]
        except BadBox as error:
            return [Lost("bad box", record.where, str(error))]

    @property
    def _cuts(self) -> bool:
        return self.entry.dataset.ocr and self.entry.dataset.regions

    def _row(self, record: Record) -> Made:
        stored = [self._stored(image) for image in record.images]
        size = (stored[0].width_px, stored[0].height_px) if stored else None
        found, unboxed = [], 0
        try:
            found = self._boxes(record, size)
        except BadBox:
            if self.boxed:
                raise
            unboxed = 1
        described = boxes.described(found, *size) if found else []
        values = self._values(record, found) | {"boxes_json": boxes.as_json(described)}
        return replace(
            self._made(record, self._id(record), stored, values, described), unboxed=unboxed
        )

    def _regions(self, record: Record) -> list[Made | Lost]:
        """Return one row for each box with text, in reading order."""
        image = pictures.open_checked(record.images[0], self._start(record.images[0]))
        document, out = pictures.digest(image), []
        lines = boxes.lines(self._boxes(record, image.size))
        for number, box in enumerate(each for line in lines for each in line if each.text.strip()):
            name = f"{self._id(record)}/{number}"
            try:
                cut = boxes.crop(image, box, self.entry.dataset.region_padding)
                values = self._values(record, [box]) | {
                    "boxes_json": "[]",
                    "answer": box.text,
                    "answers": None,
                }
                out.append(self._made(record, name, [self._stored(cut)], values, [], document))
            except (_Unusable, BadImage) as error:
                out.append(Lost(error.reason, f"{record.where} region {number}", str(error)))
        return out or [Lost("no text", record.where, "none of its boxes has a text to cut out")]

    def _made(
        self,
        record: Record,
        name: str,
        stored: list[StoredImage],
        values: dict,
        described: list[dict],
        document: str = "",
    ) -> Made:
        data = self.entry.dataset
        prompt = self._filled(self.entry.prompt, values, "prompt")
        answer = self._filled(self.entry.answer, values, "answer")
        if len(answer) > data.max_answer_chars:
            raise _Unusable(
                "answer too long",
                f"{len(answer)} characters, max_answer_chars is {data.max_answer_chars}",
            )
        answers = values.get("answers")
        extra = {"boxes": described} if described else {}
        if isinstance(answers, list | tuple):
            texts = map(self._text, answers)
            extra["answers"] = [
                text for text in (map(boxes.clean, texts) if data.ocr else texts) if text
            ]
        source = {"dataset": dataset_name(data), "id": self._id(record), "revision": data.revision}
        images = tuple(f"{IMAGES}/{each.name}" for each in stored)
        row = TaskRow(name, images, prompt, answer, record.split or "", source, "", extra)
        try:
            row.line().encode()
        except UnicodeEncodeError as error:
            raise _Unusable("not Unicode", f"half of a surrogate pair: {error.reason}") from None
        group = column(record.found, "group", data)
        keys = [each.digest for each in stored] + ([document] if document else [])
        keys += [f"~{group}"] if group not in (None, "") else []  # ~ sorts behind every digest
        keys += [] if stored else [text_key(prompt)]
        return Made(row, tuple(keys), int(any(each.resized for each in stored)))

    def _id(self, record: Record) -> str:
        found = column(record.found, "id", self.entry.dataset)
        return f"{self.entry.name}-{record.number}" if found in (None, "") else str(found)

    def _stored(self, image: ImageSource) -> StoredImage:
        """Store a picture, or remember that it has just been stored."""
        if isinstance(image, str) and image in self.seen:
            self.seen.move_to_end(image)
            return self.seen[image]
        limits = self.limits.min_pixels, self.limits.max_pixels
        stored = pictures.store(image, self.folder / IMAGES, *limits, root=self._start(image))
        if isinstance(image, str):
            self.seen[image] = stored
            if len(self.seen) > _REMEMBERED:
                self.seen.popitem(last=False)
        return stored

    def _start(self, image: ImageSource) -> Path | None:
        if isinstance(image, str) and self.root is None:
            raise _Unusable(
                "no picture",
                f"{image!r} is a path; set dataset.image_root to the folder it starts at",
            )
        return self.root

    def _boxes(self, record: Record, size_px: tuple[int, int] | None) -> list[Box]:
        """Return a record's boxes in the pixels of its upright picture. Raises BadBox, as for boxes
        without one."""
        data = self.entry.dataset
        raw, *frame = (column(record.found, name, data) for name in ("boxes", "width", "height"))
        if raw and size_px is None:
            raise BadBox("the row has boxes and no picture that they lie on")
        return (
            boxes.parse(raw, boxes.frame(*frame, size_px), size_px, data.box_format) if raw else []
        )

    def _values(self, record: Record, found: list[Box]) -> dict:
        """Return what templates may name: the row's columns, under their own names and those of
        dataset.fields."""
        data = self.entry.dataset
        values = record.found | {name: column(record.found, name, data) for name in data.fields}
        if any(box.text for box in found):
            values["text"] = (
                boxes.transcript(found) if data.ocr else "\n".join(box.text for box in found)
            )
        if data.ocr and values.get("answer") in (None, "") and values.get("text"):
            values["answer"] = values["text"]
        return values

    def _filled(self, template: str, values: dict, what: str) -> str:
        parts = []
        for literal, name in template_parts(template, what):
            parts.append(literal)
            if name is not None:
                parts.append(self._value(name, values))
        text = (
            boxes.clean("".join(parts))
            if what == "answer" and self.entry.dataset.ocr
            else "".join(parts).strip()
        )
        if not text:
            raise _Unusable(f"empty {what}", f"{template!r} gives no text")
        return text

    def _value(self, name: str, values: dict) -> str:
        if values.get(name) is None:
            known = ", ".join(
                sorted(str(key) for key, value in values.items() if value is not None)
            )
            raise _Unusable(
                f"no field {name}",
                f"a template names {{{name}}}, and the row has {known}; see dataset.fields",
            )
        return self._text(values[name])

    @staticmethod
    def _text(value: object) -> str:
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, str | int | float):
            return str(value).replace("\r\n", "\n")
        return boxes.as_json(value)


@lru_cache
def template_parts(template: str, what: str) -> tuple[tuple[str, str | None], ...]:
    """Return (literal, field or None) pairs of a template; doubled braces are literal ones. Raises
    ConfigError."""
    try:
        parts = [part[:2] for part in string.Formatter().parse(template)]
        plain = all(
            not spec and not conversion
            for *_, spec, conversion in string.Formatter().parse(template)
        )
    except ValueError as error:
        raise ConfigError(
            f"the {what} template {template!r} cannot be read: {error}; write {{{{ for a brace"
        ) from None
    names = [name for _, name in parts if name is not None]
    if not plain or not all(name.replace("_", "a").replace("-", "a").isalnum() for name in names):
        raise ConfigError(
            f"the {what} template {template!r} may hold columns in braces, as in {{prompt}}, and nothing else there; "
            "write {{ and }} for braces that are meant"
        )
    return tuple(parts)
