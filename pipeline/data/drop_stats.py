"""What is dropped on the way from a source to a dataset: counted, shown by example, and an error
where it is too much.

Every room that drops something counts it here: documents, task rows, rows over a token limit.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import DataError

EXAMPLES = 3  # kept per reason

# Characters of an example: a row may hold a whole picture where a path was meant.
_LONGEST = 300

# Of what is said about all of them, a screen of text: beyond it, reasons have one short example.
_MOST_EXPLAINED = 1500
_SHORT = 120
_SHOWN_REASONS = 8


def shortened(text: str, most: int) -> str:
    """Return a text of at most `most` characters and a few more, which say how long it was."""
    if len(text) <= most:
        return text
    return f"{text[:most]}... ({len(text):,} characters)"


class Dropped(DataError):
    """Raised of one item that cannot be used: `reason` is the kind of fault, for counting, the text
    what is wrong with this one."""

    def __init__(self, reason: str, text: str):
        super().__init__(text)
        self.reason = reason


@dataclass
class DropStats:
    """How many items were seen, and how many were dropped for which reason, with examples of each.

    `harmless` are the reasons that are no fault of the source (a duplicate, a limit that is full):
    they are counted and shown, but never too many.
    """

    harmless: Collection[str] = ()
    seen: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)  # what else to tell, of how many

    def drop(self, reason: str, where: str, detail: str = "") -> None:
        """Count one dropped item; `where` says which, `detail` what about it."""
        self.counts[reason] += 1
        self._show(reason, where, detail)

    def drop_some(self, reason: str, count: int, where: Sequence[str]) -> None:
        """Count several dropped items; `where` says which the first of them are."""
        # A reason that dropped nothing is not named
        if count:
            self.counts[reason] += count
            for which in where:
                self._show(reason, which)

    def note(self, text: str, where: str) -> None:
        """Count something to tell that drops nothing."""
        self.notes[text] += 1
        self._show(text, where)

    def _show(self, reason: str, where: str, detail: str = "") -> None:
        shown = self.examples.setdefault(reason, [])
        # The first, so that a report is the same however many follow
        if len(shown) < EXAMPLES:
            shown.append(shortened(f"{where}: {detail}" if detail else where, _LONGEST))

    def merge(self, later: "DropStats") -> None:
        """Add what was dropped in a later step of the same items, which are not seen twice."""
        self.counts.update(later.counts)
        self.notes.update(later.notes)
        for reason, shown in later.examples.items():
            before = self.examples.get(reason, [])
            both = before + shown
            self.examples[reason] = both[:EXAMPLES]

    @property
    def total(self) -> int:
        """Items that were dropped, for whatever reason."""
        return self.counts.total()

    @property
    def bad(self) -> int:
        """Items that were dropped for a fault of the source."""
        # By the harmless ones: a reason that nobody has thought of counts as bad
        harmless = sum(self.counts[reason] for reason in self.harmless)
        return self.total - harmless

    def check(self, max_share: float, what: str, setting: str, remedy: str) -> None:
        """Raise DataError when more than `max_share` of the items seen is bad.

        `what` names the items and what ails them, `setting` where max_share was set, `remedy` what
        a person can do about it.
        """
        if self.bad > max_share * self.seen:
            raise DataError(
                f"{self.bad} of {self.seen} {what}, more than {setting} ({max_share:g}) allows: "
                f"{self.explain(bad_only=True)}. {remedy}"
            )

    def explain(self, bad_only: bool = False) -> str:
        """Return the counts with their examples as one phrase, the most frequent reason first."""
        counts = self.counts.most_common()
        if bad_only:
            counts = [item for item in counts if item[0] not in self.harmless]
        phrases = []
        for reason, count in counts:
            phrases.append(f"{count} {reason} ({', '.join(self.examples[reason])})")
        if len("; ".join(phrases)) > _MOST_EXPLAINED:
            phrases = []
            for reason, count in counts[:_SHOWN_REASONS]:
                example = shortened(self.examples[reason][0], _SHORT)
                phrases.append(f"{count} {shortened(reason, _SHORT)} ({example})")
            if len(counts) > _SHOWN_REASONS:
                phrases.append(f"and {len(counts) - _SHOWN_REASONS} other reasons")
        return "; ".join(phrases) or "none dropped"

    def told(self, what: str = "") -> list[str]:
        """Return the notes with their examples, the most frequent first, then what was left out,
        whether or not it is a fault; `what` names the items where there are several kinds."""
        phrases = []
        for text, count in self.notes.most_common():
            shown = self.examples[text]
            more = f" and {count - len(shown)} more" if count > len(shown) else ""
            phrases.append(f"{', '.join(shown)}{more}: {text}")
        if self.total:
            phrases.append(f"{f'{what} ' if what else ''}left out: {self.explain()}")
        return phrases

    def as_json(self) -> dict[str, Any]:
        """Return what dropped.json and a part's manifest hold."""
        noted = {"notes": dict(self.notes)} if self.notes else {}
        return {
            "seen": self.seen,
            "dropped": dict(self.counts),
            "examples": self.examples,
            **noted,
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], harmless: Collection[str] = ()) -> "DropStats":
        """Return what as_json gave; `harmless` is no part of it."""
        return cls(
            harmless=harmless,
            seen=raw["seen"],
            counts=Counter(raw["dropped"]),
            examples=dict(raw["examples"]),
            notes=Counter(raw.get("notes", {})),
        )
