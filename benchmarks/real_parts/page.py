"""The dated page: tables of what was scored, and whether the aims are reached.

n documents.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.measuring import table
from benchmarks.real_parts.scores import HeldOut, Row
from benchmarks.real_parts.variants import TOTAL, Standing
from pipeline.metrics.bootstrap import Interval
from pipeline.metrics.language import ByDomain, Scores

BASE = "base"
# Bits per byte that no domain which nobody taught may lose
MOST_FORGOTTEN = 0.002
# Of a dense model's parameters: more than rounding is not as many active ones
EQUAL_ACTIVE = 1.001


@dataclass(frozen=True)
class Verdict:
    """How a row stands to the aims."""

    name: str
    is_ahead: bool | None  # of dense total on all domains, its interval below zero
    forgets: tuple[str, float]  # the untaught domain that lost most against the base, how much
    difference: float
    interval: Interval | None
    is_as_active: bool
    is_as_trained: bool

    @property
    def reaches(self) -> bool:
        """Whether it reaches all of them."""
        kept = self.forgets[1] <= MOST_FORGOTTEN
        return bool(self.is_ahead) and kept and self.is_as_active and self.is_as_trained


class Tables:
    """The rows so far, on all domains, on the taught and on the untaught ones."""

    def __init__(self, held_out: HeldOut, taught: Sequence[str]):
        self.domains = held_out.shards.domains
        self.taught = tuple(taught)
        self.untaught = tuple(name for name in self.domains if name not in taught)
        self.rows: list[Row] = []
        self.failed: list[tuple[str, str]] = []
        self.scores: dict[str, Scores] = {}
        groups = {"all": self.domains, "taught": self.taught, "untaught": self.untaught}
        for name, domains in groups.items():
            if domains:
                self.scores[name] = held_out.scores(domains)
        # Of rows that do not change any more; the page is written after every one of them
        self._known: dict[tuple[str, ...], str] = {}
        self._add(BASE, held_out.base())
        self.base_parameters = held_out.shape.stack_parameters(1)

    def _add(self, name: str, nats: ByDomain) -> None:
        for scores in self.scores.values():
            scores.add(name, {domain: nats[domain] for domain in scores.documents})

    def add(self, row: Row) -> None:
        """Take a row in, its oracle, and the mean of its form's seeds where there are several."""
        self.rows.append(row)
        name = row.variant.name
        self._add(name, row.nats)
        # Another router over the same experts has the same
        if row.oracle is not None and not self._has_oracle(row.oracle):
            self._add(oracle_of(name), row.oracle)
        seeds = self.seeds_of(row.variant.form)
        if len(seeds) > 1:
            self._add(mean_of(row.variant.form, len(seeds)), _average([r.nats for r in seeds]))

    def _has_oracle(self, nats: ByDomain) -> bool:
        known = self.all.nats.values()
        return any(all(np.array_equal(each[d], nats[d]) for d in nats) for each in known)

    def seeds_of(self, form: str) -> list[Row]:
        """Return the rows of a form that differ by the seed alone."""
        return [row for row in self.rows if row.variant.form == form]

    @property
    def standings(self) -> list[Standing]:
        """The mean of all domains of each row."""
        return [Standing(row.variant, self.all.mean(row.variant.name)) for row in self.rows]

    def mean(self, group: str, name: str) -> str:
        """Return a row's mean over a group of domains, with its interval."""
        key = (group, name)
        if key not in self._known:
            scores = self.scores[group]
            self._known[key] = _plain(scores.mean(name), scores.interval(name))
        return self._known[key]

    def difference(self, group: str, name: str, rival: str) -> str:
        """Return a row minus another over a group of domains, with its interval."""
        key = (group, name, rival)
        if key not in self._known:
            self._known[key] = _signed(*self.scores[group].difference(name, rival))
        return self._known[key]

    @property
    def all(self) -> Scores:
        """Scores on all domains."""
        return self.scores["all"]

    def has(self, name: str) -> bool:
        """Whether a row was scored."""
        return name in self.all.nats

    def verdicts(self) -> Iterator[Verdict]:
        """Yield how each stack of the taught domains stands to the aims, over the seeds that both
        it and dense have where there are several."""
        rivals = {row.variant.seed: row for row in self.seeds_of(TOTAL)}
        for row in self.rows:
            variant = row.variant
            seeds = [each.variant.seed for each in self.seeds_of(variant.form)]
            is_first = variant.seed == seeds[0]
            if variant.kind != "stack" or variant.taught != self.taught or not is_first:
                continue
            rival = rivals.get(variant.seed)
            name, against = variant.name, rival.variant.name if rival else ""
            if len(seeds) > 1 and seeds == list(rivals):
                name, against = mean_of(variant.form, len(seeds)), mean_of(TOTAL, len(seeds))
            difference, interval = 0.0, None
            if rival is not None:
                difference, interval = self.all.difference(name, against)
            ahead = interval[1] < 0 if interval else None
            active = row.facts.active_parameters or 0
            trained = rival is not None and row.facts.tokens <= rival.facts.tokens
            yield Verdict(
                name,
                ahead,
                self._forgets(name),
                difference,
                interval,
                active <= EQUAL_ACTIVE * self.base_parameters,
                trained,
            )

    def _forgets(self, name: str) -> tuple[str, float]:
        own, base = self.all.bits_per_byte(name), self.all.bits_per_byte(BASE)
        lost = {domain: own[domain] - base[domain] for domain in self.untaught}
        worst = max(lost, key=lambda domain: lost[domain], default="")
        return worst, lost.get(worst, 0.0)


