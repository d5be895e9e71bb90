"""What a server tells whoever runs it, and how it starts and stops: probes, metrics, logs, keys,
drain. A real server, and behind it a service without a model."""

import io
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import fake_engine
import httpx
import pytest
from fake_engine import FakeEngine
from prometheus_client.parser import text_string_to_metric_families
from small_server import PATIENCE_S, application, served, until

from pipeline.errors import ConfigError
from pipeline.serve import logs
from pipeline.serve.app import _end_texts
from pipeline.serve.generation import (
    Generation,
    Piece,
    Prompt,
    RequestChoice,
    Sampling,
    Stats,
    Token,
)
from pipeline.serve.keys import Keys
from pipeline.serve.metrics import Metrics

ROOT = Path(__file__).parent.parent
PROMPT = "the secret of the sea"


def ask(client, path="/v1/echo", **more):
    return client.post(path, json={"prompt": PROMPT}, **more)


def figures(client) -> dict:
    """Return what /metrics says: value by name and labels."""
    found = {}
    for metric in text_string_to_metric_families(client.get("/metrics").text):
        for sample in metric.samples:
            found[(sample.name, *sample.labels.values())] = sample.value
    return found


def test_a_server_is_alive_before_it_is_ready_and_ready_until_it_is_full():
    app = application(opened=False)
    gate = app.state.gate
    with served(app) as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        answer = client.delete("/healthz")
        assert answer.status_code == 405 and "is not served here" in answer.text
        answer = client.get("/readyz")
        assert (answer.status_code, answer.json()) == (503, {"status": "loading"})
        answer = ask(client)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
        assert int(answer.headers["retry-after"]) > 0
        assert client.get("/metrics").status_code == 200
        gate.opened = True
        assert client.get("/readyz").json() == {"status": "ready"}
        assert ask(client).status_code == 200
        gate.is_full = lambda: True
        assert (client.get("/readyz").status_code, client.get("/readyz").json()) == (
            503,
            {"status": "full"},
        )
        # whose turn it is, the engine says
        assert ask(client).status_code == 200
        assert client.get("/healthz").status_code == 200


def test_what_is_inside_when_a_server_is_told_to_stop_comes_to_its_end():
    app = application()
    with served(app) as client:
        answers = []
        waiting = threading.Thread(target=lambda: answers.append(ask(client, "/v1/wait")))
        waiting.start()
        until(lambda: app.state.gate.inside)
        client.server._stop(signal.SIGTERM, None)
        answer = client.get("/readyz")
        assert (answer.status_code, answer.json()) == (503, {"status": "stopping"})
        answer = ask(client)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "stopping")
        assert client.thread.is_alive() and not answers
        app.state.release.set()
        waiting.join()
        assert answers[0].json() == {"waited": True}
        client.thread.join(PATIENCE_S)
        assert not client.thread.is_alive() and not client.server.interrupted


def test_what_does_not_come_to_its_end_in_time_is_told_so():
    app = application()
    with served(app, drain_seconds=0.2) as client:
        answers = []
        waiting = threading.Thread(target=lambda: answers.append(ask(client, "/v1/wait")))
        streaming = threading.Thread(target=lambda: answers.append(cut_off(client)))
        waiting.start()
        streaming.start()
        until(lambda: app.state.gate.inside == 2)
        client.server._stop(signal.SIGINT, None)
        client.thread.join(PATIENCE_S)
        assert not client.thread.is_alive() and client.server.interrupted
        waiting.join()
        streaming.join()
        codes = {getattr(answer, "status_code", answer) for answer in answers}
        assert codes == {503, "cut off"}
        assert app.state.left == ["stream"]


def test_a_text_that_is_cut_is_told_so_in_its_stream(tmp_path):
    engine = FakeEngine(step_s=0.3)
    app = fake_engine.served(tmp_path, engine, new_tokens=64)
    app.state.gate.end_texts = lambda: _end_texts(engine)
    app.state.release = threading.Event()  # which `served` sets in the end
    asked = {"prompt": "The", "max_tokens": 60}
    with served(app, drain_seconds=0.2) as client, ThreadPoolExecutor(2) as pool:
        path = "/v1/completions"
        whole = pool.submit(client.post, path, json=asked)
        stream = pool.submit(client.post, path, json=asked | {"stream": True})
        until(lambda: len(engine.asked) == 2)
        client.server._stop(signal.SIGTERM, None)
        client.thread.join(PATIENCE_S)
    assert whole.result().status_code == 503
    assert whole.result().json()["error"]["code"] == "stopping"
    *_, told, done, rest = stream.result().text.split("\n\n")
    assert '"code":"stopping"' in told and (done, rest) == ("data: [DONE]", "")


