"""An adapter that was trained elsewhere, in the place of one that is trained here: a package, whose
base is known by its fingerprint, or what PEFT saved, whose base is held against text of its domain.

B sequences, T tokens.
"""

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ....data.text.mixture import DomainMixture
from ....hardware import device, uses_bf16
from ....model.language_model import filled
from ....model.router_init import FeatureStatistics
from ....store.expert_package import STATISTICS, Package
from ....store.package_place import refusing
from ....train.loop import NoTraining
from ... import Parts
from ...adapters import foreign, peft_io
from ...adapters.foreign import Opened
from ..config import FfnMoeConfig
from ..imported import (
    SETTING,
    check_fingerprints,
    check_runs,
    check_statistics,
    origin,
    source_of,
    taken_statistics,
    text_for,
)
from ..parts import batch_of, token_losses
from .model import Adapted, Options, base_ref, stored_base
from .statistics import read_layers, text_statistics

# Sequences of its domain's text that an adapter of no proven base is held against
PROBED = 32
SLACK = "expert.imported_slack"


def imported(cfg: FfnMoeConfig, parts: Parts, item: str) -> NoTraining:
    """Return how an adapter is made that the settings name. Nothing is read yet."""
    return NoTraining(partial(_write, cfg, parts, item))


def look_at_adapter(cfg: FfnMoeConfig, item: str) -> None:
    """Raise DataError for an imported adapter that is not there, not whole, too large, or of a kind
    that none here is; its tensors are not read. Nothing for one that is trained here."""
    if item in cfg.expert.imported:
        source = source_of(cfg, item)
        with refusing(source, item):
            check_statistics(cfg, item, foreign.look(source))


def _write(cfg: FfnMoeConfig, parts: Parts, item: str, folder: Path) -> dict[str, Any]:
    """Check an adapter and write it to folder as those that are trained here; return metrics.

    Raises DataError for what is none, not whole, not finite, or no help on this base, MismatchError
    for a package that was made for another run.
    """
    started_s = time.monotonic()
    source = source_of(cfg, item)
    with refusing(source, item):
        opened = foreign.look(source)
        check_statistics(cfg, item, opened)
        facts = opened.facts if isinstance(opened, Package) else None
        if facts is not None:
            check_fingerprints(parts, item, facts)
        base = stored_base(cfg, parts)
        parts.progress(f"copying {item}", None)
        found = foreign.take(base.network, opened, folder)
        options = Options(found.r, found.alpha, found.targets)
        adapters = peft_io.put(base.network, item, options, found.tensors, SETTING)
        adapted = Adapted(adapters.to(device()))
        check_runs(adapted.under(item), filled, cfg.trunk.context_tokens)
        statistics, probed = _known_by(cfg, parts, item, opened, adapted, folder)
    pin = base_ref(cfg, parts)
    peft_io.write_files(folder, peft_io.files(adapters, item, pin, {"domain": item}))
    peft_io.write_files(folder, {STATISTICS: statistics.tensors()})
    made = foreign.kept(opened, found, folder, time.monotonic() - started_s)
    return {**made, "statistics": origin(cfg, item, facts), **probed}


def _known_by(
    cfg: FfnMoeConfig,
    parts: Parts,
    item: str,
    opened: Opened,
    adapted: Adapted,
    folder: Path,
) -> tuple[FeatureStatistics, Mapping[str, float]]:
    """Return the statistics that the router knows an adapter's domain by, and what it was held
    against. Raises ForeignFile for statistics of no text, and for an adapter that makes text of its
    domain less likely."""
    if isinstance(opened, Package) and STATISTICS in opened.facts.files:
        layers = len(read_layers(adapted))
        d_model = adapted.config.hidden_size
        return taken_statistics(opened, layers, d_model, folder / STATISTICS), {}
    with text_for(cfg, parts, item, folder) as rows:
        tokens = cfg.expert.statistics_tokens
        statistics = text_statistics(cfg, adapted, rows, tokens, parts.progress)
        if isinstance(opened, Package):
            return statistics, {}
        parts.progress(f"what {item} makes of text of its domain", None)
        base_nats = _mean_nats(cfg, adapted, rows)
        own_nats = _mean_nats(cfg, adapted.under(item), rows)
    foreign.check_probe(
        base_nats, own_nats, cfg.expert.imported_slack, SLACK, foreign.numbers_of(opened)
    )
    return statistics, {"probe_base_nats": base_nats, "probe_nats": own_nats}


def _mean_nats(cfg: FfnMoeConfig, model: Adapted, rows: DomainMixture) -> float:
    """Return mean nats of the first rows, one after another so that they take no more memory than
    one."""
    count = max(1, min(PROBED, rows.tokens() // rows.context_tokens))
    batches = [batch_of(rows, number, 1) for number in range(count)]
    return token_losses(model, filled, batches, uses_bf16(cfg.dtype)).mean().item()
