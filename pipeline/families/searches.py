"""What searches of learning rates left, whatever was searched for."""

from collections.abc import Iterable

from ..config.run import RunConfig
from ..report.schema.base import RateSearch, TriedRate
from ..store.reading import read_as
from ..train.lr_search import FOUND, Found
from . import Parts


def found_rate(parts: Parts, search: str, item: str | None) -> Found:
    """Return what a search left. Raises MissingArtifact, DamagedArtifact, StaleArtifact."""
    return read_as(Found, parts.folder(search, item) / FOUND)


def searched(cfg: RunConfig, parts: Parts, searches: Iterable[str]) -> list[RateSearch]:
    """Return what each search of some stages tried, as reports have it. Raises what `found_rate`
    raises."""
    out = []
    for stage in searches:
        for item in cfg.items(stage):
            found = found_rate(parts, stage, item)
            tried = [TriedRate(lr=each.lr, nats=each.valid_nats) for each in found.tried]
            out.append(
                RateSearch(
                    job=f"{stage} {item}" if item else stage,
                    lr=found.lr,
                    steps=found.steps,
                    before_nats=found.before_nats,
                    tried=tuple(tried),
                )
            )
    return out
