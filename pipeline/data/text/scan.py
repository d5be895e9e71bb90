"""The first pass over the documents: sampled and counted, from which partition, splits and
tokenizer follow.

Invariant: memory holds samples, keys and a line per batch, never the corpus.
"""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from ...config.text_data import TextRunConfig
from ...errors import DataError
from ...protocols import Progress
from ...store.artifacts import write_text
from ..drop_stats import DropStats
from ..sources.columns import listed
from . import partition
from . import tokenizer as tokenizers
from .documents import Document, Stream, drop_stats
from .encode import TRIED, Batching, DocRange, all_cores
from .partition import Domains
from .splits import Sample, SmallDomains, Splits
from .tokenizer import Tokenizer
from .tokenizer_check import SAMPLE_BYTES, check

FIT_BYTES = 64 << 20  # text that clusters and difficulty are fitted on, at most
_SPARE = 1.2  # sampled over what is wanted, because chance may hold out more than its share
_PROGRESS_EVERY = 2000  # documents


@dataclass(frozen=True)
class FirstPass:
    """What the first pass has settled for the second."""

    domains: Domains
    splits: Splits
    tokenizer: Tokenizer
    stats: DropStats
    batches: list[DocRange]
    seconds: dict[str, float]  # by phase

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return sum(batch.bytes for batch in self.batches)


def first_pass(cfg: TextRunConfig, folder: Path, progress: Progress) -> FirstPass:
    """Read cfg.data once and leave partition and tokenizer in folder. Raises DataError."""
    clock = _PhaseClock()
    with clock("scan"):
        scan = _Scan(cfg)
        scan.read(progress)
    with clock("partition"):
        domains, splits = scan.decide(progress)
        domains.save(folder)
    with clock("tokenizer"):
        what = "training" if cfg.tokenizer.pretrained is None else "loading"
        progress(f"{what} the tokenizer", None)
        with all_cores(cfg.runtime.threads):
            tokenizer = _tokenizer(cfg, scan.samples, domains, splits)
        tokenizer.save(folder)
        if cfg.tokenizer.pretrained is not None:
            progress("trying the tokenizer on a sample of the text", None)
            tried = check(tokenizer, scan.sampled(), cfg.tokenizer.max_lost_share)
            write_text(folder / TRIED, json.dumps(tried, indent=1) + "\n")
    return FirstPass(domains, splits, tokenizer, scan.stats, scan.batches, clock.seconds)


class _PhaseClock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - start


class _Scan:
    """What one reading of all documents collects: counts, the keys of small domains, samples by
    label."""

    def __init__(self, cfg: TextRunConfig):
        self.cfg = cfg
        self.by_label = cfg.partition.by == "labels"
        self.stats = drop_stats()
        self.splits = Splits(cfg.data)
        self.small = SmallDomains(cfg.data)
        self.bytes = 0
        self.labels: set[str] = set()
        self.other_labels: Counter[str] = Counter()
        # by label; one of all, named "", without labels
        self.samples: dict[str, Sample] = defaultdict(self._new_sample)
        self.batches: list[DocRange] = []

    def read(self, progress: Progress) -> None:
        """Read every document. Raises DataError for data that no run could use."""
        batching = Batching()
        stream = Stream(self.cfg, self.stats)
        for number, document in enumerate(stream):
            if batching.begins(document):
                self.batches.append(DocRange(stream.cursor(document)))
            self.batches[-1].add(document)
            self._count(document)
            if number % _PROGRESS_EVERY == 0:
                progress(f"reading: {number} documents, {self.bytes / 1e6:.1f} MB", None)
        self.other_labels = stream.other_labels
        self._check()

    def _count(self, document: Document) -> None:
        name = document.label if self.by_label else ""
        self.bytes += document.bytes
        self.splits.remember(document)
        self.labels.add(name)
        if document.split in (None, "train"):
            self.samples[name].add(document)
        if self.by_label and document.split is None:
            self.small.add(name, document.key)

    def _new_sample(self) -> Sample:
        return Sample(self._sample_bytes(), self.cfg.data.seed)

    def _sample_bytes(self) -> float:
        """Return how many bytes one sample may hold."""
        data = self.cfg.data
        wanted = self.cfg.tokenizer.sample_megabytes * 1e6
        if self.cfg.tokenizer.pretrained:
            wanted = SAMPLE_BYTES
        if not self.by_label:
            return max(FIT_BYTES, 2 * wanted)
        # Held-out documents are sampled too, and left out once splits are decided
        train_share = 1 - data.valid_share - data.test_share
        return _SPARE * wanted / len(self.cfg.partition.names) / train_share

    def sampled(self) -> Iterator[str]:
        """Yield sampled training texts, the domains by turns."""
        found = [sample.documents() for sample in self.samples.values()]
        for turn in zip_longest(*found):
            for document in filter(None, turn):
                if self.splits.of(document) == "train":
                    yield document.text

    def _check(self) -> None:
        data = self.cfg.data
        if not self.bytes and not self.other_labels:
            raise DataError(
                f"no usable document in data.{data.source}, {self.stats.seen} seen: "
                f"{self.stats.explain()}; check the paths, data.text_field and "
                "data.min_document_bytes"
            )
        if not self.by_label:
            return
        missing = [name for name in self.cfg.partition.names if name not in self.labels]
        if missing:
            found = sorted(self.labels)
            for label, _ in self.other_labels.most_common(20):
                found.append(label)
            raise DataError(
                f"partition.domains names {', '.join(missing)}, and no document has that label; "
                f"data.label_field ({data.label_field}) holds {listed(found)}. Correct "
                "partition.domains, or say under partition.labels which labels a domain has"
            )

    def decide(self, progress: Progress) -> tuple[Domains, Splits]:
        """Fit the partition on training documents, then fix the splits of small domains."""
        names = self.cfg.partition.names
        given = self.cfg.data.split_field is not None
        if self.by_label:
            domains = partition.fit(self.cfg, [])
        else:
            progress(f"fitting {len(names)} domains by {self.cfg.partition.by}", None)
            sample = self.samples[""]
            found = sample.documents()
            # By threshold: which domains are small is known only once there are domains
            train = [document for document in found if self.splits.of(document) == "train"]
            domains = partition.fit(self.cfg, train)
            # A sample that left something out is larger than any small domain
            if given or not sample.whole:
                return domains, self.splits
            for document, name in zip(found, domains.assign(found), strict=True):
                self.small.add(name, document.key)
        if not given:
            self.small.decide(self.splits, names)
        return domains, self.splits


def _tokenizer(
    cfg: TextRunConfig, samples: dict[str, Sample], domains: Domains, splits: Splits
) -> Tokenizer:
    """Load the tokenizer, or train one on the same number of bytes of each domain."""
    if cfg.tokenizer.pretrained:
        return tokenizers.pretrained(cfg.tokenizer.pretrained, cfg.tokenizer.revision)
    share_bytes = cfg.tokenizer.sample_megabytes * 1e6 / len(domains.names)
    texts: list[str] = []
    taken: Counter[str] = Counter()  # bytes by domain
    for sample in samples.values():
        # A held-out document must not even decide how text is cut into tokens
        found = [document for document in sample.documents() if splits.of(document) == "train"]
        for document, name in zip(found, domains.assign(found), strict=True):
            if taken[name] < share_bytes:
                taken[name] += document.bytes
                texts.append(document.text)
    return tokenizers.train(cfg.tokenizer.vocab_size, texts)
