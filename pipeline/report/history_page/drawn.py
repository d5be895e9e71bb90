"""What the page of histories is made of, as its script reads it."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class DrawnRun:
    """A run: its number among the page's runs is what lines refer to."""

    id: str
    family: str
    begun: str


@dataclass(frozen=True)
class DrawnAxis:
    """Where the points of lines are: three ways to place them."""

    step: list[float]
    tokens: list[float | None]
    hours: list[float | None]  # since the training's first row


@dataclass(frozen=True)
class DrawnCurve:
    """A named line; `dash` tells lines of one run apart, `axis` is the number of its places."""

    name: str
    runs: tuple[int, ...]
    axis: int
    values: list[float | None]
    dash: int = 0


@dataclass(frozen=True)
class CurveChart:
    """One quantity, with a line for each training."""

    title: str
    unit: str
    lines: list[DrawnCurve]
    aside: bool = False  # looked at by few, so folded away


@dataclass(frozen=True)
class HeatMap:
    """Shares of tokens, from 0; an even share is in the middle of the colours."""

    title: str
    runs: tuple[int, ...]
    rows: list[str]  # experts
    columns: list[str]  # steps, or layers
    values: list[list[float | None]]  # a line for each row
    across: str  # what the columns are


@dataclass(frozen=True)
class StageSection:
    """A stage of the runs."""

    title: str
    note: str
    charts: list[CurveChart]
    heats: list[HeatMap]


@dataclass(frozen=True)
class Listed:
    """A table of words."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


@dataclass(frozen=True)
class HistoryPage:
    """All of it."""

    title: str
    meta: str
    runs: list[DrawnRun]
    axes: list[DrawnAxis]
    sections: list[StageSection]
    tables: list[Listed]
    notes: list[str]
