"""How a token is drawn, against transformers' own processors, and what may be shown of a text,
against looking at all of it.

V vocabulary.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeline.serve import sampling as module
from pipeline.serve.generation import Sampling
from pipeline.serve.sampling import TokenSampler, draw_all
from pipeline.serve.text_stream import TextStream

GRID = 400


class Grid:
    """In place of a generator: numbers from 0 to 1, one after another."""

    def __init__(self):
        self.at = 0

    def random(self) -> float:
        self.at += 1
        return (self.at - 0.5) / GRID


def counts(logit_V: torch.Tensor, sampling: Sampling) -> list[int]:
    """Return how often each token is drawn by as many equally spread numbers as there are."""
    sampler = TokenSampler(sampling)
    sampler._random = Grid()
    found = Counter(sampler.draw(logit_V).id for _ in range(GRID))
    return [found[token] for token in range(len(logit_V))]


@pytest.mark.parametrize("sorted_first", [1, 3, 1024])
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 99),
    temperature=st.floats(0.05, 2),
    top_k=st.integers(0, 12),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.99)),
    min_p=st.one_of(st.just(0.0), st.floats(0.01, 0.9)),
)
def test_tokens_are_drawn_as_often_as_transformers_would(
    sorted_first, seed, temperature, top_k, top_p, min_p
):
    logit_V = torch.randn(30, generator=torch.Generator().manual_seed(seed)) * 2
    warpers = [TemperatureLogitsWarper(temperature)]
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    score_1V = LogitsProcessorList(warpers)(torch.zeros(1, 1, dtype=torch.long), logit_V[None])
    wanted_V = score_1V[0].softmax(-1) * GRID
    before, module.SORTED = module.SORTED, sorted_first
    try:
        found_V = torch.tensor(
            counts(logit_V, Sampling(None, temperature, top_p, None, top_k=top_k, min_p=min_p))
        )
    finally:
        module.SORTED = before
    assert (found_V - wanted_V).abs().max() <= 1.01


def test_penalties_and_bias_change_logits_by_what_they_say():
    logit_V = torch.tensor([3.0, 2.0, 1.0])
    sampler = TokenSampler(
        Sampling(None, 0.0, presence_penalty=0.6, frequency_penalty=0.5, logprobs=3)
    )
    drawn = [sampler.draw(logit_V) for _ in range(5)]
    # what was drawn once has 1.1 less, then .5 less each time: 3, 2 against 1.9, 1.9 against 1,
    # 1.4 against 1, and 1 against .9 twice
    assert [each.id for each in drawn] == [0, 1, 0, 0, 2]
    nats_V = logit_V.log_softmax(-1)
    for each in drawn:
        # what is told is the model's own, whatever was asked for
        assert each.nats == pytest.approx(nats_V[each.id].item())
        assert [token for token, _ in each.likeliest] == [0, 1, 2]
    biased = Sampling(None, 0.0, logit_bias={2: 2.5})
    assert TokenSampler(biased).draw(logit_V).id == 2
    assert TokenSampler(replace(biased, logit_bias={0: -100.0})).draw(logit_V).id == 1


def test_a_bias_is_of_its_own_text_alone():
    logit_BV = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    first, second = logit_BV[2].topk(2).indices.tolist()
    asked = [
        Sampling(None, 0.0, logit_bias={3: 100.0}),
        Sampling(None, 0.0),
        Sampling(None, 0.0, logit_bias={first: -100.0, 3: -1.0}),
        Sampling(None, 0.0, logit_bias={4: 100.0}, presence_penalty=1.0),
        Sampling(None, 1.0, seed=1, logit_bias={5: 100.0}),
        Sampling(None, 0.0, logit_bias={6: 100.0}, logprobs=0),
        Sampling(None, 0.0, logit_bias={7: float("nan")}),
    ]
    given_BV = logit_BV.clone()
    drawn = draw_all([TokenSampler(each) for each in asked], given_BV)
    assert isinstance(drawn.pop(), ArithmeticError)
    assert [each.id for each in drawn] == [3, int(logit_BV[1].argmax()), second, 4, 5, 6]
    assert drawn[5].nats == pytest.approx(logit_BV[5].log_softmax(-1)[6].item())
    assert torch.equal(given_BV, logit_BV)


def test_a_seed_draws_the_same_whoever_draws_beside_it():
    logit_BV = torch.randn(5, 40)
    sampling = Sampling(None, 1.3, seed=-(2**63))
    alone = TokenSampler(sampling)
    wanted = [alone.draw(logit_BV[2]).id for _ in range(20)]
    several = [TokenSampler(Sampling(None, 1.0)) for _ in range(5)]
    several[2] = TokenSampler(sampling)
    torch.manual_seed(1)
    assert [draw_all(several, logit_BV)[2].id for _ in range(20)] == wanted
    other = TokenSampler(replace(sampling, seed=2**63 - 1))
    assert [other.draw(logit_BV[2]).id for _ in range(20)] != wanted


def test_logits_that_are_no_numbers_are_an_error_of_their_own_text():
    logit_BV = torch.randn(3, 40)
    logit_BV[1, 3] = float("nan")
    for sampling in (Sampling(None, 0.0), Sampling(None, 1.0)):
        drawn = draw_all([TokenSampler(sampling)] * 3, logit_BV)
        assert isinstance(drawn[1], ArithmeticError)
        assert not any(isinstance(drawn[at], Exception) for at in (0, 2))


TOKENS = [b"a", b"b", b"ab", b"ba", b"c", "é".encode()[:1], "é".encode()[1:], b"\xf0\x9f", b" "]


def decode(ids: list[int]) -> str:
    """Return what tokens of bytes say, as a decoder does: what is no text is a mark."""
    return b"".join(TOKENS[token] for token in ids).decode(errors="replace")


@settings(max_examples=200, deadline=None)
@given(
    ids=st.lists(st.integers(0, len(TOKENS) - 1), max_size=24),
    stops=st.lists(st.text("abcé ", min_size=1, max_size=4), max_size=3),
    before=st.lists(st.integers(0, len(TOKENS) - 1), max_size=10),
)
def test_what_is_shown_is_the_text_before_the_first_stop_string(ids, stops, before):
    stream, shown, count = TextStream(decode, stops, before), [], 0
    for token in ids:
        shown += stream.add(token)
        count += 1
        text = "".join(shown)
        assert decode(ids).startswith(text) or stream.stopped
        if stream.stopped:
            break
        # what no stop string can begin with is shown at once, but for what is no character yet
        if not stops:
            assert text.rstrip("\ufffd") == decode(ids[:count]).rstrip("\ufffd")
    else:
        shown += stream.end()
    whole = decode(ids[:count])
    ends = [whole.find(stop) for stop in stops if stop in whole]
    assert "".join(shown) == (whole[: min(ends)] if ends else whole)
    assert stream.stopped == bool(ends)
    assert len(shown) <= count
    # and the text is cut with the token that makes a stop string whole
    before = decode(ids[: count - 1])
    if ends and not before.endswith("\ufffd"):
        assert not any(stop in before for stop in stops)


def test_a_text_that_goes_on_keeps_the_space_that_a_decoder_drops_in_front():
    words = ["▁the", "▁reef", "▁was", "ful"]
    model = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, words[0]))
    model.decoder = decoders.Metaspace()
    for before, said in (([0, 1], " was reefful"), ([], "was reefful")):
        stream = TextStream(model.decode, (), before)
        assert "".join(text for token in (2, 1, 3) for text in stream.add(token)) == said
    # where its characters are not whole yet, nothing is known of the text before
    assert TextStream(decode, (), [0, 7]).add(0) == ["a"]