def oracle_of(name: str) -> str:
    """Return what the oracle of a row is called."""
    return f"{name}: oracle"


def mean_of(form: str, seeds: int) -> str:
    """Return what the mean of a form's seeds is called."""
    return f"{form}, mean of {seeds} seeds"


def _average(nats: Sequence[ByDomain]) -> ByDomain:
    # Bits per byte are a sum of nats by a size, so their mean is that of averaged sums
    out = {}
    for domain in nats[0]:
        out[domain] = sum(each[domain] for each in nats) / len(nats)
    return out


def body(tables: Tables) -> str:
    """Return all sections of the page."""
    parts = [
        "## Aims\n",
        *_aims(tables),
        "## Bits per byte on held-out text (lower is better)\n",
        _quality(tables),
        "An oracle is told the domain of each document: its own expert reads it, the base where "
        "there is none.\n",
        "## Differences in bits per byte (below zero: better than that row)\n",
        _differences(tables),
        "## What it cost\n",
        _costs(tables),
    ]
    if _spread_rows(tables):
        parts += ["## Seeds\n", _seeds(tables)]
    if tables.failed:
        failed = [[name, why.replace("|", "/").replace("\n", " ")] for name, why in tables.failed]
        parts += ["## What failed\n", table(["row", "why"], failed)]
    return "\n".join(parts)


def _aims(tables: Tables) -> list[str]:
    verdicts = list(tables.verdicts())
    lines = [
        f"1. Better than {TOTAL} on the mean of all domains, its 95 % interval below zero, at no "
        "more training tokens and no more active parameters.",
        f"2. No untaught domain more than {MOST_FORGOTTEN} bits per byte above the base.\n",
    ]
    reached = [verdict.name for verdict in verdicts if verdict.reaches]
    rows = []
    for verdict in verdicts:
        domain, lost = verdict.forgets
        rows.append(
            [
                verdict.name,
                _signed(verdict.difference, verdict.interval),
                {True: "yes", False: "no", None: "undecided"}[verdict.is_ahead],
                f"{lost:+.4f} ({domain})" if domain else "",
                _yes(lost <= MOST_FORGOTTEN),
                _yes(verdict.is_as_active),
                _yes(verdict.is_as_trained),
            ]
        )
    head = [
        "stack",
        f"stack - {TOTAL}",
        "better",
        "most lost against the base",
        f"within {MOST_FORGOTTEN}",
        "equal active",
        "equal tokens",
    ]
    if not tables.seeds_of(TOTAL):
        lines.append(f"{TOTAL} has not been scored: nothing is judged.\n")
    elif verdicts:
        lines += [table(head, rows)]
        told = ", ".join(reached) if reached else "no row"
        lines.append(f"Both are reached by: **{told}**.\n")
    return lines


