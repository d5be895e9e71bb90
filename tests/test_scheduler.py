"""Many texts at once: each is what it is alone, whoever comes, leaves or fails beside it.

T tokens, V vocabulary.
"""

import asyncio
import gc
import math
import random
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import aclosing, contextmanager, suppress
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.errors import DataError
from pipeline.protocols import Abandoned
from pipeline.serve.generation import (
    BASE_READER,
    Capacity,
    Generation,
    NoSuchReader,
    Overloaded,
    Prompt,
    Sampling,
    Stats,
)
from pipeline.serve.leaving import EventStream
from pipeline.serve.metrics import Metrics
from pipeline.serve.scheduler import Scheduler
from pipeline.serve.slot_cache import SlotLayer
from pipeline.serve.streaming import merged
from pipeline.serve.waiting_line import WaitingLine, has_room, most_of_one
from tests import small_engines
from tests.small_engines import CONTEXT, END, KINDS, NAMES, VOCAB, SmallEngine, said

POISON = 3e4  # of what stands in a slot that nobody wrote to


@pytest.fixture(scope="module", params=KINDS)
def small(request):
    """One kind of engine with what computes the same alone."""
    torch.set_num_threads(1)
    return KINDS[request.param]()


@pytest.fixture(scope="module")
def engine():
    """An engine of full experts."""
    return small_engines.stock().engine


@pytest.fixture
def poisoned(monkeypatch):
    """Slots that hold large numbers where nothing was written, as a former text would leave."""
    empty = SlotLayer._empty
    monkeypatch.setattr(SlotLayer, "_empty", lambda self, like: empty(self, like).fill_(POISON))


def asked(draw: random.Random, readers) -> tuple[Prompt, Sampling]:
    """Return a random request."""
    ids = tuple(draw.randrange(END) for _ in range(draw.choice((1, 2, 5, 11, 30, 60))))
    reader = draw.choice((None, None, *readers))
    stop = draw.choice(((), (), ("ea",), ("hhb", "cgd")))
    echoes = draw.random() < 0.2
    sampling = Sampling(
        max_tokens=draw.choice((1, 2, 7, 20, 0 if echoes else None)),
        echoes=echoes,
        temperature=draw.choice((0.0, 0.0, 0.8, 2.0)),
        top_p=draw.choice((1.0, 0.7)),
        top_k=draw.choice((0, 0, 5)),
        min_p=draw.choice((0.0, 0.05)),
        seed=draw.randrange(100),
        stop=stop,
        presence_penalty=draw.choice((0.0, 0.5)),
        frequency_penalty=draw.choice((0.0, 0.3)),
        logit_bias=draw.choice(({}, {draw.randrange(VOCAB): 4.0})),
        logprobs=draw.choice((None, 0, 3)),
    )
    return Prompt(ids, reader=reader), sampling


def told(generation: Generation) -> list[tuple]:
    """Return all that a text tells, probabilities as far as batches of other sizes agree."""
    out = []
    for piece in generation.wait():
        token = piece.token
        nats = None if piece.logprob is None else pytest.approx(piece.logprob, abs=1e-4)
        experts = token and (token.id, token.text, tuple(map(tuple, token.experts)))
        out.append((piece.text, piece.finish, nats, len(piece.likeliest), experts))
    return [*out, (generation.completion_tokens, generation.reader)]


def numbers(told_of_it: list[tuple]) -> list[tuple]:
    """Return the same with plain numbers, to be held against it."""
    out = []
    for piece in told_of_it:
        out.append(tuple(getattr(value, "expected", value) for value in piece))
    return out


def test_every_text_among_others_is_what_it_is_alone(small, poisoned):
    """Of random lengths, readers, samplings, arrivals and cancellations, over rows that are used
    again and again."""
    draw, engine = random.Random(11), small.engine
    requests = [asked(draw, engine.readers) for _ in range(18)]
    running = []
    for prompt, sampling in requests:
        running.append(engine.submit(prompt, sampling, draw.choice("ab")))
        if draw.random() < 0.3:
            time.sleep(0.02)
        if draw.random() < 0.3:
            draw.choice(running).cancel()
    together = []
    for generation in running:
        with suppress(Abandoned):
            together.append((generation, told(generation)))
    assert len(together) > 6
    for generation, found in together:
        alone = told(engine.submit(generation.prompt, generation.sampling))
        assert found == numbers(alone)
    assert engine.stats.running == engine.stats.waiting == engine.stats.failed == 0


