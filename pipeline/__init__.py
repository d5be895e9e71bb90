"""MoleForge: train a mixture of experts in parts and serve it as one model."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .metrics.training import TrainingMetrics

__version__ = "0.1.0"

logging.getLogger("bitsandbytes").setLevel(
    logging.ERROR
)  # peft imports it, and it remarks on kernels nobody asked for


def metrics_of(address: str, store: Path | str | None = None) -> "TrainingMetrics":
    """Return the losses, speed, experts and memory of one training, finished or not; needs no
    torch.

    `address`: an address, or a name (`mine/train_experts/medicine`); `store`: none is
    $MOLEFORGE_STORE, else ./store. Raises ConfigError for what is no training, StoreError,
    DamagedArtifact, UnreadableFile.
    """
    # Only who asks pays for the import: every module of ours runs this file first
    from .run.trainings import metrics_of as of_store
    from .store.artifacts import Store, default_root

    return of_store(address, Store(Path(store) if store else default_root()))
