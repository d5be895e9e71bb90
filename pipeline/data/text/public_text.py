"""Some text that no domain of the run has, as shards of its own."""

from collections.abc import Sequence
from pathlib import Path

from ...config.text_data import FilesConfig, TextRunConfig
from .documents import documents, drop_stats
from .shards import Shards, ShardWriter
from .tokenizer import Tokenizer

TOGETHER = 256  # documents that are encoded at once


def write_public_text(
    cfg: TextRunConfig,
    folder: Path,
    name: str,
    paths: Sequence[str],
    tokenizer: Tokenizer,
    tokens: int,
) -> Shards:
    """Return shards in folder of the first documents of some files, all for training, as one domain
    of at least so many tokens, or all there are.

    Raises DataError for files that are not there or cannot be read.
    """
    files = (FilesConfig(paths=tuple(paths), domain=name),)
    data = cfg.data.model_copy(update={"source": "files", "files": files, "split_field": None})
    partition = cfg.partition.model_copy(update={"by": "labels", "domains": (name,), "labels": {}})
    alone = cfg.model_copy(update={"data": data, "partition": partition})
    writer = ShardWriter(
        folder, (name,), tokenizer.vocab_size, tokenizer.end_id, lead=tokenizer.lead
    )
    waiting = []
    for document in documents(alone, drop_stats()):
        waiting.append(document)
        if len(waiting) == TOGETHER:
            _add(writer, name, tokenizer, waiting)
            waiting = []
        if writer.count("train", name).tokens >= tokens:
            break
    _add(writer, name, tokenizer, waiting)
    writer.finish()
    return Shards(folder)


def _add(writer: ShardWriter, name: str, tokenizer: Tokenizer, found: Sequence) -> None:
    encoded = tokenizer.encode([document.text for document in found])
    for document, each in zip(found, encoded, strict=True):
        writer.add("train", name, each.ids, document.bytes)