def test_greedy_texts_together_are_those_of_a_plain_model(small):
    """The reference has no cache, no batch and, of one reader, no gates."""
    draw, engine = random.Random(5), small.engine
    running = []
    for reader in (None, *engine.readers) * 2:
        ids = tuple(draw.randrange(END) for _ in range(draw.randrange(1, 40)))
        running.append(engine.submit(Prompt(ids, reader=reader), Sampling(9, 0.0, logprobs=2)))
    for generation in running:
        generation.wait()
    # only now: the reference is the same network
    for generation in running:
        pieces = generation.wait()
        ids = list(generation.prompt.ids)
        reader = generation.prompt.reader
        if generation.choice:
            reader = generation.reader
            assert reader == engine.stack.choice(ids).name
        spoken = [piece.token.id for piece in pieces if piece.token]
        assert spoken == small.greedy(ids, reader, 9)
        nats_TV = small.alone([*ids, *spoken], reader)[len(ids) - 1 :].log_softmax(-1)
        for piece, nats_V in zip(pieces, nats_TV, strict=False):
            if piece.token:
                assert piece.logprob == pytest.approx(nats_V[piece.token.id].item(), abs=1e-3)
                assert [token for token, _ in piece.likeliest] == nats_V.topk(2).indices.tolist()


def test_a_token_tells_who_spoke_it(small):
    engine = small.engine
    ids = (3, 1, 4, 1, 5)
    for reader in (None, *engine.readers):
        generation = engine.submit(Prompt(ids, reader=reader), Sampling(6, 0.0))
        tokens = [piece.token for piece in generation.wait() if piece.token]
        prompt = Prompt((*ids, *(token.id for token in tokens)), reader=reader)
        read = engine.route(prompt).result().tokens
        # a token was chosen where the one before it was read
        assert [t.experts for t in tokens] == [t.experts for t in read[len(ids) - 1 : -1]]
        assert "".join(t.text for t in read) == "".join(said(token) for token in prompt.ids)
        if reader is not None:
            names = {engine.speakers[e] for t in tokens for layer in t.experts for e in layer}
            assert names <= {reader}


def test_a_long_prompt_does_not_keep_a_short_one_from_beginning(engine):
    """Read in pieces of twelve tokens, it has its first token in the ninth pass; the other in one
    of the first."""
    long = engine.submit(Prompt((7,) * 90), Sampling(1))
    short = engine.submit(Prompt((5, 6)), Sampling(1))
    long.wait()
    short.wait()
    assert short.times.first < long.times.first


@pytest.mark.parametrize("made", [small_engines.unmerged, small_engines.steady])
def test_a_models_size_is_that_of_all_its_experts(made):
    engine = made().engine
    network = engine.network
    config = network.model.config
    dense = AutoModelForCausalLM.from_config(config)
    whole = sum(each.numel() for each in dense.parameters())
    # two factors of rank 4 for each of three matrices
    deltas = 3 * 4 * (config.hidden_size + config.intermediate_size) * config.num_hidden_layers
    assert network.parameters == whole + len(small_engines.NAMES) * deltas
    assert engine.stats.prefill_tokens == small_engines.SMALL.prefill_tokens
    assert Scheduler(network, Capacity(), Stats()).prefill_tokens == 2048


def test_who_cannot_read_is_named_with_those_who_can(engine):
    with pytest.raises(NoSuchReader, match="there is no 'oak'; there are ash, birch, cedar"):
        engine.submit(Prompt((1,), reader="oak"), Sampling())
    with pytest.raises(NoSuchReader, match="full experts without the base's own network"):
        engine.submit(Prompt((1,), reader=BASE_READER), Sampling())
    for prompt, sampling, said_of_it in (
        (Prompt(()), Sampling(), "no token to go on from"),
        (Prompt((VOCAB,)), Sampling(), "97 is no token"),
        (Prompt((1,)), Sampling(logit_bias={-1: 1.0}), "-1 is no token"),
        (Prompt((1,) * CONTEXT), Sampling(None), "over the context of 96"),
    ):
        with pytest.raises(DataError, match=said_of_it):
            engine.submit(prompt, sampling)


@contextmanager
def stepping(engine):
    """Have every pass wait to be let go; yields what lets one go, and the tokens of each pass."""
    permits, passes = threading.Semaphore(0), []

    def wait(_model, _given, keywords):
        passes.append(keywords["input_ids"].tolist())
        assert permits.acquire(timeout=60)

    hook = engine.model.base_model.register_forward_pre_hook(wait, with_kwargs=True)
    try:
        yield permits, passes
    finally:
        hook.remove()
        permits.release(10_000)


