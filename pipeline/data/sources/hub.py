"""Documents from data sets of the Hugging Face Hub, streamed: nothing is kept on this machine."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ...config.base import is_folder
from ...config.text_data import DataConfig, HubConfig, TextRunConfig
from ...errors import DataError
from ...protocols import Eye, Seen
from . import FoundRow, Row, SkippedRow, Source, SourceFile
from .tables import BATCH_ROWS, TableColumns


def sources(cfg: TextRunConfig) -> Iterator[Source]:
    """Yield each entry of data.hub, its split as one file of rows."""
    for entry in cfg.data.hub:
        rows = partial(_rows, entry, cfg.data)
        read_by = entry.model_dump(exclude={"domain"})
        file = SourceFile(rows, partial(_seen, entry), read_by, is_remote=not _is_here(entry))
        yield entry.domain, iter([file])


def _is_here(entry: HubConfig) -> bool:
    return Path(entry.dataset).expanduser().is_dir()


def _seen(entry: HubConfig, eye: Eye) -> Iterator[Seen]:
    if _is_here(entry):
        # A folder has no revisions
        yield from eye.below("data.hub", Path(entry.dataset).expanduser())
    else:
        yield Seen("data.hub", f"{entry.dataset}[{entry.split}]", entry.revision)


def look(cfg: TextRunConfig) -> None:
    """Raise DataError for a data set that is named as a folder here and is none."""
    for entry in cfg.data.hub:
        if is_folder(entry.dataset) and not Path(entry.dataset).expanduser().is_dir():
            raise DataError(f"data.hub: there is no folder {entry.dataset}; correct the path")


def _rows(entry: HubConfig, data: DataConfig) -> Iterator[FoundRow]:
    name = f"{entry.dataset}[{entry.split}]"
    number = 0
    try:
        for number, row in enumerate(_streamed(entry, data), 1):
            yield f"{name} row {number - 1}", row
    except DataError:
        raise
    except Exception as error:  # datasets, the hub client and the network raise what they like
        raise DataError(
            f"data.hub: {name} at revision {entry.revision} cannot be streamed: "
            f"{type(error).__name__}: {error}. Check the name, subset, split and revision, and "
            "that this machine reaches the Hub (HF_TOKEN for private data); a local folder or "
            "data.source=files works without a network"
        ) from error


def _streamed(entry: HubConfig, data: DataConfig) -> Iterator[Row | SkippedRow]:
    from datasets import load_dataset

    found = load_dataset(
        entry.dataset,
        entry.subset,
        split=entry.split,
        revision=entry.revision,
        # A set may be larger than the disk, and a limit may stop reading early
        streaming=True,
    )
    # A stream whose features nobody knows before the first row has None
    features = found.features.to_dict() if found.features else None
    count = 0
    # As tables: made into rows by the library, one value that is no text would end the stream
    for table in found.with_format("arrow").iter(batch_size=BATCH_ROWS):
        count += table.num_rows
        yield from TableColumns(table.schema, data, features).rows(table)
    if not entry.allow_fewer_rows:
        check_count(found, entry.split, count, f"data.hub: {entry.dataset}")


def check_count(found: Any, split: str, count: int, what: str) -> None:
    """Raise DataError for a stream that has ended before the rows of its split's metadata: a file
    that is gone, or torn on the way, ends it like that of a shorter split."""
    splits = found.info.splits or {}
    about = splits.get(split)
    wanted = about.num_examples if about is not None else 0
    if wanted and count < wanted:
        raise DataError(
            f"{what}[{split}] gave {count} rows, and its metadata says {wanted}. Try again or pin "
            f"another revision; where the metadata is out of date, set allow_fewer_rows: true"
        )
