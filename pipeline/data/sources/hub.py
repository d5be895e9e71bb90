"""Documents from data sets of the Hugging Face Hub, streamed: nothing is kept on this machine."""

from collections.abc import Iterator
from functools import partial

from ...config.text_data import HubConfig, TextRunConfig
from ...errors import DataError
from . import FoundRow, Source


def sources(cfg: TextRunConfig) -> Iterator[Source]:
    """Yield each entry of data.hub, its split as one file of rows."""
    for entry in cfg.data.hub:
        yield entry.domain, iter([partial(_rows, entry)])


def _rows(entry: HubConfig) -> Iterator[FoundRow]:
    from datasets import load_dataset

    name = f"{entry.dataset}[{entry.split}]"
    try:
        rows = load_dataset(
            entry.dataset,
            entry.subset,
            split=entry.split,
            revision=entry.revision,
            # A set may be larger than the disk, and a limit may stop reading early
            streaming=True,
        )
        for number, row in enumerate(rows):
            yield f"{name} row {number}", row
    except Exception as error:  # datasets, the hub client and the network raise what they like
        raise DataError(
            f"data.hub: {name} at revision {entry.revision} cannot be streamed: "
            f"{type(error).__name__}: {error}. Check the name, subset, split and revision, and "
            "that this machine reaches the Hub (HF_TOKEN for private data); a local folder or "
            "data.source=files works without a network"
        ) from error