def wait_for(condition) -> None:
    """Wait until something holds."""
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.002)


def one_row(**changes) -> SmallEngine:
    """Return an engine that runs one text at a time."""
    made = small_engines.stock()
    capacity = Capacity(rows=1, prefill_tokens=12, **changes)
    return SmallEngine(made.engine.network, NAMES, capacity)


def test_who_leaves_frees_the_row_before_the_next_pass():
    engine = one_row()
    with stepping(engine) as (permits, passes):
        first = engine.submit(Prompt((1, 2, 3)), Sampling(50, 0.0))
        second = engine.submit(Prompt((4, 5)), Sampling(2, 0.0))
        permits.release(2)
        wait_for(lambda: len(passes) == 3)
        first.cancel()
        permits.release()
        wait_for(lambda: len(passes) == 4)
        assert passes[3] == [[4, 5]]
        permits.release(2)
        assert second.wait()[-1].finish == "length"
    assert first.completion_tokens == 2
    assert engine.stats.cancelled == 1
    with pytest.raises(Abandoned):
        first.wait()


def test_who_waits_and_leaves_is_never_run():
    engine = one_row()
    with stepping(engine) as (permits, passes):
        first = engine.submit(Prompt((1, 2, 3)), Sampling(3, 0.0))
        waiting = engine.submit(Prompt((4, 5)), Sampling(2, 0.0))
        route = engine.route(Prompt((6, 7)))
        wait_for(lambda: len(passes) == 1)
        waiting.cancel()
        assert route.cancel()
        permits.release(3)
        first.wait()
        wait_for(lambda: engine.stats.waiting == 0 and engine.stats.running == 0)
    assert len(passes) == 3


def test_past_the_line_a_request_is_refused_at_once():
    engine = one_row(waiting=2)
    with stepping(engine) as (permits, passes):
        taken = [engine.submit(Prompt((1,)), Sampling(1))]
        wait_for(lambda: len(passes) == 1)
        taken += [engine.submit(Prompt((1,)), Sampling(1)) for _ in range(2)]
        with pytest.raises(Overloaded, match="2 requests are waiting") as error:
            engine.submit(Prompt((1,)), Sampling(1))
        assert error.value.waiting == 2
        permits.release(3)
        assert [each.wait()[-1].finish for each in taken] == ["length"] * 3
    assert engine.stats.refused == 1


def test_a_client_with_many_waits_behind_one_with_few():
    engine = one_row()
    with stepping(engine) as (permits, passes):
        running = [engine.submit(Prompt((at,)), Sampling(1), "many") for at in range(3)]
        wait_for(lambda: len(passes) == 1)
        running.append(engine.submit(Prompt((9,)), Sampling(1), "few"))
        permits.release(4)
        for each in running:
            each.wait()
    # a row is free when the next is chosen, so that both have none: they take turns
    assert [row[0] for row in passes] == [[0], [1], [9], [2]]
    line = WaitingLine()
    for number, client in enumerate("aaabab"):
        line.add(_Waiting(number, client))
    order, runs = [], {"a": 1}
    while (each := line.first(runs)) is not None:
        line.remove(each)
        runs[each.client] = runs.get(each.client, 0) + 1
        order.append(each.number)
    assert order == [3, 0, 5, 1, 2, 4]
    assert len(line) == 0


def test_a_client_that_fills_the_line_leaves_a_place_for_who_has_none():
    engine = one_row(waiting=8)
    with stepping(engine) as (permits, passes):
        taken = [engine.submit(Prompt((0,)), Sampling(1), "greedy")]
        wait_for(lambda: len(passes) == 1)
        taken += [engine.submit(Prompt((1,)), Sampling(1), "greedy") for _ in range(6)]
        with pytest.raises(Overloaded, match="6 .* of this client, and the places left are for"):
            engine.submit(Prompt((1,)), Sampling(1), "greedy")
        taken.append(engine.submit(Prompt((2,)), Sampling(1), "late"))
        permits.release(8)
        for each in taken:
            each.wait()
    assert [row[0] for row in passes].index([2]) == 2


