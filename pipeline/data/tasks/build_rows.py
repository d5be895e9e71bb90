"""One record to task rows: its pictures stored, its boxes in 0..1000, its templates filled, its
text checked.

Invariant: what comes out depends on the record and the settings alone, so any process may do any
record.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...config.task_data import ImageLimitsConfig, TaskConfig
from ..drop_stats import Dropped
from ..images import boxes, images
from ..images.box_formats import LABELS, TEXTS, BoxFault, BoxFormat
from ..images.boxes import BadBox, Box
from ..images.images import ImageSource, StoredImage
from ..images.near_duplicates import look
from ..sources import AS_UTF8
from ..sources.columns import is_blank, is_missing, structured, value_at
from ..sources.conversations import said_by
from ..sources.tasks import Record, column, dataset_name, root
from . import markup, right_answers
from .as_trained import strange_about
from .groups import text_key
from .rows import IMAGES, TaskRow
from .templates import as_text, template_parts

# Pictures of a process that need no second look: questions about one picture follow one another.
_REMEMBERED = 64

_SHOWN_BEFORE = 20  # characters before a byte that is not UTF-8, in a message


@dataclass(frozen=True)
class BuiltRow:
    """A task row whose split and group are still to be settled."""

    row: TaskRow  # split is "" where the source gives none, group is ""
    keys: tuple[str, ...]  # what must not be in two splits: digests of pictures, a document's name
    resized: bool = False  # whether a picture of it was
    unboxed: bool = False  # whether its boxes were left out, being wrong and not needed
    where: str = ""  # of its record, for messages
    looks: tuple[tuple[str, bytes], ...] = ()  # of pictures by their digests, where they are asked
    boxes: int = 0  # that its record has and something was made of
    box_faults: tuple[BoxFault, ...] = ()  # the ones among them that were left out
    strange: tuple[str, ...] = ()  # what as_trained counts of it


@dataclass(frozen=True)
class DroppedRow:
    """Why a record, or a region of it, became no row."""

    reason: str
    where: str
    detail: str


@dataclass
class RowBuilder:
    """Makes rows of one task into one folder; travels to other processes."""

    entry: TaskConfig
    limits: ImageLimitsConfig
    folder: Path
    recent: OrderedDict[str, StoredImage] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        data = self.entry.dataset
        self.root = root(data)
        self.cuts_regions = data.ocr and data.regions
        # Synthetic pictures are different by how they are made.
        self.compares_looks = data.near_duplicates != "off" and data.source != "synthetic"
        named = set()
        for what, template in (("prompt", self.entry.prompt), ("answer", self.entry.answer)):
            for _, name in template_parts(template, what):
                named.add(name)
        # Wrong boxes cost a row only where something is made of them.
        self.needs_boxes = self.cuts_regions or bool(named & {"boxes_json", "text"})
        self.needs_text = "text" in named
        self.box_format = BoxFormat(data.box_format, data.box_units, data.class_names)

    def build(self, record: Record) -> list[BuiltRow | DroppedRow]:
        """Return what became of a record: its row or rows, or why there is none."""
        if record.skipped is not None:
            return [DroppedRow(record.skipped.reason, record.where, record.skipped.detail)]
        try:
            if self.cuts_regions:
                return self._region_rows(record)
            return [self._whole_row(record)]
        except Dropped as error:
            detail = str(error)
            if error.reason == images.SEVERAL:
                detail += ", or set dataset.frames to first"
            return [DroppedRow(error.reason, record.where, detail)]
        except BadBox as error:
            return [DroppedRow("bad box", record.where, str(error))]

    def _whole_row(self, record: Record) -> BuiltRow:
        stored = [self._stored(image) for image in record.images]
        size_px = None
        if stored:
            size_px = (stored[0].width_px, stored[0].height_px)
        found: list[Box] = []
        faults: list[BoxFault] = []
        unboxed = False
        is_transcribed = self._is_transcribed(record)
        needs_boxes = self.needs_boxes or is_transcribed
        try:
            found, faults = self._boxes(record, size_px)
            if faults and not found:
                raise BadBox(str(faults[0]))
        except BadBox:
            if needs_boxes:
                raise
            unboxed = True
        if is_transcribed:
            _check_transcript(faults)
        described = []
        if found and size_px is not None:
            described = boxes.described(found, *size_px)
        values = self._values(record, found)
        values["boxes_json"] = boxes.as_json(described)
        built = self._built(record, self._id(record), stored, values, described)
        if not needs_boxes:
            return replace(built, unboxed=unboxed)
        return replace(
            built,
            where=record.where,
            boxes=len(found) + len(faults),
            box_faults=tuple(faults),
        )

    def _is_transcribed(self, record: Record) -> bool:
        """Tell whether the texts of a record's boxes become its answer."""
        data = self.entry.dataset
        # Many OCR sets have the text in their boxes alone.
        return self.needs_text or (
            data.ocr
            and is_blank(column(record.columns, "answer", data))
            and bool(column(record.columns, "boxes", data))
        )

    def _region_rows(self, record: Record) -> list[BuiltRow | DroppedRow]:
        """Return one row for each box with text, in reading order."""
        first_frame = self.entry.dataset.frames == "first"
        source = record.images[0]
        image = images.open_checked(source, self._start(source), first_frame=first_frame)
        # All regions of a page carry its digest, so that they stay in one split.
        document = images.digest(image)
        looks = ((document, look(image)),) if self.compares_looks else ()
        with_text = []
        found, faults = self._boxes(record, image.size)
        for line in boxes.lines(found):
            for box in line:
                if box.text.strip():
                    with_text.append(box)

        rows: list[BuiltRow | DroppedRow] = []
        for fault in faults:
            rows.append(DroppedRow("bad box", record.where, str(fault)))
        for number, box in enumerate(with_text):
            values = self._values(record, [box])
            # What the row says of the whole page is not true of a region of it.
            values |= {"boxes_json": "[]", "answer": box.text, "answers": None}
            name = f"{self._id(record)}/{number}"
            try:
                crop = boxes.crop(image, box, self.entry.dataset.region_padding)
                stored = [self._stored(crop)]
                built = self._built(record, name, stored, values, [], document)
                rows.append(replace(built, looks=looks))
                looks = ()
            except Dropped as error:
                where = f"{record.where} region {number}"
                rows.append(DroppedRow(error.reason, where, str(error)))
        if not rows:
            detail = "none of its boxes has a text to cut out"
            return [DroppedRow("no text", record.where, detail)]
        return rows

    def _built(
        self,
        record: Record,
        name: str,
        stored: list[StoredImage],
        values: dict,
        described: list[dict],
        document: str = "",
    ) -> BuiltRow:
        data = self.entry.dataset
        prompt, placeholders = self._prompt(values, len(stored))
        answer = self._filled(self.entry.answer, values, "answer")
        self._check_marks(prompt, answer)
        if len(answer) > data.max_answer_chars:
            raise Dropped(
                "answer too long",
                f"{len(answer)} characters, max_answer_chars is {data.max_answer_chars}",
            )
        # Only what there is: an empty list in every row would be most of a plain row.
        extra: dict[str, list] = {}
        if described:
            extra["boxes"] = described
        answers = values.get("answers")
        if isinstance(answers, list | tuple):
            extra["answers"] = self._references(answers)

        row = TaskRow(
            id=name,
            images=tuple(f"{IMAGES}/{image.name}" for image in stored),
            prompt=prompt,
            answer=answer,
            split=record.split or "",
            source={
                "dataset": dataset_name(data),
                "id": self._id(record),
                "revision": data.revision,
            },
            group="",
            extra=extra,
        )
        try:
            row.line().encode()
        except UnicodeEncodeError as error:
            raise _unwritable(error) from None

        keys = [image.digest for image in stored]
        if document:
            keys.append(document)
        group = column(record.columns, "group", data)
        # A group that the source names joins rows whose pictures differ: the pages of a document.
        if not is_blank(group):
            keys.append(f"~{group}")  # ~ sorts behind every digest
        if not stored:
            keys.append(text_key(prompt))
        looks = [(image.digest, image.look) for image in stored if image.look]
        return BuiltRow(
            row,
            tuple(keys),
            looks=tuple(looks),
            resized=any(image.resized for image in stored),
            strange=strange_about(self.entry, row, stored, self.limits, placeholders),
        )

    def _prompt(self, values: dict, pictures: int) -> tuple[str, int]:
        """Return a row's prompt, without placeholders of its pictures, and how many it had."""
        text = self._filled(self.entry.prompt, values, "prompt")
        try:
            prompt, count = markup.without_placeholders(text, pictures)
        except markup.StrangePlaceholder as error:
            raise Dropped("placeholder without a picture", str(error)) from None
        if not prompt:
            raise Dropped(
                "empty prompt", f"{text!r} only says where pictures are; write what is asked"
            )
        return prompt, count

    def _check_marks(self, prompt: str, answer: str) -> None:
        if self.entry.dataset.markup == "text":
            return
        for what, text in (("prompt", prompt), ("answer", answer)):
            mark = markup.special_token(text, is_answer=what == "answer")
            if mark is not None:
                raise Dropped(
                    "special token",
                    f"the {what} holds {mark!r}, which is no text but a mark of another format; "
                    "write what it means, or set dataset.markup to text to learn it letter by "
                    "letter",
                )

    def _references(self, answers: list | tuple) -> list[str]:
        """Return every reference answer that has a text."""
        references = []
        for answer in answers:
            text = as_text(answer)
            if self.entry.dataset.ocr:
                text = boxes.clean(text)
            if text:
                references.append(text)
        return references

    def _id(self, record: Record) -> str:
        found = column(record.columns, "id", self.entry.dataset)
        if is_blank(found):
            return f"{self.entry.name}-{record.number}"
        return str(found)

    def _stored(self, image: ImageSource) -> StoredImage:
        """Store a picture, or remember that it has just been stored."""
        if isinstance(image, str) and image in self.recent:
            self.recent.move_to_end(image)
            return self.recent[image]
        stored = images.store(
            image,
            self.folder / IMAGES,
            self.limits.min_pixels,
            self.limits.max_pixels,
            root=self._start(image),
            first_frame=self.entry.dataset.frames == "first",
            # Of a region the page counts: lines of many pages are alike.
            with_look=self.compares_looks and not self.cuts_regions,
        )
        # Only paths are remembered: to look bytes up, they would have to be hashed as well.
        if isinstance(image, str):
            self.recent[image] = stored
            if len(self.recent) > _REMEMBERED:
                self.recent.popitem(last=False)
        return stored

    def _start(self, image: ImageSource) -> Path | None:
        """Return the folder that a picture's path starts at."""
        if isinstance(image, str) and self.root is None:
            raise Dropped(
                "no picture",
                f"{image!r} is a path; set dataset.image_root to the folder it starts at",
            )
        return self.root

    def _boxes(
        self, record: Record, size_px: tuple[int, int] | None
    ) -> tuple[list[Box], list[BoxFault]]:
        """Return a record's boxes in the pixels of its upright picture, and what is wrong with the
        others. Raises BadBox where none can be placed, as for boxes without a picture."""
        data = self.entry.dataset
        raw = structured(column(record.columns, "boxes", data))
        if not raw:
            return [], []
        if size_px is None:
            raise BadBox("the row has boxes and no picture that they lie on")
        width = column(record.columns, "width", data)
        height = column(record.columns, "height", data)
        frame_px = self.box_format.frame(width, height, size_px)
        # A region is cut out along its box, and of a line of no height nothing would be seen.
        keep_text = data.ocr and not self.cuts_regions
        beside = self._beside(record, raw)
        return self.box_format.parse_each(raw, frame_px, size_px, beside, keep_text)

    def _beside(self, record: Record, raw: object) -> dict[str, Sequence]:
        """Return the lists of labels and texts that stand beside a list of corners."""
        data = self.entry.dataset
        if not isinstance(raw, list | tuple):
            return {}
        # What lies in the same object: the category of objects.bbox is objects.category.
        home, dot, _ = data.fields.get("boxes", "boxes").rpartition(".")
        beside: dict[str, Sequence] = {}
        for name, known in (("label", LABELS), ("text", TEXTS)):
            mapped = data.fields.get(f"{name}s")
            wanted = [mapped] if mapped else [f"{home}{dot}{key}" for key in known]
            for each in wanted:
                values = structured(value_at(record.columns, each))
                if mapped and not isinstance(values, list | tuple):
                    raise BadBox(
                        f"dataset.fields.{name}s is {mapped}, which holds no list of as many as "
                        "there are boxes"
                    )
                # Of a list of objects that have no such key, there is a list of nothing.
                if not isinstance(values, list | tuple) or all(each is None for each in values):
                    continue
                # A list that nobody named and that is of another length may be about the picture.
                if mapped or len(values) == len(raw):
                    beside[name] = values
                    break
        return beside

    def _values(self, record: Record, found: list[Box]) -> dict:
        """Return what templates may name: the row's columns, under their own names and those of
        dataset.fields."""
        data = self.entry.dataset
        values = dict(record.columns)
        for name, mapped in data.fields.items():
            # What a field names elsewhere is not what the row has under the field's own name.
            values.pop(name, None)
            if value_at(record.columns, mapped) is not None:
                values[name] = column(record.columns, name, data)
        if any(box.text for box in found):
            if data.ocr:
                values["text"] = boxes.transcript(found)
            else:
                values["text"] = "\n".join(box.text for box in found)
        # Many OCR sets have the text in their boxes alone.
        if data.ocr and is_blank(values.get("answer")) and values.get("text"):
            values["answer"] = values["text"]
        self._choose_answer(values)
        return values

    def _choose_answer(self, values: dict) -> None:
        """Put one of several right answers under `answer`, and all of them under `answers`."""
        metric = self.entry.metric
        # Of turns the list of right answers would be what all of them say
        said = said_by("assistant", values.get("answer"))
        if isinstance(said, str):
            values["answer"] = said
        # A list of numbers is a box, and one of texts never is.
        numbers = metric == "count"
        # Of boxes none may be right, of answers a list of nothing says that nobody knows.
        if metric != "iou" and "answer" in values and right_answers.is_empty(values["answer"]):
            values["answer"] = None
        given = right_answers.listed(values.get("answer"), numbers)
        others = right_answers.listed(values.get("answers"), numbers)
        if not given and is_blank(values.get("answer")):
            given = others
        if given:
            values["answer"] = right_answers.chosen(given)
        if given or others:
            values["answers"] = list(dict.fromkeys([*given, *others]))

    def _filled(self, template: str, values: dict, what: str) -> str:
        text = ""
        for literal, name in template_parts(template, what):
            text += literal
            if name is not None:
                text += _value(name, values, "user" if what == "prompt" else "assistant")
        is_transcript = what == "answer" and self.entry.dataset.ocr
        text = boxes.clean(text) if is_transcript else text.strip()
        if not text:
            raise Dropped(f"empty {what}", f"{template!r} gives no text")
        return text


