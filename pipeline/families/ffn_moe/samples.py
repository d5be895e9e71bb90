"""The beginnings of held-out texts as the report shows them: with who reads each token.

B sequences, T tokens, n documents.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from ...data.text.shards import Shards
from ...hardware import device, uses_bf16
from ...protocols import Progress
from ...report.schema.language import SampleText
from .. import Parts
from .config import FfnMoeConfig
from .speakers import Listener, spans
from .stack import FfnStack
from .stock import run_tokenizer

SHOWN_TOKENS = 128  # of a text, or the context, where that is less
# Of all texts together, so that a report of very many domains stays small; each is cut alike
ALL_TOKENS = 16_384
LEAST_TOKENS = 8  # that a text has

# Returns who reads each token of ids_BT, which is one text with what leads it
Reading = Callable[[torch.Tensor], list[str]]


def samples(
    cfg: FfnMoeConfig, parts: Parts, shards: Shards, progress: Progress, read: Reading
) -> tuple[SampleText, ...]:
    """Return the first held-out texts of each domain, evaluate.samples of them."""
    if not cfg.evaluate.samples:
        return ()
    progress("who reads held-out texts", None)
    tokenizer = run_tokenizer(parts)
    lead = len(shards.lead)
    most = shown_tokens(cfg, len(shards.domains))
    out = []
    for domain in shards.domains:
        for ids_T in _first_documents(shards, domain, cfg.evaluate.samples):
            shown_T = ids_T[: max(most, lead + LEAST_TOKENS)]
            speakers = read(torch.from_numpy(shown_T).unsqueeze(0).to(device()))
            # What leads a document is nobody's text
            told = spans(tokenizer, shown_T[lead:].tolist(), speakers[lead:])
            out.append(SampleText(domain=domain, spans=told, goes_on=len(ids_T) > len(shown_T)))
    return tuple(out)


def shown_tokens(cfg: FfnMoeConfig, domains: int) -> int:
    """Return how many tokens of each text are read, with those that lead it."""
    each = ALL_TOKENS // (domains * max(1, cfg.evaluate.samples))
    return min(SHOWN_TOKENS, cfg.trunk.context_tokens, each)


def by_token(stack: FfnStack, cfg: FfnMoeConfig) -> Reading:
    """Return who reads the tokens of a text where gates choose for each of them."""
    listener = Listener(stack.mixture, stack.names)
    bf16 = uses_bf16(cfg.dtype)

    def read(ids_BT: torch.Tensor) -> list[str]:
        autocast = torch.autocast(ids_BT.device.type, torch.bfloat16, enabled=bf16)
        with torch.no_grad(), autocast:
            stack.trunk.hidden(ids_BT, listener)
        return listener.speakers()[0]

    return read


def _first_documents(shards: Shards, domain: str, count: int) -> Iterator[np.ndarray]:
    """Yield ids_T of the first held-out documents that have a few tokens, what leads each
    included."""
    starts_n, _ = shards.documents("test", domain)
    least = len(shards.lead) + LEAST_TOKENS
    long_enough = np.flatnonzero(np.diff(starts_n) >= least)
    stream = shards.stream("test", domain)
    for number in long_enough[:count].tolist():
        yield np.asarray(stream[starts_n[number] : starts_n[number + 1]], dtype=np.int64)
