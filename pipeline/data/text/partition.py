"""How documents find their domain: labels, clusters, chance or difficulty; fitted once, saved, then
a pure function.

Invariant: the domain of a document depends on the saved tensors, data.seed and the document alone.
Legend: N documents, V hashed words, R reduced dimensions, K domains.
"""

import json
import zlib
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np

from ...config.text_data import TextRunConfig
from ...errors import DamagedArtifact, DataError, MissingArtifact
from .documents import Document, key_of

SCORED_CHARS = 8192  # of a document; what comes after does not change its cluster or difficulty
WORDS = 1 << 15
DIMENSIONS = 64
_ITERATIONS = 30
_SWEEPS = 4


@dataclass(frozen=True)
class Domains:
    """A fitted partition."""

    by: str
    names: tuple[str, ...]
    seed: int
    difficulty: str | None = None
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    def assign(self, documents: list[Document]) -> list[str]:
        """Return the domain of each document."""
        if self.by == "labels":
            return [document.label for document in documents]
        if not documents:
            return []
        return [self.names[i] for i in _ASSIGN[self.by](self, documents)]

    def save(self, folder: Path) -> None:
        """Write partition.safetensors and partition.json."""
        from safetensors.numpy import save

        about = {
            "by": self.by,
            "names": self.names,
            "seed": self.seed,
            "difficulty": self.difficulty,
        }
        with open(folder / "partition.safetensors", "wb") as file:
            file.write(save(self.tensors))
        with open(folder / "partition.json", "w", encoding="utf-8") as file:
            file.write(json.dumps(about | {"scored_chars": SCORED_CHARS}, indent=1) + "\n")


def load(folder: Path) -> Domains:
    """Read what Domains.save wrote. Raises MissingArtifact or DamagedArtifact."""
    from safetensors import SafetensorError
    from safetensors.numpy import load as read

    try:
        about = json.loads((folder / "partition.json").read_text("utf-8"))
        tensors = read((folder / "partition.safetensors").read_bytes())
    except FileNotFoundError as error:
        raise MissingArtifact(
            f"{error.filename} does not exist; run the stage preprocess first"
        ) from None
    except (ValueError, SafetensorError) as error:
        raise DamagedArtifact(
            f"the partition in {folder} cannot be read ({error}); run preprocess again"
        ) from None
    return Domains(about["by"], tuple(about["names"]), about["seed"], about["difficulty"], tensors)


def fit(cfg: TextRunConfig, sample: list[Document]) -> Domains:
    """Fit cfg.partition on sample, its training documents. Raises DataError when there are too few."""
    settings, seed = cfg.partition, cfg.data.seed
    names = settings.names
    if settings.by in ("labels", "random"):
        return Domains(settings.by, names, seed)
    sample = sample[: settings.sample_documents]
    if len(sample) < 2 * len(names):
        raise DataError(
            f"partition.by {settings.by} wants {len(names)} domains (partition.count) out of {len(sample)} training "
            f"documents; at least {2 * len(names)} are needed. Lower partition.count, or give it more documents"
        )
    if settings.by == "clusters":
        return Domains(
            "clusters", names, seed, None, _fit_clusters([d.text for d in sample], len(names), seed)
        )
    tensors = _fit_rarity(sample) if settings.difficulty == "rarity" else {}
    scores_N = _SCORES[settings.difficulty](tensors, sample)
    tensors["thresholds"] = np.quantile(scores_N, np.arange(1, len(names)) / len(names))
    return Domains("curriculum", names, seed, settings.difficulty, tensors)


def _by_chance(domains: Domains, documents: list[Document]) -> list[int]:
    count = len(domains.names)
    return [
        key_of(d.key.to_bytes(8, "little").hex().encode(), domains.seed, b"domain") % count
        for d in documents
    ]


def _by_cluster(domains: Domains, documents: list[Document]) -> list[int]:
    space_NR = _reduced([d.text for d in documents], domains.tensors)
    return np.argmin(_distances(space_NR, domains.tensors["centres"]), axis=1).tolist()


def _by_difficulty(domains: Domains, documents: list[Document]) -> list[int]:
    scores_N = _SCORES[domains.difficulty](domains.tensors, documents)
    return np.searchsorted(domains.tensors["thresholds"], scores_N, side="right").tolist()


_ASSIGN = {"random": _by_chance, "clusters": _by_cluster, "curriculum": _by_difficulty}


def _counts(texts: list[str]):
    """Return hashed word counts (N, V), sparse."""
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(
        n_features=WORDS, alternate_sign=False, norm=None, dtype=np.float32
    )
    return vectorizer.transform([text[:SCORED_CHARS] for text in texts])


def _fit_clusters(texts: list[str], count: int, seed: int) -> dict[str, np.ndarray]:
    from sklearn.decomposition import TruncatedSVD

    counts_NV = _counts(texts)
    idf_V = np.log((1 + len(texts)) / (1 + counts_NV.getnnz(axis=0))).astype(np.float32)
    dimensions = min(DIMENSIONS, len(texts) - 1)
    reduction = TruncatedSVD(dimensions, random_state=seed % 2**32).fit(_weighted(counts_NV, idf_V))
    tensors = {
        "idf": idf_V,
        "projection": np.ascontiguousarray(reduction.components_, dtype=np.float32),
    }
    return tensors | {"centres": _balanced_centres(_reduced(texts, tensors), count, seed)}


