"""A trained adapter of a language model as a package, with the statistics that its router knows its
domain by: as they are, or with noise.

B documents, T tokens, S layers that are read, D model width.
"""

import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
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
from ..document_means import Centre, all_documents, clipped, noised
from ..fingerprint import tokenizer_fingerprint, trunk_fingerprint
from ..packing import check_packable
from ..parts import EVALUATION_SEQUENCES, shards_of
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
    sum_SD = torch.zeros_like(centre.mean_LD)
    for mean_BSD in document_states(cfg, stored_base(cfg, parts), documents, parts.progress):
        sum_SD += clipped(mean_BSD, centre, noise.clip).sum(0)
    # Of the system's own entropy: whoever knows the seed can take the noise away again
    random = np.random.default_rng(secrets.randbits(128))
    stored = noised(sum_SD, len(documents), centre, noise, random)
    return public.around(stored["sum"].double(), int(stored["tokens"].item()))


def document_states(
    cfg: FfnMoeConfig, base: LanguageModel, documents: Sequence[np.ndarray], progress: Progress
) -> Iterator[Tensor]:
    """Yield mean_BSD of some documents after another: what the states that the router reads are on
    average over a document's tokens, up to trunk.context_tokens of them, each read alone."""
    context = cfg.trunk.context_tokens
    layers = read_layers(base)
    for at in range(0, len(documents), EVALUATION_SEQUENCES):
        progress(f"means of {len(documents):,} documents", at / len(documents))
        batch = [ids[:context] for ids in documents[at : at + EVALUATION_SEQUENCES]]
        longest = max(len(ids) for ids in batch)
        ids_BT = torch.zeros(len(batch), longest, dtype=torch.int64)
        counts_BT = torch.zeros(len(batch), longest)
        for row, ids in enumerate(batch):
            # What fills up the end is looked at by no token before it
            ids_BT[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
            # As in a text that is routed the first token says nothing, where there are others
            counts_BT[row, min(1, len(ids) - 1) : len(ids)] = 1
        weight_BT = counts_BT / counts_BT.sum(1, keepdim=True)
        x_BTSD = base.states(ids_BT.to(device()), layers, uses_bf16(cfg.dtype)).cpu()
        yield (x_BTSD * weight_BT[:, :, None, None]).sum(1).double()
