"""Questions with pictures, many at once under different adapters: each answer is the stack's own,
as the report measures it, one request at a time."""

import gc
import random
import time
import weakref
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch

from pipeline.errors import DataError
from pipeline.families.adapters.inference import Request
from pipeline.families.adapters.stack import AdapterStack
from pipeline.families.lora_vlm.base import open_base
from pipeline.serve.chat_engine import (
    ROUTER,
    ChatAdapters,
    ChatEngine,
    SteadyChat,
    _Media,
    _Seen,
)
from pipeline.serve.generation import BASE_READER, Capacity, Prompt, Sampling, Stats, Watcher
from pipeline.serve.messages import Turn
from pipeline.serve.pictures import DecodingRoom
from pipeline.serve.prompts import TaskPrompts
from pipeline.serve.rows import Order, QuestionRow
from pipeline.serve.steady.trial import is_steady
from tests import small_stack
from tests.small_stack import EXPERTS

READERS = (*EXPERTS, BASE_READER)


class SmallChat(ChatEngine):
    """An engine over a stack that no bundle holds."""

    def __init__(self, stack: AdapterStack, capacity: Capacity, network_of=ChatAdapters, room=None):
        self.stack = stack
        self.experts = EXPERTS
        self.readers = READERS
        self.context_tokens = 4096
        self.capacity = capacity
        self.stats = Stats()
        self.watcher = None
        self._serve(network_of(stack.model, READERS, room))

    def ask(self, request: Request, reader: str | None = None, client="", **sampling):
        """Have a request answered."""
        stack, media = self.stack, request.media
        prompt = Prompt(
            stack.prompt_ids(request.prompt, media),
            media,
            reader,
            stack.routing_ids(request.prompt, media),
        )
        how = Sampling(**{"max_tokens": None, "temperature": 0.0} | sampling)
        return self.submit(prompt, how, client)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random base."""
    torch.set_num_threads(1)
    return small_stack.built(tmp_path_factory.mktemp("base") / "base")


# Of some adapters, one reaches into the vision tower: what it makes of a picture is its own
TOWERS = {"language": None, "vision too": {"count": r".*(visual.*\.(qkv|proj)|\.q_proj)"}}


@pytest.fixture(scope="module", params=TOWERS)
def model(request, folder):
    """A base with adapters."""
    return small_stack.on(small_stack.opened(folder), TOWERS[request.param])


def text(generation) -> str:
    """Return what was said."""
    return "".join(piece.text for piece in generation.wait())


# fewer tokens than a picture has, so that it is read in parts; or a prompt at once
@pytest.mark.parametrize("prefill_tokens", [7, 64])
def test_answers_together_are_those_of_the_stack_alone(model, prefill_tokens):
    stack = small_stack.stack(model)
    requests = small_stack.requests(14, seed=prefill_tokens)
    draw = random.Random(prefill_tokens)
    readers = [draw.choice((None, *READERS)) for _ in requests]
    wanted = []
    for request, reader in zip(requests, readers, strict=True):
        wanted.append(stack.answer([request], expert=reader)[0])
    engine = SmallChat(stack, Capacity(rows=5, prefill_tokens=prefill_tokens))
    running = [engine.ask(*each) for each in zip(requests, readers, strict=True)]
    for generation in running:
        generation.wait()
    for request, reader, generation, answer in zip(requests, readers, running, wanted, strict=True):
        assert text(generation) == answer.text
        assert generation.wait()[-1].finish == answer.finish
        assert generation.reader == answer.expert
        assert generation.prompt_tokens == answer.prompt_tokens
        assert generation.completion_tokens == answer.completion_tokens
        if reader is None:
            choice = stack.route([request])[0]
            assert generation.choice.answered_by == choice.answered_by
            assert generation.choice.confidence == pytest.approx(choice.confidence, abs=1e-4)
    assert len({generation.reader for generation in running}) > 2
    assert engine.stats.failed == 0


def test_the_best_of_several_answers_is_told_as_the_stack_ranks_them(model):
    stack = small_stack.stack(model, threshold=1.0, top_k=2)
    engine = SmallChat(stack, Capacity(rows=4, prefill_tokens=32))
    ended = []
    engine.watcher = create_autospec(Watcher, instance=True)
    engine.watcher.ended.side_effect = lambda *told: ended.append(told)
    requests = small_stack.requests(6, seed=3)
    running = [engine.ask(request) for request in requests]
    left = engine.ask(requests[0])
    left.cancel()
    for generation in running:
        generation.wait()
    engine.close()
    # each once, however many answered it, and once it has an end
    assert sorted(map(id, (left, *running))) == sorted(id(told[0]) for told in ended)
    assert (left, "cancelled") in ended
    assert all(generation.times.ended for generation, _ in ended)
    several = 0
    for request, generation in zip(requests, running, strict=True):
        answer = stack.answer([request])[0]
        assert (text(generation), generation.reader) == (answer.text, answer.expert)
        assert generation.others == answer.others
        assert generation.completion_tokens == answer.completion_tokens
        several += len(answer.others)
    assert several > 2


def left_behind(engine, seed: int, leaves_after_s: float | None) -> weakref.ref:
    """Have a question answered, or given up after a while; return what knows its picture."""
    (picture,) = small_stack.pictures(1, seed)
    generation = engine.ask(Request("what color?", (picture,)))
    if leaves_after_s is None:
        generation.wait()
    else:
        time.sleep(leaves_after_s)
        generation.cancel()
    return weakref.ref(picture)


@pytest.mark.parametrize("threshold", [0.0, 1.0], ids=["one answers", "several answer"])
def test_pictures_go_with_what_was_asked_of_them(model, threshold):
    stack = small_stack.stack(model, threshold=threshold, top_k=2)
    engine = SmallChat(stack, Capacity(rows=4, prefill_tokens=32))
    # what knows itself is found now and then, and until then it is in memory
    gc.collect()
    gc.disable()
    try:
        for seed, seconds in enumerate((None, 0.0, 0.005, None, 0.01, 0.02, 0.04)):
            gone = left_behind(engine, seed, seconds)
            until = time.monotonic() + 10
            while gone() is not None:
                assert time.monotonic() < until, f"left after {seconds}"
                time.sleep(0.01)
    finally:
        gc.enable()
        engine.close()


def test_pictures_are_encoded_once_for_router_and_answers(folder):
    model = small_stack.mixed(folder)
    stack = small_stack.stack(model, threshold=1.0, top_k=3)
    engine = SmallChat(stack, Capacity(rows=4, prefill_tokens=7))
    seen = []
    hook = model.core.model.visual.register_forward_pre_hook(lambda *_: seen.append(1))
    try:
        pictures = tuple(small_stack.pictures(2))
        text(engine.ask(Request("what color?", pictures)))
    finally:
        hook.remove()
    assert len(seen) == 1


def test_pictures_of_several_requests_take_one_pass_of_the_tower(folder):
    model = small_stack.mixed(folder)
    stack = small_stack.stack(model)
    network = SmallChat(stack, Capacity()).network
    pictures = small_stack.pictures(5)
    # the same one in two requests, two in one, and none
    shown = [pictures[:1], pictures[:1], pictures[1:3], (), pictures[3:]]
    rows = []
    for each in shown:
        order = Order("", None, lambda: False, print)
        row = QuestionRow(order, stack.routing_ids("what color?", each), ROUTER, list)
        row.features = _Seen(_Media(tuple(each)))
        rows.append(row)
    alone = [model.encode_media(each) for each in shown]
    seen = []
    hook = model.core.model.visual.register_forward_pre_hook(lambda *_: seen.append(1))
    try:
        with torch.no_grad():
            network.prepare(rows)
            network.prepare(rows)
    finally:
        hook.remove()
    assert len(seen) == 1
    for row, wanted in zip(rows, alone, strict=True):
        for found, one in zip(row.features.encoded, wanted, strict=True):
            torch.testing.assert_close(found.embed_TD, one.embed_TD)


def test_what_a_client_shows_again_is_encoded_once_and_no_other_client_can_tell(
    folder, monkeypatch
):
    model = small_stack.mixed(folder)
    first, second, third = small_stack.pictures(3)
    asked = [
        ("ann", Request("what color?", (first,)), 1),
        ("ann", Request("how many?", (first.copy(), second)), 1),
        ("bob", Request("locate the square", (first.copy(),)), 1),
        ("bob", Request("what color?", (third, third.copy(), first.copy())), 1),
        ("ann", Request("what color?", (second.copy(), first.copy())), 0),
    ]
    stack = small_stack.stack(model)
    wanted = [stack.answer([request], expert="color")[0].text for _, request, _ in asked]
    room = DecodingRoom()
    engine = SmallChat(stack, Capacity(), room=room)
    seen = []
    encode = model.chat.media.encode

    def counted(core, prepared):
        seen.append(len(prepared[1]))
        return encode(core, prepared)

    monkeypatch.setattr(model.chat.media, "encode", counted)
    for (client, request, encoded), text_alone in zip(asked, wanted, strict=True):
        seen.clear()
        assert text(engine.ask(request, "color", client)) == text_alone
        assert sum(seen) == encoded
    # what a picture becomes: its own tokens, and again for a layer that takes them in
    sides = [each.size for each in (first, second, first, third)]
    tokens = sum(width * height // 32**2 for width, height in sides)
    assert room.kept_bytes == tokens * 64 * 2 * 4


def test_what_is_kept_makes_room_for_what_is_newer_and_for_pictures(monkeypatch):
    monkeypatch.setattr("pipeline.serve.pictures.FEATURE_BYTES", 100)
    room = DecodingRoom(150)
    for key in "abc":
        room.keep(key, key.upper(), 40)
    assert [room.kept(key) for key in "abc"] == [None, "B", "C"]
    assert room.kept("b") == "B"
    room.keep("d", "D", 40)
    room.keep("huge", "H", 101)
    assert [room.kept(key) for key in "bcd"] == ["B", None, "D"]
    with room.taken(100, until=time.monotonic()):
        assert room.kept_bytes == 40
        # all the rest is a picture's
        room.keep("e", "E", 60)
        assert room.kept("e") is None
        room.keep("f", "F", 50)
        assert room.kept_bytes == 50
    assert room.kept("f") == "F"


def test_who_asks_where_a_request_goes_is_told_what_the_stack_says(model):
    stack = small_stack.stack(model)
    engine = SmallChat(stack, Capacity(rows=2, prefill_tokens=7))
    requests = small_stack.requests(5, seed=9)
    asked = []
    for request in requests:
        ids = stack.routing_ids(request.prompt, request.media)
        own = stack.prompt_ids(request.prompt, request.media)
        asked.append(engine.route(Prompt(own, request.media, None, ids)))
    routes = [future.result() for future in asked]
    # only now: the stack's model is the engine's
    for wanted, route in zip(stack.route(requests), routes, strict=True):
        found = route.choice
        assert (found.expert, found.answered_by) == (wanted.expert, wanted.answered_by)
        assert dict(found.alternatives) == pytest.approx(dict(wanted.alternatives), abs=1e-4)


def test_a_seed_says_the_same_among_others(model):
    stack = small_stack.stack(model)
    engine = SmallChat(stack, Capacity(rows=4, prefill_tokens=16))

    def asked(seed: int, request: Request):
        return engine.ask(request, "locate", temperature=1.2, seed=seed)

    numbered = list(enumerate(small_stack.requests(6, seed=4)))
    running = [asked(*each) for each in numbered]
    together = [text(each) for each in running]
    assert together == [text(asked(*each)) for each in numbered]
    assert len(set(together)) > 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_bf16_every_answer_is_to_the_last_bit_what_it_is_alone(folder, dtype):
    """Its router's too, over pictures that are read in parts, whatever the base is held in."""
    base = SimpleNamespace(**vars(small_stack.BASE) | {"dtype": dtype})
    model = small_stack.on(open_base(folder, base), TOWERS["vision too"])
    assert ChatAdapters(model, READERS).dtype == {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    engine = SmallChat(small_stack.stack(model), Capacity(rows=5, prefill_tokens=7), SteadyChat)
    assert is_steady(engine.network, 4096, EXPERTS)
    draw = random.Random(6)
    asked = [(each, draw.choice((None, *READERS))) for each in small_stack.requests(9, seed=6)]
    how = {"temperature": 0.7, "seed": 2, "logprobs": 3}
    running = [engine.ask(*each, **how) for each in asked]
    together = [(each.wait(), each.choice) for each in running]
    for request, found in zip(asked, together, strict=True):
        alone = engine.ask(*request, **how)
        assert (alone.wait(), alone.choice) == found
    # and it is the stack's own, as far as bf16 goes
    stack = small_stack.stack(small_stack.on(small_stack.opened(folder), TOWERS["vision too"]))
    for (request, reader), (_, choice) in zip(asked, together, strict=True):
        if reader is None:
            wanted = dict(stack.route([request])[0].alternatives)
            assert dict(choice.alternatives) == pytest.approx(wanted, abs=0.05)


def test_a_prompt_of_tokens_has_none_of_a_picture(model):
    prompts = TaskPrompts(SmallChat(small_stack.stack(model), Capacity()))
    assert prompts.ids([1, 2], None).ids == (1, 2)
    with pytest.raises(DataError, match="stands for a picture"):
        prompts.ids([1, model.chat.media.placeholder_id], None)


def test_what_clients_ask_is_not_kept(model):
    prompts = TaskPrompts(SmallChat(small_stack.stack(model), Capacity()))
    kept = model.chat.prompt_ids.cache_info().currsize
    # how soon a long question is encoded would tell that it was asked before, by whomever
    prompt = prompts.text("what color? " * 9, None)
    assert prompts.text("what color? " * 9, None) == prompt
    prompts.ids(prompt.ids, None)
    assert model.chat.prompt_ids.cache_info().currsize == kept


def test_what_is_too_long_is_refused_before_it_is_looked_through(model, monkeypatch):
    prompts = TaskPrompts(SmallChat(small_stack.stack(model), Capacity()))

    def look(*_given):
        raise AssertionError("it was looked through")

    monkeypatch.setattr("pipeline.serve.prompts.without_placeholders", look)
    monkeypatch.setattr(prompts, "decode", look)
    long = Turn("user", "<image1>" * 2000, ("data:,",))
    with pytest.raises(DataError, match=r"16,000 characters; at most 8,000 are taken"):
        prompts.chat([long], None, goes_on=False, seconds=1)
    with pytest.raises(DataError, match=r"5,000 tokens, the maximum input length is 4,096"):
        prompts.ids([1] * 5000, None)
