"""Text cut into pieces at good places."""

from collections.abc import Iterable, Iterator

_PARAGRAPH_ENDS = (b"\n\n", b"\r\n\r\n")
_LONGEST_CHARACTER = 4  # bytes of UTF-8


def cut(blocks: Iterable[bytes], max_bytes: int, paragraphs: bool = False) -> Iterator[bytes]:
    """Yield pieces of at most max_bytes of the UTF-8 in blocks, ended at a line, else a space, else
    a character; with `paragraphs` at the end of one before all of these.

    Every byte is in one piece, and what is not UTF-8 is cut like the rest.
    """
    rest = b""
    for block in blocks:
        rest += block
        start = 0
        # At most max_bytes stay over for the next block, which may hold a better place to end
        while len(rest) - start > max_bytes:
            end = _boundary(rest, start, start + max_bytes, paragraphs)
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest


def _boundary(text: bytes, start: int, end: int, paragraphs: bool) -> int:
    if paragraphs:
        found = max(_after(text, mark, start, end) for mark in _PARAGRAPH_ENDS)
        if found > start:
            return found
    # In the second half only: a piece is never shorter than half of what it may be
    middle = (start + end) // 2
    for mark in (b"\n", b" "):
        found = text.rfind(mark, middle, end)
        if found >= 0:
            return found + 1
    # A continuation byte of UTF-8 is 10xxxxxx: the character began before it
    for back in range(_LONGEST_CHARACTER):
        if text[end - back] & 0xC0 != 0x80:
            return end - back
    return end


def _after(text: bytes, mark: bytes, start: int, end: int) -> int:
    """Return where the last mark between start and end ends; start without one."""
    found = text.rfind(mark, start, end)
    return start if found < 0 else found + len(mark)
