"""Task rows: what preprocess leaves for one expert, and how every later stage reads it.

Invariant: image paths are relative to the folder of rows.jsonl and stay inside it; a group is in
one split only.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import DamagedArtifact, DataError, MissingArtifact
from ...store.reading import exists, reading
from ..text.documents import SPLITS

if TYPE_CHECKING:
    from PIL.Image import Image

ROWS = "rows.jsonl"
IMAGES = "images"
DROPPED = "dropped.json"

# Of a line, in this order: equal rows are equal bytes.
_COLUMNS = ("id", "images", "prompt", "answer", "split", "source", "group")

# Columns that stand in a line only where a row has them.
_EXTRA = ("boxes", "answers")


@dataclass(frozen=True)
class TaskRow:
    """One question, about pictures or of text alone, and its answer."""

    id: str
    images: tuple[str, ...]  # relative to the folder of rows.jsonl
    prompt: str
    answer: str
    split: str  # one of train, valid, test
    source: dict  # {"dataset", "id", "revision"}
    group: str  # sha256:..., of text alone text:...; rows that share a picture share it
    # boxes (0..1000) and answers (every reference), where there are any
    extra: dict = field(default_factory=dict)

    def line(self) -> str:
        """Return the row as its line of rows.jsonl."""
        columns = {name: getattr(self, name) for name in _COLUMNS}
        return json.dumps(columns | self.extra, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, raw: dict) -> "TaskRow":
        """Return the row of a line's JSON; KeyError or TypeError when it is none."""
        columns = {name: raw[name] for name in _COLUMNS}
        # JSON has no tuples, and a row that is read must equal the one that was written.
        columns["images"] = tuple(raw["images"])
        extra = {name: raw[name] for name in _EXTRA if name in raw}
        return cls(**columns, extra=extra)


class TaskRows:
    """The rows of one task, read once on first asking."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._rows: dict[str, list[TaskRow]] | None = None

    def rows(self, split: str) -> list[TaskRow]:
        """Return the rows of a split in file order. Raises MissingArtifact, DamagedArtifact,
        DataError for the name."""
        if split not in SPLITS:
            raise DataError(
                f"there is no split {split!r} of task rows; they are {', '.join(SPLITS)}"
            )
        if self._rows is None:
            self._rows = {name: [] for name in SPLITS}
            for row in read_rows(self.folder):
                self._rows[row.split].append(row)
        return self._rows[split]

    def picture(self, row: TaskRow) -> "Image":
        """Return a row's first picture; it has one. Raises DataError."""
        return self.pictures(row)[0]

    def pictures(self, row: TaskRow) -> "list[Image]":
        """Return a row's pictures, decoded and checked. Raises DataError."""
        # Only who opens a picture pays for importing Pillow.
        from ..images.images import open_checked

        return [open_checked(name, root=self.folder) for name in row.images]


def read_rows(folder: Path) -> Iterator[TaskRow]:
    """Yield the task rows of a folder one by one. Raises MissingArtifact, DamagedArtifact,
    UnreadableFile."""
    path = Path(folder) / ROWS
    if not exists(path):
        raise MissingArtifact(f"{path} does not exist", stages=("preprocess",))
    with reading(path), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = TaskRow.read(json.loads(line))
                if row.split not in SPLITS:
                    raise ValueError(f"split {row.split!r}")
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise DamagedArtifact(
                    f"{path}:{number} is no task row ({type(error).__name__}: {error})",
                    remove=path.parent,
                    stage="preprocess",
                ) from None
            yield row
