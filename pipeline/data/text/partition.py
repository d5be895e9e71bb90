"""How documents find their domain: labels, clusters, chance or difficulty; fitted once, saved, then
a pure function.

Invariant: the domain of a document depends on the saved tensors, data.seed and the document alone.
Legend: N documents, V hashed words, R reduced dimensions, K domains, P pairs that may
change places.
"""

import json
import zlib
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy import float32, float64, ndarray

from ...config.text_data import TextRunConfig
from ...errors import DamagedArtifact, DataError, MissingArtifact
from ...store.artifacts import write_text
from ...store.reading import exists, read_as, read_bytes
from ...store.room import writing
from .documents import Document, key_of

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

SCORED_CHARS = 8192  # of a document; what comes after does not change its cluster or difficulty
WORDS = 1 << 15
DIMENSIONS = 64
_ITERATIONS = 30  # of k-means, at most
_SWEEPS = 4  # of exchanges between clusters, at most
_TINY = 1e-9  # length below which a document has no direction
_LEAST_GAIN = 1e-6  # of an exchange; below, rounding could exchange two documents for ever
Tensors = dict[str, ndarray]


@dataclass(frozen=True)
class _Fitted:
    """What partition.json holds."""

    by: str
    names: tuple[str, ...]
    seed: int
    difficulty: str | None


@dataclass(frozen=True)
class Domains:
    """A fitted partition."""

    by: str
    names: tuple[str, ...]
    seed: int
    difficulty: str | None = None
    tensors: Tensors = field(default_factory=dict)

    def assign(self, documents: list[Document]) -> list[str]:
        """Return the domain of each document."""
        if self.by == "labels":
            return [document.label for document in documents]
        # Neither a vectorizer nor a clustering takes an empty list
        if not documents:
            return []
        if self.by == "random":
            numbers = self._by_chance(documents)
        elif self.by == "clusters":
            numbers = self._by_cluster(documents)
        else:
            numbers = self._by_difficulty(documents)
        return [self.names[number] for number in numbers]

    def _by_chance(self, documents: list[Document]) -> list[int]:
        numbers = []
        for document in documents:
            # Hashed again, because the key itself decides the split: both must be independent
            key = document.key.to_bytes(8, "little").hex()
            number = key_of(key.encode(), self.seed, b"domain")
            numbers.append(number % len(self.names))
        return numbers

    def _by_cluster(self, documents: list[Document]) -> list[int]:
        space_NR = _reduced(_texts(documents), self.tensors)
        distance_NK = _distances(space_NR, self.tensors["centres"])
        return distance_NK.argmin(axis=1).tolist()

    def _by_difficulty(self, documents: list[Document]) -> list[int]:
        score_N = _difficulty(self.difficulty, self.tensors, documents)
        thresholds = self.tensors["thresholds"]
        return np.searchsorted(thresholds, score_N, side="right").tolist()

    def save(self, folder: Path) -> None:
        """Write partition.safetensors and partition.json. Raises DiskFull."""
        from safetensors.numpy import save

        about = {
            "by": self.by,
            "names": self.names,
            "seed": self.seed,
            "difficulty": self.difficulty,
            "scored_chars": SCORED_CHARS,
        }
        tensors = folder / "partition.safetensors"
        with writing(tensors):
            tensors.write_bytes(save(self.tensors))
        write_text(folder / "partition.json", json.dumps(about, indent=1) + "\n")


def load(folder: Path) -> Domains:
    """Read what Domains.save wrote. Raises MissingArtifact or DamagedArtifact."""
    from safetensors import SafetensorError
    from safetensors.numpy import load as read

    for name in ("partition.json", "partition.safetensors"):
        if not exists(folder / name):
            raise MissingArtifact(f"{folder / name} does not exist", stages=("preprocess",))
    try:
        about = read_as(_Fitted, folder / "partition.json")
        tensors = read(read_bytes(folder / "partition.safetensors"))
    except (DamagedArtifact, SafetensorError) as error:
        raise DamagedArtifact(
            f"the partition in {folder} cannot be read ({error})",
            remove=folder,
            stage="preprocess",
        ) from None
    return Domains(
        by=about.by,
        names=about.names,
        seed=about.seed,
        difficulty=about.difficulty,
        tensors=tensors,
    )


