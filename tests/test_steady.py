"""Stacks in bf16: each text is, to the last bit, what it is alone.

N rows, D width in, F width out.
"""

import gc
import logging
import random
import weakref

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.serve import engine, scheduler
from pipeline.serve.engine import CompletionEngine
from pipeline.serve.gates import FREE, GateChoice, GateHearing
from pipeline.serve.generation import Prompt, Sampling
from pipeline.serve.networks import Chunk, StockMixture
from pipeline.serve.opening import open_model
from pipeline.serve.rows import ServedRow
from pipeline.serve.slot_cache import SlotCache
from pipeline.serve.steady import network as steady_network
from pipeline.serve.steady import products
from pipeline.serve.steady.mixture import SteadyMixture
from pipeline.serve.steady.products import (
    RowCounts,
    SteadyProducts,
    elementwise,
    silu,
    silu_,
    tried,
)
from pipeline.serve.steady.trial import is_steady
from tests import test_scheduler
from tests.small_engines import CONTEXT, END, STEADY, steady
from tests.small_server import until
from tests.test_scheduler import asked, numbers, told

BF16 = torch.bfloat16
poisoned = test_scheduler.poisoned  # a fixture


@pytest.fixture(scope="module", params=STEADY)
def small(request):
    """One kind of stack in bf16 with what computes the same alone in fp32."""
    torch.set_num_threads(1)
    made = STEADY[request.param]()
    assert is_steady(made.engine.network, CONTEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "LINGER_S", 0.1)
        yield made


def let_go(engine):
    """Return an engine's network once its thread has ended, which clears the cache as it goes."""
    until(lambda: engine.scheduler._thread is None)
    return engine.network


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("shape", [(96, 64), (4, 96), (97, 4)])
def test_a_row_of_a_product_has_the_same_bits_in_any_company(dtype, shape):
    torch.manual_seed(0)
    weight_FD = torch.randn(shape).to(dtype)
    x_ND = torch.randn(150, shape[1])
    multiply = SteadyProducts()
    whole_NF = multiply(x_ND, weight_FD)
    expected_NF = x_ND.to(dtype).double() @ weight_FD.double().T
    torch.testing.assert_close(whole_NF.double(), expected_NF, rtol=1e-2, atol=1e-2)
    for rows in (1, 2, 3, 5, 9, 17, 40, 64, 65, 149):
        for start in (0, 1, 150 - rows):
            own = slice(start, start + rows)
            assert torch.equal(multiply(x_ND[own], weight_FD), whole_NF[own])


def test_numbers_of_rows_that_round_otherwise_do_not_go_together(monkeypatch):
    """A library that adds something from eight rows on, and of 64 rows to each another."""
    linear = products.F.linear

    def other(x_ND, weight_FD):
        more = float(len(x_ND) >= 8) + torch.arange(len(x_ND)).unsqueeze(1) * (len(x_ND) == 64)
        return linear(x_ND, weight_FD) + more

    monkeypatch.setattr(products.F, "linear", other)
    counts = tried(torch.zeros(3, 6))
    assert counts == RowCounts((8, 16, 32))
    parts = [(own.start, own.stop, filled) for own, filled in counts.parts(75)]
    assert parts == [(0, 32, 32), (32, 64, 32), (64, 75, 16)]
    assert list(counts.parts(0)) == []
    monkeypatch.setattr(products.F, "linear", lambda x_ND, _: x_ND.cumsum(0))
    # nobody but a row alone is at the same place everywhere
    assert tried(torch.zeros(6, 6)) == RowCounts((1,))


def test_many_numbers_go_through_the_same_instructions(monkeypatch):
    x_ND = torch.randn(100, 8)
    monkeypatch.setattr(products, "SERIAL_NUMBERS", 100)
    sizes = []

    def doubled(part_ND):
        sizes.append(part_ND.numel())
        return 2 * part_ND

    assert torch.equal(elementwise(doubled, x_ND), 2 * x_ND)
    assert max(sizes) < 100


@pytest.mark.parametrize("width", [1, 31, 48, 64, 100])
def test_no_number_is_left_over_for_other_instructions(monkeypatch, width):
    """In place of torch's own a function that is another for numbers that fill no vector."""
    torch.manual_seed(0)
    x_ND = torch.randn(5, width)
    for rows in (1, 2, 5):
        assert torch.equal(silu(x_ND)[:rows], silu(x_ND[:rows]))
    torch.testing.assert_close(silu(x_ND), x_ND.sigmoid() * x_ND)
    whole_ND = silu(x_ND)
    assert silu_(x_ND).data_ptr() == x_ND.data_ptr() and torch.equal(x_ND, whole_ND)

    def other(part, inplace=False):
        alike = part.numel() // 32 * 32
        done = torch.where(torch.arange(part.numel()).view_as(part) < alike, part, 0.0)
        return part.copy_(done) if inplace else done

    assert torch.equal(elementwise(other, x_ND), x_ND)
    monkeypatch.setattr(products.F, "silu", other)
    assert torch.equal(silu(x_ND), x_ND)
    assert torch.equal(silu_(x_ND.clone()), x_ND)


