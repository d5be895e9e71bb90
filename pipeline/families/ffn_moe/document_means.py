"""Statistics of documents rather than of tokens, so that what one document adds is bounded and can
be hidden by noise.

Each document is read alone, from its first token on, so no other one is in its numbers: windows of
a stream run over the ends of documents, and attention looks back over them.

L layers with experts, B documents, T tokens, D model width.
"""

import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ...data.text.documents import SPLITS
from ...data.text.shards import Shards
from ...hardware import device, uses_bf16
from ...model.gaussian_mechanism import least_sigma
from ...model.router_init import FeatureStatistics
from ...model.trunk import Ffn, Trunk
from ...protocols import Progress
from ...store.expert_package import Noise
from .config import FfnMoeConfig
from .parts import EVALUATION_SEQUENCES


@dataclass(frozen=True)
class Centre:
    """Where inputs of each layer lie and how far they are spread over text that everybody may know
    of: it decides how much of a document counts, so it must come from no private one."""

    mean_LD: Tensor
    spread_L: Tensor  # root mean square distance of an input from the mean

    @classmethod
    def of(cls, statistics: FeatureStatistics) -> "Centre":
        """Return the centre of the trunk's own text."""
        mean_LD = statistics.mean_LD
        spread = []
        for place, mean_D in enumerate(mean_LD):
            square = statistics.mean_gram_DD(place).trace() - mean_D @ mean_D
            spread.append(square.clamp(min=0).sqrt())
        return cls(mean_LD, torch.stack(spread))

    def tensors(self) -> dict[str, Tensor]:
        """Return what is stored."""
        return {"mean": self.mean_LD.float(), "spread": self.spread_L.float()}

    @classmethod
    def from_tensors(cls, stored: dict[str, Tensor]) -> "Centre":
        """Return what `tensors` gave."""
        return cls(stored["mean"].double(), stored["spread"].double())


def document_means(
    cfg: FfnMoeConfig,
    trunk: Trunk,
    ffn: Ffn,
    layers: Sequence[int],
    documents: Sequence[np.ndarray],
    progress: Progress,
) -> Iterator[Tensor]:
    """Yield mean_BLD of some documents after another: the mean input of each layer over a
    document's tokens, up to trunk.context_tokens of them."""
    place_of = {layer: place for place, layer in enumerate(layers)}
    bf16 = uses_bf16(cfg.dtype)
    for ids_BT, real_BT in padded_batches(documents, cfg.trunk.context_tokens, progress):
        weight_BT = (real_BT / real_BT.sum(1, keepdim=True)).to(device())
        mean_BLD = torch.zeros(len(ids_BT), len(layers), trunk.config.hidden_size)
        observed = _observing(ffn, place_of, weight_BT, mean_BLD)
        autocast = torch.autocast(device(), torch.bfloat16, enabled=bf16)
        with torch.no_grad(), autocast:
            trunk.hidden(ids_BT.to(device()), observed)
        yield mean_BLD.double()


def padded_batches(
    documents: Sequence[np.ndarray], context_tokens: int, progress: Progress
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (ids_BT, real_BT) of some documents after another, up to context_tokens of each;
    real_BT is 1 where a token is, 0 where the end is filled up."""
    for at in range(0, len(documents), EVALUATION_SEQUENCES):
        progress(f"means of {len(documents):,} documents", at / len(documents))
        batch = [ids[:context_tokens] for ids in documents[at : at + EVALUATION_SEQUENCES]]
        longest = max(len(ids) for ids in batch)
        ids_BT = torch.zeros(len(batch), longest, dtype=torch.int64)
        real_BT = torch.zeros(len(batch), longest)
        for row, ids in enumerate(batch):
            # What fills up the end is looked at by no token before it
            ids_BT[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
            real_BT[row, : len(ids)] = 1
        yield ids_BT, real_BT


def _observing(
    ffn: Ffn, place_of: dict[int, int], weight_BT: Tensor, mean_BLD: Tensor
) -> Callable[[int, Tensor], Tensor]:
    """Return an ffn that notes each document's mean input before `ffn` handles it."""

    def observed(layer: int, x_BTD: Tensor) -> Tensor:
        if layer in place_of:
            weighted_BTD = x_BTD.detach().float() * weight_BT[:, :, None]
            mean_BLD[:, place_of[layer]] = weighted_BTD.sum(1).cpu()
        return ffn(layer, x_BTD)

    return observed


def all_documents(shards: Shards, domain: str) -> list[np.ndarray]:
    """Return the tokens of every document of a domain, held out or not: which are held out may
    depend on how many there are, so a choice among them could tell of one."""
    found = []
    for split in SPLITS:
        stream = shards.stream(split, domain)
        starts, _ = shards.documents(split, domain)
        for start, end in pairwise(starts):
            found.append(stream[start:end])
    return found


def private_sums(
    means: Iterable[Tensor], documents: int, centre: Centre, noise: Noise
) -> dict[str, Tensor]:
    """Return what `noised` does of the mean_BLD of so many documents, with noise drawn anew."""
    sum_LD = torch.zeros_like(centre.mean_LD)
    for mean_BLD in means:
        sum_LD += clipped(mean_BLD, centre, noise.clip).sum(0)
    # Of the system's own entropy: whoever knows the seed can take the noise away again
    random = np.random.default_rng(secrets.randbits(128))
    return noised(sum_LD, documents, centre, noise, random)


def clipped(mean_BLD: Tensor, centre: Centre, clip: float) -> Tensor:
    """Return v_BLD of length 1 at most in each layer: a document's mean input from the centre, in
    units of clip times the spread, drawn in where it is longer."""
    radius_L1 = (clip * centre.spread_L)[:, None]
    v_BLD = (mean_BLD - centre.mean_LD) / radius_L1.clamp(min=1e-12)
    length_BL1 = v_BLD.norm(dim=-1, keepdim=True)
    return v_BLD / length_BL1.clamp(min=1)


def noised(
    sum_LD: Tensor, documents: int, centre: Centre, noise: Noise, random: np.random.Generator
) -> dict[str, Tensor]:
    """Return private statistics of a sum of clipped v_LD over some documents: `sum` and `tokens`,
    which counts documents, as a package has them.

    Sensitivity. What is made public is (S_1, ..., S_L, n): in each layer the sum of v over the
    documents, and their number. v is a function of one document alone, the trunk, the expert's
    published weights and the centre, and of length 1 at most, so a document more or less changes
    each S by a vector of length 1 at most and n by 1: all together by sqrt(L + 1) at most. Noise of
    least_sigma(epsilon, delta) sqrt(L + 1) on every number makes them (epsilon, delta) private
    under adding or removing one document; scaling back to inputs, rounding n and filling in second
    moments of the trunk's public text use nothing else, and keep that. Second moments of the text
    itself are left out: L D^2 numbers more, whose noise would be D^(1/2) times as long against
    eigenvalues that are D times as short.
    """
    layers = len(sum_LD)
    sigma = least_sigma(noise.epsilon, noise.delta) * math.sqrt(layers + 1)
    noise_LD = torch.from_numpy(random.normal(0.0, sigma, tuple(sum_LD.shape)))
    count = max(1, round(documents + random.normal(0.0, sigma)))
    radius_L1 = (noise.clip * centre.spread_L)[:, None]
    mean_LD = centre.mean_LD + radius_L1 * (sum_LD + noise_LD) / count
    return {
        "sum": (mean_LD * count).float(),
        "tokens": torch.tensor([count], dtype=torch.int64),
    }
