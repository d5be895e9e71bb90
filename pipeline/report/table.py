"""What a table is before it is drawn, and how values of a report become its cells.

Nothing here knows of terminals or HTML, and a value that is missing never stops a table.
"""

from dataclasses import dataclass

from .format import finite

PARTIAL = (
    "oracle",
    "expert",
)  # kinds of rows that are told the domain or know only one: never the best
FAINT = 0.2  # least full scale of gains relative to that of losses, and the other way round


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
    """A named row; note is smaller beside the name, main the row that the report is about."""

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


def domains_of(report: dict) -> tuple[str, ...]:
    """Return the names of the domains, in the report's order."""
    return tuple(map(str, report.get("domains") or ()))


def part(mapping: dict, key: str) -> dict:
    """Return mapping[key] where it is a dictionary, else an empty one."""
    found = mapping.get(key)
    return found if isinstance(found, dict) else {}


def best(rows: list[dict], value) -> set[int]:
    """Return the positions of the lowest value among rows that serve every domain as one model."""
    found = {i: finite(value(row)) for i, row in enumerate(rows) if row.get("kind") not in PARTIAL}
    least = min((v for v in found.values() if v is not None), default=None)
    return {i for i, v in found.items() if v is not None and v == least}


def at(line, i: int):
    """Return line[i], or None where there is no such entry."""
    return line[i] if isinstance(line, list | tuple) and i < len(line) else None


def less(a, b) -> float | None:
    """Return a - b, or None where either is missing."""
    a, b = finite(a), finite(b)
    return None if a is None or b is None else a - b


def diverge(lines: list[list[float | None]]) -> list[list[float | None]]:
    """Scale gains by the greatest gain and losses by the greatest loss, so that neither hides the
    other.

    The lesser of the two counts for at least FAINT of the greater: noise is not painted in full
    colour.
    """
    top, bottom = extremes(lines)
    floor = max(FAINT * max(top, bottom), 1e-3)
    top, bottom = max(top, floor), max(bottom, floor)
    return [[None if v is None else v / (top if v > 0 else bottom) for v in line] for line in lines]


def extremes(lines: list[list[float | None]]) -> tuple[float, float]:
    """Return the greatest gain and the greatest loss, both as positive numbers or 0."""
    flat = [v for line in lines for v in line if v is not None]
    return max([0.0, *flat]), max([0.0, *(-v for v in flat)])
