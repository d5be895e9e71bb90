"""A bundle behind a real uvicorn on a real socket: answers, experts, errors, keys, and whatever a
client may send.

B sequences, T tokens, D model width, E experts, K experts per token.
"""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn
from fake_engine import FakeEngine, served
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.interface import ask
from pipeline.__main__ import main
from pipeline.errors import ConfigError, PipelineError
from pipeline.families.ffn_moe.stack import assemble
from pipeline.families.load import load
from pipeline.run.context import StoredParts
from pipeline.serve import command
from pipeline.serve.app import create
from pipeline.serve.generation import Sampling
from pipeline.serve.listening import listen
from pipeline.store.artifacts import Store

ROOT = Path(__file__).parent.parent
NAMES = ["sea", "shop", "hall"]
PROMPT = "3: tide reef"


@contextmanager
def running(app):
    """Serve an application in a thread; yields a client of it."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        with httpx.Client(
            base_url=f"http://127.0.0.1:{listening.getsockname()[1]}",
            timeout=30,
            headers={"Content-Type": "application/json"},
        ) as client:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield client
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@pytest.fixture(scope="module")
def application(bundled):
    """The bundle's application."""
    torch.set_num_threads(1)
    return create(bundled[2])


@pytest.fixture(scope="module")
def engine(application):
    """What runs behind it."""
    return application.state.service.engine


@pytest.fixture(scope="module")
def client(application):
    """A client of it, over a socket."""
    with running(application) as client:
        yield client


