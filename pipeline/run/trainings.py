"""The metrics of the trainings that a store knows: finished, in progress, interrupted."""

from collections.abc import Iterator, Sequence

from ..errors import ConfigError
from ..metrics.training import TrainingMetrics, training_metrics
from ..store.artifacts import Store
from ..store.history import read
from ..store.imported import origin_of
from .find import Named, found


def metrics_of(address: str, store: Store) -> TrainingMetrics:
    """Return what one training was, by its address or a name (`mine/train_experts/medicine`).

    Raises ConfigError for what is no training, or several; StoreError, DamagedArtifact,
    UnreadableFile where the store cannot be read.
    """
    store.open(create=False)
    names = found(store, [address])
    known = list(trainings(store, names))
    # Also of a run that was named alone and has no other
    if len(known) == 1:
        return known[0]
    if known:
        of = ", ".join(each.address for each in known)
        raise ConfigError(f"{address} is several trainings: {of}; name one of them")
    raise ConfigError(f"{address} is no training: {', '.join(each.name for each in names)}")


def trainings(store: Store, names: Sequence[Named]) -> Iterator[TrainingMetrics]:
    """Yield the metrics of those that are trainings, begun or finished."""
    for each in names:
        made = None
        if store.has(each.address):
            made = store.manifest(each.address).metrics
            # A part that was only written counts no steps, nor does a search of a rate
            if "planned_steps" not in made:
                continue
        elif not store.history(each.address).exists():
            continue
        elif origin := origin_of(store, each.address):
            made = origin.metrics or None
        steps = made.get("steps") if made else None
        past = read(store.history(each.address), steps)
        yield training_metrics(
            each.address,
            each.stage,
            each.item,
            made,
            past.rows,
            past.missing,
            planned_steps=past.steps or None,
        )