def cut_off(client) -> str:
    """Read a stream, and return how it ended."""
    try:
        with client.stream("POST", "/v1/stream", json={}) as answer:
            for _ in answer.iter_raw():
                continue
    except httpx.RemoteProtocolError:
        return "cut off"
    return "whole"


def test_figures_are_of_one_application_and_tell_no_content():
    other = application()
    with served(application()) as client:
        for _ in range(3):
            ask(client)
        ask(client, f"/v1/{'x' * 30}")
        client.get(f"/v1/models?key={PROMPT}")
        client.post("/v1/echo", content=b"x")
        found = figures(client)
        assert found["moleforge_http_responses_total", "/v1/echo", "200"] == 3
        assert found["moleforge_http_responses_total", "/v1/echo", "415"] == 1
        assert found["moleforge_http_responses_total", "other", "404"] == 2
        assert found["moleforge_http_request_seconds_count",] == 6
        assert found["process_resident_memory_bytes",] > 1e6
        said = client.get("/metrics").text
        assert "xxx" not in said and "secret" not in said
        asked = {"Accept": "application/openmetrics-text; version=1.0.0"}
        assert client.get("/metrics", headers=asked).text.endswith("# EOF\n")
    told, _ = other.state.metrics.shown("")
    assert b"/v1/echo" not in told


def test_the_engine_s_figures():
    metrics = Metrics()
    stats = Stats(running=2, waiting=3, rows=8, prompt_tokens=11, completion_tokens=7)
    stats.spoken["sea"] = 5
    engine = SimpleNamespace(stats=stats, watcher=None)
    metrics.follow(engine)
    tokens = [Token(1, "a", [[0, 1], [1, 0]], [[0.75, 0.25], [0.5, 0.5]])]
    generation = Generation(Prompt((1, 2)), Sampling())
    generation.times.begun = generation.times.asked + 0.02
    for token in tokens:
        generation.add(Piece(token, token.text, finish="stop"))
    chosen = Generation(Prompt((1,)), Sampling())
    chosen.choice = RequestChoice("sea", 0.92, (("sea", 0.92),), ("sea",))
    chosen.add(Piece(None, "", finish="length"))
    engine.watcher.stepped(4, 0.01)
    engine.watcher.began(generation, 0.03)
    engine.watcher.went_on(0.004)
    engine.watcher.ended(generation, "stop")
    engine.watcher.ended(chosen, "length")
    engine.watcher.ended(Generation(Prompt((1,)), Sampling()), "cancelled")
    found = {}
    for metric in text_string_to_metric_families(metrics.shown("")[0].decode()):
        for sample in metric.samples:
            found[(sample.name, *sample.labels.values())] = sample.value
    assert found["moleforge_num_requests_running",] == 2
    assert found["moleforge_num_requests_waiting",] == 3
    assert found["moleforge_prompt_tokens_total",] == 11
    assert found["moleforge_generation_tokens_total",] == 7
    assert found["moleforge_expert_assignments_total", "sea"] == 5
    assert found["moleforge_batch_size_sum",] == 4
    assert found["moleforge_time_to_first_token_seconds_sum",] == 0.03
    assert found["moleforge_request_queue_time_seconds_sum",] == pytest.approx(0.02)
    assert found["moleforge_inter_token_latency_seconds_sum",] == 0.004
    assert found["moleforge_e2e_request_latency_seconds_count",] == 2
    # the mean of two layers' largest weights, and the router's own
    assert found["moleforge_router_confidence_sum",] == pytest.approx(0.625 + 0.92)
    ended = {
        reason: found["moleforge_requests_ended_total", reason]
        for reason in ("stop", "length", "cancelled")
    }
    assert set(ended.values()) == {1}


