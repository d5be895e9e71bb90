"""A prompt told with its tokens' probabilities, as those who measure a model ask for it."""

import random

import pytest
import torch

from pipeline.errors import DataError
from pipeline.serve.generation import Prompt, Sampling
from tests.small_engines import CONTEXT, END, KINDS, STEADY, said

# More than a step reads, less than that, and one token
LENGTHS = (40, 11, 1)


@pytest.fixture(scope="module", params=KINDS)
def small(request):
    """One kind of engine with what computes the same alone."""
    torch.set_num_threads(1)
    return KINDS[request.param]()


def echoed(count: int, **changes) -> Sampling:
    """Return how a text is told with so many tokens after it."""
    return Sampling(count, 0.0, logprobs=2, echoes=True, **changes)


def test_probabilities_are_those_of_a_plain_model_for_each_reader(small):
    """All are read at once, in pieces, beside texts that go on."""
    draw, engine = random.Random(3), small.engine
    running = []
    for reader in (None, *engine.readers):
        for length in LENGTHS:
            ids = tuple(draw.randrange(END) for _ in range(length))
            running.append(engine.submit(Prompt(ids, reader=reader), echoed(draw.choice((0, 3)))))
            running.append(engine.submit(Prompt(ids, reader=reader), Sampling(3, 0.0, logprobs=2)))
    for generation in running:
        generation.wait()
    for generation, plain in zip(running[::2], running[1::2], strict=True):
        *told, last = generation.wait()
        ids = [piece.token.id for piece in told]
        count = len(generation.prompt.ids)
        assert tuple(ids[:count]) == generation.prompt.ids
        assert (told[0].logprob, told[0].likeliest) == (None, ())
        nats_TV = small.alone(ids, generation.reader).log_softmax(-1)
        for piece, nats_V in zip(told[1:], nats_TV, strict=False):
            assert piece.logprob == pytest.approx(nats_V[piece.token.id].item(), abs=1e-3)
            assert [nats for _, nats in piece.likeliest] == pytest.approx(
                nats_V.topk(2).values.tolist(), abs=1e-3
            )
        assert "".join(piece.text for piece in told) == "".join(said(token) for token in ids)
        # what is drawn is what is drawn without it, of as many as were asked for
        wanted = generation.sampling.max_tokens
        assert ids[count:] == [t.id for t in plain.tokens[:wanted]]
        assert generation.completion_tokens == (plain.completion_tokens if wanted else 0)
        assert last.finish == (plain.wait()[-1].finish if wanted else "length")


def test_its_tokens_tell_who_read_them(small):
    engine = small.engine
    for reader in (None, *engine.readers):
        prompt = Prompt(tuple(range(30)), reader=reader)
        told = engine.submit(prompt, echoed(2)).wait()
        read = engine.route(prompt).result().tokens
        for piece, token in zip(told, read, strict=False):
            assert piece.token == token


def test_without_probabilities_it_is_the_prompt_alone(small):
    prompt = Prompt(tuple(range(20)))
    told = small.engine.submit(prompt, Sampling(0, echoes=True)).wait()
    assert [piece.token.id for piece in told[:-1]] == list(prompt.ids)
    assert {piece.logprob for piece in told} == {None}


def test_a_prompt_may_be_as_long_as_the_context(small):
    """Where nothing is drawn; a stop string ends what is drawn and not the prompt."""
    engine = small.engine
    whole = Prompt(tuple(token % END for token in range(CONTEXT)))
    *told, last = engine.submit(whole, echoed(0, stop=(said(5),))).wait()
    assert len(told) == CONTEXT and last.finish == "length"
    assert all(piece.logprob is not None for piece in told[1:])
    with pytest.raises(DataError, match="over the context of 96"):
        engine.submit(whole, echoed(1))


@pytest.mark.parametrize("made", [*KINDS.values(), *STEADY.values()])
def test_a_token_has_the_probability_that_it_was_drawn_with(made):
    """Whoever is read beside it; in bf16 too, where passes of other lengths round otherwise."""
    engine = made().engine
    near = 0.02 if engine.network.dtype == "bf16" else 1e-4
    for reader in (None, *engine.readers):
        prompt = Prompt((3, 1, 4, 1, 5, 9, 2, 6), reader=reader)
        *drawn, _ = engine.submit(prompt, Sampling(12, 1.0, seed=3, logprobs=3)).wait()
        whole = Prompt((*prompt.ids, *[piece.token.id for piece in drawn]), reader=reader)
        beside = engine.submit(Prompt(tuple(range(50))), Sampling(9, 0.0))
        told = engine.submit(whole, echoed(0)).wait()[len(prompt.ids) : -1]
        beside.wait()
        for first, then in zip(drawn, told, strict=True):
            assert then.logprob == pytest.approx(first.logprob, abs=near)
