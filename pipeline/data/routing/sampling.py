"""Rows taken from the table in balance: how many of each source and split, in whose turn, with
which wording.

Invariant: a request (pictures and wording) is taken once, rows that `dedupe` never compares and
copies under `short: upsample` aside; those are made in train alone, as a copied test row only makes
an interval look narrower.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...config.routing_set import RoutingSetConfig, SplitRowsConfig
from ...errors import DataError
from ...protocols import Progress
from .candidates import HELD, TEST, CandidateTable, blob
from .prompts import PromptChooser
from .rows import SPLITS, normalized

_ROWS = (
    "SELECT r.n, t.id, t.prompt, r.pics, r.alone FROM rows r JOIN text t USING (n) "
    "WHERE unit = ? AND split = ? ORDER BY turn, t.id"
)


@dataclass(frozen=True)
class Lack:
    """A source that had fewer rows than wanted."""

    expert: str
    split: str
    wanted: int
    found: int
    setting: str  # that wants them


@dataclass
class Taken:
    """What one source gave one split."""

    taken: int = 0
    neutral: int = 0
    copies: int = 0


class Draw:
    """One drawing of a routing set from a settled table."""

    def __init__(self, table: CandidateTable, settings: RoutingSetConfig, wordings: PromptChooser):
        self.table, self.settings, self.wordings = table, settings, wordings
        self.lacks: list[Lack] = []
        self.done: dict[tuple[int, int], Taken] = {}  # unit, split
        self._have: dict[tuple[int, int], int] = {}  # unit, split

    def take(self, progress: Progress) -> None:
        """Fill the table's list of drawn rows. Raises DataError for a shortage, or held-out wording
        that is seen."""
        splits = range(HELD + self.wordings.any_held)
        self._clear_held()
        self._have = self.table.available()
        for split in splits:
            progress(f"drawing {SPLITS[split]}", 0.6 + 0.3 * split / len(splits))
            for unit, wanted in self.wanted(split).items():
                self._fill(unit, split, wanted)
        self._check_lacks()
        self._check_wordings()

    def wanted(self, split: int) -> dict[int, int]:
        """Return how many rows each source is to give."""
        sources, shares = self.settings.sources, {}
        have = {unit: self._have.get((unit, split), 0) for unit in range(len(sources))}
        for expert, share in self._shares(have).items():
            units = [
                u for u, each in enumerate(sources) if each.expert == expert and not each.per_split
            ]
            weight = sum(sources[u].weight for u in units)
            shares |= {u: share * sources[u].weight / weight for u in units}
        out = {u: _rows(each.per_split, split) for u, each in enumerate(sources) if each.per_split}
        total = _rows(self.settings.per_expert, split) * len({sources[u].expert for u in shares})
        if self.settings.balance == "natural":
            total = min(total, sum(have[u] for u in shares))
        return dict(sorted((out | divided(total, shares)).items()))

    def counts(self, number: Callable[[Taken], int]) -> dict[str, dict[str, int]]:
        """Return a number of every split and expert."""
        out = {split: dict.fromkeys(self.settings.experts, 0) for split in SPLITS}
        for (unit, split), done in self.done.items():
            out[SPLITS[split]][self.settings.sources[unit].expert] += number(done)
        return out

    def _shares(self, have: dict[int, int]) -> dict[str, float]:
        """Return the share of each expert that has a source without numbers of its own."""
        free = {each.expert: 0.0 for each in self.settings.sources if not each.per_split}
        match self.settings.balance:
            case "equal":
                return dict.fromkeys(free, 1.0)
            case "natural":
                for unit, each in enumerate(self.settings.sources):
                    if not each.per_split:
                        free[each.expert] += have[unit]
                return free
            case shares:
                return {expert: shares.get(expert, 0.0) for expert in free}

    def _clear_held(self) -> None:
        """Leave in test_held, of experts without held-out wordings, only rows that nobody trains
        with."""
        if self.wordings.any_held:
            bare = [
                i for i, name in enumerate(self.settings.experts) if not self.wordings.held(name)
            ]
            self.table.drop_trained_wordings(bare, self.wordings.seen)

    def _fill(self, unit: int, split: int, wanted: int) -> None:
        done = self.done[unit, split] = Taken()
        self._round(unit, split, wanted, done, copy=0)
        found = done.taken
        if found < wanted:
            setting = (
                f"sources.{unit}.per_split"
                if self.settings.sources[unit].per_split
                else "per_expert"
            )
            name = f"dataset.{setting}.{SPLITS[min(split, TEST)]}"
            self.lacks.append(
                Lack(self.settings.sources[unit].expert, SPLITS[split], wanted, found, name)
            )
        copy = 0
        while (
            self.settings.short == "upsample"
            and SPLITS[split] == "train"
            and 0 < found <= done.taken < wanted
        ):
            copy += 1
            self._round(unit, split, wanted, done, copy)

    def _round(self, unit: int, split: int, wanted: int, done: Taken, copy: int) -> None:
        """Offer every row of a source's split in its turn until there are enough."""
        for row in self.table.sql.execute(_ROWS, (unit, split)):
            if done.taken == wanted:
                return
            self._offer(row, unit, split, done, copy)

    def _offer(self, row: tuple, unit: int, split: int, done: Taken, copy: int) -> None:
        """Take a row with the first wording that its pictures do not have yet; a copy in any case."""
        n, name, prompt, pics, alone = row
        expert = self.settings.sources[unit].expert
        due = bool(alone) and done.neutral + 0.5 <= self.settings.ambiguous_share * (done.taken + 1)
        options = list(
            self.wordings.options(f"{expert}-{name}-{copy}", prompt, expert, SPLITS[split], due)
        )
        turn = self.table.turn(expert, name, copy)
        for text, neutral in options:
            said = blob(normalized(text))
            values = (
                n,
                copy,
                unit,
                split,
                turn,
                neutral,
                text,
                said,
                self.table.once(n, pics, text),
            )
            if self.table.pick(values) or (copy and self.table.pick((*values[:-1], None))):
                done.taken += 1
                done.neutral += neutral
                done.copies += copy > 0
                return

    def _check_lacks(self) -> None:
        """Raise DataError for shortages that the settings do not accept, all at once."""
        bad = [
            x
            for x in self.lacks
            if self.settings.short == "error" or (x.split == "train" and not x.found)
        ]
        if not bad:
            return
        lines = [
            f"  {x.expert}, {x.split}: {x.found} of {x.wanted} wanted by {x.setting}{self._why(x)}"
            for x in bad
        ]
        dropped = ", ".join(
            f"{count} {reason}" for reason, count in sorted(self.table.dropped.items())
        )
        lines += [f"  rows that were dropped before: {dropped}"] if dropped else []
        mend = "Give these experts more rows, or lower the numbers"
        if self.settings.short == "error":
            mend += ", or set dataset.short to upsample (repeat training rows) or accept (take what there is)"
        raise DataError("\n".join(["the routing set is short of rows:", *lines, mend]))

    def _why(self, lack: Lack) -> str:
        if lack.split == "test_held" and not self.wordings.held(lack.expert):
            return f" whose own prompt is not trained with; give it wordings in dataset.paraphrases.{lack.expert}.held"
        both = lack.split in ("test", "test_held") and self.wordings.any_held
        return (
            " (test and test_held have different pictures, and divide those of test)"
            if both
            else ""
        )

    def _check_wordings(self) -> None:
        """Raise DataError where a held-out wording is also some row's wording outside test_held."""
        for text, split, name in self.table.leaks():
            raise DataError(
                f"the held-out wording {text!r} is also the prompt of row {name!r} in {SPLITS[split]}; remove it from "
                "the held lists of dataset.paraphrases and dataset.neutral, or reword it"
            )


def divided(total: int, shares: Mapping[int, float]) -> dict[int, int]:
    """Return whole numbers that add up to total and are as near to the shares as may be."""
    whole = sum(shares.values()) or 1.0
    exact = {key: total * share / whole for key, share in shares.items()}
    out = {key: int(value) for key, value in exact.items()}
    first = sorted(exact, key=lambda key: (out[key] - exact[key], key))
    for key in first[: max(0, round(sum(exact.values())) - sum(out.values()))]:
        out[key] += 1
    return out


def _rows(numbers: SplitRowsConfig, split: int) -> int:
    return getattr(numbers, SPLITS[min(split, TEST)])  # test_held has as many as test
