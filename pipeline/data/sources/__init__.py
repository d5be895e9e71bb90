"""Where data comes from: one file a source, and the shapes that sources of documents share.

A new source of documents is a file here that is called as data.source calls it and has
`sources(cfg)`, may have `look(cfg)`, which a plan asks whether what is read is there, and
`seen(cfg, eye)`, which says what there is now where `sources` raises, and its settings in
config/text_data.py; nothing else knows which sources there are.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...protocols import Eye, Seen

# The end of what is told of bytes that are not UTF-8
ENCODING = "set encoding beside paths where it is another"
# The same where no setting says how text is encoded
AS_UTF8 = "write the file as UTF-8 (one of cp1252 by `iconv -f cp1252 -t UTF-8`)"
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


@dataclass(frozen=True)
class Note:
    """Something to tell of a file that is no fault of it: how it was read."""

    text: str


# Where a row is, for messages, and what it holds
FoundRow = tuple[str, Row | SkippedRow | Note]
# The rows of one file. Called to open it: one that nobody wants never is
Rows = Callable[[], Iterator[FoundRow]]


@dataclass(frozen=True)
class SourceFile:
    """One file of a source, or what stands for one: a split on the Hub, a kind of installed
    text."""

    rows: Rows
    seen: Callable[[Eye], Iterable[Seen]]  # what tells that it is the same as before
    read_by: Mapping[str, Any]  # what decides its rows beside its bytes and the section data
    is_whole: bool = False  # read to its end whatever limit there is, for its bytes are here
    is_remote: bool = False  # reading it takes a network


# The label of every row of a source, if it has one, and its files in order
Source = tuple[str | None, Iterator[SourceFile]]
