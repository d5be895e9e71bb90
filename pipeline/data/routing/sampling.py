"""Rows sampled from the table in balance: how many of each source and split, in which order, with
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
from ..tasks.groups import normalized
from .candidates import HELD, TEST, CandidateTable, PickedRow, hashed
from .prompts import PromptChooser
from .rows import SPLITS

_CANDIDATES = """
    SELECT r.n, t.id, t.prompt, r.images_hash, r.decisive
    FROM rows r JOIN text t USING (n)
    WHERE source_index = ? AND split = ?
    ORDER BY sort_key, t.id
"""


@dataclass(frozen=True)
class Shortage:
    """A source that had fewer rows than wanted."""

    expert: str
    split: str
    wanted: int
    found: int
    setting: str  # that wants them


@dataclass
class SourceCounts:
    """What one source gave one split."""

    taken: int = 0
    neutral: int = 0
    copies: int = 0


class RoutingSample:
    """One sample of a finalized table: the routing set's rows."""

    def __init__(
        self,
        table: CandidateTable,
        settings: RoutingSetConfig,
        prompts: PromptChooser,
    ):
        self.table = table
        self.settings = settings
        self.prompts = prompts
        self.shortages: list[Shortage] = []
        # Both by source_index and split.
        self.given: dict[tuple[int, int], SourceCounts] = {}
        self._available: dict[tuple[int, int], int] = {}

    def take(self, progress: Progress) -> None:
        """Fill the table's list of picked rows. Raises DataError for a shortage, or held-out
        wording that is seen."""
        # Without held-out wordings there is no test_held, the last of the splits.
        splits = range(HELD + self.prompts.any_held)
        self._clear_held()
        self._available = self.table.available()
        for split in splits:
            progress(f"drawing {SPLITS[split]}", 0.6 + 0.3 * split / len(splits))
            for source_index, wanted in self.wanted(split).items():
                self._fill(source_index, split, wanted)
        self._check_shortages()
        self._check_wordings()

    def wanted(self, split: int) -> dict[int, int]:
        """Return how many rows each source is to give, by source_index."""
        sources = self.settings.sources
        wanted = {}
        for i, source in enumerate(sources):
            if source.per_split:
                wanted[i] = _rows(source.per_split, split)

        # The other sources of an expert divide its share by their weights.
        available = {i: self._available.get((i, split), 0) for i in range(len(sources))}
        shares: dict[int, float] = {}
        experts = self._expert_shares(available)
        for expert, share in experts.items():
            free = []
            for i, source in enumerate(sources):
                if source.expert == expert and not source.per_split:
                    free.append(i)
            weight = sum(sources[i].weight for i in free)
            for i in free:
                shares[i] = share * sources[i].weight / weight

        total = _rows(self.settings.per_expert, split) * len(experts)
        if self.settings.balance == "natural":
            total = min(total, sum(available[i] for i in shares))
        wanted |= apportioned(total, shares)
        return dict(sorted(wanted.items()))

    def counts(self, number: Callable[[SourceCounts], int]) -> dict[str, dict[str, int]]:
        """Return a number of every split and expert."""
        out = {split: dict.fromkeys(self.settings.experts, 0) for split in SPLITS}
        for (source_index, split), given in self.given.items():
            expert = self.settings.sources[source_index].expert
            out[SPLITS[split]][expert] += number(given)
        return out

    def _expert_shares(self, available: dict[int, int]) -> dict[str, float]:
        """Return the share of each expert that has a source without numbers of its own."""
        shares: dict[str, float] = {}
        balance = self.settings.balance
        for i, source in enumerate(self.settings.sources):
            if source.per_split:
                continue
            if balance == "equal":
                shares[source.expert] = 1.0
            elif balance == "natural":
                shares[source.expert] = shares.get(source.expert, 0.0) + available[i]
            else:
                shares[source.expert] = balance.get(source.expert, 0.0)
        return shares

    def _clear_held(self) -> None:
        """Leave in test_held, of experts without held-out wordings, only rows that nobody trains
        with."""
        if not self.prompts.any_held:
            return
        without = []
        for i, name in enumerate(self.settings.experts):
            if not self.prompts.has_held(name):
                without.append(i)
        self.table.drop_trained_wordings(without, self.prompts.seen)

    def _fill(self, source_index: int, split: int, wanted: int) -> None:
        """Take as many rows of a source as are wanted, or note that there are too few."""
        source = self.settings.sources[source_index]
        given = SourceCounts()
        self.given[source_index, split] = given
        self._offer_all(source_index, split, wanted, given, copy=0)
        found = given.taken
        if found < wanted:
            setting = f"sources.{source_index}.per_split" if source.per_split else "per_expert"
            setting = f"dataset.{setting}.{SPLITS[min(split, TEST)]}"
            shortage = Shortage(source.expert, SPLITS[split], wanted, found, setting)
            self.shortages.append(shortage)
        if self.settings.short != "upsample" or SPLITS[split] != "train" or not found:
            return
        copy = 0
        while given.taken < wanted:
            copy += 1
            self._offer_all(source_index, split, wanted, given, copy)

    def _offer_all(
        self,
        source_index: int,
        split: int,
        wanted: int,
        given: SourceCounts,
        copy: int,
    ) -> None:
        """Offer every row of a source's split in its turn until there are enough."""
        for row in self.table.sql.execute(_CANDIDATES, (source_index, split)):
            if given.taken == wanted:
                return
            self._offer(row, source_index, split, given, copy)

    def _offer(
        self,
        row: tuple,
        source_index: int,
        split: int,
        given: SourceCounts,
        copy: int,
    ) -> None:
        """Take a row with the first wording that its pictures do not have yet; a copy in any
        case."""
        n, name, prompt, images_hash, decisive = row
        expert = self.settings.sources[source_index].expert
        sort_key = self.table.sort_key(expert, name, copy)

        # Neutral prompts go to rows that can be told by their pictures, as soon as the share of
        # those taken so far falls half a row behind: spread evenly over the set, and never over.
        share = self.settings.ambiguous_share
        due = bool(decisive) and given.neutral + 0.5 <= share * (given.taken + 1)
        options = self.prompts.options(
            f"{expert}-{name}-{copy}", prompt, expert, SPLITS[split], due
        )
        for text, neutral in options:
            picked = PickedRow(
                n=n,
                copy=copy,
                source_index=source_index,
                split=split,
                sort_key=sort_key,
                neutral=neutral,
                prompt=text,
                prompt_hash=hashed(normalized(text)),
                once_key=self.table.once_key(n, images_hash, text),
            )
            taken = self.table.pick(picked)
            if not taken and copy:
                taken = self.table.pick(picked._replace(once_key=None))
            if taken:
                given.taken += 1
                given.neutral += neutral
                given.copies += copy > 0
                return

    def _check_shortages(self) -> None:
        """Raise DataError for shortages that the settings do not accept, all at once."""
        refused = []
        for shortage in self.shortages:
            # However short is set: an expert without any training row cannot be learnt.
            is_empty = shortage.split == "train" and not shortage.found
            if self.settings.short == "error" or is_empty:
                refused.append(shortage)
        if not refused:
            return
        lines = ["the routing set is short of rows:"]
        for shortage in refused:
            lines.append(
                f"  {shortage.expert}, {shortage.split}: {shortage.found} of {shortage.wanted} "
                f"wanted by {shortage.setting}{self._reason(shortage)}"
            )
        counts = self.table.stats.counts
        if counts:
            dropped = [f"{count} {reason}" for reason, count in sorted(counts.items())]
            lines.append(f"  rows that were dropped before: {', '.join(dropped)}")
        remedy = "Give these experts more rows, or lower the numbers"
        if self.settings.short == "error":
            remedy += (
                ", or set dataset.short to upsample (repeat training rows) or accept (take what "
                "there is)"
            )
        lines.append(remedy)
        raise DataError("\n".join(lines))

    def _reason(self, shortage: Shortage) -> str:
        if shortage.split == "test_held" and not self.prompts.has_held(shortage.expert):
            return (
                " whose own prompt is not trained with; give it wordings in "
                f"dataset.paraphrases.{shortage.expert}.held"
            )
        if shortage.split in ("test", "test_held") and self.prompts.any_held:
            return " (test and test_held have different pictures, and divide those of test)"
        return ""

    def _check_wordings(self) -> None:
        """Raise DataError where a held-out wording is also some row's wording outside test_held."""
        for text, split, name in self.table.leaks():
            raise DataError(
                f"the held-out wording {text!r} is also the prompt of row {name!r} in "
                f"{SPLITS[split]}; remove it from the held lists of dataset.paraphrases and "
                "dataset.neutral, or reword it"
            )


def apportioned(total: int, shares: Mapping[int, float]) -> dict[int, int]:
    """Return whole numbers that add up to total and are as near to the shares as may be: the
    method of largest remainders."""
    whole = sum(shares.values()) or 1.0
    exact = {key: total * share / whole for key, share in shares.items()}
    out = {key: int(value) for key, value in exact.items()}
    left = max(0, round(sum(exact.values())) - sum(out.values()))

    def by_remainder(key: int) -> tuple[float, int]:
        # The key too: of equal remainders always the same ones are rounded up.
        return out[key] - exact[key], key

    for key in sorted(exact, key=by_remainder)[:left]:
        out[key] += 1
    return out


def _rows(numbers: SplitRowsConfig, split: int) -> int:
    # test_held has as many as test.
    return getattr(numbers, SPLITS[min(split, TEST)])
