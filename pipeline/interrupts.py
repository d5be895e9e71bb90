"""Ctrl-C and SIGTERM, at whatever moment of a command, a job or a process below it they come.

Of several signals the first one alone raises: a terminal, a wrapper around the command and a person
in a hurry each send one for the same wish, and a second KeyboardInterrupt would end what the first
one has begun to put away.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

STOPPED = 130  # a command's exit status after either signal, as shells have it for Ctrl-C
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# So many signals, and whoever sends them waits for nothing any more.
IMPATIENT = 3
# Libraries that import on demand, and destructors, swallow a KeyboardInterrupt now and then.
SWALLOWED_S = 5.0
PR_SET_PDEATHSIG = 1  # of prctl(2)
# The environment's name for the process that a helper process ends with.
STARTER = "MOLEFORGE_STARTER"


def end_at_once(status: int, text: str) -> None:
    """From here on have either signal write a text and end this process, nothing else: for when
    there is nothing to be saved."""
    for number in SIGNALS:
        signal.signal(number, partial(_end, status, text))


def _end(status: int, text: str, _number: int, _frame: "FrameType | None") -> None:
    # neither print nor an exception: either may be in the middle of anything, an import too
    with suppress(OSError):
        os.write(2, text.encode())
    os._exit(status)


def raise_once(give_up: Callable[[], None] | None = None, again_s: float = 0.0) -> None:
    """From here on have the first signal raise KeyboardInterrupt and later ones do nothing; the
    third calls `give_up`. With `again_s` it is raised again after so long, until `ignore`."""
    came = 0

    def raise_first(number: int, _frame: "FrameType | None") -> None:
        nonlocal came
        came += number in SIGNALS
        if came == 1 or number == signal.SIGALRM:
            signal.setitimer(signal.ITIMER_REAL, again_s)
            raise KeyboardInterrupt
        if came >= IMPATIENT and give_up:
            give_up()

    for number in SIGNALS:
        signal.signal(number, raise_first)
    if again_s:
        signal.signal(signal.SIGALRM, raise_first)
    # a process may have been started with them held back
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextmanager
def raised_once(give_up: Callable[[], None]) -> Iterator[None]:
    """Handle signals as `raise_once` does, and as before afterwards, but after `end_at_once` not at
    all; nothing but in the main thread, as Python lets no other set handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    for number in SIGNALS:
        handler = signal.getsignal(number)
        at_once = isinstance(handler, partial) and handler.func is _end
        # Its text would come after the one that tells how it ended
        before[number] = signal.SIG_IGN if at_once else handler
    try:
        raise_once(give_up)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def first_for(what: Callable[[], None]) -> Iterator[None]:
    """Have the first Ctrl-C inside do something and raise nothing; the next one, and SIGTERM, are
    handled as before. Nothing but in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def once(_number: int, _frame: "FrameType | None") -> None:
        signal.signal(signal.SIGINT, before)
        what()

    signal.signal(signal.SIGINT, once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def ignore() -> None:
    """From here on have neither signal do anything, nor one that was to be raised again, nor one
    that has been dealt with."""
    # A KeyboardInterrupt that came up through `exec` of a text, as dataclasses do while modules are
    # imported, CPython keeps in mind even if it was caught, and ends `python -m` with the signal's
    # status instead of the module's; the next text forgets it.
    eval("None")  # noqa: S307
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def held_back() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach before they call `end_with_starter`, or let it
    through themselves; here it comes afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    os.environ[STARTER] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[STARTER]
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_starter() -> None:
    """Have this process, started while signals were `held_back`, end when its starter does, however
    that ends; Ctrl-C, which the whole group gets, is for the starter alone."""
    starter = os.environ.pop(STARTER, None)
    if starter is None:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if sys.platform == "linux":
        # Only here: a command comes by this module before it can be stopped in one line
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    # it may have ended before that
    if os.getppid() != int(starter):
        os._exit(STOPPED)