@pytest.fixture(params=["json", "plain"])
def written(request):
    """What is logged, in either format, as it is written."""
    root, ours = logging.getLogger(), logging.getLogger(logs.OURS)
    before = root.handlers, root.level, ours.level
    logs.configure(request.param)
    held = io.StringIO()
    root.handlers[0].setStream(held)
    try:
        yield held
    finally:
        root.handlers, *levels = before
        for logger, level in zip((root, ours), levels, strict=True):
            logger.setLevel(level)
        logging.captureWarnings(False)


def test_a_log_names_requests_and_nothing_of_them(written):
    key = "sk-of-somebody"
    secret = {"Authorization": f"Bearer {key}", "X-Request-Id": "of-a-client/7"}
    picture = "data:image/png;base64,iVBORw0KGgo"
    with served(application(keys=Keys(key))) as client:
        answer = ask(client, headers=secret)
        assert answer.headers["x-request-id"] == "of-a-client/7"
        answer = client.post("/v1/fail", json={"p": PROMPT, "url": picture}, headers=secret)
        assert answer.status_code == 500 and PROMPT not in answer.text
        answer = ask(client, f"/v1/echo?api_key={key}", headers={"X-Request-Id": "a b\x7f"})
        made = answer.headers["x-request-id"]
        assert answer.status_code == 401 and made.startswith("req-")
        client.get("/healthz")
        client.get("/a%0Ab\u00e9", headers=secret)
        # as a proxy of this machine says whose request it is, and so may anybody here
        client.get("/far", headers=secret | {"X-Forwarded-For": "\x1b[2J" + "9" * 999})
    said = written.getvalue()
    for part in (key, PROMPT, picture, "iVBOR", "a b"):
        assert part not in said
    assert "/healthz" not in said and "of-a-client/7" in said and made in said
    assert "/a%0Ab%C3%A9" in said and "RuntimeError" in said and "small_server.py" in said
    requests = [line for line in said.splitlines() if " request " in line or '"request"' in line]
    assert len(requests) == 5
    assert "\x1b" not in said and "[2J999" in said and len(requests[-1]) < 400
    if said.startswith("{"):
        lines = [json.loads(line) for line in said.splitlines()]
        assert [line["status"] for line in lines if line["message"] == "request"] == [
            200,
            500,
            401,
            404,
            404,
        ]
        assert {"time", "level", "request_id", "client", "method", "path", "seconds"} <= lines[
            0
        ].keys()


def test_any_of_several_keys_lets_in_and_no_other(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# of the lab\nsésame  # Ada\n\n  voilà#1\n")
    file.chmod(0o600)
    with served(application(keys=Keys("one two", file))) as client:
        for number, key in enumerate(("one", "two", "sésame", "voilà#1")):
            answer = ask(client, headers={"Authorization": f"bearer   {key}".encode()})
            assert answer.json()["client"] == f"key {number}"
        for wrong in ("", "on", "onetwo", "one two", "# of the lab", "Ada", "sesame", "#1"):
            answer = ask(client, headers={"Authorization": f"Bearer {wrong}".strip().encode()})
            assert answer.status_code == 401, wrong
        assert ask(client, headers={"Authorization": "Basic one"}).status_code == 401
        for path, status in (("/healthz", 200), ("/readyz", 200), ("/metrics", 200), ("/x", 401)):
            assert client.get(path).status_code == status
    with served(application(keys=Keys("one"), open_metrics=False)) as client:
        assert client.get("/metrics").status_code == 401
        assert client.get("/metrics", headers={"Authorization": "Bearer one"}).status_code == 200


def test_a_file_of_keys_that_changes_is_read_again_and_a_bad_one_is_not(tmp_path, caplog):
    file = tmp_path / "keys"
    file.write_text("first\n")
    file.chmod(0o644)
    keys = Keys(None, file)
    assert "others can read" in caplog.text and "first" not in caplog.text
    file.chmod(0o600)
    assert keys.find("first") == 0 and keys.find("second") is None
    file.write_text("second\nthird\n")
    assert keys.find("third") == 1 and keys.find("first") is None
    # who has the line of a former key is not taken for whoever had that one
    assert keys.find("second") == 2
    caplog.clear()
    for content in ("", "# none\n", "two words\n", "\xff".encode("latin-1").decode("latin-1") * 3):
        file.write_bytes(content.encode("latin-1"))
        assert keys.find("second") == 2 and keys.find("words") is None
    assert caplog.text.count("keys of before still hold") == 4 and "words" not in caplog.text
    caplog.clear()
    file.unlink()
    for _ in range(3):
        assert keys.find("second") == 2
    assert caplog.text.count("still hold") == 1
    file.write_text("fourth")
    assert keys.find("fourth") == 3
    # SIGHUP reads it whether or not it looks changed
    found = file.stat()
    file.write_text("fiveth")
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    keys.reload()
    assert keys.find("fiveth") == 4


@pytest.mark.parametrize("content", [b"", b"\n# a\n", b"a b\n", b"\xff\n", None])
def test_a_file_of_keys_with_none_is_refused_at_the_start(tmp_path, content):
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match="key"):
        Keys(None, file)