def _quality(tables: Tables) -> str:
    rows = []
    for name in tables.all.nats:
        bits = tables.all.bits_per_byte(name)
        cells = [f"{bits[domain]:.4f}" for domain in tables.domains]
        for group in tables.scores:
            cells.append(tables.mean(group, name))
        rows.append([_told(tables, name), *cells])
    means = [f"mean of {name}" for name in tables.scores]
    return table(["row", *tables.domains, *means], rows)


def _told(tables: Tables, name: str) -> str:
    """Return a row's name, and what else there is to say of it."""
    for row in tables.rows:
        if row.variant.name == name and row.facts.told:
            return f"{name} ({row.facts.told})"
    return name


def _differences(tables: Tables) -> str:
    dense = len(tables.seeds_of(TOTAL))
    # of other seeds than the first, where that one is not among them
    total = TOTAL if tables.has(TOTAL) else mean_of(TOTAL, dense)
    rivals = [name for name in (total, BASE) if tables.has(name)]
    rows = []
    for name in tables.all.nats:
        if name == BASE:
            continue
        cells = []
        for rival in rivals:
            for group in tables.scores:
                cells.append("" if name == rival else tables.difference(group, name, rival))
        rows.append([name, *cells])
    head = [f"- {rival}, {group}" for rival in rivals for group in tables.scores]
    return table(["row", *head], rows)


def _costs(tables: Tables) -> str:
    rows = []
    for row in tables.rows:
        facts = row.facts
        rows.append(
            [
                row.variant.name,
                f"{facts.tokens:,}",
                "" if facts.lr is None else f"{facts.lr:g}",
                _number(facts.tokens_per_s),
                _number(facts.peak_mb),
                "" if facts.file_bytes is None else f"{facts.file_bytes / 1e6:.2f}",
                _number(facts.active_parameters and facts.active_parameters / 1e6, 1),
                _number(facts.valid_nats, 4),
            ]
        )
    head = [
        "row",
        "training tokens, all parts",
        "learning rate",
        "tokens/s of a training",
        "peak MB of a training",
        "MB an expert",
        "active M",
        "validation nats on own domain",
    ]
    return table(head, rows)


def _spread_rows(tables: Tables) -> list[list[Row]]:
    forms = dict.fromkeys(row.variant.form for row in tables.rows)
    groups = [tables.seeds_of(form) for form in forms]
    return [group for group in groups if len(group) > 1]


def _seeds(tables: Tables) -> str:
    rows = []
    for group in _spread_rows(tables):
        cells = [group[0].variant.form, str(len(group))]
        for scores in tables.scores.values():
            means = [scores.mean(row.variant.name) for row in group]
            each = ", ".join(f"{mean:.4f}" for mean in means)
            cells.append(f"{statistics.mean(means):.4f} ± {statistics.stdev(means):.4f} ({each})")
        rows.append(cells)
    means = [f"mean of {name}" for name in tables.scores]
    return table(["form", "seeds", *means], rows)


def _plain(mean: float, interval: Interval | None) -> str:
    # none over too few documents
    return f"{mean:.4f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def _signed(difference: float, interval: Interval | None) -> str:
    around = f" [{interval[0]:+.4f}, {interval[1]:+.4f}]" if interval else ""
    return f"{difference:+.4f}{around}"


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
