"""What a command asks of machines elsewhere and of their volume; modal_app.py does it by Modal's
client, and tests without."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from ..errors import PipelineError

Names = Callable[[str], Iterable[str]]  # a folder of the volume -> the names in it
WIDE = 10_000  # columns of what a container prints: lines are for another terminal to break
Read = Callable[[str], bytes | None]  # a file of the volume -> its bytes, None where there is none


class FarError(PipelineError):
    """What was asked of machines elsewhere is refused, or nobody answers."""


class FarCall(Protocol):
    """Something that a container does."""

    def get(self, timeout: float | None = None) -> Any:
        """Return what it comes to. Raises TimeoutError where that takes longer, FarError."""


class Far(Protocol):
    """Machines elsewhere; whatever they refuse is a FarError."""

    @property
    def mount(self) -> str:
        """Where containers have the volume."""

    def names(self, folder: str) -> Iterable[str]:
        """Return the names in a folder of the volume."""

    def read(self, path: str) -> bytes | None:
        """Return a file of the volume, None where there is none."""

    def stored_bytes(self) -> int:
        """Return what lies on the volume."""

    def begin(self, function: str, *given: Any) -> FarCall:
        """Have a container do a function of the app, by its name."""

    def is_alive(self, run: str, addresses: Sequence[str]) -> bool:
        """Whether anybody is at a run still, by what its attempts are called and its addresses."""

    def is_deployed(self) -> bool:
        """Whether the app is."""

    def deploy(self, environ: Mapping[str, str]) -> int:
        """Deploy what the volume says, with those variables; return the exit code."""

    def copy(self, path: str, folder: Path) -> None:
        """Copy a folder of the volume into one here, over what is there. Raises DiskFull too."""


@dataclass(frozen=True)
class FarStore:
    """The far store as the laptop sees it, each thing asked for once: trials share most."""

    names: Names
    read: Read
    mount: str  # where containers have it
    folder: Path  # gets what of it is needed here

    @classmethod
    def asked_once(cls, names: Names, read: Read, mount: str, folder: Path) -> "FarStore":
        """Return one that remembers what it was told."""
        return cls(cache(names), cache(read), mount, folder)


def on_volume(root: Path, folder: Path) -> FarStore:
    """Return the far store as a container sees it that has the volume at root."""

    def names(place: str) -> list[str]:
        there = root / place
        return [path.name for path in there.iterdir()] if there.is_dir() else []

    def read(path: str) -> bytes | None:
        try:
            return (root / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    return FarStore(names, read, str(root), folder)
