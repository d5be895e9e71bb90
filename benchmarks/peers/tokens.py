"""The text that all contenders train on, drawn once: tokens that half the time follow from the one
before.

So a loss has something to fall to. Legend: N tokens, B sequences, T context tokens.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.measuring import Job, Sizes

DOCUMENT_TOKENS = 400
END_ID = 0


def draw(vocab_size: int, count: int, seed: int) -> np.ndarray:
    """Return ids_N from 1 to vocab_size: common ones often, every other one determined by its
    predecessor."""
    rng = np.random.default_rng(seed)
    ids_N = 1 + (rng.zipf(1.2, count) - 1) % (vocab_size - 1)
    follows_N = rng.random(count) < 0.5
    follows_N[0] = False
    for i in np.flatnonzero(follows_N):
        ids_N[i] = 1 + (ids_N[i - 1] * 31 + seed) % (vocab_size - 1)
    return ids_N


def stream(job: Job) -> np.ndarray:
    """Return tokens_N of the training text of the domain that a job is about, as they stand on the
    disk."""
    return np.memmap(
        text_folder(job, job.item) / "train" / f"{domain(job.item)}.bin", "<u2", mode="r"
    )


def text_folder(job: Job, number: int) -> Path:
    """Return where the tokens of a domain are."""
    return Path(job.work) / f"preprocess-{domain(number)}"


def domain(number: int) -> str:
    """Return the name of a domain."""
    return f"d{number:02}"


def batches(job: Job, seed: int = 0) -> Callable[[int], torch.Tensor]:
    """Return what gives ids_BT of B windows at random places, T one longer than the context."""
    tokens_N, rng, length = stream(job), np.random.default_rng(seed), job.sizes.context_tokens + 1

    def batch(count: int) -> torch.Tensor:
        starts = rng.integers(0, len(tokens_N) - length, count)
        return torch.from_numpy(
            np.stack([tokens_N[s : s + length] for s in starts]).astype(np.int64)
        )

    return batch


def windows(sizes: Sizes) -> int:
    """Return the windows of each domain's training text."""
    return max(200, 4 * sizes.batch_sequences)
