"""Documents to shards: one streaming pass to sample and count, one to encode and write.

Invariant: both passes see the same documents in the same order, and memory holds samples and batches, never the corpus.
"""

import json
import os
import queue
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from ..config import Config
from ..errors import DataError
from . import partition, tokenizer
from .corpus import SPLITS, Document, Tally, documents
from .partition import Domains
from .shards import ShardWriter
from .splits import Sample, SmallDomains, Splits
from .tokenizer import Tokenizer

BATCH_BYTES = 2 << 20  # enough documents to keep every core encoding
FIT_BYTES = 64 << 20  # text that clusters and difficulty are fitted on, at most
_AHEAD = 2  # batches waiting between two steps
_SPARE = 1.2  # sampled over what is wanted, because chance may hold out more than its share
Say = Callable[[str, float | None], None]


def quiet(text: str, share_done: float | None) -> None:
    """Report nothing."""


def prepare(cfg: Config, folder: Path, say: Say = quiet) -> dict:
    """Read cfg.data and leave tokenizer, partition and shards in folder, which is empty; return metrics.

    say(text, share_done) hears of progress. Raises DataError for everything about the data that is not
    as asked; OSError (a full disk) passes through.
    """
    folder, clock = Path(folder), _Clock()
    with clock("survey"):
        survey = _Survey(cfg, say)
    with clock("partition"):
        domains, splits = survey.decide(say)
        domains.save(folder)
    with clock("tokenizer"):
        say("training the tokenizer" if cfg.tokenizer.pretrained is None else "loading the tokenizer", None)
        with _all_cores(cfg.runtime.threads):
            tokens = _tokenizer(cfg, survey.samples, domains, splits)
        tokens.save(folder)
        survey.samples.clear()
    with clock("write"), _all_cores(cfg.runtime.threads):
        writer = ShardWriter(folder, domains.names, tokens.vocab_size, tokens.end_id)
        leaks = _write(cfg, domains, splits, tokens, writer, survey.bytes, say)
    _check(cfg, writer)
    writer.finish()
    survey.tally.dropped |= leaks.dropped
    survey.tally.examples |= leaks.examples
    _write_dropped(folder, survey.tally)
    return _metrics(writer, survey, clock)


class _Clock:
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

    def __init__(self, cfg: Config, say: Say):
        self.cfg, self.tally, self.splits = cfg, Tally(), Splits(cfg.data)
        self.by_label = cfg.partition.by == "labels"
        self.small, self.bytes, self.labels = SmallDomains(cfg.data), 0, set()
        budget = self._budget_bytes()
        self.samples: dict[str, Sample] = defaultdict(lambda: Sample(budget, cfg.data.seed))
        for number, document in enumerate(documents(cfg, self.tally)):
            self._see(document)
            if number % 2000 == 0:
                say(f"reading: {number} documents, {self.bytes / 1e6:.1f} MB", None)
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
        if self.by_label:  # held-out documents are sampled too, and left out once splits are decided
            train_share = 1 - data.valid_share - data.test_share
            return _SPARE * wanted / len(self.cfg.partition.names) / train_share
        return max(FIT_BYTES, 2 * wanted)

    def _check(self) -> None:
        if not self.bytes and not self.tally.other_labels:
            raise DataError(
                f"no usable document in data.{self.cfg.data.source}, {self.tally.seen} seen: {self.tally.explain()}; "
                "check the paths, data.text_field and data.min_document_bytes"
            )
        missing = [name for name in self.cfg.partition.names if self.by_label and name not in self.labels]
        if missing:
            found = [*sorted(self.labels), *(label for label, _ in self.tally.other_labels.most_common(20))]
            raise DataError(
                f"partition.domains names {', '.join(missing)}, and no document has that label; data.label_field "
                f"({self.cfg.data.label_field}) holds {', '.join(found)}. Correct partition.domains or the labels"
            )

    def decide(self, say: Say) -> tuple[Domains, Splits]:
        """Fit the partition on training documents, then settle the splits of small domains."""
        names = self.cfg.partition.names
        if self.by_label:
            domains = partition.fit(self.cfg, [])
        else:
            say(f"fitting {len(names)} domains by {self.cfg.partition.by}", None)
            found = self.samples[""].documents()
            domains = partition.fit(self.cfg, [d for d in found if self.splits.of(d) == "train"])
            if not self.samples[""].whole or self.cfg.data.split_field:  # larger than any small domain, or given
                return domains, self.splits
            for document, name in zip(found, domains.assign(found), strict=True):
                self.small.see(name, document.key)
        if not self.cfg.data.split_field:
            self.small.decide(self.splits, names)
        return domains, self.splits