@pytest.mark.parametrize("room", [1, 2, 3, 8, 256])
def test_greedy_clients_leave_a_place_for_one_that_has_nothing_waiting(room):
    """Each takes all that it gets, one after another: a quarter of what is left stays."""
    draw = random.Random(room)
    taken = dict.fromkeys(range(6), 0)
    for client in range(int(math.log(room, 4))):
        while has_room(taken[client], sum(taken.values()), room):
            taken[client] += 1
    assert has_room(0, sum(taken.values()), room)
    alone = 0
    while has_room(alone, alone, room):
        alone += 1
    assert alone == most_of_one(room) >= 0.75 * room
    # whoever comes and goes: what is full for one that has none is full for everybody
    for _ in range(200):
        client = draw.choice(list(taken))
        total = sum(taken.values())
        if draw.random() < 0.4 and taken[client]:
            taken[client] -= 1
        elif has_room(taken[client], total, room):
            taken[client] += 1
            assert total < room
        else:
            assert taken[client] or total == room


class _Waiting:
    def __init__(self, number, client):
        self.number = number
        self.client = client


def test_an_error_ends_the_text_that_it_concerns_and_no_other(small):
    """In passes that fail wherever one token is among their rows, whatever else is."""
    engine, bad = small.engine, 13
    draw = random.Random(7)

    def fail(_model, _given, keywords):
        if (keywords["input_ids"] == bad).any():
            raise RuntimeError("a token that cannot be read")

    requests = []
    for number in range(9):
        ids = [draw.randrange(20, END) for _ in range(draw.randrange(2, 30))]
        if number % 3 == 0:
            ids[draw.randrange(1, len(ids))] = bad
        # nobody draws it
        sampling = Sampling(6, 1.0, seed=number, logit_bias={bad: -100.0})
        requests.append((Prompt(tuple(ids), reader=draw.choice(engine.readers)), sampling))
    models = [each.model.base_model for each in (engine.network, engine.network.beside) if each]
    hooks = [model.register_forward_pre_hook(fail, with_kwargs=True) for model in models]
    try:
        running = [engine.submit(*request) for request in requests]
        for number, generation in enumerate(running):
            if number % 3 == 0:
                with pytest.raises(RuntimeError, match="cannot be read"):
                    generation.wait()
        found = [told(each) for number, each in enumerate(running) if number % 3]
    finally:
        for hook in hooks:
            hook.remove()
    wanted = [told(engine.submit(*each)) for number, each in enumerate(requests) if number % 3]
    assert found == list(map(numbers, wanted))


def test_a_text_goes_on_past_its_end_where_that_is_asked(small):
    """As who measures speed asks; what comes before is as it was."""
    engine = small.engine
    prompt = Prompt((3, 1, 4), reader=engine.readers[0])
    ends = Sampling(6, 0.0, logit_bias={END: 1000.0})
    (last,) = engine.submit(prompt, ends).wait()
    assert last.finish == "stop"
    *past, last = engine.submit(prompt, replace(ends, past_end=True)).wait()
    assert [piece.token.id for piece in past] == [END] * 6 and last.finish == "length"
    never = Sampling(6, 0.0, logit_bias={END: -1000.0})
    assert told(engine.submit(prompt, replace(never, past_end=True))) == numbers(
        told(engine.submit(prompt, never))
    )


@pytest.mark.parametrize("echoes", [False, True])
def test_a_text_that_is_no_numbers_leaves_none_behind(small, echoes):
    """In the slots of three such texts others go on, beside a longer one."""
    engine, bad = small.engine, 13
    reader = engine.readers[0]

    def spoil(_module, given, x_BTD):
        return x_BTD.masked_fill((given[0] == bad).unsqueeze(-1), float("nan"))

    how = Sampling(None, 0.0, logit_bias={END: -100.0, bad: -100.0})
    asked_for = [Prompt((3, 1, 4), reader=reader)]
    asked_for += [Prompt((7,) * 29 + (bad,), reader=reader)] * 3
    asked_for += [Prompt((9, at), reader=reader) for at in range(3)]
    hook = engine.network.model.base_model.embed_tokens.register_forward_hook(spoil)
    try:
        bad_how = replace(how, echoes=echoes, logprobs=1 if echoes else None)
        running = []
        for number, prompt in enumerate(asked_for):
            running.append(engine.submit(prompt, bad_how if 0 < number < 4 else how))
        for each in running[1:4]:
            with pytest.raises(ArithmeticError):
                each.wait()
        others = [running[0], *running[4:]]
        found = [told(each) for each in others]
    finally:
        hook.remove()
    assert found == [numbers(told(engine.submit(each.prompt, how))) for each in others]