def _unwritable(error: UnicodeEncodeError) -> Dropped:
    """Return why a row whose text no UTF-8 file can hold is none."""
    code = ord(error.object[error.start])
    # What a table is read with keeps bytes of other encodings as these.
    if 0xDC80 <= code <= 0xDCFF:
        before = error.object[max(0, error.start - _SHOWN_BEFORE) : error.start]
        return Dropped("not UTF-8", f"byte 0x{code - 0xDC00:02X} after {before!r}; {AS_UTF8}")
    # JSON can spell it.
    return Dropped("not Unicode", f"half of a surrogate pair: {error.reason}")


def _check_transcript(faults: list[BoxFault]) -> None:
    """Raise BadBox when a transcript would lack what a box says that has no place."""
    for fault in faults:
        if fault.lost_text:
            raise BadBox(f"{fault}; its text would be missing from the transcript")


def _value(name: str, values: dict, speaker: str) -> str:
    """Return a column's value as text; of a chat's turn what its speaker says. Raises Dropped."""
    if is_missing(values.get(name)):
        if name in values:
            detail = f"its {name} is empty; fill it in, or leave the row out"
            raise Dropped(f"no field {name}", detail)
        given = [str(key) for key, value in values.items() if not is_missing(value)]
        raise Dropped(
            f"no field {name}",
            f"a template names {{{name}}}, and the row has {', '.join(sorted(given))}; "
            "see dataset.fields",
        )
    try:
        value = values[name]
        said = said_by(speaker, value)
        # As it was written, where it is JSON of anything else
        return as_text(said if isinstance(said, str) else value)
    except UnicodeDecodeError as error:
        raise Dropped("not UTF-8", f"{name}: byte {error.start}: {error.reason}") from None