def test_every_key_is_compared_whichever_is_right(monkeypatch):
    compared = []

    def compare(asked, known):
        compared.append(len(known))
        return asked == known

    monkeypatch.setattr("hmac.compare_digest", compare)
    keys = Keys("a bb ccc")
    for key in ("a", "ccc", "none", ""):
        compared.clear()
        keys.find(key)
        assert compared == [32, 32, 32]


DRAIN_S = 60
# Each line that it reads makes a server of a copy of this process, which has imported it already
COMMAND = """
import gc, os, signal, sys, time
sys.path[:0] = ["tests"]
from small_server import application
from types import SimpleNamespace
from pipeline.serve.generation import Stats
from pipeline.serve.listening import listen
gc.freeze()
print("here", flush=True)
for words in sys.stdin:
    pid = os.fork()
    if not pid:
        break
    print("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
else:
    sys.exit()
def slowly():
    if "slow" in words:
        time.sleep(60)
    app.state.gate.opened = True
app = application(opened=False)
app.state.service.engine = SimpleNamespace(name="small", stats=Stats())
def say(text):
    print(text, flush=True)
say(os.getpid())
try:
    listen(app, "127.0.0.1", 0, say, slowly, drain_seconds=60, hang_up=lambda: say("hung up"))
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture(scope="module")
def starter():
    """A process that starts servers, one after another."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", COMMAND], cwd=ROOT, bufsize=0, **pipes) as process:
        assert process.stdout.readline() == b"here\n"
        yield process


def says_something(starter, seconds) -> bool:
    """Whether there is a line to read, or comes in time."""
    return bool(select.select([starter.stdout], [], [], seconds)[0])


def next_line(starter) -> str:
    """Return the next line."""
    assert says_something(starter, PATIENCE_S)
    return starter.stdout.readline().decode()


@pytest.mark.parametrize(
    ("words", "number", "wanted"),
    [
        ("", signal.SIGTERM, 0),
        ("", signal.SIGINT, 130),
        ("slow", signal.SIGTERM, 0),
        ("slow", signal.SIGINT, 130),
    ],
)
def test_signals_end_a_server_with_their_status_once_it_has_answered(
    starter, words, number, wanted
):
    starter.stdin.write(f"{words}\n".encode())
    pid, ended = int(next_line(starter)), ""
    try:
        address = next_line(starter).split()[2].rstrip(";")
        with httpx.Client(base_url=address, timeout=PATIENCE_S) as client:
            until(lambda: client.get("/readyz").status_code == (503 if words else 200))
            if not words:
                assert "serving small at http" in next_line(starter)
            os.kill(pid, signal.SIGHUP)
            assert next_line(starter) == "hung up\n"
            began = time.monotonic()
            if words:
                os.kill(pid, number)
                ended = next_line(starter)
                assert ended == f"ended {wanted}\n"
                return
            with client.stream("POST", "/v1/stream", json={}) as answer:
                blocks = answer.iter_raw()
                next(blocks)
                os.kill(pid, number)
                until(lambda: client.get("/readyz").status_code == 503)
                assert not says_something(starter, 0) and next(blocks)
                if number == signal.SIGINT:
                    # a second Ctrl-C waits for nothing
                    os.kill(pid, signal.SIGINT)
                    ended = next_line(starter)
            # the client that was waited for has left
            ended = ended or next_line(starter)
            assert ended == f"ended {wanted}\n"
            assert time.monotonic() - began < DRAIN_S
    finally:
        if not ended:
            os.kill(pid, signal.SIGKILL)
            while not next_line(starter).startswith("ended"):
                continue
