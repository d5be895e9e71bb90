"""Bits per byte of models on held-out text, domain by domain, with paired intervals."""

from collections.abc import Iterable

from benchmarks.domain_parts.state import State
from benchmarks.measuring import progress, table
from pipeline.families.ffn_moe.evaluator import Evaluator
from pipeline.families.ffn_moe.parts import shards_of
from pipeline.metrics.bootstrap import Interval
from pipeline.metrics.language import Scores
from pipeline.model.trunk import Ffn, Trunk


class ByDomainScores:
    """The held-out documents of each domain of a run, and what models score on them."""

    def __init__(self, state: State, tokens: int):
        cfg = state.cfg
        # The report of a run reads as much as its file says; here it is the page's own matter
        evaluate = cfg.evaluate.model_copy(update={"tokens_per_domain": tokens})
        cfg = cfg.model_copy(update={"evaluate": evaluate})
        shards = shards_of(state.parts, cfg.partition.names)
        self.evaluator = Evaluator(cfg, shards, _quiet)
        self.of: dict[str, Scores] = {}
        for domain, documents in self.evaluator.documents.items():
            self.of[domain] = Scores({domain: documents}, evaluate.bootstrap, cfg.data.seed)

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains, in the run's order."""
        return tuple(self.of)

    def add(self, row: str, trunk: Trunk, ffn: Ffn, domains: Iterable[str] | None = None) -> None:
        """Score a model on some domains, or on all."""
        for domain in self.domains if domains is None else domains:
            progress(f"scoring {row} on {domain}")
            documents = self.evaluator.documents[domain]
            nats_n = documents.sums(self.evaluator.token_nats(trunk, ffn, domain))
            self.of[domain].add(row, {domain: nats_n})

    def take(
        self, other: "ByDomainScores", row: str, domains: Iterable[str], as_known: str
    ) -> None:
        """Take what a row has scored elsewhere, as it was called there, on the same documents."""
        for domain in domains:
            self.of[domain].add(row, other.of[domain].nats[as_known])

    def bits(self, row: str, domain: str) -> float:
        """Return bits per byte of a row on a domain."""
        return self.of[domain].mean(row)

    def difference(self, row: str, against: str, domain: str) -> tuple[float, Interval | None]:
        """Return a row minus another in bits per byte, and the 95 % interval over documents."""
        return self.of[domain].difference(row, against)

    def table(self, rows: Iterable[str], differences: Iterable[tuple[str, str]] = ()) -> str:
        """Return the table of some rows, then of some rows minus others."""
        lines = []
        for row in rows:
            cells = []
            for domain, scores in self.of.items():
                has = row in scores.nats
                cells.append(_plain(self.bits(row, domain), scores.interval(row)) if has else "")
            lines.append([row, *cells])
        for row, against in differences:
            cells = [signed(*self.difference(row, against, domain)) for domain in self.domains]
            lines.append([f"{row} - {against}", *cells])
        return table(["bits per byte", *self.domains], lines)

    def told(self) -> str:
        """Return how much text stands behind the figures, and what is too little for intervals."""
        words = []
        few: list[str] = []
        for domain, documents in self.evaluator.documents.items():
            words.append(f"{domain} {len(documents.bytes_n)} ({documents.tokens:,} tokens)")
            few += self.of[domain].too_few
        lacking = f" Too few documents for intervals: {', '.join(few)}." if few else ""
        return f"Held-out documents: {', '.join(words)}.{lacking}"


def _quiet(_text: str, _share: float | None) -> None:
    """Tell nothing: what is scored is told domain by domain."""


def _plain(bits: float, interval: Interval | None) -> str:
    return f"{bits:.4f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def signed(difference: float, interval: Interval | None) -> str:
    """Return a difference with its sign and interval."""
    around = f" [{interval[0]:+.4f}, {interval[1]:+.4f}]" if interval else ""
    return f"{difference:+.4f}{around}"
