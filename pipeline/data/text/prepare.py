"""Documents to shards: first the tokenizer, then one domain after another or side by side.

Invariant: what is made for a domain depends on no other, but for documents that an earlier one has
too; memory holds samples and batches, never the corpus.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...config.text_data import TextRunConfig
from ...errors import DataError
from ...protocols import Progress, quiet
from ...store.artifacts import write_text
from ..drop_stats import DropStats
from . import tokenizer as tokenizers
from .documents import SPLITS, Document, documents, drop_stats
from .encode import TRIED, Encoder, changed, finalize
from .fitting import assigned, fit, fitted_splits, no_documents, nothing_labelled
from .held_out import HeldOut
from .splits import Sample, too_few
from .survey import Print, Survey
from .tokenizer_check import SAMPLE_BYTES, check


def make_tokenizer(
    cfg: TextRunConfig, survey: Survey, folder: Path, progress: Progress = quiet
) -> dict[str, Any]:
    """Leave the tokenizer in folder, which is empty; return metrics. Raises DataError."""
    start = time.perf_counter()
    metrics = fit(cfg, survey, folder, progress)
    return metrics | {"seconds": {"tokenizer": round(time.perf_counter() - start, 3)}}


def prepare(
    cfg: TextRunConfig,
    survey: Survey,
    domain: str,
    tokenizer: Path,
    folder: Path,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Leave the shards of one domain in folder, which is empty; return metrics. `tokenizer` is
    where make_tokenizer left what it made.

    Raises DataError for everything about the data that is not as asked; OSError (a full disk)
    passes through.
    """
    start = time.perf_counter()
    stats = drop_stats()
    reading = _Reading(cfg, survey, domain, tokenizer, stats)
    encoder = Encoder(cfg, domain, reading.splits, tokenizers.load(tokenizer))
    writer = encoder.writer(folder)
    total_bytes = survey.bytes(domain if survey.by_label else None)
    leaks = encoder.write(reading.documents(), writer, total_bytes, progress)
    reading.check()
    stats.merge(leaks)
    if cfg.tokenizer.pretrained is not None:
        progress("trying the tokenizer on a sample of the text", None)
        tried = check(encoder.tokenizer, reading.sampled(), cfg.tokenizer.max_lost_share)
        write_text(folder / TRIED, json.dumps(tried, indent=1) + "\n")
    return finalize(cfg, folder, writer, stats, time.perf_counter() - start)


class _Reading:
    """The documents of one domain, read once, and what is seen of them on the way."""

    def __init__(
        self, cfg: TextRunConfig, survey: Survey, domain: str, tokenizer: Path, stats: DropStats
    ):
        self.cfg = cfg
        self.survey = survey
        self.domain = domain
        self.stats = stats
        self.tokenizer = tokenizer
        self.distinct: int | None = None
        if survey.by_label:
            held_out = HeldOut(survey)
            self.splits = held_out.splits(domain)
            self.distinct = held_out.distinct(domain)
        else:
            self.splits = fitted_splits(cfg, tokenizer)
        self._print = Print()
        self._sample = Sample(SAMPLE_BYTES, cfg.data.seed)

    def documents(self) -> Iterator[Document]:
        """Yield the domain's documents."""
        part = self.survey.part(self.domain) if self.survey.by_label else None
        found = self._watched(documents(self.cfg, self.stats, part))
        if not self.survey.by_label:
            number = self.cfg.partition.names.index(self.domain)
            found = assigned(self.tokenizer, found, number)
        for document in found:
            # A sample costs a hash a document, and only one tokenizer is tried on it
            if self.cfg.tokenizer.pretrained and self.splits.of(document) == "train":
                self._sample.add(document)
            yield document

    def sampled(self) -> Iterator[str]:
        """Yield sampled training texts."""
        for document in self._sample.documents():
            yield document.text

    def check(self) -> None:
        """Raise DataError where the documents are not those that were surveyed, or too few."""
        surveyed = self.domain if self.survey.by_label else None
        if self._print.text != self.survey.print_of(surveyed):
            raise changed(self.cfg, surveyed)
        if not self.survey.count(surveyed):
            raise self._nothing()
        if self.distinct is not None and self.distinct < len(SPLITS):
            raise too_few(self.domain, self.distinct)

    def _watched(self, found: Iterator[Document]) -> Iterator[Document]:
        for document in found:
            self._print.add(document)
            yield document

    def _nothing(self) -> DataError:
        """Return the error for a domain without a document."""
        told = nothing_labelled(self.cfg, self.survey, self.domain)
        return told or no_documents(self.cfg, self.stats.seen, self.stats.explain())