def _weighted(counts_NV, idf_V: np.ndarray):
    from sklearn.preprocessing import normalize

    counts_NV = counts_NV.copy()
    counts_NV.data = (1 + np.log(counts_NV.data)) * idf_V[counts_NV.indices]
    return normalize(counts_NV, copy=False)


def _reduced(texts: list[str], tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Return texts as unit vectors (N, R)."""
    space_NR = _weighted(_counts(texts), tensors["idf"]) @ tensors["projection"].T
    return space_NR / np.maximum(np.linalg.norm(space_NR, axis=1, keepdims=True), 1e-9)


def _balanced_centres(space_NR: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return centres (K, R) of clusters that hold equally many of the sample."""
    from sklearn.cluster import kmeans_plusplus

    centres_KR, _ = kmeans_plusplus(space_NR, count, random_state=seed % 2**32)
    before_N = None
    for _ in range(_ITERATIONS):
        chosen_N = balanced(_distances(space_NR, centres_KR))
        if before_N is not None and (chosen_N == before_N).all():
            break
        centres_KR = np.stack([space_NR[chosen_N == k].mean(axis=0) for k in range(count)])
        before_N = chosen_N
    return np.ascontiguousarray(centres_KR, dtype=np.float32)


def balanced(distance_NK: np.ndarray) -> np.ndarray:
    """Return a cluster (N,) per document, no cluster holding more than ceil(N / K).

    In rounds, each unplaced document asks for its nearest open cluster; an over-asked cluster keeps
    those that would lose most by their next choice, and closes. Then pairs of clusters exchange
    what suits both.
    """
    total, count = distance_NK.shape
    room_K = np.full(count, total // count) + (np.arange(count) < total % count)
    chosen_N, cost_NK = np.full(total, -1), distance_NK.astype(np.float64)
    while (waiting := np.flatnonzero(chosen_N < 0)).size:
        cost_NK[:, room_K == 0] = np.inf
        wish_N = np.argmin(cost_NK[waiting], axis=1)
        loss_N = _loss(cost_NK[waiting])
        for k in np.unique(wish_N):
            asking = np.flatnonzero(wish_N == k)
            kept = asking[np.argsort(-loss_N[asking], kind="stable")[: room_K[k]]]
            chosen_N[waiting[kept]] = k
            room_K[k] -= len(kept)
    for _ in range(_SWEEPS):
        if not _swap(distance_NK, chosen_N):
            break
    return chosen_N


def _swap(distance_NK: np.ndarray, chosen_N: np.ndarray) -> bool:
    """Exchange documents between two clusters at a time, in place, while that brings both nearer
    together."""
    swapped = False
    for a, b in combinations(range(distance_NK.shape[1]), 2):
        gain_N = (distance_NK[:, a] - distance_NK[:, b]) * np.where(chosen_N == a, 1, -1)
        one, two = (
            m[np.argsort(-gain_N[m], kind="stable")]
            for m in (np.flatnonzero(chosen_N == k) for k in (a, b))
        )
        pairs = min(len(one), len(two))
        better = int((gain_N[one[:pairs]] + gain_N[two[:pairs]] > 1e-6).sum())
        chosen_N[one[:better]], chosen_N[two[:better]] = b, a
        swapped |= better > 0
    return swapped


def _loss(cost_NK: np.ndarray) -> np.ndarray:
    """Return how much worse each document's second choice is than its first."""
    if cost_NK.shape[1] == 1:
        return np.zeros(len(cost_NK))
    two_N2 = np.partition(cost_NK, 1, axis=1)
    return two_N2[:, 1] - two_N2[:, 0]


def _distances(space_NR: np.ndarray, centres_KR: np.ndarray) -> np.ndarray:
    return (centres_KR**2).sum(
        axis=1
    ) - 2 * space_NR @ centres_KR.T  # less |x|^2, the same for every centre


def _fit_rarity(sample: list[Document]) -> dict[str, np.ndarray]:
    frequency_V = np.asarray(_counts([d.text for d in sample]).sum(axis=0), np.float64).ravel() + 1
    return {"surprise": -np.log(frequency_V / frequency_V.sum())}


def _rarity(tensors: dict[str, np.ndarray], documents: list[Document]) -> np.ndarray:
    counts_NV = _counts([d.text for d in documents])
    words_N = np.asarray(counts_NV.sum(axis=1), np.float64).ravel()
    return counts_NV @ tensors["surprise"] / np.maximum(words_N, 1)


def _length(tensors: dict[str, np.ndarray], documents: list[Document]) -> np.ndarray:
    return np.array([d.bytes for d in documents], np.float64)


def _compression(tensors: dict[str, np.ndarray], documents: list[Document]) -> np.ndarray:
    raw = [d.text[:SCORED_CHARS].encode() for d in documents]
    return np.array([len(zlib.compress(text, 6)) / len(text) for text in raw], np.float64)


_SCORES = {"length": _length, "rarity": _rarity, "compression": _compression}
