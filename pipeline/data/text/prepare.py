"""Documents to shards: one streaming pass to sample and count, one to encode and write.

Invariant: both passes see the same documents in the same order, and memory holds samples and
batches, never the corpus.
"""

import time
from pathlib import Path

from ...config.text_data import TextRunConfig
from ...errors import DataError
from ...protocols import Progress, quiet
from . import distributed
from .documents import documents, drop_stats
from .encode import DocRange, Encoder, finalize
from .scan import first_pass


def prepare(
    cfg: TextRunConfig,
    folder: Path,
    progress: Progress = quiet,
    jobs_folder: Path | None = None,
) -> dict:
    """Read cfg.data and leave tokenizer, partition and shards in folder, which is empty; return
    metrics.

    Where a scan left a plan in jobs_folder, merge what jobs made by it: the same bytes. Raises
    DataError for everything about the data that is not as asked; OSError (a full disk) passes
    through.
    """
    if jobs_folder is not None:
        plan = distributed.planned(jobs_folder)
        if plan is not None:
            return distributed.merge(cfg, jobs_folder, plan, folder, progress)
    found = first_pass(cfg, folder, progress)
    start = time.perf_counter()
    encoder = Encoder(cfg, found.domains, found.splits, found.tokenizer)
    writer = encoder.writer(folder)
    scanned = DocRange.joined(found.batches)
    read = DocRange(scanned.start)
    # The first pass has counted what the rows drop; only the leaks are new in this one
    stream = read.counting(documents(cfg, drop_stats()))
    leaks = encoder.write(stream, writer, found.bytes, progress)
    if read != scanned:
        raise DataError(
            f"data.{cfg.data.source} has changed since it was scanned: of {scanned.documents} "
            f"documents of {scanned.bytes} bytes, {read.documents} of {read.bytes} were read "
            "again. Let nothing write to the source and start again"
        )
    found.stats.merge(leaks)
    seconds = found.seconds | {"write": time.perf_counter() - start}
    return finalize(cfg, folder, writer, found.stats, found.bytes, seconds)
