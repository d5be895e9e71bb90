"""What is handed through the layers, as the layers see it; whoever makes such a thing need not know
this module."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

POLL_S = 0.1  # how often who waits looks whether anybody wants the result still

# Of the work that goes on in this context: a request's thread has its own. The places that ask are
# many calls below the one that knows, in code that knows nothing of requests.
_unwanted: ContextVar[Callable[[], bool]] = ContextVar("unwanted", default=lambda: False)


class Progress(Protocol):
    """Called with what is being done, and with the share of it that is done where that is known."""

    def __call__(self, text: str, share: float | None, /) -> None: ...


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