def fit(cfg: TextRunConfig, sample: list[Document]) -> Domains:
    """Fit cfg.partition on sample, its training documents.

    Raises DataError when there are too few.
    """
    settings = cfg.partition
    seed = cfg.data.seed
    names = settings.names
    count = len(names)
    if settings.by in ("labels", "random"):
        return Domains(settings.by, names, seed)
    sample = sample[: settings.sample_documents]
    # Fewer than two a domain, and a cluster or level would be a single document
    if len(sample) < 2 * count:
        raise DataError(
            f"partition.by {settings.by} wants {count} domains (partition.count) out of "
            f"{len(sample)} training documents; at least {2 * count} are needed. Lower "
            "partition.count, or give it more documents"
        )
    if settings.by == "clusters":
        tensors = _fit_clusters(_texts(sample), count, seed)
        return Domains("clusters", names, seed, None, tensors)
    tensors = _fit_rarity(sample) if settings.difficulty == "rarity" else {}
    score_N = _difficulty(settings.difficulty, tensors, sample)
    shares = np.arange(1, count) / count
    tensors["thresholds"] = np.quantile(score_N, shares)
    return Domains("curriculum", names, seed, settings.difficulty, tensors)


def _texts(documents: list[Document]) -> list[str]:
    return [document.text for document in documents]


def _counts(texts: list[str]) -> "csr_matrix":
    """Return hashed word counts (N, V), sparse."""
    from sklearn.feature_extraction.text import HashingVectorizer

    # Hashed, so that no vocabulary has to be fitted or saved
    vectorizer = HashingVectorizer(
        n_features=WORDS,
        # A sign would make counts negative, and their logarithm is taken
        alternate_sign=False,
        norm=None,
        dtype=float32,
    )
    return vectorizer.transform([text[:SCORED_CHARS] for text in texts])


def _fit_clusters(texts: list[str], count: int, seed: int) -> Tensors:
    """Return TF-IDF weights, their projection (R, V) by latent semantic analysis, and centres."""
    from sklearn.decomposition import TruncatedSVD

    counts_NV = _counts(texts)
    documents_V = counts_NV.getnnz(axis=0)
    # As if one more document had every word: none has a weight without end
    ratio_V = (1 + len(texts)) / (1 + documents_V)
    idf_V = np.log(ratio_V).astype(float32)
    # A matrix of N rows has no more than N-1 directions that tell rows apart
    dimensions = min(DIMENSIONS, len(texts) - 1)
    reduction = TruncatedSVD(dimensions, random_state=seed % 2**32)
    reduction.fit(_weighted(counts_NV, idf_V))
    tensors = {
        "idf": idf_V,
        "projection": np.ascontiguousarray(reduction.components_, dtype=float32),
    }
    space_NR = _reduced(texts, tensors)
    tensors["centres"] = _balanced_centres(space_NR, count, seed)
    return tensors


def _weighted(counts_NV: "csr_matrix", idf_V: ndarray) -> "csr_matrix":
    """Return TF-IDF rows of length 1, with the logarithm of the counts."""
    from sklearn.preprocessing import normalize

    counts_NV = counts_NV.copy()
    # A sparse matrix: its entries that are not zero, and the column of each
    weights = 1 + np.log(counts_NV.data)
    counts_NV.data = weights * idf_V[counts_NV.indices]
    return normalize(counts_NV, copy=False)


def _reduced(texts: list[str], tensors: Tensors) -> ndarray:
    """Return texts as unit vectors (N, R)."""
    weighted_NV = _weighted(_counts(texts), tensors["idf"])
    space_NR = weighted_NV @ tensors["projection"].T
    length_N1 = np.linalg.norm(space_NR, axis=1, keepdims=True)
    return space_NR / np.maximum(length_N1, _TINY)


def _balanced_centres(space_NR: ndarray, count: int, seed: int) -> ndarray:
    """Return centres (K, R) of clusters that hold equally many of the sample."""
    from sklearn.cluster import kmeans_plusplus

    # Balanced, as plain k-means leaves some experts with a fraction of the others' text
    centres_KR, _ = kmeans_plusplus(space_NR, count, random_state=seed % 2**32)
    before_N = None
    for _ in range(_ITERATIONS):
        chosen_N = balanced(_distances(space_NR, centres_KR))
        if before_N is not None and np.array_equal(chosen_N, before_N):
            break
        members = [space_NR[chosen_N == k] for k in range(count)]
        centres_KR = np.stack([each.mean(axis=0) for each in members])
        before_N = chosen_N
    return np.ascontiguousarray(centres_KR, dtype=float32)


