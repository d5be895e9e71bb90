"""Task rows from the Hub, or from a folder in one of its layouts: streamed, with pictures left as
bytes and classes under their names."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ...config.task_data import TaskDataConfig
from ...errors import DataError
from .columns import named
from .hub import check_count
from .task_streams import Found, Stream, given_splits, setting

# From a column's value to the same with names in place of class numbers.
Naming = Callable[[Any], Any]


def streams(name: str, data: TaskDataConfig) -> Iterator[Stream]:
    """Yield the splits of a data set on the Hub. Raises DataError when it cannot be streamed."""
    given = given_splits(data)
    if not given:
        yield None, _rows(name, data, data.split or "train")
    for split, wanted in given.items():
        yield split, _rows(name, data, wanted)


def _rows(name: str, data: TaskDataConfig, wanted: str) -> Iterator[Found]:
    from datasets import load_dataset

    what = f"{data.id}[{wanted}]"
    try:
        found = load_dataset(
            data.id, data.subset, split=wanted, revision=data.revision, streaming=True
        )
        # A stream whose features nobody knows before the first row has None.
        features = found.features or {}
        if features:
            # Pictures stay bytes at any depth: decoded by the library, a torn one would end the
            # whole stream, and here it costs its own row.
            found = found.decode(False)
        namings = _namings(features)
        count = 0
        for row in found:
            yield f"{what} row {count}", _members_named(namings, row)
            count += 1
        if not data.allow_fewer_rows:
            check_count(found, wanted, count, f"{setting(name)}: {data.id}")
    except DataError:
        raise
    # datasets, the hub client and the network raise what they like.
    except Exception as error:
        raise DataError(
            f"{setting(name)}: {what} at revision {data.revision} cannot be streamed: "
            f"{type(error).__name__}: {error}. Check id, subset, split and revision, and that "
            "this machine reaches the Hub (HF_TOKEN for private data); the sources jsonl and "
            "folder work without a network"
        ) from error


def _namings(features: Any) -> dict[str, Naming]:
    """Return how to name the class labels of each column that has some."""
    namings = {}
    for key, feature in features.items():
        naming = _naming(feature)
        if naming is not None:
            namings[key] = naming
    return namings


def _naming(feature: Any) -> Naming | None:
    """Return how to name the class labels in a feature, at any depth; None where it has none."""
    from datasets import ClassLabel, LargeList, List

    if isinstance(feature, ClassLabel):
        return partial(named, names=tuple(feature.names))
    if isinstance(feature, dict):
        namings = _namings(feature)
        return partial(_members_named, namings) if namings else None
    naming = _naming(feature.feature) if isinstance(feature, List | LargeList) else None
    return partial(_items_named, naming) if naming else None


def _members_named(namings: dict[str, Naming], value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    found = {key: naming(value[key]) for key, naming in namings.items() if key in value}
    return value | found


def _items_named(naming: Naming, value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return value
    return [naming(item) for item in value]
