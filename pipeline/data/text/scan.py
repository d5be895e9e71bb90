"""The first pass over the documents: sampled and counted, from which partition, splits and
tokenizer follow.

Invariant: memory holds samples, keys and a line per batch, never the corpus.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...config.text_data import TextRunConfig
from ...errors import DataError
from ...protocols import Progress
from ..drop_stats import DropStats
from . import partition, tokenizer
from .documents import Document, Stream, drop_stats
from .encode import Batching, DocRange, all_cores
from .partition import Domains
from .splits import Sample, SmallDomains, Splits
from .tokenizer import Tokenizer

FIT_BYTES = 64 << 20  # text that clusters and difficulty are fitted on, at most
_SPARE = 1.2  # sampled over what is wanted, because chance may hold out more than its share


@dataclass(frozen=True)
class Settled:
    """What the first pass has settled for the second."""

    domains: Domains
    splits: Splits
    tokens: Tokenizer
    stats: DropStats
    batches: list[DocRange]
    seconds: dict[str, float]  # by phase

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return sum(batch.bytes for batch in self.batches)


def first_pass(cfg: TextRunConfig, folder: Path, progress: Progress) -> Settled:
    """Read cfg.data once and leave partition and tokenizer in folder. Raises DataError."""
    clock = _StageClock()
    with clock("survey"):
        survey = _Survey(cfg, progress)
    with clock("partition"):
        domains, splits = survey.decide(progress)
        domains.save(folder)
    with clock("tokenizer"):
        progress(
            "training the tokenizer"
            if cfg.tokenizer.pretrained is None
            else "loading the tokenizer",
            None,
        )
        with all_cores(cfg.runtime.threads):
            tokens = _tokenizer(cfg, survey.samples, domains, splits)
        tokens.save(folder)
    return Settled(domains, splits, tokens, survey.stats, survey.batches, clock.seconds)


class _StageClock:
    """Seconds by phase."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - start


class _Survey:
    """The first pass: counts, the keys of small domains, samples by label."""

    def __init__(self, cfg: TextRunConfig, progress: Progress):
        self.cfg, self.stats, self.splits = cfg, drop_stats(), Splits(cfg.data)
        self.by_label = cfg.partition.by == "labels"
        self.small, self.bytes, self.labels = SmallDomains(cfg.data), 0, set()
        budget = self._budget_bytes()
        self.samples: dict[str, Sample] = defaultdict(lambda: Sample(budget, cfg.data.seed))
        self.batches, batching, stream = [], Batching(), Stream(cfg, self.stats)
        self.other_labels = stream.other_labels
        for number, document in enumerate(stream):
            if batching.begins(document):
                self.batches.append(DocRange(stream.mark(document)))
            self.batches[-1].see(document)
            self._see(document)
            if number % 2000 == 0:
                progress(f"reading: {number} documents, {self.bytes / 1e6:.1f} MB", None)
        self._check()

    def _see(self, document: Document) -> None:
        name = document.label if self.by_label else ""
        self.bytes += document.bytes
        self.splits.see(document)
        self.labels.add(name)
        if document.split in (None, "train"):
            self.samples[name].see(document)
        if self.by_label and document.split is None:
            self.small.see(name, document.key)

    def _budget_bytes(self) -> float:
        data, wanted = self.cfg.data, self.cfg.tokenizer.sample_megabytes * 1e6
        wanted = 0 if self.cfg.tokenizer.pretrained else wanted
        if (
            self.by_label
        ):  # held-out documents are sampled too, and left out once splits are decided
            train_share = 1 - data.valid_share - data.test_share
            return _SPARE * wanted / len(self.cfg.partition.names) / train_share
        return max(FIT_BYTES, 2 * wanted)

    def _check(self) -> None:
        if not self.bytes and not self.other_labels:
            raise DataError(
                f"no usable document in data.{self.cfg.data.source}, {self.stats.seen} seen: {self.stats.explain()}; "
                "check the paths, data.text_field and data.min_document_bytes"
            )
        missing = [
            name for name in self.cfg.partition.names if self.by_label and name not in self.labels
        ]
        if missing:
            found = [
                *sorted(self.labels),
                *(label for label, _ in self.other_labels.most_common(20)),
            ]
            raise DataError(
                f"partition.domains names {', '.join(missing)}, and no document has that label; data.label_field "
                f"({self.cfg.data.label_field}) holds {', '.join(found)}. Correct partition.domains or the labels"
            )

    def decide(self, progress: Progress) -> tuple[Domains, Splits]:
        """Fit the partition on training documents, then settle the splits of small domains."""
        names = self.cfg.partition.names
        if self.by_label:
            domains = partition.fit(self.cfg, [])
        else:
            progress(f"fitting {len(names)} domains by {self.cfg.partition.by}", None)
            found = self.samples[""].documents()
            domains = partition.fit(self.cfg, [d for d in found if self.splits.of(d) == "train"])
            if (
                not self.samples[""].whole or self.cfg.data.split_field
            ):  # larger than any small domain, or given
                return domains, self.splits
            for document, name in zip(found, domains.assign(found), strict=True):
                self.small.see(name, document.key)
        if not self.cfg.data.split_field:
            self.small.decide(self.splits, names)
        return domains, self.splits


def _tokenizer(
    cfg: TextRunConfig, samples: dict[str, Sample], domains: Domains, splits: Splits
) -> Tokenizer:
    if cfg.tokenizer.pretrained:
        return tokenizer.pretrained(cfg.tokenizer)
    share_bytes = cfg.tokenizer.sample_megabytes * 1e6 / len(domains.names)
    texts, taken = [], Counter()
    for sample in samples.values():
        found = [d for d in sample.documents() if splits.of(d) == "train"]
        for document, name in zip(found, domains.assign(found), strict=True):
            if taken[name] < share_bytes:
                taken[name] += document.bytes
                texts.append(document.text)
    return tokenizer.train(cfg.tokenizer, texts)
