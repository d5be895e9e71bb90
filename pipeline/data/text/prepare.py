"""Documents to shards: one streaming pass to sample and count, one to encode and write.

Invariant: both passes see the same documents in the same order, and memory holds samples and
batches, never the corpus.
"""

import time
from pathlib import Path

from ...config.text_data import TextRunConfig
from ...protocols import Progress, quiet
from . import distributed as piecewise
from .documents import documents, drop_stats
from .encode import Encoder, finalize
from .scan import first_pass


def prepare(
    cfg: TextRunConfig, folder: Path, progress: Progress = quiet, parts: Path | None = None
) -> dict:
    """Read cfg.data and leave tokenizer, partition and shards in folder, which is empty; return
    metrics.

    Where a survey left a plan in parts, merge what was made of it: the same bytes. say(text,
    share_done) hears of progress. Raises DataError for everything about the data that is not as
    asked; OSError (a full disk) passes through.
    """
    folder = Path(folder)
    plan = piecewise.planned(parts) if parts else None
    if plan:
        return piecewise.merge(cfg, parts, plan, folder, progress)
    found = first_pass(cfg, folder, progress)
    start = time.perf_counter()
    encoder = Encoder(cfg, found.domains, found.splits, found.tokens)
    writer = encoder.writer(folder)
    found.stats.merge(encoder.write(documents(cfg, drop_stats()), writer, found.bytes, progress))
    seconds = found.seconds | {"write": time.perf_counter() - start}
    return finalize(cfg, folder, writer, found.stats, found.bytes, seconds)
