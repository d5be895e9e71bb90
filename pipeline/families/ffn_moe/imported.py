"""An expert that was trained elsewhere, in the place of one that is trained here: its package is
held against the run, part by part, before a number of it is used.

B sequences, T tokens, D model width.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ...data.text.mixture import DomainMixture
from ...data.text.public_text import write_public_text
from ...errors import DataError, MismatchError
from ...model.experts import Expert, in_layers
from ...model.loading import check_finite
from ...model.low_rank import LowRankExpert
from ...model.router_init import FeatureStatistics
from ...model.trunk import Ffn, Trunk
from ...store.artifacts import load_tensors, save_tensors
from ...store.expert_package import (
    ABOUT,
    EXPERT,
    STATISTICS,
    ExpertFacts,
    Package,
    open_package,
)
from ...store.foreign import ForeignFile
from ...store.package_place import ExpertSource, refusing
from ...store.tensor_header import Wanted
from ...train.loop import NoTraining
from .. import Parts
from .config import FfnMoeConfig
from .fingerprint import tokenizer_fingerprint, trunk_fingerprint
from .parts import (
    expert_layers,
    feature_statistics,
    open_expert,
    shards_of,
    stored_settings,
    stored_trunk,
    training_rows,
)
from .stock import run_tokenizer

SETTING = "expert.imported"


def imported(cfg: FfnMoeConfig, parts: Parts, item: str) -> NoTraining:
    """Return how an expert is made whose package the settings name. Nothing is read yet."""
    return NoTraining(partial(_write, cfg, parts, item))


def look_at_package(cfg: FfnMoeConfig, item: str) -> None:
    """Raise DataError for an imported expert whose package is not there, not whole, or too large;
    its tensors are not read. Nothing for an expert that is trained here."""
    if item in cfg.expert.imported:
        source = source_of(cfg, item)
        with refusing(source, item):
            check_statistics(cfg, item, open_package(source))


def source_of(cfg: FfnMoeConfig, item: str) -> ExpertSource:
    """Return where the settings say that an imported expert is."""
    return ExpertSource(cfg.expert.imported[item], cfg.expert.imported_bytes)


def check_statistics(cfg: FfnMoeConfig, item: str, opened: object) -> None:
    """Raise DataError for an expert that neither brings statistics nor has text here."""
    brings = isinstance(opened, Package) and STATISTICS in opened.facts.files
    if not brings and not cfg.has_text_for(item):
        raise DataError(
            f"{SETTING}: {item} brings no statistics, and there is no text of its domain to fit "
            f"the gates on; name some that is like it under expert.imported_text.{item}"
        )


def _write(cfg: FfnMoeConfig, parts: Parts, item: str, folder: Path) -> dict[str, Any]:
    """Check a package and write its tensors to folder; return metrics.

    Raises DataError for a package that is none, not whole or not finite, MismatchError for one
    that was made for another run.
    """
    started_s = time.monotonic()
    source = source_of(cfg, item)
    with refusing(source, item):
        package = open_package(source)
        facts = package.facts
        check_statistics(cfg, item, package)
        check_fingerprints(parts, item, facts)
        _check_form(cfg, parts, item, facts)
        trunk, dummy = stored_trunk(cfg, parts)
        layers = expert_layers(cfg, len(dummy.layers))
        parts.progress(f"copying {item}", None)
        package.take(EXPERT, _expert_tensors(cfg, dummy, layers), folder / EXPERT)
        tensors = load_tensors(folder / EXPERT)
        check_finite(tensors.items())
        check_runs(trunk, open_expert(cfg, dummy, tensors), cfg.trunk.context_tokens)
        if STATISTICS in facts.files:
            statistics = _brought(parts, package, layers, folder / STATISTICS)
        else:
            statistics = _summed(cfg, parts, item, folder)
        summed = statistics.tensors()
        # Again: second moments that are made of finite means may be beyond fp32
        check_finite(summed.items())
    save_tensors(folder / STATISTICS, summed)
    (folder / ABOUT).write_bytes(package.about)
    return {
        "steps": 0,
        # None of it was spent here
        "tokens": 0,
        "trained_tokens": facts.tokens,
        "seconds": time.monotonic() - started_s,
        "trained_in": facts.dtype,
        "statistics": origin(cfg, item, facts),
    }


def origin(cfg: FfnMoeConfig, item: str, facts: ExpertFacts | None) -> str:
    """Return in words where the statistics are from; facts of a package, none of another."""
    if facts is None or STATISTICS not in facts.files:
        return "of public text" if item in cfg.expert.imported_text else "of the text here"
    if facts.noise:
        return f"brought, with noise (epsilon {facts.noise.epsilon:g}, {facts.noise.delta:g})"
    return "brought"


def check_fingerprints(parts: Parts, item: str, facts: ExpertFacts) -> None:
    """Raise MismatchError for an expert that was trained on another trunk or tokenizer."""
    prints = {
        "on another trunk": (facts.trunk, trunk_fingerprint(parts)),
        "with another tokenizer": (facts.tokenizer, tokenizer_fingerprint(run_tokenizer(parts))),
    }
    for what, (theirs, ours) in prints.items():
        if theirs != ours:
            raise MismatchError(
                f"{SETTING}: {item} was trained {what} (fingerprint {theirs[:12]}, this run's is "
                f"{ours[:12]}); have it trained from a kit of this run"
            )


def _check_form(cfg: FfnMoeConfig, parts: Parts, item: str, facts: ExpertFacts) -> None:
    """Raise MismatchError for an expert that is made otherwise than those here."""
    own = cfg.expert
    count = stored_settings(parts, "train_shared")["num_hidden_layers"]
    settings: dict[str, tuple[Any, Any]] = {
        "form": (facts.form, own.form),
        "rank": (facts.rank, own.delta_rank),
        "scale (alpha over rank)": (facts.scale, own.packed_scale),
        "layers": (list(facts.layers), list(expert_layers(cfg, count))),
        "statistics_path": (facts.statistics_path, own.statistics_path),
    }
    for name, (its_own, here) in settings.items():
        if its_own != here:
            raise MismatchError(
                f"{SETTING}: {item} has another {name}, {its_own}, than the experts here, {here}; "
                "have it trained from a kit of this run"
            )


def _expert_tensors(cfg: FfnMoeConfig, dummy: Expert, layers: Sequence[int]) -> Wanted:
    """Return the tensors that an expert of this run has, none of them drawn."""
    if cfg.expert.delta_rank:
        with torch.device("meta"):
            rank, scale = cfg.expert.delta_rank, cfg.expert.delta_scale
            like: Expert = LowRankExpert(dummy, rank, scale, layers)
    else:
        like = in_layers(dummy, dummy, layers)
    return {name: ("F32", tuple(each.shape)) for name, each in like.named().items()}


def check_runs(trunk: Trunk, ffn: Ffn, tokens: int) -> None:
    """Raise ForeignFile for an expert whose numbers are finite and what they compute is not: one
    token that it gets would be lost, and all that look back at it."""
    count = len(trunk.head)
    ids_BT = torch.arange(tokens, device=trunk.head.device)[None] * max(1, count // tokens) % count
    with torch.no_grad():
        h_BTD = trunk.hidden(ids_BT, ffn)
    if not torch.isfinite(h_BTD).all():
        raise ForeignFile("its numbers compute what is not finite (NaN or infinite)")


def _brought(
    parts: Parts, package: Package, layers: Sequence[int], target: Path
) -> FeatureStatistics:
    """Return a package's own statistics, copied to target; where their second moments were left
    out, with those of the trunk's text around the mean of theirs."""
    general = FeatureStatistics.from_tensors(
        parts.tensors("train_shared", "statistics.safetensors")
    ).of_layers(layers)
    _, d_model = general.sum_LD.shape
    if not package.facts.noise:
        return taken_statistics(package, len(layers), d_model, target)
    stored = _taken(package, {"sum": ("F32", (len(layers), d_model))}, target)
    return general.around(stored["sum"].double(), int(stored["tokens"].item()))


