"""A domain's documents to splits and tokens, batch by batch; and what closes a folder of shards."""

import json
import os
import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ...config.text_data import TextRunConfig
from ...errors import DataError
from ...protocols import Progress
from ...store.artifacts import write_text
from ..drop_stats import DropStats
from .documents import SPLITS, Document, drop_stats
from .shards import ShardWriter
from .splits import Splits
from .tokenizer import Tokenizer

TRIED = "tokenizer_check.json"  # what a pretrained tokenizer did to a sample of the text
BATCH_BYTES = 2 << 20  # enough documents to keep every core encoding
_PREFETCHED = 2  # batches waiting between two steps
# What a document is dropped as that another split has too, by whether it was to be trained on
_LEAKS = {
    True: "equals a held-out document",
    False: "equals a document that an earlier split or domain has",
}
T = TypeVar("T")


class Batching:
    """Tells where batches begin."""

    def __init__(self) -> None:
        self._bytes = 0

    def begins(self, document: Document) -> bool:
        """Say whether the next document is the first of a batch."""
        first = self._bytes == 0
        # What a document costs beside its text, so that a batch of tiny ones stays small too
        self._bytes += document.bytes + 64
        if self._bytes >= BATCH_BYTES:
            self._bytes = 0
        return first


class _Placed(NamedTuple):
    """A document and the shard it goes to."""

    split: str
    document: Document


class Encoder:
    """Writes the documents of one domain."""

    def __init__(self, cfg: TextRunConfig, domain: str, splits: Splits, tokenizer: Tokenizer):
        self.cfg = cfg
        self.domain = domain
        self.splits = splits
        self.tokenizer = tokenizer

    def writer(self, folder: Path) -> ShardWriter:
        """Return a writer of such shards."""
        tokenizer = self.tokenizer
        return ShardWriter(
            folder,
            (self.domain,),
            tokenizer.vocab_size,
            tokenizer.end_id,
            lead=tokenizer.lead,
        )

    def write(
        self,
        found: Iterator[Document],
        writer: ShardWriter,
        total_bytes: int,
        progress: Progress,
    ) -> DropStats:
        """Read, encode and write, each in its own thread. Returns the leaks that were dropped."""
        leaks = drop_stats()
        done = 0
        with all_cores(self.cfg.runtime.threads):
            # Reading is ahead of encoding, and encoding of writing: the disk, all cores, one core
            batches = _prefetch(self._batches(found, leaks))
            # Closed here, so that an error in this thread ends the two others before it is told
            with closing(_prefetch(self._encoded(batches))) as encoded:
                for batch, encodings in encoded:
                    for placed, encoding in zip(batch, encodings, strict=True):
                        size = placed.document.bytes
                        writer.add(placed.split, self.domain, encoding.ids, size)
                        done += size
                    text = f"writing: {done / 1e6:.1f} of {total_bytes / 1e6:.1f} MB"
                    progress(text, min(1.0, done / max(total_bytes, 1)))
        return leaks

    def _encoded(
        self, batches: Generator[list[_Placed], None, None]
    ) -> Generator[tuple[list[_Placed], list], None, None]:
        with closing(batches):
            for batch in batches:
                yield batch, self.tokenizer.encode([placed.document.text for placed in batch])

    def _batches(
        self, found: Iterator[Document], leaks: DropStats
    ) -> Generator[list[_Placed], None, None]:
        for group in grouped(found):
            batch = []
            for document in group:
                split = self.splits.of(document)
                if split is None:
                    leaks.drop(_LEAKS[document.split == "train"], document.where)
                else:
                    batch.append(_Placed(split, document))
            yield batch