def _tokenizer(cfg: Config, samples: dict[str, Sample], domains: Domains, splits: Splits) -> Tokenizer:
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


def _write(cfg: Config, domains: Domains, splits: Splits, tokens: Tokenizer, writer, total: int, say: Say) -> Tally:
    """Run the second pass: read, encode and write each in its own thread. Returns the leaks it dropped."""
    leaks, done = Tally(), 0
    batches = _ahead(_batches(cfg, domains, splits, leaks))
    with closing(_ahead(_encoded(batches, tokens))) as encoded:
        for batch, encodings in encoded:
            for (split, domain, document), encoding in zip(batch, encodings, strict=True):
                writer.add(split, domain, encoding.ids, document.bytes)
                done += document.bytes
            say(f"writing: {done / 1e6:.1f} of {total / 1e6:.1f} MB", done / total)
    return leaks


def _encoded(batches: Iterator[list], tokens: Tokenizer) -> Iterator[tuple[list, list]]:
    with closing(batches):
        for batch in batches:
            yield batch, tokens.encode([document.text for _, _, document in batch])


def _batches(cfg: Config, domains: Domains, splits: Splits, leaks: Tally) -> Iterator[list[tuple[str, str, Document]]]:
    for found in _grouped(documents(cfg, Tally())):
        batch = []
        for document, domain in zip(found, domains.assign(found), strict=True):
            split = splits.of(document)
            if split is None:
                leaks.drop("equals a held-out document", document.where)
            else:
                batch.append((split, domain, document))
        yield batch


def _grouped(found: Iterable[Document]) -> Iterator[list[Document]]:
    group, size = [], 0
    for document in found:
        group.append(document)
        size += document.bytes + 64
        if size >= BATCH_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _ahead(items: Generator) -> Iterator:
    """Yield items while a thread works on the next ones; its exception is raised here."""
    waiting: queue.Queue = queue.Queue(_AHEAD)
    closed = threading.Event()

    def put(kind: str, value) -> None:
        while not closed.is_set():
            try:
                waiting.put((kind, value), timeout=0.1)
            except queue.Full:
                continue
            return

    def work() -> None:
        try:
            for item in items:
                put("item", item)
                if closed.is_set():
                    break
        except BaseException as error:
            put("error", error)
        else:
            put("end", None)
        finally:
            items.close()

    thread = threading.Thread(target=work, name="prepare", daemon=True)
    thread.start()
    try:
        while (entry := waiting.get())[0] == "item":
            yield entry[1]
        if entry[0] == "error":
            raise entry[1]
    finally:
        closed.set()
        thread.join()


@contextmanager
def _all_cores(threads: int) -> Iterator[None]:
    """Let tokenizers use its threads even after a fork, unless the environment already says otherwise."""
    wanted = {"TOKENIZERS_PARALLELISM": "true"} | ({"RAYON_NUM_THREADS": str(threads)} if threads else {})
    added = wanted.keys() - os.environ.keys()
    os.environ.update({name: wanted[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _check(cfg: Config, writer: ShardWriter) -> None:
    """Raise DataError for a domain without held-out documents or with too few training tokens."""
    for domain in writer.domains:
        for split in ("valid", "test"):
            if not writer.counts[split, domain]["documents"]:
                how = (
                    f"set {split} in data.split_field ({cfg.data.split_field})"
                    if cfg.data.split_field
                    else (f"raise data.{split}_share ({getattr(cfg.data, split + '_share'):g})")
                )
                raise DataError(f"domain {domain} has no {split} document: {how}, or give it more documents")
        found = writer.counts["train", domain]["tokens"]
        if found < cfg.partition.min_tokens:
            raise DataError(
                f"domain {domain} has {found} training tokens, fewer than partition.min_tokens "
                f"({cfg.partition.min_tokens}): give it more text, merge it into another, or lower the setting"
            )


def _write_dropped(folder: Path, tally: Tally) -> None:
    about = {"seen": tally.seen, "dropped": dict(tally.dropped), "examples": tally.examples}
    with open(folder / "dropped.json", "w", encoding="utf-8") as file:
        file.write(json.dumps(about, indent=1, ensure_ascii=False) + "\n")


def _metrics(writer: ShardWriter, survey: _Survey, clock: _Clock) -> dict:
    by_split = {
        what: {split: {d: writer.counts[split, d][what] for d in writer.domains} for split in SPLITS}
        for what in ("documents", "bytes", "tokens")
    }
    return by_split | {
        "vocab_size": writer.vocab_size,
        "dropped": dict(survey.tally.dropped),
        "seconds": {phase: round(seconds, 3) for phase, seconds in clock.seconds.items()},
        "megabytes_per_s": survey.bytes / 1e6 / sum(clock.seconds.values()),
    }
