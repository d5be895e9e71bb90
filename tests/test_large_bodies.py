"""Bodies that are made to cost more than they take to send, over an engine without a model: each
gets a short answer soon. And many usual ones at once."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_engine import FakeEngine, served
from spent import is_done_in
from test_serve import refused, running

from pipeline.serve.forms import Form

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
USER = {"role": "user", "content": "a"}
MANY = 50_000
NAMED = {f"a{i}": 0 for i in range(MANY)}
NUMBERED = {str(i): "x" for i in range(MANY)}
PART = {"type": "text", "text": "a", "x": 1}
BOMBS = {
    "fields": NAMED,
    "fields of a message": {"messages": [USER | NAMED]},
    "messages": {"messages": [USER] * 9000},
    "messages with a wrong field": {"messages": [USER | {"x": 1}] * 8000},
    "parts": {"messages": [{"role": "user", "content": [PART] * 9000}]},
    "biases": {"messages": [USER], "logit_bias": NUMBERED},
    "metadata": {"messages": [USER], "metadata": dict.fromkeys(NUMBERED, 1)},
    "a name": {"messages": [USER], "x" * 500_000: 1},
    "a model": {"messages": [USER], "model": "x" * 500_000},
}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A client of a server that takes bodies of 8 MiB."""
    folder = tmp_path_factory.mktemp("fake")
    with running(served(folder, FakeEngine(), new_tokens=64, body_bytes=1 << 23)) as client:
        yield client


@pytest.mark.parametrize("bomb", BOMBS)
def test_what_is_wrong_thousands_of_times_is_told_in_some_words_and_soon(client, bomb):
    content = json.dumps(BOMBS[bomb])
    answer = client.post(CHAT, content=content, headers=JSON)
    # of this process, of which the server is a thread
    assert is_done_in(0.3, lambda: client.post(CHAT, content=content, headers=JSON))
    assert answer.status_code == (404 if bomb == "a model" else 400)
    assert len(answer.content) < 3000


def test_several_problems_are_told_and_the_rest_counted(client):
    answer = client.post(CHAT, json={"messages": [USER]} | {f"a{i}": 0 for i in range(20)})
    error = refused(answer, 400, "^a0: no such field; a1", "a0")
    assert error["message"].endswith("a7: no such field; and 12 more")


@pytest.mark.parametrize("value", ["[]", "{}", "0"])
def test_more_values_than_a_request_needs_are_refused_before_they_are_made(client, value):
    content = f'{{"messages": [{",".join([value] * ((1 << 20) + 2))}]}}'
    answer = client.post(CHAT, content=content, headers=JSON)
    refused(answer, 413, "over 1,048,576 values", None, "too_large")


def test_a_long_text_with_commas_is_one_value(client):
    asked = {"prompt": "a, b" * (1 << 17), "max_tokens": 1}
    answer = client.post("/v1/completions", json=asked)
    refused(answer, 400, "context", "prompt", "context_length_exceeded")


def test_a_token_has_one_number_in_a_bias(client):
    asked = {"prompt": "a", "logit_bias": {"017": 1.0, "17": -1.0}}
    refused(client.post("/v1/completions", json=asked), 400, "'017'", "logit_bias")


def test_more_clients_at_once_than_threads_all_get_answers(tmp_path):
    app = served(tmp_path, FakeEngine(), new_tokens=64)
    asked = {"prompt": "The", "max_tokens": 2}
    with running(app) as client, ThreadPoolExecutor(90) as pool:
        wanted = [pool.submit(client.post, "/v1/completions", json=asked) for _ in range(90)]
        assert {each.result().status_code for each in wanted} == {200}


def test_more_texts_than_there_is_ever_room_for_are_not_asked_to_come_back(tmp_path):
    with running(served(tmp_path, FakeEngine(), waiting=3)) as client:
        asked = {"prompt": "The", "max_tokens": 2}
        assert client.post("/v1/completions", json=asked | {"n": 3}).status_code == 200
        answer = client.post("/v1/completions", json=asked | {"n": 4})
        refused(answer, 400, "4 texts are asked for, and there is room for 3", "n")


def test_a_long_answer_is_written_beside_the_loop_that_hears_others(tmp_path, monkeypatch):
    threads = []
    whole = Form.whole

    def noted(form, tellings):
        threads.append(threading.get_ident())
        return whole(form, tellings)

    monkeypatch.setattr(Form, "whole", noted)
    app = served(tmp_path, FakeEngine(), new_tokens=64)

    @app.get("/loop")
    async def loop() -> int:
        return threading.get_ident()

    with running(app) as client:
        asked = {"prompt": "The", "max_tokens": 4, "n": 16, "logprobs": 20}
        assert len(client.post("/v1/completions", json=asked).json()["choices"]) == 16
        assert threads != [client.get("/loop").json()]