def grouped(found: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield documents in batches."""
    group: list[Document] = []
    batching = Batching()
    for document in found:
        if batching.begins(document) and group:
            yield group
            group = []
        group.append(document)
    if group:
        yield group


class _End:
    """Stands in a queue after the last item: None could be an item."""


def _prefetch(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """Yield items while a thread works on the next ones; its exception is raised here."""
    waiting: queue.Queue[T | _End] = queue.Queue(_PREFETCHED)
    closed = threading.Event()
    failed: list[BaseException] = []

    def put(item: T | _End) -> None:
        # Never for good: whoever reads may have stopped, and then nothing makes room any more
        while not closed.is_set():
            try:
                waiting.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def work() -> None:
        try:
            for item in items:
                put(item)
                if closed.is_set():
                    break
        except BaseException as error:
            failed.append(error)
        put(_End())
        # A generator has to be closed by the thread that runs it
        items.close()

    thread = threading.Thread(target=work, name="prepare", daemon=True)
    thread.start()
    try:
        while True:
            item = waiting.get()
            if isinstance(item, _End):
                break
            yield item
        if failed:
            raise failed[0]
    finally:
        closed.set()
        thread.join()


@contextmanager
def all_cores(threads: int | str) -> Iterator[None]:
    """Let tokenizers use its threads even after a fork, unless the environment already says
    otherwise."""
    # It turns them off in a process that was forked after they had been used
    wanted = {"TOKENIZERS_PARALLELISM": "true"}
    if threads not in (0, "auto"):
        wanted["RAYON_NUM_THREADS"] = str(threads)
    added = wanted.keys() - os.environ.keys()
    os.environ.update({name: wanted[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def finalize(
    cfg: TextRunConfig,
    folder: Path,
    writer: ShardWriter,
    stats: DropStats,
    seconds: float,
) -> dict[str, Any]:
    """Check and close the shards of folder, note what was dropped, return the metrics. Raises
    DataError."""
    _check(cfg, writer)
    writer.finish()
    dropped = json.dumps(stats.as_json(), indent=1, ensure_ascii=False)
    write_text(folder / "dropped.json", dropped + "\n")
    documents: dict[str, dict[str, int]] = {}
    sizes: dict[str, dict[str, int]] = {}
    tokens: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        counts = {domain: writer.count(split, domain) for domain in writer.domains}
        documents[split] = {domain: count.documents for domain, count in counts.items()}
        sizes[split] = {domain: count.bytes for domain, count in counts.items()}
        tokens[split] = {domain: count.tokens for domain, count in counts.items()}
    tried = folder / TRIED
    about = {}
    if tried.exists():
        about["tokenizer"] = json.loads(tried.read_text("utf-8"))
    return about | {
        "documents": documents,
        "bytes": sizes,
        "tokens": tokens,
        "vocab_size": writer.vocab_size,
        "dropped": dict(stats.counts),
        "notes": stats.told(),
        "seconds": {"write": round(seconds, 3)},
        "megabytes_per_s": sum(sum(each.values()) for each in sizes.values()) / 1e6 / seconds,
    }


def changed(cfg: TextRunConfig, domain: str | None) -> DataError:
    """Return the error for documents that are others than a moment ago."""
    of = f" of domain {domain}" if domain else ""
    return DataError(
        f"data.{cfg.data.source} has changed since it was looked at: the documents{of} are others. "
        "Let nothing write to the source and start again"
    )


def _check(cfg: TextRunConfig, writer: ShardWriter) -> None:
    """Raise DataError for a domain without held-out documents or with too few training tokens."""
    data = cfg.data
    held_out = {"valid": data.valid_share, "test": data.test_share}
    for domain in writer.domains:
        for split, share in held_out.items():
            if writer.count(split, domain).documents:
                continue
            if data.split_field:
                how = f"set {split} in data.split_field ({data.split_field})"
            else:
                how = f"raise data.{split}_share ({share:g})"
            raise DataError(
                f"domain {domain} has no {split} document: {how}, or give it more documents"
            )
        found = writer.count("train", domain).tokens
        wanted = cfg.partition.min_tokens
        if found < wanted:
            raise DataError(
                f"domain {domain} has {found} training tokens, fewer than partition.min_tokens "
                f"({wanted}): give it more text, merge it into another, or lower the setting"
            )