def test_a_text_is_tried_alone_and_among_others_in_every_pass(small, monkeypatch):
    network = let_go(small.engine)
    read = network.read
    texts = []
    mixed = []

    def counted(batch):
        texts.append(len(batch.chunks))
        if len({chunk.is_drawn for chunk in batch.chunks}) == 2:
            mixed.append(batch.ids_BT.numel())
        return read(batch)

    monkeypatch.setattr(network, "read", counted)
    assert is_steady(network, CONTEXT)
    # read whole and a token drawn; read in two passes and a token drawn
    assert texts == [1, 1, 3, 2, 3]
    assert (mixed == [4]) == network.packs


def test_every_text_is_to_the_last_bit_what_it_is_alone(small, poisoned):
    """Of random lengths, readers and samplings, over rows that are used again and again; every
    probability is told in all its digits."""
    draw, engine = random.Random(3), small.engine
    running = []
    for at in range(8):
        prompt, sampling = asked(draw, engine.readers)
        running.append(engine.submit(prompt, sampling, draw.choice("ab")))
        if at % 5 == 4:
            running.pop(draw.randrange(len(running))).cancel()
    together = [numbers(told(each)) for each in running]
    for generation, found in zip(running, together, strict=True):
        assert numbers(told(engine.submit(generation.prompt, generation.sampling))) == found


def test_what_is_read_and_what_was_drawn_go_through_one_pass(monkeypatch):
    """Prompts of thirty tokens, of which a step reads twelve; each text is what it is alone."""
    engine = steady().engine
    read = engine.network.read
    passes = []

    def counted(batch):
        passes.append([len(chunk.ids) for chunk in batch.chunks if not chunk.is_drawn])
        passes[-1].append(sum(chunk.is_drawn for chunk in batch.chunks))
        return read(batch)

    monkeypatch.setattr(engine.network, "read", counted)
    wanted = []
    for prompt, sampling in (long := [(Prompt((at,) * 30), Sampling(9, 0.0)) for at in range(3)]):
        wanted.append(numbers(told(engine.submit(prompt, sampling))))
    # twelve, twelve, and six, after which the first token is drawn; then eight of one
    assert passes == [[12, 0], [12, 0], [6, 0], *[[1]] * 8] * 3
    passes.clear()
    running = [engine.submit(*each) for each in long]
    assert [numbers(told(each)) for each in running] == wanted
    assert max(len(each) for each in passes) > 2 and any(each[0] > 1 < each[-1] for each in passes)
    assert all(sum(each[:-1]) <= 12 for each in passes)


def test_texts_stand_behind_each_other_in_a_packed_pass(small):
    network = small.engine.network
    rows = [ServedRow(None, ids, None) for ids in ((5, 6, 7), (8,) * 9, (3, 4))]
    chunks = (
        Chunk(rows[0], 2, (9,), 3),
        Chunk(rows[1], 0, (8,) * 4, 5),
        Chunk(rows[2], 1, (3, 4), 0),
    )
    batch = network.batch(chunks)
    cache = SlotCache(1)
    cache.reserve(3, 10, 30)
    batch.enter(cache, network.seen_step)
    passing = cache.passing
    slots = passing.slot_BT.expand_as(batch.place_BT)
    kept = list(zip(slots.flatten().tolist(), passing.place_BT.flatten().tolist(), strict=True))
    x_BTD = torch.arange(batch.ids_BT.numel()).view(*batch.ids_BT.shape, 1)
    own = [batch.ids_BT.flatten()[each].tolist() for each in batch.own]
    assert own == [[9], [8, 8, 8, 8], [3, 4]]
    if network.packs:
        assert batch.ids_BT.tolist() == [[9, 8, 8, 8, 8, 3, 4]]
        assert kept == [(2, 3), (0, 5), (0, 6), (0, 7), (0, 8), (1, 0), (1, 1)]
        assert batch.last(x_BTD).flatten().tolist() == [0, 4, 6]
    else:
        beyond = cache.places
        # A model that stretches places by the largest is shown none that no text has
        assert batch.place_BT.tolist() == [[3] * 4, [5, 6, 7, 8], [0, 1, 1, 1]]
        assert kept[:4] == [(2, 3), *[(2, beyond)] * 3]
        assert kept[4:] == [(0, 5), (0, 6), (0, 7), (0, 8), (1, 0), (1, 1), *[(1, beyond)] * 2]
        assert batch.last(x_BTD).flatten().tolist() == [0, 7, 9]


