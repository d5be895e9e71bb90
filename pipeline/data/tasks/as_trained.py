"""What a task's rows are to who trains on them: three of them as they are trained on, and what is
strange and true of nearly all.

A row that is wrong by itself is dropped where it is built; a convention that was misread shows only
in many rows, each of which could be right.
"""

import hashlib
import heapq
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...config.task_data import ImageLimitsConfig, TaskConfig
from ...errors import DataError
from ...metrics.answers import unreadable
from ..images import images
from ..images.boxes import UNITS
from ..images.images import StoredImage
from .rows import TaskRow

SHOWN = 3  # rows of each task
LONGEST = 160  # characters of a prompt or an answer that are shown
_NEARLY_ALL = 0.9
_LEAST_ROWS = 10  # fewer say nothing of the rest
_ONE_TONE = 8  # levels between the darkest and the lightest point of a colour
_KEPT_ANSWERS = 1 << 14  # distinct ones that are counted: a task with more has no usual answer

_NOTHING = re.compile(r"nan|none|null|n/?a|<na>|undefined|nat", re.I)
_PYTHON = re.compile(
    r"[\[({]\s*['(]|None\b|True\b|False\b|b'|np\.|\w+\((?:\[|')|<[\w.][^<>]* at 0x"
)
# What opens in angle brackets and is closed nowhere, as HTML is but for these.
_MARK = re.compile(r"<(?!(?:br|hr|p|li|td|th|tr|img|input)>)(/?)([A-Za-z_]\w*)>")
_FLOAT = re.compile(r"-?\d+\.0")
_COORDINATES = re.compile(r"\W*(?:-?\d+(?:\.\d+)?[\s,]+){3,}-?\d+(?:\.\d+)?\W*")

# What may be strange about a row, and what to do where it is so of nearly all.
STRANGE = {
    "placeholder": "had placeholders of pictures in the prompt, which were taken out or named: the "
    "chat template puts every picture in front",
    "unlabelled": "have boxes without any label; name the column of their classes as "
    "dataset.fields.labels, unless boxes of one class are meant",
    "numbered": "have numbers for labels of boxes; name them in dataset.class_names",
    "all of it": "have a box around the whole picture; see dataset.box_units and box_format",
    "nothing": "have an answer such as nan, none or null; leave them out where nothing was meant",
    "python": "have an answer as Python prints it, quoted by ' or with None; write JSON",
    "fraction": "have an answer that ends in .0, as whole numbers do in a table with gaps",
    "coordinates": "have an answer of numbers alone, as coordinates are; write boxes as boxes",
    "echo": "have the prompt as their answer; see the templates and dataset.fields",
    "enlarged": "have a picture made over twice as wide and high to reach min_pixels",
    "mark": "have a mark in angle brackets that nothing closes, as special tokens of other models "
    "are; write what it means",
    "one tone": "have a picture of nearly one tone; see what its values mean",
}


def strange_about(
    entry: TaskConfig,
    row: TaskRow,
    stored: Sequence[StoredImage],
    limits: ImageLimitsConfig,
    placeholders: int,
) -> tuple[str, ...]:
    """Return what is strange about a row, by names of STRANGE and of this module's own counts."""
    answer = row.answer
    about = {
        "placeholder": placeholders > 0,
        "nothing": _NOTHING.fullmatch(answer) is not None,
        "python": _is_pythons(answer),
        "fraction": _FLOAT.fullmatch(answer) is not None,
        "coordinates": not _is_json(answer) and _COORDINATES.fullmatch(answer) is not None,
        "echo": answer == row.prompt,
        "mark": _has_mark(row.prompt) or _has_mark(answer),
        "enlarged": any(4 * each.width_px * each.height_px < limits.min_pixels for each in stored),
        "one tone": any(each.tones <= _ONE_TONE for each in stored),
        "no box": "{boxes_json}" in entry.answer and not row.extra.get("boxes"),
        "unread": _unread(entry, row) is not None,
    }
    if row.extra.get("boxes") and "{boxes_json}" in entry.answer:
        about |= _about_boxes(entry, row.extra["boxes"], stored)
    return tuple(name for name, is_so in about.items() if is_so)


def _is_pythons(answer: str) -> bool:
    return _PYTHON.match(answer) is not None and not _is_json(answer)


def _has_mark(text: str) -> bool:
    names: set[str] = set()
    closed: set[str] = set()
    for slash, name in _MARK.findall(text):
        (closed if slash else names).add(name)
    return bool(names - closed)


def _is_json(answer: str) -> bool:
    try:
        json.loads(answer)
    except (ValueError, RecursionError):
        return False
    return True


def _unread(entry: TaskConfig, row: TaskRow) -> str | None:
    """Return what the task's metric misses in every right answer of a row."""
    others = row.extra.get("answers") or ()
    problem = None
    for answer in (row.answer, *map(str, others)):
        problem = unreadable(entry.metric, answer)
        if problem is None:
            return None
    return problem


def _about_boxes(
    entry: TaskConfig,
    described: list[dict],
    stored: Sequence[StoredImage],
) -> dict[str, bool]:
    labels = [box["label"] for box in described]
    width_px, height_px = stored[0].width_px, stored[0].height_px
    is_large = min(width_px, height_px) > 1.25 * UNITS
    # Back in pixels: what boxes reach to, were they meant as thousandths.
    right_px = max(box["bbox_2d"][2] for box in described) * width_px / UNITS
    bottom_px = max(box["bbox_2d"][3] for box in described) * height_px / UNITS
    is_undeclared = entry.dataset.box_units is None and is_large
    fits = max(right_px, bottom_px) <= UNITS + 1
    whole = [0, 0, UNITS, UNITS]
    return {
        "unlabelled": not any(labels),
        "numbered": all(label.isdecimal() for label in labels),
        "all of it": any(_is_near(box["bbox_2d"], whole) for box in described),
        "in thousandths": is_undeclared and fits,
        "in pixels": is_undeclared and not fits,
    }


