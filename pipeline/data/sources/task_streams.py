"""What the sources of task rows share: the shapes that they yield, and how messages name a
setting."""

from collections.abc import Iterator
from pathlib import Path

from ...config.task_data import TaskDataConfig
from ...errors import DataError
from ..text.documents import SPLITS
from . import SkippedRow

# Where a row was found, for messages, and its columns or why it has none.
Found = tuple[str, dict | SkippedRow]

# The rows of one split, or of a source that has to be divided (None).
Stream = tuple[str | None, Iterator[Found]]

# Where pictures are when nothing else is set; those of the Hub's folders of images come last.
IMAGE_COLUMNS = ("image", "images", "file_name", "file_names")


def image_columns(setting: str) -> tuple[str, ...]:
    """Return the columns that may hold a row's pictures: the one that is set, and for the default
    its other names."""
    if setting == "image":
        return (setting, *IMAGE_COLUMNS)
    return (setting,)


def given_splits(data: TaskDataConfig) -> dict[str, str]:
    """Return the files, folders or Hub splits that the settings name, by split."""
    return {split: getattr(data, split) for split in SPLITS if getattr(data, split)}


def base_of(data: TaskDataConfig) -> Path:
    """Return where a source's files are. Raises DataError when its settings do not say."""
    if data.path is None:
        raise DataError(f"the source {data.source} has no path")
    return Path(data.path)


def setting(name: str) -> str:
    """Return what messages call the settings of a task's data."""
    return f"loras.experts.{name}.dataset"
