"""Where data comes from: one file a source, and the shapes that sources of documents share.

A new source of documents is a file here that is called as data.source calls it and has
`sources(cfg)`, and its settings in config/text_data.py; nothing else knows which sources there are.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]  # column -> value


@dataclass(frozen=True)
class SkippedRow:
    """Why a row could not be read."""

    reason: str
    detail: str


@dataclass(frozen=True)
class LargeFile:
    """A text file too large for memory, in place of its text: a way to read its blocks again."""

    blocks: Callable[[], Iterator[bytes]]


FoundRow = tuple[str, Row | SkippedRow]  # where it is, for messages; what it holds
Rows = Callable[[], Iterator[FoundRow]]  # of one file; opens nothing before it is called
Source = tuple[str | None, Iterator[Rows]]  # fixed label, if it has one; its files in order
