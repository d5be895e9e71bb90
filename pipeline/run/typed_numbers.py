"""Numbers as they are typed behind a command."""

import argparse
import math

from ..config.base import parse_bytes


def positive(text: str) -> int:
    """Return a whole number of 1 or more. Raises ArgumentTypeError."""
    # int() would also take -1 and 1_000, and argparse would name this function.
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def positive_or_auto(text: str) -> int | str:
    """Return a whole number of 1 or more, or auto. Raises ArgumentTypeError."""
    if text == "auto":
        return text
    try:
        return positive(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor auto") from None


def port(text: str) -> int:
    """Return the number of a port. Raises ArgumentTypeError."""
    if not text.isdecimal() or int(text) >= 2**16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
    return int(text)


def seconds(text: str) -> float:
    """Return a number of seconds, 0 or more. Raises ArgumentTypeError."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return found


def size(text: str) -> int:
    """Return the bytes of a size such as 350MB. Raises ArgumentTypeError."""
    try:
        found = parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} {error}") from None
    if not isinstance(found, int) or found < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has room for nothing")
    return found
