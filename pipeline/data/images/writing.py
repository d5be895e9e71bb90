"""Which way words run: lines from right to left, scripts without blanks between words.

A box has its text in the order in which it is read; what has to be found out is the order of the
boxes of a line, which is that of the Unicode Bidirectional Algorithm (UAX 9), undone for whole
words: what is known is where each word stands.
"""

import unicodedata
from collections.abc import Iterable, Sequence

# Right-to-left letters: of Hebrew and its like, of Arabic.
_RIGHT_TO_LEFT = ("R", "AL")

# Scripts that put no blank between words, by the beginnings of their characters' Unicode names;
# beside those whose characters are wide, of which Hangul alone has blanks.
_UNSPACED = ("THAI ", "LAO ", "KHMER ", "MYANMAR ", "TIBETAN ", "HALFWIDTH KATAKANA ")
_WIDE = ("W", "F")


def runs_to_the_left(texts: Iterable[str]) -> bool:
    """Whether most letters of some texts are of scripts that run from right to left."""
    balance = 0
    for text in texts:
        for character in text:
            balance += _direction_of(character)
    return balance < 0


def reading_order(texts: Sequence[str], page_to_the_left: bool) -> list[int]:
    """Return the places of a line's words, given from left to right, in the order they are read in.

    A line runs as its page does where it has a letter of that direction or none at all, and
    otherwise as its own letters do; words that run the other way keep their own order.
    """
    directions = [_direction(text) for text in texts]
    base = -1 if page_to_the_left else 1
    if base not in directions and any(directions):
        base = -base
    order: list[int] = []
    run: list[int] = []
    places = range(len(texts)) if base > 0 else range(len(texts) - 1, -1, -1)
    for place in places:
        if directions[place] == -base:
            run.append(place)
        elif directions[place] == 0 and run and _goes_on(directions, place, base):
            # A number between two words of a run is one of it.
            run.append(place)
        else:
            order += reversed(run)
            run = []
            order.append(place)
    return order + run[::-1]


def _goes_on(directions: Sequence[int], place: int, base: int) -> bool:
    """Whether the next word with letters, in the direction that a line is read, runs against it."""
    rest = directions[place + 1 :] if base > 0 else directions[:place][::-1]
    for direction in rest:
        if direction:
            return direction == -base
    return False


def _direction(text: str) -> int:
    """Return the direction of a word's first letter, 0 where it has none."""
    for character in text:
        direction = _direction_of(character)
        if direction:
            return direction
    return 0


def _direction_of(character: str) -> int:
    kind = unicodedata.bidirectional(character)
    if kind in _RIGHT_TO_LEFT:
        return -1
    return 1 if kind == "L" else 0


def blank_between(before: str, after: str) -> str:
    """Return what is written between two words of a line: a blank, or nothing where both are of a
    script that has none there."""
    if is_unspaced(before[-1:]) and is_unspaced(after[:1]):
        return ""
    return " "


def is_unspaced(character: str) -> bool:
    """Whether a character is of a script that puts no blanks between words."""
    if not character:
        return False
    name = unicodedata.name(character, "")
    if unicodedata.east_asian_width(character) in _WIDE:
        # Pictographs are as wide, and of no script.
        return not name.startswith("HANGUL ") and unicodedata.category(character) != "So"
    return name.startswith(_UNSPACED)