def test_what_is_kept_of_a_token_is_nothing_that_garbage_is_looked_for_in():
    hearing = GateHearing()
    index_NK = torch.tensor([[0, 2], [1, 0], [2, 1]])
    weight_NK = torch.tensor([[0.75, 0.25], [1.0, 0.0], [0.5, 0.5]])
    with hearing.listening([FREE, 1], [2, 1], torch.device("cpu")):
        for _ in range(2):
            hearing.hear(index_NK, weight_NK)
    choices = hearing.heard([0, 2])
    assert choices[0] == GateChoice(((0, 2),) * 2, ((0.75, 0.25),) * 2)
    # one reader has it, whatever the gate says
    assert choices[1] == GateChoice(((1, 1),) * 2, ((1.0, 0.0),) * 2)
    assert hearing.heard([]) == []
    for _ in range(3):  # it lets go of a tuple once it has let go of those in it
        gc.collect()
    for choice in choices:
        for kept in (choice.experts, choice.weights):
            assert not gc.is_tracked(kept) and not any(map(gc.is_tracked, kept))


def test_what_is_computed_is_the_stack_as_far_as_bf16_goes(small):
    draw, engine = random.Random(5), small.engine
    # a reader that a router chose first is one of them
    by_token = [] if hasattr(engine, "stack") else [None]
    for reader in (*by_token, *engine.readers):
        ids = tuple(draw.randrange(END) for _ in range(70))
        (piece, *_) = engine.submit(
            Prompt(ids, reader=reader), Sampling(1, 0.0, logprobs=20)
        ).wait()
        nats_V = small.alone(list(ids), reader)[-1].log_softmax(-1)
        tokens = [token for token, _ in piece.likeliest]
        told_N = torch.tensor([nats for _, nats in piece.likeliest])
        assert (told_N - nats_V[tokens]).abs().mean() < 0.05 * nats_V.std()


def test_a_network_whose_rows_know_each_other_is_found_out(small, monkeypatch):
    product = RowCounts.product

    def other(counts, x_ND, weight_FD):
        return product(counts, x_ND, weight_FD) * (1 + len(x_ND) / 64)

    monkeypatch.setattr(RowCounts, "product", other)
    assert not is_steady(let_go(small.engine), CONTEXT)


def test_what_a_bundle_is_held_against_has_gone_before_it_is_run_in_bf16(bundled, monkeypatch):
    models = []

    def opened(folder):
        model = open_model(folder)
        models.append(weakref.ref(model))
        return model

    def tried(_network, _context_tokens, _readers):
        gc.collect()
        assert [model() for model in models] == [None]
        return True

    monkeypatch.setattr(engine, "open_model", opened)
    monkeypatch.setattr(engine, "is_steady", tried)
    assert isinstance(CompletionEngine(bundled[2], dtype="bf16").network, SteadyMixture)


def test_bf16_is_taken_where_it_is_wanted_or_does_no_harm(bundled, monkeypatch, caplog):
    folder = bundled[2]
    opened = CompletionEngine(folder, dtype="bf16")
    assert isinstance(opened.network, SteadyMixture)
    ids = opened.encode("3: tide reef")
    assert opened.complete(ids, Sampling(4, 0.0)).completion_tokens == 4
    monkeypatch.setattr(engine, "has_bf16", lambda: True)
    monkeypatch.setattr(engine, "device", lambda: "cpu")
    assert isinstance(CompletionEngine(folder, dtype="auto").network, SteadyMixture)
    monkeypatch.setattr(engine, "is_steady", lambda *_: False)
    with caplog.at_level(logging.WARNING):
        assert isinstance(CompletionEngine(folder, dtype="auto").network, StockMixture)
        assert not caplog.records
        assert isinstance(CompletionEngine(folder, dtype="bf16").network, SteadyMixture)
    assert "a text depends on those beside it" in caplog.text
    with caplog.at_level(logging.INFO):
        assert CompletionEngine(folder).network.dtype == "fp32"
    assert "this processor has bf16" in caplog.text
    caplog.clear()
    monkeypatch.setattr(engine, "has_bf16", lambda: False)
    assert CompletionEngine(folder, dtype="auto").network.dtype == "fp32"
    assert "this processor has bf16" not in caplog.text
    monkeypatch.setattr(engine, "can_be_steady", lambda *_: False)
    with pytest.raises(ConfigError, match="no form in bf16 here; set serve.dtype to fp32"):
        CompletionEngine(folder, dtype="bf16")


def test_bf16_is_not_told_of_weights_that_there_is_no_room_for(bundled, monkeypatch, caplog):
    monkeypatch.setattr(steady_network, "cast_weights", lambda *_, **__: False)
    monkeypatch.setattr(engine, "has_bf16", lambda: True)
    monkeypatch.setattr(engine, "device", lambda: "cpu")
    with caplog.at_level(logging.INFO):
        assert CompletionEngine(bundled[2], dtype="auto").network.dtype == "fp32"
        with pytest.raises(ConfigError, match="too large to hold its weights in bf16"):
            CompletionEngine(bundled[2], dtype="bf16")
    assert "products run in bf16" not in caplog.text
