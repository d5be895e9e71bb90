"""A trained adapter of a language model as a package, with the statistics that its router knows its
domain by: as they are, or with noise.

B documents, T tokens, S layers that are read, D model width.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from ....hardware import device, uses_bf16
from ....model.language_model import LanguageModel
from ....model.router_init import FeatureStatistics
from ....protocols import Progress
from ....store.artifacts import save_tensors
from ....store.expert_package import STATISTICS, ExpertFacts, Noise, write_package
from ... import PackWish, Parts
from ...adapters.packing import write_numbers
from ..config import FfnMoeConfig
from ..document_means import Centre, all_documents, padded_batches, private_sums
from ..fingerprint import tokenizer_fingerprint, trunk_fingerprint
from ..packing import check_packable
from ..parts import shards_of
from ..stock import run_tokenizer
from .model import stored_base
from .statistics import read_layers


def pack(
    cfg: FfnMoeConfig,
    parts: Parts,
    item: str,
    wish: PackWish,
    folder: Path,
    public: FeatureStatistics | None = None,
) -> None:
    """Write the package of a trained adapter to an empty folder.

    public: for noise, statistics of text that everybody may know of. Noise is drawn anew each time,
    and each time spends what it promises. Raises ConfigError, and what `parts` does.
    """
    check_packable(cfg)
    if wish.noise and public is None:
        # Never statistics as they are in the place of those that hide something
        raise ValueError("noise is measured by public statistics, and none are given")
    told = write_numbers(parts, item, folder)
    if wish.noise and public:
        hidden = private_statistics(cfg, parts, item, wish.noise, public)
        save_tensors(folder / STATISTICS, hidden.tensors())
    elif wish.statistics:
        save_tensors(folder / STATISTICS, parts.tensors("train_experts", STATISTICS, item))
    facts = ExpertFacts(
        **told,
        trunk=trunk_fingerprint(parts),
        tokenizer=tokenizer_fingerprint(run_tokenizer(parts)),
        dtype="bf16" if uses_bf16(cfg.dtype) else "fp32",
        context_tokens=cfg.trunk.context_tokens,
        noise=wish.noise if wish.statistics else None,
        licence=wish.licence,
        description=wish.description,
    )
    write_package(folder, facts)


def private_statistics(
    cfg: FfnMoeConfig, parts: Parts, item: str, noise: Noise, public: FeatureStatistics
) -> FeatureStatistics:
    """Return statistics that hide each document of an expert's domain: means with noise, as
    `noised` of document_means makes them, spread as public text is around its own."""
    centre = Centre.of(public)
    documents = all_documents(shards_of(parts, (item,)), item)
    means = document_states(cfg, stored_base(cfg, parts), documents, parts.progress)
    stored = private_sums(means, len(documents), centre, noise)
    return public.around(stored["sum"].double(), int(stored["tokens"].item()))


def document_states(
    cfg: FfnMoeConfig, base: LanguageModel, documents: Sequence[np.ndarray], progress: Progress
) -> Iterator[Tensor]:
    """Yield mean_BSD of some documents after another: what the states that the router reads are on
    average over a document's tokens, up to trunk.context_tokens of them, each read alone."""
    layers = read_layers(base)
    for ids_BT, real_BT in padded_batches(documents, cfg.trunk.context_tokens, progress):
        # As in a text that is routed the first token says nothing, where there are others
        counts_BT = real_BT.clone()
        counts_BT[real_BT.sum(1) > 1, 0] = 0
        weight_BT = counts_BT / counts_BT.sum(1, keepdim=True)
        x_BTSD = base.states(ids_BT.to(device()), layers, uses_bf16(cfg.dtype)).cpu()
        yield (x_BTSD * weight_BT[:, :, None, None]).sum(1).double()
