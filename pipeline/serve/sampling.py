"""How the next token of a text is drawn from logits: penalties, bias, temperature and cuts, each
text with a generator of its own, so that what others draw beside it changes nothing.

B texts, V vocabulary, N tokens that may be drawn.
"""

import math
import random
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .generation import Sampling

# Logits over a smaller temperature overflow; the most likely token it is.
COLDEST = 1e-3
# Of the likeliest tokens, which are sorted first: in them is what top_p leaves of most texts, and
# to sort a whole vocabulary takes longer than the rest of a draw.
SORTED = 1024
SEEDS = 2**64


@dataclass(frozen=True)
class Drawn:
    """A token, and what is told of its probability: in the model's own distribution, before what
    the request asked for changed it."""

    id: int
    nats: float | None = None  # its log-probability
    likeliest: tuple[tuple[int, float], ...] = ()


class TokenSampler:
    """Draws the tokens of one text."""

    def __init__(self, sampling: Sampling, tells: bool = False):
        self.sampling = sampling
        # to be ranked an answer needs its probability, whoever asked for it or not
        self.told = 0 if tells and sampling.logprobs is None else sampling.logprobs
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        # Python's, as it takes microseconds and draws the same on every machine
        self._random = random.Random(seed % SEEDS)
        self._drawn: Counter[int] = Counter()
        self.biased = list(sampling.logit_bias)
        self.bias = list(sampling.logit_bias.values())  # of each of those

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is taken, with no more to it than a bias, and nothing is told
        of it."""
        return self._is_cold and self.told is None and not self._penalizes

    @property
    def _is_cold(self) -> bool:
        return self.sampling.temperature < COLDEST

    @property
    def _penalizes(self) -> bool:
        """Whether what was drawn has less of a chance."""
        return bool(self.sampling.presence_penalty or self.sampling.frequency_penalty)

    def draw(self, logit_V: Tensor) -> Drawn:
        """Return the next token. Raises ArithmeticError for logits that are no numbers."""
        wide_V = logit_V.float()
        changed_V = self._changed(wide_V) if self.biased or self._penalizes else wide_V
        check_numbers(changed_V)
        token = int(changed_V.argmax()) if self._is_cold else self._drawn_from(changed_V)
        self._drawn[token] += 1
        if self.told is None:
            return Drawn(token)
        (drawn,) = with_nats(wide_V.unsqueeze(0), [token], self.told)
        return drawn

    def _changed(self, wide_V: Tensor) -> Tensor:
        """Return logits less penalties of what was drawn, with the bias that was asked for."""
        changed_V = wide_V.clone()
        sampling = self.sampling
        if self._drawn:
            drawn_N = torch.tensor(list(self._drawn))
            often_N = torch.tensor(list(self._drawn.values()), dtype=torch.float32)
            less_N = sampling.presence_penalty + sampling.frequency_penalty * often_N
            changed_V[drawn_N] -= less_N
        if self.biased:
            changed_V[torch.tensor(self.biased)] += torch.tensor(self.bias, dtype=torch.float32)
        return changed_V

    def _drawn_from(self, logit_V: Tensor) -> int:
        """Return a token, drawn with its probability among those that are not cut."""
        scaled_V = logit_V / self.sampling.temperature
        token_N, nats_N = self._kept(scaled_V)
        # in fp64, so that thousands of small probabilities do not add up to something else
        sum_N = nats_N.double().softmax(-1).cumsum(-1)
        place = torch.searchsorted(sum_N, self._random.random() * sum_N[-1].item(), right=True)
        chosen = min(int(place), len(sum_N) - 1)
        return chosen if token_N is None else int(token_N[chosen])

    def _kept(self, scaled_V: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the tokens that may be drawn, likeliest first, with their logits; None for tokens
        that are all in their own order."""
        sampling = self.sampling
        token_N = None
        if sampling.top_k:
            best = scaled_V.topk(min(sampling.top_k, len(scaled_V)))
            token_N, scaled_V = best.indices, best.values
        if sampling.top_p < 1:
            order_N, scaled_V = _nucleus(scaled_V, sampling.top_p)
            token_N = order_N if token_N is None else token_N[order_N]
        if sampling.min_p:
            likely_N = scaled_V >= scaled_V.max() + math.log(sampling.min_p)
            scaled_V = scaled_V[likely_N]
            token_N = likely_N.nonzero().flatten() if token_N is None else token_N[likely_N]
        return token_N, scaled_V


