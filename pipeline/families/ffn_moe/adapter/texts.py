"""Held-out documents as a router of adapters meets them: their first tokens, each a text of its
own, and what they lose under the choices that are made.

T tokens of a stream, n documents, B texts, C choices (experts, then the base), S layers that are
read, D model width.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy import ndarray

from ....data.text.shards import Shards
from ....hardware import device
from ....metrics.language import ByDomain, Documents
from ....model.language_model import first_tokens
from ..evaluator import Evaluator
from ..sections import BASE
from .stack import RequestStack

# x_nSD by number of first tokens, then by domain
Texts = Mapping[int, Mapping[str, torch.Tensor]]


class Way(Protocol):
    """Choices of every document by its first tokens."""

    @property
    def prompt_tokens(self) -> int: ...
    @property
    def index_n(self) -> Mapping[str, ndarray]: ...


def first_tokens_of(evaluator: Evaluator, stack: RequestStack, prompts: Sequence[int]) -> Texts:
    """Return what the first tokens of every held-out document are on average, for some numbers of
    them. A document that is shorter has what it has."""
    out: dict[int, dict[str, torch.Tensor]] = {prompt: {} for prompt in prompts}
    most = max(prompts)
    for domain, documents in evaluator.documents.items():
        starts = _starts(evaluator.shards, domain, documents, most)
        done = 0
        for ids_BT in _batches(starts, evaluator.cfg.evaluate.batch_sequences):
            x_BTSD = stack.model.states(ids_BT, stack.text_router.layers, evaluator.bf16)
            for prompt in prompts:
                x_BSD = first_tokens(x_BTSD, prompt)
                # Taken once: what each pass leaves would lie between the blocks that the next needs
                if domain not in out[prompt]:
                    size = (len(starts), *x_BSD.shape[1:])
                    out[prompt][domain] = x_BSD.new_empty(size)
                out[prompt][domain][done : done + len(ids_BT)] = x_BSD
            done += len(ids_BT)
    return out


def _starts(shards: Shards, domain: str, documents: Documents, tokens: int) -> list[ndarray]:
    """Return the first tokens of each document, its lead among them."""
    stream = shards.stream("test", domain)
    starts = []
    for start, end in zip(documents.starts_n[:-1], documents.starts_n[1:], strict=True):
        starts.append(stream[start : min(end, start + tokens)].astype(np.int64))
    return starts


def _batches(starts: Sequence[ndarray], most: int) -> list[torch.Tensor]:
    """Return ids_BT of documents in their order; those that run together are equally long."""
    out: list[torch.Tensor] = []
    batch: list[ndarray] = []
    for start in starts:
        if batch and (len(batch) == most or len(batch[0]) != len(start)):
            out.append(torch.from_numpy(np.stack(batch)).to(device()))
            batch = []
        batch.append(start)
    out.append(torch.from_numpy(np.stack(batch)).to(device()))
    return out


def routed_nats(evaluator: Evaluator, experts: Sequence[str], way: Way) -> ByDomain:
    """Return nats_n by domain: of each document the first tokens' under the base, the others' under
    its choice, a number of `experts` or theirs for the base."""
    out = {}
    for domain, documents in evaluator.documents.items():
        names = (*experts, BASE)
        nats_CT = np.stack([evaluator.token_nats_of[name][domain] for name in names])
        lengths_n = np.diff(documents.starts_n)
        # by token: its place in its document, and who reads that
        place_T = np.concatenate([np.arange(length) for length in lengths_n])
        choice_T = np.repeat(way.index_n[domain], lengths_n)
        choice_T = np.where(place_T < way.prompt_tokens, len(experts), choice_T)
        nats_T = np.take_along_axis(nats_CT, choice_T[None], axis=0)[0]
        out[domain] = documents.sums(nats_T)
    return out