def _is_near(corners: Sequence[int], others: Sequence[int]) -> bool:
    return all(abs(a - b) <= UNITS // 50 for a, b in zip(corners, others, strict=True))


@dataclass
class AsTrained:
    """Rows of one task as they pass: counts of what is strange, a few of them to show."""

    entry: TaskConfig
    rows: int = 0
    strange: Counter[str] = field(default_factory=Counter)
    example: dict[str, str] = field(default_factory=dict)  # of what is strange, a row's id
    answers: Counter[str] = field(default_factory=Counter)
    shown: list[tuple[int, TaskRow]] = field(default_factory=list)

    def count(self, row: TaskRow, strange: Sequence[str]) -> None:
        """Take note of a row and what is strange about it."""
        self.rows += 1
        self.strange.update(strange)
        for name in strange:
            self.example.setdefault(name, row.id)
        if row.answer in self.answers or len(self.answers) < _KEPT_ANSWERS:
            self.answers[row.answer] += 1

    def show(self, row: TaskRow) -> None:
        """Take a row that is trained on as one of those to show, perhaps."""
        # By a hash: the first rows of a source are often of one kind.
        digest = hashlib.blake2b(row.id.encode("utf-8", "replace"), digest_size=8).digest()
        order = -int.from_bytes(digest, "big")
        if len(self.shown) < SHOWN:
            heapq.heappush(self.shown, (order, row))
        elif order > self.shown[0][0]:
            heapq.heapreplace(self.shown, (order, row))

    def check(self) -> None:
        """Raise DataError for what nearly all rows show to be misread: boxes, or right answers."""
        name = self.entry.name
        fit = self.strange["in thousandths"]
        if fit >= _LEAST_ROWS and not self.strange["in pixels"]:
            raise DataError(
                f"loras.experts.{name}.dataset: no box of {fit} rows with pictures of over "
                f"{1.25 * UNITS:.0f} px reaches beyond {UNITS}, so they seem to be in thousandths; "
                "set box_units to thousandths, or to pixels where they are"
            )
        if self.rows and self.strange["no box"] == self.rows:
            raise DataError(
                f"loras.experts.{name}.dataset: the answer names {{boxes_json}}, and no row of "
                f"{self.rows} has a box; name the column of boxes in fields.boxes"
            )
        unread = self.strange["unread"]
        if unread > self.entry.dataset.max_bad_share * self.rows:
            raise DataError(
                f"loras.experts.{name}.metric: {self.entry.metric} cannot read the right answer of "
                f"{unread} of {self.rows} rows (first {self.example['unread']}), so nothing could "
                f"be right there; it wants {_WANTED[self.entry.metric]}. Mend the answers or "
                "choose another metric"
            )

    def warnings(self) -> list[str]:
        """Return what is strange and true of nearly all rows, in sentences."""
        out = []
        for name, what in STRANGE.items():
            count = self.strange[name]
            if self._nearly_all(count):
                out.append(f"{count} of {self.rows} rows {what}")
        if self.strange["unread"]:
            out.append(
                f"{self.strange['unread']} of {self.rows} rows have no right answer that the "
                f"metric {self.entry.metric} can read; the report leaves them out"
            )
        # A template without a column is the same on purpose.
        usual = self.answers.most_common(1) if "{" in self.entry.answer else []
        if usual and self._nearly_all(usual[0][1]):
            answer, count = usual[0]
            out.append(f"{count} of {self.rows} rows have the answer {_short(answer)}")
        return out

    def _nearly_all(self, count: int) -> bool:
        return self.rows >= _LEAST_ROWS and count >= _NEARLY_ALL * self.rows

    def examples(self, folder: Path) -> list[dict]:
        """Return the rows to show, with the sizes of their pictures as stored in folder."""
        out = []
        for _, row in sorted(self.shown, key=lambda pair: -pair[0]):
            sizes = []
            for name in row.images:
                width, height = images.claimed_size((folder / name).read_bytes())
                sizes.append(f"{width} x {height}")
            out.append(
                {"id": row.id, "pictures": sizes, "prompt": row.prompt, "answer": row.answer}
            )
        return out


_WANTED = {
    "iou": f"boxes as JSON, [{{'bbox_2d': [x0, y0, x1, y1], 'label': ...}}] in 0..{UNITS}",
    "count": "a number",
    "caption": "words",
    "cer": "a text",
    "exact": "a text",
}


def told(name: str, shown: Sequence[dict], warnings: Sequence[str]) -> list[str]:
    """Return the lines that preprocess prints of a task."""
    lines = []
    for row in shown:
        pictures = " and ".join(f"a picture of {size} px" for size in row["pictures"])
        lines.append(
            f"{name}: trained on {pictures or 'no picture'}, asked {_short(row['prompt'])}, "
            f"answered {_short(row['answer'])}"
        )
    lines += [f"{name}: warning: {warning}" for warning in warnings]
    return lines


def _short(text: str) -> str:
    """Return a text in quotes on one line, its middle left out when it is long."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return json.dumps(text, ensure_ascii=False)