def _nucleus(logit_N: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return the places of the fewest likeliest tokens that have a share of the probability
    (1904.09751), likeliest first, and their logits."""
    whole = logit_N.double().logsumexp(-1)
    for count in (min(SORTED, len(logit_N)), len(logit_N)):
        best = logit_N.topk(count)
        probability_N = (best.values.double() - whole).exp()
        # of those before a token
        before_N = probability_N.cumsum(-1) - probability_N
        is_kept_N = before_N < share
        if count == len(logit_N) or not is_kept_N[-1]:
            break
    is_kept_N[0] = True
    return best.indices[is_kept_N], best.values[is_kept_N]


def with_nats(logit_NV: Tensor, tokens: Sequence[int], likeliest: int) -> list[Drawn]:
    """Return tokens with their probabilities and those of so many likeliest in the place of each,
    of logits in fp32."""
    whole_N1 = logit_NV.logsumexp(-1, keepdim=True)
    token_N1 = torch.tensor(tokens, device=logit_NV.device).unsqueeze(1)
    nats = (logit_NV.gather(1, token_N1) - whole_N1).flatten().tolist()
    best = logit_NV.topk(min(likeliest, logit_NV.shape[1]))
    likely = (best.values - whole_N1).tolist()
    drawn = []
    for token, own, ids, others in zip(tokens, nats, best.indices.tolist(), likely, strict=True):
        drawn.append(Drawn(token, own, tuple(zip(ids, others, strict=True))))
    return drawn


def check_numbers(logit_V: Tensor) -> None:
    """Raise ArithmeticError for logits, of any leading shape, that are no numbers."""
    # one that is minus infinity is a token that cannot be drawn
    if not logit_V.amax(-1).isfinite().all():
        raise ArithmeticError("the logits of the next token are no numbers")


def draw_all(samplers: Sequence[TokenSampler], logit_BV: Tensor) -> list[Drawn | Exception]:
    """Return each text's next token, or what is the matter with its own."""
    plain_BV = _biased(samplers, logit_BV).max(-1)
    likeliest = plain_BV.indices.tolist()
    is_finite = plain_BV.values.isfinite().tolist()
    drawn: list[Drawn | Exception] = []
    for row, sampler in enumerate(samplers):
        if sampler.is_plain and is_finite[row]:
            drawn.append(Drawn(likeliest[row]))
            continue
        try:
            drawn.append(sampler.draw(logit_BV[row].cpu()))
        except Exception as error:  # of one text, and no reason to end the others
            drawn.append(error)
    return drawn


def _biased(samplers: Sequence[TokenSampler], logit_BV: Tensor) -> Tensor:
    """Return logits of the texts of which no more is asked than that, each with its own bias."""
    rows: list[int] = []
    tokens: list[int] = []
    biases: list[float] = []
    for row, sampler in enumerate(samplers):
        if sampler.biased and sampler.is_plain:
            rows += [row] * len(sampler.biased)
            tokens += sampler.biased
            biases += sampler.bias
    if not rows:
        return logit_BV
    device = logit_BV.device
    bias_N = torch.tensor(biases, dtype=torch.float32, device=device)
    changed_BV = logit_BV.to(torch.float32, copy=True)
    changed_BV[torch.tensor(rows, device=device), torch.tensor(tokens, device=device)] += bias_N
    return changed_BV