def test_an_error_in_drawing_or_decoding_is_of_one_text_too(engine, monkeypatch):
    decode = engine._decode
    wanted = told(engine.submit(Prompt((1, 2)), Sampling(8, 0.0)))

    def fail(ids: list[int]) -> str:
        if 50 in ids:
            raise ValueError("no text")
        return decode(ids)

    monkeypatch.setattr(engine, "_decode", fail)
    always = Sampling(8, 0.0, logit_bias={50: 1000.0})
    never = Sampling(8, 1.0, logit_bias={token: float("nan") for token in range(VOCAB)})
    running = [engine.submit(Prompt((1, 2)), each) for each in (always, never, Sampling(8, 0.0))]
    with pytest.raises(ValueError, match="no text"):
        running[0].wait()
    with pytest.raises(Exception, match=r".") as error:
        running[1].wait()
    assert not isinstance(error.value, Abandoned)
    if 50 not in [experts[0] for *_, experts in wanted[:-1] if experts]:
        assert told(running[2]) == numbers(wanted)


def test_time_ends_a_text_where_it_is(engine):
    def slow(*_):
        time.sleep(0.05)

    hook = engine.model.base_model.register_forward_pre_hook(slow)
    try:
        late = engine.submit(Prompt((1, 2)), Sampling(60, 0.0, seconds=0.0))
        with pytest.raises(TimeoutError, match="before it was its turn"):
            late.wait()
        cut = engine.submit(Prompt((1, 2)), Sampling(60, 0.0, seconds=0.4))
        assert cut.wait()[-1].finish == "length"
    finally:
        hook.remove()
    assert 0 < cut.completion_tokens < 10
    assert cut.times.between("asked", "ended") < 5


def test_a_text_whose_time_is_over_while_it_is_read_ends_no_other():
    engine = SmallEngine(small_engines.stock().engine.network, NAMES)
    metrics = Metrics()
    metrics.follow(engine)
    with stepping(engine) as (permits, passes):
        other = engine.submit(Prompt((1, 2)), Sampling(9, 0.0))
        late = engine.submit(Prompt((3,) * 60), Sampling(9, 0.0, seconds=1000.0))
        permits.release(4)
        # a part of it has been read, and no token is drawn
        wait_for(lambda: len(passes) == 5)
        (row,) = [row for row in engine.scheduler._rows if len(row.ids) == 60]
        row.order = replace(row.order, until=0.0)
        permits.release(100)
        assert other.wait()[-1].finish == "length"
        with pytest.raises(TimeoutError, match="before it was its turn"):
            late.wait()
    assert 0 < row.read < 60
    assert engine.stats.failed == 1
    shown = metrics.shown("")[0].decode()
    assert 'requests_ended_total{finished_reason="failed"} 1.0' in shown
    assert 'requests_ended_total{finished_reason="length"} 1.0' in shown


def test_a_client_that_leaves_as_its_text_ends_is_counted_and_no_fault():
    engine = one_row()
    Metrics().follow(engine)
    left = Generation(Prompt((1,)), Sampling())
    left.cancel()
    engine.watcher.ended(left, "stop")
    assert engine.submit(Prompt((1,)), Sampling(1, 0.0)).wait()[-1].finish == "length"


async def heard(generation: Generation) -> str:
    """Read a text as the endpoint does, and return what ends it."""
    try:
        async for _ in generation.pieces():
            pass
    except Exception as told:
        return str(told)
    return ""


async def streamed(generation: Generation) -> str:
    """Read it as a stream of events does."""
    try:
        async with aclosing(merged([generation])) as pieces:
            async for _ in pieces:
                pass
    except Exception as told:
        return str(told)
    return ""


def read_in_a_thread(read) -> Callable[[Generation], str]:
    """The same for what waits in a thread."""

    def words(generation: Generation) -> str:
        try:
            read(generation)
        except Exception as told:
            return str(told)
        return ""

    return words


def ended(make) -> Generation:
    """A text that ended as the scheduler ends it: with an error whose frames know it."""
    generation = Generation(Prompt((1,)), Sampling())
    try:
        raise make()
    except Exception as error:
        generation.fail(error)
    return generation


ERRORS = {
    "Abandoned": lambda: Abandoned("nobody waits"),
    "Overloaded": lambda: Overloaded(3, closing=True),
    "NoSuchReader": lambda: NoSuchReader("math", ["code"], "it is another"),
    "OSError": lambda: OSError(28, "No space left on device"),
    "KeyError": lambda: KeyError("x"),
    "UnicodeDecodeError": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no start byte"),
}


