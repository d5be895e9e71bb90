"""What is handed through the layers, as the layers see it; whoever makes such a thing need not know
this module."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, TypeVar

T = TypeVar("T")

POLL_S = 0.1  # how often who waits looks whether anybody wants the result still

# Of the work that goes on in this context: a request's thread has its own. The places that ask are
# many calls below the one that knows, in code that knows nothing of requests.
_unwanted: ContextVar[Callable[[], bool]] = ContextVar("unwanted", default=lambda: False)


class Progress(Protocol):
    """Called with what is being done, and with the share of it that is done where that is known."""

    def __call__(self, text: str, share: float | None, /) -> None: ...


@dataclass(frozen=True)
class Seen:
    """Something that a job reads outside the store, as it was when it was looked at."""

    setting: str
    name: str  # of a file its path, from what the setting names on
    sum: str  # sha256; of a URL what its server says of it, of a package its version
    bytes: int = 0


@dataclass(frozen=True)
class Looked:
    """All that a job reads outside the store, and the print of it, which its address holds."""

    print: str
    seen: tuple[Seen, ...]
    lacks: str = ""  # why a job could do nothing with it, as far as a look tells

    @classmethod
    def of(cls, seen: Iterable[Seen]) -> Self:
        """Return what was seen with the print of its names and sums, in their order."""
        seen = tuple(seen)
        # Not the settings' names: which setting a file is named by changes nothing that it holds
        text = json.dumps([[each.name, each.sum] for each in seen])
        return cls(hashlib.sha256(text.encode()).hexdigest(), seen)


class Eye(Protocol):
    """What looks at files outside the store; store/looking.py has the one there is."""

    progress: Progress
    folder: Path | None  # of the store, for what is worth keeping of a look; None: nothing is kept
    fetches: bool  # whether what is far away may be read for it

    def file(self, setting: str, path: Path | str, name: str) -> Seen:
        """A file by its content, whatever is the matter with it."""

    def below(
        self, setting: str, folder: Path, wanted: Callable[[str], bool] | None = None
    ) -> Iterator[Seen]:
        """The files below a folder, those whose names are wanted, in order."""

    def once(self, key: str, make: Callable[[], T]) -> T:
        """What `make` gives, made once in a look, whatever number of jobs asks for it."""


class Abandoned(Exception):
    """Nobody waits for an answer any more, so that the work on it ends. No person acts on it, so it
    is none of the errors: the endpoint alone sees it."""


def while_wanted(unwanted: Callable[[], bool]) -> None:
    """Have the work of this context end with Abandoned once `unwanted()` is true."""
    _unwanted.set(unwanted)


def is_unwanted() -> bool:
    """Whether nobody wants the result of the work in this context any more."""
    return _unwanted.get()()


def check_wanted() -> None:
    """Raise Abandoned where nobody wants the result any more."""
    if is_unwanted():
        raise Abandoned("nobody waits for the answer any more")


@contextmanager
def held(lock: threading.Lock) -> Iterator[None]:
    """Have a lock. Raises Abandoned where nobody wants the result before it can be had."""
    check_wanted()
    while not lock.acquire(timeout=POLL_S):
        check_wanted()
    try:
        yield
    finally:
        lock.release()


def quiet(_text: str, _share: float | None, /) -> None:
    """Tell nobody."""
