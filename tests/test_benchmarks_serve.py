"""The benchmark of serving many clients, for a moment on a random model."""

import os
import random
import subprocess
from dataclasses import replace
from subprocess import Popen
from unittest.mock import create_autospec

import fake_engine
import psutil
import pytest
from fake_engine import FakeEngine

from benchmarks import plain_chat, serve_peers, serve_throughput
from benchmarks.serve_peers import Peer, turn
from benchmarks.serve_throughput import Asking, Kept, alike, served
from pipeline.serve.engines import engine_of
from pipeline.serve.generation import Capacity
from tests import small_engines, small_stack
from tests.test_serve import running


def test_what_clients_are_told_is_counted_and_held_against_the_same_alone():
    engine = small_engines.stock().engine
    found = served(engine, 3, 0.4, 5)
    assert found.requests >= 3
    assert 3 <= found.held <= 5
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


def test_questions_of_a_bundle_are_answered_as_plain_generate_answers_them(tmp_path):
    engine = engine_of(small_stack.bundle(tmp_path), Capacity(rows=4), "fp32")
    long = Asking(engine, 1, long=True)
    asked = [sampling for _, sampling in (long.next() for _ in range(20))]
    assert {each.max_tokens for each in asked} == set(serve_throughput.NEW_TOKENS)
    # whatever ends an answer: each has as many tokens as its reader gives
    found = served(engine, 2, 0.3, 4, long=True)
    assert found.different == 0 and found.tokens > 3 * (found.requests - found.left)
    text = plain_chat.beside_generate(
        tmp_path / "bundle", engine, serve_throughput.question, (3,), 1
    )
    lines = [line.split("|")[1:-1] for line in text.splitlines()[2:]]
    told = [[cell.strip() for cell in line] for line in lines]
    assert [line[:3] + line[-1:] for line in told] == [
        ["3", "one", "4", "3 of 3"],
        ["3", "all", "4", "3 of 3"],
    ]


def test_what_a_server_streams_is_counted_as_its_usage_tells(tmp_path, monkeypatch):
    monkeypatch.setattr(serve_peers, "PROMPT_CHARACTERS", (8,))
    monkeypatch.setattr(serve_peers, "NEW_TOKENS", (3,))
    with running(fake_engine.served(tmp_path, FakeEngine(room=10**6))) as client:
        peer = Peer("ours", str(client.base_url), "", create_autospec(Popen, instance=True))
        told = client.get("/v1/models").json()["data"][0]["id"]
        found = turn(Peer("ours", peer.address, told, peer.process), 2, 0.3, 0)
    assert found.tokens
    assert found.tokens % 3 == 0
    assert found.failed == 0
    assert len(found.first_s) == found.tokens // 3


def test_a_server_that_fails_is_counted_and_one_that_says_nothing_ends_it(tmp_path, monkeypatch):
    engine = FakeEngine(room=10**6)
    with running(fake_engine.served(tmp_path, engine)) as client:
        told = client.get("/v1/models").json()["data"][0]["id"]
        peer = Peer("ours", str(client.base_url), told, create_autospec(Popen, instance=True))
        monkeypatch.setattr(serve_peers, "PROMPT_CHARACTERS", (8,))
        assert serve_peers.likened([peer, replace(peer, name="theirs")]) == {
            "ours": "8 of 8",
            "theirs": "8 of 8",
        }
        answers = iter([True])
        streamed = serve_peers._streamed

        def sometimes(http, body):
            return streamed(http, body if next(answers, False) else body | {"temperature": -1})

        monkeypatch.setattr(serve_peers, "_streamed", sometimes)
        found = turn(peer, 1, 1.0, 0)
        assert found.failed and len(found.first_s) == 1
        with pytest.raises(SystemExit, match="ours gave 2 clients no token"):
            turn(peer, 2, 0.1, 0)


def test_who_is_not_asked_stands_still():
    processes = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    peers = [Peer(str(each.pid), "", "", each) for each in processes]
    try:
        with peers[0].alone(peers):
            stopped = os.waitid(os.P_PID, processes[1].pid, os.WSTOPPED | os.WEXITED)
            assert psutil.Process(processes[0].pid).status() != psutil.STATUS_STOPPED
        again = os.waitid(os.P_PID, processes[1].pid, os.WCONTINUED | os.WEXITED)
    finally:
        for each in processes:
            each.kill()
            each.wait()
    assert (stopped.si_code, again.si_code) == (os.CLD_STOPPED, os.CLD_CONTINUED)


def test_beginnings_of_texts_are_the_same_for_the_same_seed():
    first, again = (serve_peers.texts(random.Random(3)) for _ in range(2))
    drawn = [next(first) for _ in range(5)]
    assert drawn == [next(again) for _ in range(5)]
    assert len(set(drawn)) == 5


def test_few_answers_are_kept_and_late_ones_as_often_as_early_ones():
    counts = [0] * 10
    for seed in range(400):
        kept = Kept(3, seed)
        for number in range(10):
            kept.offer(number)
        assert len(set(kept.generations)) == 3
        for number in kept.generations:
            counts[number] += 1
    # 120 each, less or more by some 9
    assert min(counts) > 80
    assert max(counts) < 160
