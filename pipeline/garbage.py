"""When Python looks for garbage: seldom while a process imports what it needs, a million objects of
which none is any, and never again in those."""

import atexit
import gc

USUAL = gc.get_threshold()
# New objects before the youngest are looked through, in place of 700: `plan` takes 6.0 s, not 9.2
IMPORTING = 50_000


def seldom() -> None:
    """Look for garbage seldom, until `as_usual`; and not at all once this process ends, which takes
    its modules down one after another."""
    gc.set_threshold(IMPORTING, *USUAL[1:])
    atexit.register(gc.freeze)


def as_usual() -> None:
    """Look for garbage as Python does by itself, but never in what is there now; a process forked
    from this one goes on sharing it, as Python notes in each object that it has seen it."""
    gc.freeze()
    gc.set_threshold(*USUAL)
