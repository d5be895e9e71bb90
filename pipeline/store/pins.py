"""A pin: which model a part is, where its files are and what they were, in place of a copy of them.

Invariant: what is opened is what was pinned. A file that is another one by a single bit is refused
with both sums, wherever it lies.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import DataError, MismatchError
from ..protocols import Progress
from .artifacts import write_text
from .model_sources import ModelSource, find
from .reading import read_as

NAME = "pin.json"
# Where the tensors are that cannot be mapped from the file that was pinned
DECODED = "decoded.safetensors"
# (file outside the store, the sum it should have; "": unknown) -> its sha256
FileSum = Callable[[Path, str], str]


@dataclass(frozen=True)
class PinnedFile:
    """A file as it was when it was pinned."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Pin:
    """Which model, of which files."""

    source: str  # as the settings name it
    revision: str | None  # the Hub's commit
    dtype: str  # of its tensors, by torch's names
    decoded: bool  # whether the part holds its tensors itself
    files: tuple[PinnedFile, ...]

    def write(self, folder: Path) -> None:
        """Write folder/pin.json. Raises DiskFull."""
        write_text(folder / NAME, json.dumps(asdict(self), indent=1, sort_keys=True) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Pin":
        """Read folder/pin.json. Raises DamagedArtifact or UnreadableFile."""
        return read_as(cls, folder / NAME)

    def weights(self, setting: str, sum_of: FileSum) -> list[Path]:
        """Return the files of its tensors, each of them what was pinned.

        Raises DataError when they are gone, MismatchError for one that is another.
        """
        source = find(setting, self.source, self.revision)
        for file in self.files:
            path = source.folder / file.name
            if not path.is_file():
                raise DataError(
                    f"{setting}: {path} is gone, which was pinned with sha256 {file.sha256}; bring "
                    "it back"
                )
            found = sum_of(path, file.sha256)
            if found != file.sha256:
                raise MismatchError(
                    f"{setting}: {path} has changed since it was pinned: its sha256 is {found} "
                    f"and was {file.sha256}. Bring the old file back; a command that looks at it "
                    "anew pins the new one, for trainings of its own"
                )
        return [
            source.folder / file.name for file in self.files if file.name.endswith(".safetensors")
        ]


def pinned_files(
    source: ModelSource, sum_of: FileSum, progress: Progress
) -> tuple[PinnedFile, ...]:
    """Return the files that say which model a source is, with their sums. Raises ForeignFile,
    OSError, UnreadableFile."""
    files = []
    paths = source.files()
    for done, path in enumerate(paths):
        progress(f"hashing {len(paths)} files of {source.folder}", done / len(paths))
        size = path.stat().st_size
        files.append(PinnedFile(path.relative_to(source.folder).as_posix(), size, sum_of(path, "")))
    return tuple(files)
