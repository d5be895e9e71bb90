"""Near duplicates among a task's pictures: kept in one split, or told."""

from collections.abc import Iterator
from pathlib import Path

from ..drop_stats import EXAMPLES
from ..images.near_duplicates import Looks
from .build_rows import BuiltRow
from .groups import Groups, SplitAssignment, strictness
from .rows import TaskRow


class LookAlikes:
    """What is found out about a task's pictures beside their digests; its file lies in the task's
    folder until it is closed."""

    def __init__(self, file: Path, drop: bool):
        self._looks = Looks(file)
        self._drop = drop
        self._rows: dict[str, str] = {}  # digest of a picture -> id of the first row that has it
        # Groups as they are without near duplicates, and the strictest split stated in each.
        self._exact: Groups | None = None
        self._stated: dict[str, str] = {}
        self._twins: dict[str, str] = {}  # digest -> that of a near duplicate in another group
        self.pairs = 0  # in groups of their own, were they not alike
        self.examples: list[str] = []

    def add(self, built: BuiltRow) -> None:
        """Note the pictures of a row."""
        for digest, found in built.looks:
            if digest not in self._rows:
                self._rows[digest] = built.row.id
                self._looks.add(digest, found)

    def join(self, groups: Groups, rows: Iterator[tuple[str, TaskRow]]) -> None:
        """Join the groups of near duplicates, where they are to be in one split."""
        if not self._drop:
            return
        exact = groups.copy()
        for one, other in self._looks.pairs():
            if exact.of(one) != exact.of(other):
                self._note(one, other)
                self._twins.setdefault(one, other)
                self._twins.setdefault(other, one)
                groups.join((one, other))
        if not self.pairs:
            return
        self._exact = exact
        for key, row in rows:
            home = exact.of(key)
            self._stated[home] = min(self._stated.get(home, ""), row.split, key=strictness)

    def compare(self, groups: Groups, assignment: SplitAssignment) -> None:
        """Count the near duplicates in different splits, where they stay there."""
        if self._drop:
            return
        for one, other in self._looks.pairs():
            if assignment.splits[groups.of(one)] != assignment.splits[groups.of(other)]:
                self._note(one, other)

    def told_of(self, key: str, split: str) -> str | None:
        """Return which row has a near duplicate of a row's picture, where nothing but that makes
        `split` its own; None where it would be all the same."""
        if self._exact is None or self._stated.get(self._exact.of(key)) == split:
            return None
        twin = self._twins.get(key)
        return self._rows[twin] if twin else "another row of its group"

    def close(self) -> None:
        """Remove the file."""
        self._looks.close()

    def as_json(self) -> dict:
        """Return what dropped.json says."""
        return {"pairs": self.pairs, "examples": self.examples}

    def warnings(self) -> list[str]:
        """Return what to say of near duplicates that stay in two splits."""
        if self._drop or not self.pairs:
            return []
        return [
            f"{self.pairs} pairs of pictures in two splits are nearly the same "
            f"({'; '.join(self.examples)}), so the report tests what was trained; set "
            "near_duplicates to drop"
        ]

    def _note(self, one: str, other: str) -> None:
        self.pairs += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{self._rows[one]} and {self._rows[other]}")
