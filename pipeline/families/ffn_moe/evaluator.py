"""The held-out text of an ffn_moe run, the rows that are judged on it, and what each of them
scores.

B sequences, T tokens, N = B*T, n documents.
"""

from dataclasses import dataclass
from math import ceil

import numpy as np
import torch

from ...data.text.shards import Shards
from ...hardware import device, uses_bf16
from ...metrics.language import Documents, Scores
from ...model.trunk import Ffn, Trunk
from ...protocols import Progress
from ...report.schema import RowKind
from .config import FfnMoeConfig
from .parts import token_loss


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


class Evaluator:
    """The held-out text, and what every row scores on it."""

    def __init__(self, cfg: FfnMoeConfig, shards: Shards, progress: Progress):
        self.cfg = cfg
        self.shards = shards
        self.progress = progress
        self.bf16 = uses_bf16(cfg.dtype)
        self.documents = {domain: _documents(cfg, shards, domain) for domain in shards.domains}
        self.scores = Scores(self.documents, cfg.evaluate.bootstrap, cfg.data.seed)
        # nats_T by row and domain, of the rows from which others follow
        self.token_nats_of: dict[str, dict[str, np.ndarray]] = {}

    def token_nats(self, trunk: Trunk, ffn: Ffn, domain: str) -> np.ndarray:
        """Return nats_T of a domain's held-out stream; 0 where a token is given and not
        predicted."""
        documents = self.documents[domain]
        context = self.cfg.trunk.context_tokens
        end = int(documents.starts_n[-1])
        # Windows follow each other without overlap, each led by the last token of the one before;
        # the last window is filled up
        padded = np.full(ceil((end - 1) / context) * context + 1, self.shards.end_id)
        padded[:end] = self.shards.stream("test", domain)[:end]
        windows = np.lib.stride_tricks.sliding_window_view(padded, context + 1)[::context]
        ids_BT = torch.from_numpy(windows.copy()).to(device())
        losses = []
        for batch_BT in ids_BT.split(self.cfg.evaluate.batch_sequences):
            losses.append(token_loss(trunk, ffn, batch_BT, self.bf16).flatten())
        found = torch.cat(losses).cpu().numpy()
        nats_T = np.concatenate([[0.0], found[: end - 1]])
        nats_T[documents.starts_n[:-1]] = 0.0
        return nats_T

    def score(self, name: str, trunk: Trunk, ffn: Ffn, keep_tokens: bool = False) -> None:
        """Run a network over all domains and keep what it scores under a row's name."""
        self.progress(f"evaluating {name}", None)
        nats = {domain: self.token_nats(trunk, ffn, domain) for domain in self.documents}
        sums = {domain: self.documents[domain].sums(nats_T) for domain, nats_T in nats.items()}
        self.scores.add(name, sums)
        if keep_tokens:
            self.token_nats_of[name] = nats


def _documents(cfg: FfnMoeConfig, shards: Shards, domain: str) -> Documents:
    """Return the first whole test documents of a domain, up to evaluate.tokens_per_domain, at least
    one."""
    starts_n, bytes_n = shards.documents("test", domain)
    after = int(np.searchsorted(starts_n, cfg.evaluate.tokens_per_domain, side="right"))
    count = max(1, after - 1)
    return Documents(domain, starts_n[: count + 1].copy(), bytes_n[:count].copy())