def balanced(distance_NK: ndarray) -> ndarray:
    """Return a cluster (N,) per document, no cluster holding more than ceil(N / K).

    In rounds, each unplaced document asks for its nearest open cluster; an over-asked cluster keeps
    those that would lose most by their next choice, and closes. Then pairs of clusters exchange
    what suits both.
    """
    total, count = distance_NK.shape
    # The first N mod K clusters take one more than the others
    room_K = np.full(count, total // count)
    room_K[: total % count] += 1
    chosen_N = np.full(total, -1)
    cost_NK = distance_NK.astype(float64)
    while True:
        waiting = np.flatnonzero(chosen_N < 0)
        if not waiting.size:
            break
        cost_NK[:, room_K == 0] = np.inf
        wish_N = cost_NK[waiting].argmin(axis=1)
        loss_N = _loss(cost_NK[waiting])
        for k in np.unique(wish_N):
            asking = np.flatnonzero(wish_N == k)
            by_loss = np.argsort(-loss_N[asking], kind="stable")
            kept = asking[by_loss[: room_K[k]]]
            chosen_N[waiting[kept]] = k
            room_K[k] -= len(kept)
    for _ in range(_SWEEPS):
        if not _swap(distance_NK, chosen_N):
            break
    return chosen_N


def _swap(distance_NK: ndarray, chosen_N: ndarray) -> bool:
    """Exchange documents between two clusters at a time, in place, while that brings both nearer
    together."""
    swapped = False
    count = distance_NK.shape[1]
    for a, b in combinations(range(count), 2):
        # What each document of the two gains by going to the other one
        gain_N = distance_NK[:, a] - distance_NK[:, b]
        gain_N = gain_N * np.where(chosen_N == a, 1, -1)
        from_a = _best_first(gain_N, np.flatnonzero(chosen_N == a))
        from_b = _best_first(gain_N, np.flatnonzero(chosen_N == b))
        # One for one, so that both keep their size; gains fall, so the good pairs come first
        pairs = min(len(from_a), len(from_b))
        from_a = from_a[:pairs]
        from_b = from_b[:pairs]
        gain_P = gain_N[from_a] + gain_N[from_b]
        better = int((gain_P > _LEAST_GAIN).sum())
        chosen_N[from_a[:better]] = b
        chosen_N[from_b[:better]] = a
        swapped |= better > 0
    return swapped


def _best_first(gain_N: ndarray, members: ndarray) -> ndarray:
    order = np.argsort(-gain_N[members], kind="stable")
    return members[order]


def _loss(cost_NK: ndarray) -> ndarray:
    """Return how much worse each document's second choice is than its first."""
    if cost_NK.shape[1] == 1:
        return np.zeros(len(cost_NK))
    least_NK = np.partition(cost_NK, 1, axis=1)
    return least_NK[:, 1] - least_NK[:, 0]


def _distances(space_NR: ndarray, centres_KR: ndarray) -> ndarray:
    """Return squared distances (N, K), less |x|^2, which is the same for every centre."""
    squares_K = (centres_KR**2).sum(axis=1)
    return squares_K - 2 * space_NR @ centres_KR.T


def _difficulty(kind: str | None, tensors: Tensors, documents: list[Document]) -> ndarray:
    """Return a score (N,) by which a curriculum orders documents: more is harder."""
    if kind == "length":
        return np.array([document.bytes for document in documents], float64)
    if kind == "rarity":
        return _rarity(tensors["surprise"], documents)
    return _compression(documents)


def _fit_rarity(sample: list[Document]) -> Tensors:
    """Return the surprise (V,) of each hashed word: minus the logarithm of its frequency."""
    counts_NV = _counts(_texts(sample))
    # One more each, so that a word of none has a finite surprise
    frequency_1V = np.asarray(counts_NV.sum(axis=0), float64)
    frequency_V = frequency_1V.ravel() + 1
    share_V = frequency_V / frequency_V.sum()
    return {"surprise": -np.log(share_V)}


def _rarity(surprise_V: ndarray, documents: list[Document]) -> ndarray:
    """Return the mean surprise of a document's words."""
    counts_NV = _counts(_texts(documents))
    words_N1 = np.asarray(counts_NV.sum(axis=1), float64)
    total_N = counts_NV @ surprise_V
    return total_N / np.maximum(words_N1.ravel(), 1)


def _compression(documents: list[Document]) -> ndarray:
    """Return the share of its bytes that zlib leaves of a document."""
    shares = []
    for document in documents:
        raw = document.text[:SCORED_CHARS].encode()
        packed = zlib.compress(raw, level=6)
        shares.append(len(packed) / len(raw))
    return np.array(shares, float64)