def taken_statistics(
    package: Package, layers: int, d_model: int, target: Path
) -> FeatureStatistics:
    """Return a package's own statistics of so many layers, copied to target. Raises ForeignFile
    for those of no text."""
    wanted = {
        "sum": ("F32", (layers, d_model)),
        "gram": ("F32", (layers, d_model, d_model)),
    }
    statistics = FeatureStatistics.from_tensors(_taken(package, wanted, target))
    if not statistics.is_possible():
        raise ForeignFile(f"{STATISTICS} is of no text: no inputs have these means and products")
    return statistics


def _taken(package: Package, wanted: Wanted, target: Path) -> dict[str, Tensor]:
    package.take(STATISTICS, {**wanted, "tokens": ("I64", (1,))}, target)
    stored = load_tensors(target)
    check_finite(stored.items())
    if stored["tokens"].item() < 1:
        raise ForeignFile(f"{STATISTICS} is of no token")
    return stored


def _summed(cfg: FfnMoeConfig, parts: Parts, item: str, folder: Path) -> FeatureStatistics:
    """Return statistics of text that is here."""
    trunk, dummy = stored_trunk(cfg, parts)
    layers = expert_layers(cfg, len(dummy.layers))
    expert = open_expert(cfg, dummy, load_tensors(folder / EXPERT))
    runs = dummy if cfg.expert.statistics_path == "base" else expert
    tokens = cfg.expert.statistics_tokens
    with text_for(cfg, parts, item, folder) as rows:
        return feature_statistics(cfg, trunk, runs, rows, tokens, layers, parts.progress)


@contextmanager
def text_for(cfg: FfnMoeConfig, parts: Parts, item: str, folder: Path) -> Iterator[DomainMixture]:
    """Have rows of text that is here for an imported expert: that of the setting, which lies in
    folder meanwhile, else of its domain. Raises DataError for files that cannot be read."""
    with TemporaryDirectory(dir=folder) as made:
        if item not in cfg.expert.imported_text:
            shards = shards_of(parts, (item,))
        else:
            wanted = cfg.expert.statistics_tokens + cfg.trunk.context_tokens + 1
            paths = cfg.expert.imported_text[item]
            tokenizer = run_tokenizer(parts)
            try:
                shards = write_public_text(cfg, Path(made), item, paths, tokenizer, wanted)
            except DataError as error:
                said = str(error).removeprefix("data.files: ")
                raise DataError(f"expert.imported_text: {item}: {said}") from None
        yield training_rows(cfg, shards, f"statistics {item}", (item,), how="equal")
        shards.close()