def complete(client, **fields) -> dict:
    """Return the answer to a completion."""
    answer = client.post("/v1/completions", json={"prompt": PROMPT, "temperature": 0, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(
    answer, status: int, said: str, param: str | None = None, code: str | None = None
) -> dict:
    """Check an error's status and its form, which is OpenAI's; return it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert re.search(said, error["message"]) and (error["param"], error["code"]) == (param, code), (
        error
    )
    return error


def test_health_and_models_name_the_experts_and_the_bundle(client, bundled):
    sums = hashlib.sha256((bundled[2] / "SHA256SUMS").read_bytes()).hexdigest()
    bundle = {"address": bundled[2].name, "sha256": sums}
    assert client.get("/healthz").json() == {"status": "ok", "bundle": bundle}
    assert client.get("/readyz").json() == {"status": "ready"}
    listed = client.get("/v1/models").json()
    experts = [f"expert:{name}" for name in NAMES]
    assert listed["object"] == "list"
    assert [m["id"] for m in listed["data"]][: 1 + len(NAMES)] == ["tiny", *experts]
    assert listed["data"][0] == client.get("/v1/models/tiny").json()
    assert listed["data"][0] | {"created": 0} == {
        "id": "tiny",
        "object": "model",
        "created": 0,
        "owned_by": "moleforge",
        "experts": NAMES,
        "top_k": 2,
        "context_tokens": 32,
        "bundle": bundle,
        "max_model_len": 32,
    }
    assert client.get("/v1/models/expert:sea").json()["parent"] == "tiny"


def test_a_greedy_completion_is_what_transformers_generates(client, bundled):
    """The same text as plain transformers code on the bundle's files, with no step of its own."""
    tokenizer = AutoTokenizer.from_pretrained(bundled[2])
    model = AutoModelForCausalLM.from_pretrained(bundled[2], dtype=torch.float32)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    ids_BT = prompt.input_ids
    out_BT = model.generate(**prompt, do_sample=False, max_new_tokens=12)
    answer = complete(client, max_tokens=12)
    assert answer["choices"][0]["text"] == tokenizer.decode(
        out_BT[0, ids_BT.shape[1] :], skip_special_tokens=True
    )
    assert answer["usage"]["prompt_tokens"] == ids_BT.shape[1]


def test_an_echo_has_the_probabilities_that_transformers_gives(client, bundled):
    """As evaluation harnesses ask for them: of texts and of tokens' numbers, several at once, with
    one token more, which they leave out, or none."""
    tokenizer = AutoTokenizer.from_pretrained(bundled[2])
    model = AutoModelForCausalLM.from_pretrained(bundled[2], dtype=torch.float32)
    texts = [PROMPT, "5: shop hall sea", "tide"]
    for prompts in (texts, tokenizer(texts).input_ids):
        answer = complete(client, prompt=prompts, max_tokens=1, echo=True, logprobs=1, seed=1)
        for text, choice in zip(texts, answer["choices"], strict=True):
            ids = tokenizer(text).input_ids
            told = choice["logprobs"]
            assert choice["text"].startswith(text) and len(told["tokens"]) == len(ids) + 1
            spelled = zip(ids, told["text_offset"], told["tokens"], strict=False)
            own = [(at, each) for token, at, each in spelled if token != tokenizer.eos_token_id]
            assert own and all(text[at:].startswith(each) for at, each in own)
            with torch.no_grad():
                nats_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
            for at, token in enumerate(ids[1:]):
                best = nats_TV[at].max().item()
                own = told["token_logprobs"][at + 1]
                assert own == pytest.approx(nats_TV[at, token].item(), abs=1e-4)
                assert max(told["top_logprobs"][at + 1].values()) == pytest.approx(best, abs=1e-4)
    assert answer["usage"]["completion_tokens"] == len(texts)


def test_minus_one_is_as_many_tokens_as_there_is_room_for(client):
    """As llama.cpp and LM Studio have it, whose clients send it unasked."""
    told = complete(client, max_tokens=-1, ignore_eos=True)["usage"]
    assert told["total_tokens"] == 32 and told["completion_tokens"] > 16
    error = refused(
        client.post("/v1/completions", json={"prompt": "x", "max_tokens": -2}),
        400,
        "max_tokens: must be at least -1",
        "max_tokens",
    )
    assert error["type"] == "invalid_request_error"


def test_an_echo_needs_no_further_token_and_is_the_same_as_a_stream(client):
    whole = complete(client, max_tokens=0, echo=True, logprobs=2)
    (choice,) = whole["choices"]
    assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
    assert whole["usage"]["completion_tokens"] == 0
    assert len(choice["logprobs"]["tokens"]) == whole["usage"]["prompt_tokens"]
    with client.stream(
        "POST",
        "/v1/completions",
        json={"prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 2, "stream": True},
    ) as answer:
        events = [
            json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")
        ]
    parts = [event["choices"][0] for event in events]
    assert "".join(part["text"] for part in parts) == PROMPT
    joined = {name: [] for name in choice["logprobs"]}
    for part in parts:
        for name, values in (part["logprobs"] or {}).items():
            joined[name] += values
    assert joined == choice["logprobs"]
    assert complete(client, max_tokens=0, echo=True)["choices"][0]["logprobs"] is None


def test_an_answer_has_openais_form(client):
    answer = complete(
        client, max_tokens=5, user="someone", n=1, stream=False, logprobs=None, stop=None
    )
    assert answer.keys() == {"id", "object", "created", "model", "choices", "usage", "seconds"}
    assert (
        answer["object"] == "text_completion"
        and answer["model"] == "tiny"
        and answer["id"].startswith("cmpl-")
    )
    (choice,) = answer["choices"]
    assert (
        choice.keys() == {"index", "text", "logprobs", "finish_reason"}
        and choice["finish_reason"] == "length"
    )
    usage = answer["usage"]
    assert usage["completion_tokens"] == 5 and usage["total_tokens"] == 5 + usage["prompt_tokens"]
    assert complete(client, max_tokens=5)["id"] != answer["id"]


def test_a_seed_repeats_a_text_and_none_does_not(client):
    def text(**fields) -> str:
        return complete(client, temperature=1.5, max_tokens=16, **fields)["choices"][0]["text"]

    assert text(seed=1) == text(seed=1) == text(seed=1, top_p=1.0)
    assert len({text(seed=s) for s in range(5)}) > 2
    assert len({text() for _ in range(5)}) > 2
    state = torch.random.get_rng_state()
    text(seed=9)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_narrow_share_or_a_cold_draw_is_the_likeliest_token(client):
    greedy = complete(client, max_tokens=8)["choices"][0]["text"]
    assert (
        complete(client, max_tokens=8, temperature=1.0, top_p=1e-9)["choices"][0]["text"] == greedy
    )
    for coldest in (1e-3, 1e-30):
        assert complete(client, max_tokens=8, temperature=coldest)["choices"][0]["text"] == greedy


def test_a_stop_string_ends_the_text_and_is_not_in_it(client, engine):
    whole = complete(client, max_tokens=16)["choices"][0]["text"]
    tokens = [t.text for t in engine.complete(engine.encode(PROMPT), Sampling(16, 0.0)).tokens]
    stop = whole[3:6]  # across tokens
    answer = complete(client, max_tokens=16, stop=[stop, "never"], return_experts=True)
    told = answer["choices"][0].pop("experts")
    assert answer["choices"][0] == {
        "index": 0,
        "text": whole[: whole.index(stop)],
        "logprobs": None,
        "finish_reason": "stop",
    }
    needed = next(n for n in range(1, 17) if stop in "".join(tokens[:n]))
    assert answer["usage"]["completion_tokens"] == needed, "no token is drawn after it"
    assert "".join(t["text"] for t in told["tokens"]) == answer["choices"][0]["text"]
    assert complete(client, max_tokens=16, stop=stop)["choices"] == answer["choices"]


def test_the_experts_are_those_of_the_assembled_stack(client, bundled, engine):
    """The HTTP answer against pipeline code on the store's parts: every layer's choice and weight
    for every token."""
    cfg, text = load(bundled[0]), "7: lathe gear of oboe chord"
    stack = assemble(cfg, StoredParts(cfg, Store(bundled[1])))
    chosen = {}

    def watched(layer, x_BTD):
        chosen[layer] = stack.mixture.router.route(layer, x_BTD.flatten(0, 1))
        return stack.mixture(layer, x_BTD)

    ids = engine.encode(text)
    with torch.no_grad():
        stack.trunk.hidden(torch.tensor([ids]), watched)
    answer = client.post("/v1/route", json={"text": text}).json()
    assert answer["object"] == "route" and answer["model"] == "tiny"
    assert [t["id"] for t in answer["tokens"]] == ids[1:] and "".join(
        t["text"] for t in answer["tokens"]
    ) == text
    for at, token in enumerate(answer["tokens"], start=1):
        for layer, (index_TK, weight_TK) in chosen.items():
            assert token["experts"][layer] == index_TK[at].tolist()
            assert token["weights"][layer] == pytest.approx(weight_TK[at].tolist(), abs=1e-4)
    flat = torch.cat([index_TK[1:].flatten() for index_TK, _ in chosen.values()])
    wanted = (flat.bincount(minlength=3) / len(flat)).tolist()
    assert [e["name"] for e in answer["experts"]] == NAMES
    assert [e["share"] for e in answer["experts"]] == pytest.approx(wanted, abs=1e-4)
    assert sum(e["weight"] for e in answer["experts"]) == pytest.approx(1, abs=1e-3)


def test_a_completion_names_its_experts_on_request(client):
    answer = complete(client, max_tokens=6, return_experts=True)
    told = answer["choices"][0]["experts"]
    assert (
        "".join(t["text"] for t in told["tokens"]) == answer["choices"][0]["text"]
        and len(told["tokens"]) == 6
    )
    for token in told["tokens"]:
        assert token.keys() == {"id", "text", "experts", "weights", "top"} and token["top"] in NAMES
        assert [len(k) for k in token["experts"]] == [2, 2] and all(
            sum(w) == pytest.approx(1, abs=1e-3) for w in token["weights"]
        )
    assert sum(e["share"] for e in told["experts"]) == pytest.approx(1, abs=1e-3)


WRONG = {
    "n": ({"prompt": "x", "n": 17}, "n: must be at most 16", "n"),
    "echo": ({"prompt": "x", "echo": 2}, "echo: must be true or false", "echo"),
    "logprobs": ({"prompt": "x", "logprobs": 21}, "logprobs: must be at most 20", "logprobs"),
    "no prompt": ({}, "prompt: must be given", "prompt"),
    "null prompt": ({"prompt": None}, "prompt: must be given", "prompt"),
    "mixed prompt": ({"prompt": ["x", 1]}, "prompt: must be a text", "prompt"),
    "strange field": ({"prompt": "x", "min_words": 1}, "min_words: no such field", "min_words"),
    "text for a number": (
        {"prompt": "x", "max_tokens": "5"},
        "max_tokens: must be a whole number",
        "max_tokens",
    ),
    "no tokens": (
        {"prompt": "x", "max_tokens": 0},
        "max_tokens: 0 draws nothing.*set echo to true",
        "max_tokens",
    ),
    "too many tokens": (
        {"prompt": "x", "max_tokens": 10**9},
        "max_tokens: at most 1024",
        "max_tokens",
    ),
    "hot": (
        {"prompt": "x", "temperature": 2.1},
        "temperature: must be at most 2",
        "temperature",
    ),
    "no share": ({"prompt": "x", "top_p": 0}, "top_p: .*greater than 0", "top_p"),
    "large seed": ({"prompt": "x", "seed": 2**63}, "seed: ", "seed"),
    "empty stop": ({"prompt": "x", "stop": ""}, "stop: ", "stop"),
    "many stops": ({"prompt": "x", "stop": ["x"] * 17}, "stop: .*at most 16", "stop"),
    "two at once": ({"prompt": 1, "top_p": 2}, "top_p: .*; prompt: ", "top_p"),
}


@pytest.mark.parametrize(("body", "said", "param"), WRONG.values(), ids=WRONG)
def test_a_wrong_field_is_named(client, body, said, param):
    error = refused(client.post("/v1/completions", json=body), 400, said, param)
    assert error["type"] == "invalid_request_error"


BODIES = {
    "empty": b"",
    "no JSON": b"{prompt: x}",
    "a list": b"[1, 2]",
    "no UTF-8": b'{"prompt": "\xff"}',
    "half a character": b'{"prompt": "\\ud800"}',
    "not a number": b'{"prompt": "x", "temperature": NaN}',
    "deep": b'{"prompt": ' + b"[" * 100_000,
}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/route"])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_body_that_is_no_request_is_refused(client, path, body):
    answer = client.post(path, content=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["prompt", "text", "max_tokens", "temperature", "top_p", "seed", "stop", "model", "stream"]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    body=st.binary(max_size=60)
    | st.dictionaries(FIELDS, JSON, max_size=6).map(lambda d: json.dumps(d).encode())
    | JSON.map(lambda j: json.dumps(j).encode()),
    path=st.sampled_from(["/v1/completions", "/v1/route"]),
)
def test_whatever_is_sent_the_answer_is_json_and_never_a_failure(client, path, body):
    answer = client.post(path, content=body)
    assert answer.status_code in (200, 400, 404), answer.text
    if not answer.headers["content-type"].startswith("text/event-stream"):
        assert ("error" in answer.json()) is (answer.status_code != 200)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    prompt=st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    temperature=st.floats(0, 2),
    top_p=st.floats(0, 1, exclude_min=True),
    seed=st.integers(-(2**63), 2**63 - 1),
    stop=st.lists(st.text("aet ", min_size=1, max_size=3), max_size=4),
)
def test_every_request_within_the_limits_is_answered(
    client, prompt, temperature, top_p, seed, stop
):
    body = {
        "prompt": prompt,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": stop,
        "max_tokens": 3,
    }
    answer = client.post("/v1/completions", json=body)
    if answer.status_code == 400:
        refused(answer, 400, "context length is 32 tokens", "prompt", "context_length_exceeded")
    else:
        assert answer.status_code == 200 and not any(
            s in answer.json()["choices"][0]["text"] for s in stop
        )


def test_a_text_over_the_context_is_refused_with_both_numbers(client, engine):
    text = "tide " * 40
    count = len(engine.encode(text))
    answer = client.post("/v1/completions", json={"prompt": text, "max_tokens": 3})
    said = (
        f"prompt: {count} tokens and 3 are to be drawn, but this model's maximum context length is "
        "32 tokens"
    )
    refused(answer, 400, said, "prompt", "context_length_exceeded")
    answer = client.post("/v1/route", json={"text": text})
    refused(answer, 400, f"text: {count} tokens, but", "text", "context_length_exceeded")
    room = 32 - len(engine.encode(PROMPT))
    assert complete(client, max_tokens=room)["usage"]["total_tokens"] == 32
    answer = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": room + 1})
    refused(answer, 400, "lower max_tokens", "prompt", "context_length_exceeded")


def test_a_body_over_the_limit_is_not_read_to_its_end(client):
    large = json.dumps({"prompt": "x" * (1 << 20)}).encode()
    refused(
        client.post("/v1/completions", content=large),
        413,
        "over 1,048,576 bytes",
        None,
        "too_large",
    )

    def blocks():
        for _ in range(17):  # without a length in the header
            yield large[: 1 << 16]

    refused(
        client.post("/v1/completions", content=blocks()),
        413,
        "over 1,048,576 bytes",
        None,
        "too_large",
    )
    assert client.get("/healthz").status_code == 200


def test_another_model_and_another_address_are_not_found(client):
    body = {"prompt": "x", "model": "gpt-4"}
    error = refused(
        client.post("/v1/completions", json=body),
        404,
        "'gpt-4' is not served here; there are tiny, expert:sea",
        "model",
        "model_not_found",
    )
    assert error["type"] == "not_found_error"
    refused(client.get("/v1/models/gpt-4"), 404, "is not served here", "model", "model_not_found")
    assert complete(client, model="tiny", max_tokens=1)["model"] == "tiny"
    refused(client.get("/v2"), 404, "GET /v2 is not served here; GET /healthz")
    refused(client.get("/v1/completions"), 405, "GET /v1/completions is not served here")


SLASHES = ["/v1/models/", "/v1//models", "/v1/models//", "/v1/models/tiny/", "/healthz/"]


@pytest.mark.parametrize("path", SLASHES)
def test_surplus_slashes_of_an_address_say_nothing(client, path):
    """A base_url that ends in one leaves them, and who posts is not to be sent elsewhere."""
    plain = f"/{'/'.join(filter(None, path.split('/')))}"
    assert client.get(path, follow_redirects=False).json() == client.get(plain).json()
    assert client.get(plain).status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions/", "/v1//completions"])
def test_a_body_is_taken_at_an_address_with_surplus_slashes(client, path):
    body = {"prompt": "the sea", "max_tokens": 1}
    assert client.post(path, json=body, follow_redirects=False).status_code == 200
    refused(client.get(path), 405, "GET /v1/completions is not served here")


PAGES = ["/", "/healthz", "/readyz", "/metrics", "/v1/models", "/v1/models/tiny", "/openapi.json"]


@pytest.mark.parametrize("path", [*PAGES, "/v2", "/v1/models/gpt-4", "/v1/completions"])
def test_a_head_is_answered_as_a_get_is_without_its_content(client, path):
    got = client.get(path)
    answer = client.head(path)
    assert answer.status_code == got.status_code
    assert answer.content == b""
    of_one_request = ("date", "x-request-id", "content-length")
    ours, theirs = ({**each.headers} for each in (answer, got))
    assert {**ours, **dict.fromkeys(of_one_request)} == {**theirs, **dict.fromkeys(of_one_request)}
    if path not in ("/healthz", "/metrics"):
        assert ours["content-length"] == theirs["content-length"]
    # the connection goes on behind it
    assert client.get("/readyz").json() == {"status": "ready"}


def test_a_failure_of_our_own_is_a_500_that_tells_no_secrets(client, engine, monkeypatch):
    def fail(*_):
        raise RuntimeError("secret")

    monkeypatch.setattr(engine, "route", fail)
    answer = client.post("/v1/route", json={"text": "x"})
    error = refused(answer, 500, "its log tells more")
    assert error["type"] == "server_error"
    # Else the next request may be written to a closed socket
    assert answer.headers["connection"] == "close"
    assert client.get("/healthz").status_code == 200


def test_with_a_key_nothing_of_the_model_is_shown_without_it(bundled, tmp_path):
    with running(served(tmp_path, FakeEngine(), key="sésame")) as client:
        assert client.get("/healthz").status_code == 200
        for wrong in (
            {},
            {"Authorization": "Bearer other"},
            {"Authorization": "Basic sésame".encode()},
            {"Authorization": "Bearer"},
            {"Authorization": "Bearer sésame2".encode()},
        ):
            for answer in (
                client.get("/v1/models", headers=wrong),
                client.get("/v1/models/x", headers=wrong),
                client.post("/v1/completions", content=b"garbage", headers=wrong),
                client.post("/v1/route", json={"text": "x"}, headers=wrong),
            ):
                error = refused(answer, 401, "the API key", None, "invalid_api_key")
                assert (
                    error["type"] == "authentication_error"
                    and answer.headers["www-authenticate"] == "Bearer"
                )
        right = {"Authorization": "Bearer sésame".encode()}
        assert client.post("/v1/route", json={"text": "x"}, headers=right).status_code == 200
    with pytest.raises(ConfigError, match="API key is empty"):
        create(bundled[2], key="")


def test_requests_at_once_get_what_they_get_alone(client):
    wanted = [complete(client, temperature=1.0, seed=s, max_tokens=12)["choices"] for s in range(8)]
    found = [None] * 8

    def ask(s):
        found[s] = complete(client, temperature=1.0, seed=s, max_tokens=12)["choices"]

    threads = [threading.Thread(target=ask, args=(s,)) for s in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted


def test_no_made_up_request_fails_or_is_answered_otherwise_than_described(client):
    found = ask(str(client.base_url).rstrip("/"), 100)
    assert {status for _, status in found} <= {200, 400, 404}
    assert found["POST /v1/completions", 400] and found["POST /v1/route", 400]


def test_an_address_that_cannot_be_had_is_an_error_with_a_way_out(application):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(
            PipelineError, match=r"cannot listen on 127\.0\.0\.1 port \d+: .*--port"
        ):
            listen(application, "127.0.0.1", taken.getsockname()[1], lambda _text: None)
    with pytest.raises(PipelineError, match="cannot listen on no such host"):
        listen(application, "no such host", 0, lambda _text: None)


def test_whoever_reads_the_address_may_ask_at_once(application):
    class Told(Exception):
        pass

    def connects(text: str) -> None:
        port = re.search(r":(\d+);", text)[1]
        socket.create_connection(("127.0.0.1", int(port)), timeout=5).close()
        raise Told

    with pytest.raises(Told):
        listen(application, "127.0.0.1", 0, connects)


def test_the_command_serves_a_folder_until_it_is_told_to_stop(bundled):
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "serve",
        "--bundle",
        str(bundled[2]),
        "--port",
        "0",
    ]
    environment = os.environ | {"MOLEFORGE_API_KEY": "k"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    with process:
        try:
            lines = iter(process.stderr.readline, "")
            address = next(
                found[1]
                for line in lines
                if (found := re.search(r"serving tiny at (http://\S+);", line))
            )
            with httpx.Client(
                base_url=address, headers={"Authorization": "Bearer k"}, timeout=120
            ) as client:
                assert complete(client, max_tokens=2)["usage"]["completion_tokens"] == 2
                assert (
                    client.get("/v1/models", headers={"Authorization": "Bearer l"}).status_code
                    == 401
                )
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()  # else a failure above would wait for it for ever


def test_the_command_finds_the_bundle_of_a_configuration(bundled, tmp_path, monkeypatch, capsys):
    path, store_path, folder = bundled
    opened = []
    monkeypatch.setattr(command, "open_bundle", lambda _app, folder, *_: opened.append(folder))

    def listened(_app, host, port, _say, load, **_):
        load()
        opened.append((host, port))

    monkeypatch.setattr(command, "listen", listened)
    monkeypatch.setattr(command.logs, "configure", lambda _kind: None)
    monkeypatch.delenv("MOLEFORGE_API_KEY", raising=False)
    serve = ["serve", "--config", str(path), "--store", str(store_path), "--host"]
    assert main([*serve, "0.0.0.0", "--public"]) == 0  # noqa: S104
    assert opened == [folder, ("0.0.0.0", 8000)]  # noqa: S104
    opened.clear()
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org", ""):  # noqa: S104
        assert main([*serve, host]) == 2
        said = capsys.readouterr().err
        assert "MOLEFORGE_API_KEY" in said and "--public" in said
    assert not opened
    for host in ("127.0.0.1", "127.9.8.7", "localhost", "::1"):
        assert main([*serve, host]) == 0
        assert opened.pop() == (host, 8000)
    assert main(["serve", "--config", str(path), "--store", str(tmp_path / "none")]) == 2
    assert "run `python -m pipeline deploy`" in capsys.readouterr().err
    monkeypatch.undo()
    # a folder as high as there is one, as containers have them
    assert main(["serve", "--bundle", "/"]) == 2
    assert "is not a bundle" in capsys.readouterr().err
    for wrong in (
        ["serve"],
        ["serve", "--bundle", "x", "--config", "y"],
        ["serve", "--bundle", "x", "--port", "99999"],
    ):
        with pytest.raises(SystemExit):
            main(wrong)


@contextmanager
def slowed(module: torch.nn.Module, seconds: float):
    """Make each pass of a model take so long; yields the list that has an entry for each."""
    passes = []

    def count(*_) -> None:
        passes.append(time.monotonic())
        time.sleep(seconds)

    hook = module.register_forward_pre_hook(count)
    try:
        yield passes
    finally:
        hook.remove()


def asked(client, path: str, body: dict) -> socket.socket:
    """Send a request and leave its answer unread; return the socket, for who wants to close it."""
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\n\r\n"
    )
    connection = socket.create_connection((client.base_url.host, client.base_url.port))
    connection.sendall(head.encode() + content)
    return connection


def wait_for(condition, seconds: float = 10) -> None:
    """Wait until something holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


@contextmanager
def held_up(module: torch.nn.Module):
    """Let no pass of a model go on while the context is open."""
    goes_on = threading.Event()
    hook = module.register_forward_pre_hook(lambda *_: goes_on.wait(60) and None)
    try:
        yield
    finally:
        goes_on.set()
        hook.remove()


def check_leaving(client, engine, path: str, body: dict, module, steps: int) -> None:
    """Ask and leave at each of several passes, and while others are held up: the work ends, the
    place is free, and the next request gets its answer."""
    stats = engine.stats

    def asked_for() -> int:
        return stats.running + stats.waiting

    for leave_at in (1, 2, steps // 2):
        with slowed(module, 0.06) as passes:
            connection = asked(client, path, body)
            wait_for(lambda: len(passes) >= leave_at)  # noqa: B023 (waited for here)
            connection.close()
            wait_for(lambda: not asked_for())
            # the one that ran, and one in which the server heard of it
            assert len(passes) <= leave_at + 2 < steps
    with held_up(module):
        connections = [asked(client, path, body) for _ in range(3)]
        wait_for(lambda: asked_for() == 3)
        for connection in connections:
            connection.close()
    wait_for(lambda: not asked_for())
    assert client.post(path, json=body).status_code == 200


def test_a_client_that_leaves_stops_its_text_and_frees_its_place(client, application, engine):
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 20}
    assert complete(client, max_tokens=20)["usage"]["completion_tokens"] == 20
    model = engine.model.base_model
    check_leaving(client, engine, "/v1/completions", body, model, 20)