@pytest.mark.parametrize(
    "read",
    [
        lambda generation: asyncio.run(heard(generation)),
        lambda generation: asyncio.run(streamed(generation)),
        read_in_a_thread(lambda generation: list(generation.follow())),
        read_in_a_thread(Generation.wait),
    ],
    ids=["pieces", "merged", "follow", "wait"],
)
@pytest.mark.parametrize("name", ERRORS)
def test_an_error_that_was_told_keeps_no_text_alive(read, name):
    # what knows itself is found now and then, and until then its pictures are in memory
    gc.collect()
    gc.disable()
    try:
        generation = ended(ERRORS[name])
        gone = weakref.ref(generation)
        for _ in range(2):
            assert str(ERRORS[name]()) in read(generation)
        del generation
        assert gone() is None
    finally:
        gc.enable()


async def closed_under(generation: Generation) -> None:
    """Tell a text into a socket that is closed."""

    async def events():
        async for _ in merged([generation]):
            yield b"data: \n\n"

    async def send(_message):
        raise OSError("it is closed")

    await EventStream(events(), [generation])({"type": "http"}, asyncio.Event().wait, send)


def test_a_socket_that_closes_under_a_stream_keeps_no_text_alive():
    gc.collect()
    gc.disable()
    try:
        generation = Generation(Prompt((1,)), Sampling())
        gone = weakref.ref(generation)
        asyncio.run(closed_under(generation))
        assert generation.cancelled
        del generation
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["Abandoned", "Overloaded", "NoSuchReader", "OSError", "KeyError"])
def test_an_error_is_told_as_it_was_as_often_as_asked(name):
    error = ERRORS[name]()
    generation = ended(ERRORS[name])
    for _ in range(2):
        with pytest.raises(type(error)) as told:
            generation.wait()
        assert (str(told.value), vars(told.value)) == (str(error), vars(error))


def test_closing_ends_what_was_begun_and_takes_on_nothing():
    engine = one_row()
    running = [engine.submit(Prompt((at, 2)), Sampling(5, 0.0)) for at in range(4)]
    engine.close()
    assert [each.wait()[-1].finish for each in running] == ["length"] * 4
    with pytest.raises(Overloaded, match="is shutting down") as error:
        engine.submit(Prompt((1,)), Sampling())
    assert error.value.closing


def test_closing_in_a_hurry_ends_the_rest_with_an_error():
    engine = one_row()
    with stepping(engine) as (permits, passes):
        running = [engine.submit(Prompt((at, 2)), Sampling(5, 0.0)) for at in range(3)]
        wait_for(lambda: passes)
        threading.Timer(0.3, permits.release, (100,)).start()
        engine.close(0.05)
    for each in running:
        with pytest.raises(Overloaded):
            each.wait()


def test_pieces_are_read_as_they_come_and_who_stops_gives_the_text_up(engine):
    async def read() -> tuple[list, Generation]:
        whole = engine.submit(Prompt((1, 2)), Sampling(9, 0.0))
        pieces = [piece async for piece in whole.pieces()]
        assert pieces == whole.wait()
        left = engine.submit(Prompt((1, 2)), Sampling(90, 0.0))
        stream = left.pieces()
        await anext(stream)
        await stream.aclose()
        cancelled = engine.submit(Prompt((1, 2)), Sampling(90, 0.0))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(_last(cancelled), 0.001)
        return pieces, left, cancelled

    pieces, *given_up = asyncio.run(read())
    assert [piece.finish for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    for each in given_up:
        assert each.cancelled
        with pytest.raises(Abandoned):
            each.wait()


async def _last(generation: Generation):
    return [piece async for piece in generation.pieces()][-1]


def test_texts_that_do_not_fit_together_run_one_after_another(monkeypatch):
    """Keys and values of two of these are more than the bound allows."""
    made = small_engines.stock()
    place = made.engine.network.place_bytes
    capacity = Capacity(rows=4, prefill_tokens=96, cache_bytes=200 * place)
    engine = SmallEngine(made.engine.network, NAMES, capacity)
    largest = []
    step = engine.scheduler._step

    def watched() -> int:
        largest.append(len(engine.scheduler._rows))
        cache = engine.network.cache
        assert cache.slots * cache.places <= 200
        return step()

    monkeypatch.setattr(engine.scheduler, "_step", watched)
    long = [engine.submit(Prompt((at,) * 70), Sampling(20, 0.0)) for at in range(3)]
    for each in long:
        each.wait()
    assert max(largest) == 1
