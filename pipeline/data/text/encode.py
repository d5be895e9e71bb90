"""The second pass: documents to domains, splits and tokens, batch by batch; and what closes a
folder of shards.

Invariant: where batches begin depends only on the documents, so a pass that starts where one begins
has the same ones.
"""

import json
import os
import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...config.text_data import TextRunConfig
from ...errors import DataError
from ..drop_stats import DropStats
from .documents import SPLITS, Cursor, Document, drop_stats
from .partition import Domains
from .shards import ShardWriter
from .splits import Splits
from .tokenizer import Tokenizer

BATCH_BYTES = 2 << 20  # enough documents to keep every core encoding
_AHEAD = 2  # batches waiting between two steps


class Batching:
    """Tells where batches begin."""

    def __init__(self):
        self._bytes = 0

    def begins(self, document: Document) -> bool:
        """Say whether the next document is the first of a batch."""
        first = self._bytes == 0
        self._bytes += document.bytes + 64
        if self._bytes >= BATCH_BYTES:
            self._bytes = 0
        return first


@dataclass
class DocRange:
    """A run of documents in the stream: where it starts, and what tells that the same ones were
    read again."""

    start: Cursor
    documents: int = 0
    bytes: int = 0
    keys: int = 0  # sum of the keys, modulo 2**64

    def see(self, document: Document) -> None:
        """Count one document."""
        self.documents += 1
        self.bytes += document.bytes
        self.keys = (self.keys + document.key + document.piece) % 2**64


class Encoder:
    """Writes documents as the first pass has settled."""

    def __init__(self, cfg: TextRunConfig, domains: Domains, splits: Splits, tokens: Tokenizer):
        self.cfg, self.domains, self.splits, self.tokens = cfg, domains, splits, tokens

    def writer(self, folder: Path) -> ShardWriter:
        """Return a writer of such shards."""
        return ShardWriter(folder, self.domains.names, self.tokens.vocab_size, self.tokens.end_id)

    def write(
        self, found: Iterator[Document], writer: ShardWriter, total_bytes: int, progress
    ) -> DropStats:
        """Read, encode and write, each in its own thread. Returns the leaks that were dropped."""
        leaks, done = drop_stats(), 0
        with all_cores(self.cfg.runtime.threads):
            batches = _prefetch(self._batches(found, leaks))
            with closing(_prefetch(self._encoded(batches))) as encoded:
                for batch, encodings in encoded:
                    for (split, domain, document), encoding in zip(batch, encodings, strict=True):
                        writer.add(split, domain, encoding.ids, document.bytes)
                        done += document.bytes
                    progress(
                        f"writing: {done / 1e6:.1f} of {total_bytes / 1e6:.1f} MB",
                        done / total_bytes,
                    )
        return leaks

    def _encoded(self, batches: Iterator[list]) -> Iterator[tuple[list, list]]:
        with closing(batches):
            for batch in batches:
                yield batch, self.tokens.encode([document.text for _, _, document in batch])

    def _batches(
        self, found: Iterator[Document], leaks: DropStats
    ) -> Iterator[list[tuple[str, str, Document]]]:
        for group in _grouped(found):
            batch = []
            for document, domain in zip(group, self.domains.assign(group), strict=True):
                split = self.splits.of(document)
                if split is None:
                    leaks.drop("equals a held-out document", document.where)
                else:
                    batch.append((split, domain, document))
            yield batch


def _grouped(found: Iterable[Document]) -> Iterator[list[Document]]:
    group, batching = [], Batching()
    for document in found:
        if batching.begins(document) and group:
            yield group
            group = []
        group.append(document)
    if group:
        yield group


def _prefetch(items: Generator) -> Iterator:
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
def all_cores(threads: int | str) -> Iterator[None]:
    """Let tokenizers use its threads even after a fork, unless the environment already says
    otherwise."""
    given = {} if threads in (0, "auto") else {"RAYON_NUM_THREADS": str(threads)}
    wanted = {"TOKENIZERS_PARALLELISM": "true"} | given
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
    text_bytes: int,
    seconds: dict[str, float],
) -> dict:
    """Check and close the shards of folder, note what was dropped, return the metrics. Raises
    DataError."""
    _check(cfg, writer)
    writer.finish()
    dropped = json.dumps(stats.as_json(), indent=1, ensure_ascii=False)
    (folder / "dropped.json").write_text(dropped + "\n", encoding="utf-8")
    by_split = {
        what: {
            split: {d: writer.counts[split, d][what] for d in writer.domains} for split in SPLITS
        }
        for what in ("documents", "bytes", "tokens")
    }
    return by_split | {
        "vocab_size": writer.vocab_size,
        "dropped": dict(stats.counts),
        "seconds": {phase: round(spent, 3) for phase, spent in seconds.items()},
        "megabytes_per_s": text_bytes / 1e6 / sum(seconds.values()),
    }


def _check(cfg: TextRunConfig, writer: ShardWriter) -> None:
    """Raise DataError for a domain without held-out documents or with too few training tokens."""
    for domain in writer.domains:
        for split in ("valid", "test"):
            if not writer.counts[split, domain]["documents"]:
                how = (
                    f"set {split} in data.split_field ({cfg.data.split_field})"
                    if cfg.data.split_field
                    else (f"raise data.{split}_share ({getattr(cfg.data, split + '_share'):g})")
                )
                raise DataError(
                    f"domain {domain} has no {split} document: {how}, or give it more documents"
                )
        found = writer.counts["train", domain]["tokens"]
        if found < cfg.partition.min_tokens:
            raise DataError(
                f"domain {domain} has {found} training tokens, fewer than partition.min_tokens "
                f"({cfg.partition.min_tokens}): give it more text, merge it into another, or lower the setting"
            )
