"""The rows of a run of adapters: each task's own, and the routing set made of them."""

from pathlib import Path

from ...config.task_data import ImageLimitsConfig
from ...data.routing import dataset
from ...data.sources import tasks
from ...data.tasks.prepare import prepare
from ...hardware import cores
from ...protocols import Progress
from .. import Parts
from .config import AdapterRunConfig


def prepare_task(
    cfg: AdapterRunConfig,
    item: str,
    folder: Path,
    progress: Progress,
    limits: ImageLimitsConfig | None = None,
) -> dict:
    """Write one task's rows, and what they come with, to folder; return metrics. Raises DataError.

    `limits` are those that a family sets to the size of what rows come with.
    """
    threads = cfg.runtime.threads
    # "auto" is about arithmetic, and 0 means all there are
    processes = threads if isinstance(threads, int) and threads else cores()
    return prepare(
        cfg.task(item),
        limits or ImageLimitsConfig(),
        cfg.seed,
        folder,
        progress,
        processes,
    )


def look_at_task(cfg: AdapterRunConfig, item: str) -> None:
    """Raise DataError when a task's rows are not where the settings say; none is read."""
    tasks.look(item, cfg.task(item).dataset)


def look_at_routing(cfg: AdapterRunConfig) -> None:
    """Raise DataError when rows that the routing set has of its own are not where the settings say;
    none is read."""
    dataset.look(cfg.dataset)


def make_routing_set(cfg: AdapterRunConfig, parts: Parts, folder: Path, progress: Progress) -> dict:
    """Write the routing set from all tasks' rows to folder; return metrics. Raises ConfigError,
    DataError."""
    folders = {name: parts.folder("preprocess", name) for name in cfg.tasks}
    return dataset.generate(cfg.dataset, folders, cfg.loras.labels, folder, progress)
