"""What a table is before it is drawn, and arithmetic for its marks and colours.

Nothing here knows of terminals or HTML, and a value that is missing never stops a table.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .format import finite

# least full scale of gains relative to that of losses, and the other way round
FAINT = 0.2
Values = list[float | None]


@dataclass(frozen=True)
class Cell:
    """One value: text, something smaller beside it, and how it stands out.

    heat runs from -1 (worst) over 0 to 1 (best); own marks an expert on its own domain.
    """

    text: str
    small: str = ""
    best: bool = False
    tone: str = ""  # good, bad or nothing
    heat: float | None = None
    own: bool = False


@dataclass(frozen=True)
class Row:
    """A named row; note is smaller beside the name, main the row that the report is about.

    Between rows of another kind the drawn table has a line.
    """

    name: str
    cells: tuple[Cell, ...]
    note: str = ""
    kind: str = ""
    main: bool = False


@dataclass(frozen=True)
class Table:
    """A titled table; corner heads the column of names, reading says how to read it and who drew it
    first.

    colours says what colours and frames mean, where they are drawn at all; words are the positions
    of columns that hold words; scale are the labels at the two ends of the colours.
    """

    name: str
    title: str
    corner: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    reading: str
    colours: str = ""
    words: tuple[int, ...] = ()
    scale: tuple[str, str] = ("", "")


def lowest(values: Sequence[float | None]) -> set[int]:
    """Return the positions of the lowest value, several where they are equal; None never wins."""
    # NaN would win or lose by its place in the comparison
    found = [finite(value) for value in values]
    least = min((value for value in found if value is not None), default=None)
    if least is None:
        return set()
    return {i for i, value in enumerate(found) if value == least}


def less(a: float | None, b: float | None) -> float | None:
    """Return a - b, or None where either is missing."""
    a = finite(a)
    b = finite(b)
    if a is None or b is None:
        return None
    return a - b


def at(line: Sequence[float | None], i: int) -> float | None:
    """Return line[i], or None where the line is shorter."""
    return line[i] if i < len(line) else None


def names_in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Return each name once, in the order of first appearance."""
    return tuple(dict.fromkeys(names))


def diverge(lines: list[Values]) -> list[Values]:
    """Scale gains by the greatest gain and losses by the greatest loss, so that neither hides the
    other.

    The lesser of the two counts for at least FAINT of the greater: noise is not painted in full
    colour.
    """
    gain, loss = extremes(lines)
    # a gain of 0.001 is noise, also where there is nothing else
    floor = max(FAINT * max(gain, loss), 1e-3)
    gain = max(gain, floor)
    loss = max(loss, floor)
    return [_scaled(line, gain, loss) for line in lines]


def _scaled(line: Values, gain: float, loss: float) -> Values:
    out: Values = []
    for value in line:
        if value is None:
            out.append(None)
        else:
            out.append(value / (gain if value > 0 else loss))
    return out


def extremes(lines: list[Values]) -> tuple[float, float]:
    """Return the greatest gain and the greatest loss, both as positive numbers or 0."""
    gain = 0.0
    loss = 0.0
    for line in lines:
        for value in line:
            if value is not None:
                gain = max(gain, value)
                loss = max(loss, -value)
    return gain, loss
