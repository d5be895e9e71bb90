"""Rows of a history as events of TensorBoard."""

import time
from collections.abc import Sequence
from pathlib import Path

from ...errors import ConfigError
from ...store.display import Row
from ...store.history import numbers

# What an event has anyway.
PLACES = ("step", "time")


def write_events(rows: Sequence[Row], folder: Path) -> int:
    """Write rows to a new folder, each number by its path under TensorBoard's slashes; return how
    many rows. Raises ConfigError without the package, OSError."""
    try:
        # not torch's, which writes through the same one and takes seconds to import
        from tensorboard.summary import Writer
    except ImportError as error:
        raise ConfigError(
            f"--format tensorboard needs the package tensorboard, which cannot be imported "
            f"({error}): install requirements.txt, or name another format"
        ) from None
    folder.mkdir(parents=True)
    writer = Writer(str(folder))
    try:
        for row in rows:
            at = row.get("time") or time.time()
            for name, value in numbers(row, "/"):
                if name not in PLACES:
                    writer.add_scalar(name, value, row["step"], wall_time=at)
    finally:
        writer.close()
    return len(rows)
