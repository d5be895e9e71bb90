"""The benchmark of serving many clients, for a moment on a random model."""

from benchmarks import serve_throughput
from benchmarks.serve_throughput import Asking, alike, served
from tests import small_engines


def test_what_clients_are_told_is_counted_and_held_against_the_same_alone():
    engine = small_engines.stock().engine
    found = served(engine, 3, 0.4)
    assert found.requests >= 3
    assert len(found.first_s) <= found.requests
    assert 0 < len(found.next_s) < found.tokens
    assert found.rate > 0
    assert found.different == 0
    assert engine.stats.completion_tokens >= found.tokens
    assert "tokens/s" in serve_throughput._rounds([found, found])


def test_a_client_asks_the_same_each_time_and_others_something_else():
    engine = small_engines.adapters().engine
    first, again, other = (Asking(engine, seed) for seed in (1, 1, 2))
    asked = [first.next() for _ in range(8)]
    assert asked == [again.next() for _ in range(8)]
    assert asked != [other.next() for _ in range(8)]
    assert {prompt.reader for prompt, _ in asked} > {None}


def test_what_generate_is_given_is_drawn_to_its_end():
    engine = small_engines.stock().engine
    assert alike(engine, 3, 1) > 0
    assert engine.stats.completion_tokens == 3 * 32
