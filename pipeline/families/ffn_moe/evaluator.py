"""The held-out text of an ffn_moe run, the rows that are judged on it, and what each of them
scores.

B sequences, T tokens, N = B*T, n documents.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import ceil

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from ...data.text.shards import Shards
from ...hardware import device, uses_bf16
from ...metrics.language import ByDomain, Documents, Scores
from ...model.trunk import Ffn, Trunk
from ...protocols import Progress
from ...report.schema.language import RowKind
from .config import FfnMoeConfig
from .parts import token_losses


@dataclass(frozen=True, kw_only=True)
class EvalRow:
    """One row of the quality table: what it is called, and what it costs."""

    name: str
    kind: RowKind
    train_tokens: int
    active_ffns: float = 1.0  # feed-forward networks that run per token
    kept_ffns: float = 1.0  # feed-forward networks that are kept
    axis: str = ""  # what it has in common with the stack


@dataclass(frozen=True, kw_only=True)
class NetworkRow(EvalRow):
    """A row that is a network, which gives every token a loss."""

    trunk: Trunk
    ffn: Ffn

    @property
    def told(self) -> EvalRow:
        """What it is called and cost, without the network."""
        return EvalRow(**{each.name: getattr(self, each.name) for each in fields(EvalRow)})


class Evaluator:
    """The held-out text, and what every row scores on it."""

    def __init__(self, cfg: FfnMoeConfig, shards: Shards, progress: Progress):
        self.cfg = cfg
        self.shards = shards
        self.progress = progress
        self.bf16 = uses_bf16(cfg.dtype)
        self.documents: dict[str, Documents] = {}
        for domain in shards.domains:
            self.documents[domain] = _documents(cfg, shards, domain)
        resamples = cfg.evaluate.bootstrap
        self.scores = Scores(self.documents, resamples, cfg.data.seed)
        # nats_T by row and domain, of the rows from which others follow
        self.token_nats_of: dict[str, ByDomain] = {}

    def token_nats(
        self,
        trunk: Trunk,
        ffn: Ffn,
        domain: str,
    ) -> np.ndarray:
        """Return nats_T of a domain's held-out stream; 0 where a token is given and not
        predicted."""
        documents = self.documents[domain]
        windows = held_out_windows(self.shards, documents, self.cfg.trunk.context_tokens)
        batches = windows.to(device()).split(self.cfg.evaluate.batch_sequences)
        nats_N = token_losses(trunk, ffn, batches, self.bf16)
        return predicted_nats(nats_N.cpu().numpy(), documents)

    def score(
        self,
        name: str,
        trunk: Trunk,
        ffn: Ffn,
        keep_tokens: bool = False,
        watched: Mapping[str, Ffn] | None = None,
    ) -> None:
        """Run a network over all domains and keep what it scores under a row's name.

        watched: by domain what stands for the network there, computes the same and looks on.
        """
        self.progress(f"evaluating {name}", None)
        nats = {}
        sums = {}
        for domain, documents in self.documents.items():
            on_domain = ffn if watched is None else watched[domain]
            nats[domain] = self.token_nats(trunk, on_domain, domain)
            sums[domain] = documents.sums(nats[domain])
        self.scores.add(name, sums)
        if keep_tokens:
            self.token_nats_of[name] = nats


def held_out_windows(shards: Shards, documents: Documents, context_tokens: int) -> torch.Tensor:
    """Return ids_BT of a domain's held-out documents, T one more than context_tokens. Windows
    follow each other without overlap, each led by the last token of the one before, so that every
    token but the first is predicted once; the last window is filled up."""
    end = int(documents.starts_n[-1])
    windows = ceil((end - 1) / context_tokens)
    padded = np.full(windows * context_tokens + 1, shards.end_id)
    padded[:end] = shards.stream("test", documents.domain)[:end]
    overlapping = sliding_window_view(padded, context_tokens + 1)
    return torch.from_numpy(overlapping[::context_tokens].copy())


def predicted_nats(found: np.ndarray, documents: Documents) -> np.ndarray:
    """Return nats_T of a stream from those of its windows' tokens, one after another: 0 where a
    token is given and not predicted."""
    nats_T = np.zeros(int(documents.starts_n[-1]))
    nats_T[1:] = found[: len(nats_T) - 1]
    # Nobody has to guess what leads a document
    for place in range(documents.lead):
        nats_T[documents.starts_n[:-1] + place] = 0.0
    return nats_T


def _documents(
    cfg: FfnMoeConfig,
    shards: Shards,
    domain: str,
) -> Documents:
    """Return the first whole test documents of a domain, up to evaluate.tokens_per_domain, at least
    one."""
    starts_n, bytes_n = shards.documents("test", domain)
    most = cfg.evaluate.tokens_per_domain
    after = int(np.searchsorted(starts_n, most, side="right"))
    count = max(1, after - 1)
    # Copied, or the index of a whole shard would live as long as these few
    starts_n = starts_n[: count + 1].copy()
    bytes_n = bytes_n[:count].copy()
    return Documents(domain, starts_n, bytes_n, len(shards.lead))
