"""An expert's adapter that was trained elsewhere, in the place of one that is trained here: a
package, whose base is known by its pin, or what PEFT saved, whose base is held against rows of its
task.

B rows, T tokens, D model width.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...data.tasks.rows import TaskRows
from ...errors import DataError, MismatchError
from ...hardware import uses_bf16
from ...store.expert_package import Package
from ...store.foreign import ForeignFile
from ...store.package_place import ExpertSource, refusing
from ...train.loop import NoTraining
from .. import Parts
from . import foreign, peft_io
from .base import LoadedBase
from .chat import encode
from .config import AdapterRunConfig
from .sections import RANKS, AdapterConfig
from .train import SPLITS, VALID_ROWS, answer_nats, batch_inputs, examples_of

# Rows of its task that an adapter of no proven base is held against
PROBED = 64
# Texts without a meaning: what is computed of them has to be finite
TRIED = ("A B C", "1 2 3")


def imported(
    cfg: AdapterRunConfig, parts: Parts, item: str, open_base: Callable[[], LoadedBase]
) -> NoTraining:
    """Return how an adapter is made that the settings name. Nothing is read yet."""
    return NoTraining(partial(_write, cfg, parts, item, open_base))


def look_at_adapter(cfg: AdapterRunConfig, item: str) -> None:
    """Raise DataError for an imported adapter that is not there, not whole, too large, or of a kind
    that none here is; its tensors are not read. Nothing for one that is trained here."""
    if item in cfg.imported:
        source = source_of(cfg, item)
        with refusing(source, item):
            foreign.look(source)


def source_of(cfg: AdapterRunConfig, item: str) -> ExpertSource:
    """Return where the settings say that an imported adapter is."""
    setting = f"loras.experts.{item}.imported"
    most_bytes = cfg.loras.entry(item).imported_bytes
    return ExpertSource(cfg.imported[item], most_bytes, setting, f"{setting}_bytes")


def _write(
    cfg: AdapterRunConfig,
    parts: Parts,
    item: str,
    open_base: Callable[[], LoadedBase],
    folder: Path,
) -> dict[str, Any]:
    """Check an adapter and write it to folder as those that are trained here; return metrics.

    Raises DataError for what is none, not whole, not finite, or no help on this base, MismatchError
    for a package that was made for another one, ConfigError for modules that it may not have.
    """
    started_s = time.monotonic()
    source = source_of(cfg, item)
    with refusing(source, item):
        opened = foreign.look(source)
        base = open_base()
        facts = opened.facts if isinstance(opened, Package) else None
        if facts is not None and facts.trunk != base.pin.digest:
            raise MismatchError(
                f"{source.setting}: {item} was trained on another base (pin {facts.trunk[:12]}, "
                f"this run's is {base.pin.digest[:12]}); have it trained from a kit of this run"
            )
        parts.progress(f"copying {item}", None)
        found = foreign.take(base.model, opened, folder, RANKS)
        own = {"r": found.r, "alpha": found.alpha, "targets": found.targets, "dropout": 0.0}
        options = cfg.loras.options(item).model_copy(update=own)
        where = cfg.section("train_experts", item)
        check = base.chat.media.check_targets
        model = peft_io.put(base.model, item, options, found.tensors, where, check)
        probe = Probe(cfg, base, model, item, options)
        probe.check_runs()
        probed = {}
        if facts is None:
            parts.progress(f"what {item} makes of rows of its task", None)
            base_nats, own_nats = probe.nats(parts.folder("preprocess", item))
            numbers = foreign.numbers_of(opened)
            slack = cfg.loras.entry(item).imported_slack
            setting = f"{source.setting}_slack"
            foreign.check_probe(base_nats, own_nats, slack, setting, numbers)
            probed = {"probe_base_nats": base_nats, "probe_nats": own_nats}
    peft_io.write_files(folder, peft_io.files(model, item, base.pin, {}))
    made = foreign.kept(opened, found, folder, time.monotonic() - started_s)
    return made | probed


class Probe:
    """A base with one adapter that nobody here has trained, and what the two make of rows."""

    def __init__(
        self,
        cfg: AdapterRunConfig,
        base: LoadedBase,
        model: peft_io.Adapters,
        item: str,
        options: AdapterConfig,
    ):
        self.cfg = cfg
        self.chat = base.chat
        self.model = model
        self.core = peft_io.core_of(model)
        self.item = item
        self.options = options

    def check_runs(self) -> None:
        """Raise ForeignFile where what the adapter computes is not finite: an answer would end in
        nothing."""
        inputs = self.chat.requests([(text, ()) for text in TRIED])
        moved = {key: tensor.to(self.core.device) for key, tensor in inputs.items()}
        with torch.no_grad(), peft_io.active(self.model, self.item):
            h_BTD = self.core.base_model(**moved, use_cache=False).last_hidden_state
        if not torch.isfinite(h_BTD).all():
            raise ForeignFile("its numbers compute what is not finite (NaN or infinite)")

    def nats(self, folder: Path) -> tuple[float, float]:
        """Return mean nats a token of the answers of a task's rows, which no training here went by:
        the base's and the adapter's. Raises DataError without rows."""
        rows = TaskRows(folder)
        media = self.chat.media
        # Those of validation, where there are some
        for split in reversed(SPLITS):
            examples = examples_of(media, rows, split)[:PROBED]
            dataset = encode(self.chat, examples, self.options.max_tokens)
            if dataset.rows:
                break
        else:
            raise DataError(
                f"loras.experts.{self.item}: no row of its task is left to hold it against; give "
                "it some, or raise max_tokens"
            )
        found = []
        for name in (None, self.item):
            cache = media.feature_cache(
                self.core,
                dataset.paths,
                dataset.path_tokens,
                encoder_trains=self.item in media.changed_by(self.core),
                memory_budget=self.cfg.runtime.memory_budget,
            )
            total = 0.0
            with torch.no_grad(), peft_io.active(self.model, name):
                for at in range(0, len(dataset), VALID_ROWS):
                    places = range(at, min(at + VALID_ROWS, len(dataset)))
                    inputs = batch_inputs(dataset, cache, places, [None] * len(places))
                    bf16 = uses_bf16(self.cfg.dtype)
                    total += answer_nats(self.core, inputs, bf16).item()
            found.append(total / dataset.target_count(range(len(dataset))))
        base_nats, own_nats = found
        return base_nats, own_nats
