"""Whatever comes over a socket: other sites' pages, slow and greedy clients, requests within
requests. A real server, and behind it a service without a model."""

import gzip
import json
import random
import re
import threading
import time

import pytest
from small_server import application, connection, raw, rest, served, until

from pipeline.serve import refusals
from pipeline.serve.limits import ConnectionLimits, RequestLimits
from pipeline.serve.same_site import Hosts

JSON = {"Content-Type": "application/json"}
HOST = b"Host: 127.0.0.1\r\n"
POST = b"POST /v1/echo HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"


@pytest.fixture(scope="module")
def client():
    """A client of a server with the usual limits."""
    with served(application()) as client:
        yield client


@pytest.fixture(scope="module")
def hasty():
    """A client of a server that waits for nothing long."""
    limits = ConnectionLimits(
        header_seconds=0.4, body_seconds=0.4, write_seconds=0.4, idle_seconds=60
    )
    with served(application(connections=limits)) as client:
        yield client


def status(answer: bytes) -> int:
    """Return the status of the first answer among bytes, which must be of a known form."""
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
    assert found, answer[:200]
    return int(found[1])


def refused(answer: bytes, wanted: int, said: str) -> None:
    """Check that one refusal came back, in OpenAI's form, and nothing behind it."""
    assert status(answer) == wanted, answer
    assert answer.count(b"HTTP/1.1") == 1, answer
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    assert re.search(said, json.loads(body)["error"]["message"]), body


ELSEWHERE = {"Sec-Fetch-Site": "cross-site"}
# Who asks, by the headers a browser sends, and whether that is one of us
ASKED = {
    "a program": ({}, 200),
    "its own page": ({"Origin": "http://127.0.0.1:{port}"}, 200),
    "another page": ({"Origin": "https://evil.example"}, 403),
    "a page of another port": ({"Origin": "http://127.0.0.1:1"}, 403),
    "its own page behind TLS": ({"Origin": "https://127.0.0.1:{port}"}, 200),
    "a page in a sandbox": ({"Origin": "null"}, 403),
    "a name within a name": ({"Origin": "http://127.0.0.1:{port}.evil.example"}, 403),
    "a user of that name": ({"Origin": "http://127.0.0.1:{port}@evil.example"}, 403),
    "rebound": ({"Host": "evil.example:{port}"}, 421),
    "rebound with its page": ({"Host": "evil.example", "Origin": "http://evil.example"}, 421),
    "localhost": ({"Host": "localhost:{port}"}, 200),
    "LOCALHOST.": ({"Host": "LOCALHOST.:{port}"}, 200),
    "another loopback": ({"Host": "127.8.9.1:{port}"}, 200),
    "IPv6": ({"Host": "[::1]:{port}"}, 200),
    "an address of the network": ({"Host": "192.168.0.9:{port}"}, 421),
    "no port": ({"Host": "127.0.0.1:x"}, 421),
    "a user": ({"Host": "a@127.0.0.1:{port}"}, 421),
    "a path": ({"Host": "127.0.0.1:{port}/a"}, 421),
    "a picture of another page": (
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        403,
    ),
    "a link": ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200),
}


@pytest.mark.parametrize(("headers", "wanted"), ASKED.values(), ids=ASKED)
def test_who_may_ask(client, headers, wanted):
    port = str(client.base_url.port)
    headers = {name: value.replace("{port}", port) for name, value in headers.items()}
    for answer in (
        client.get("/healthz", headers=headers),
        client.post("/v1/echo", json={}, headers=headers),
    ):
        assert answer.status_code == wanted, answer.text
        assert "access-control-allow-origin" not in answer.headers
        if wanted != 200:
            assert answer.json()["error"]["code"] in ("host_not_allowed", "origin_not_allowed")


def test_a_probe_of_http_1_0_needs_no_host_and_a_page_does(client):
    probe = b"GET /healthz HTTP/1.0\r\n"
    assert status(raw(client, probe + b"\r\n")) == 200
    assert status(raw(client, probe + b"Origin: http://127.0.0.1\r\n\r\n")) == 421


def test_the_names_of_a_server():
    everywhere = Hosts("0.0.0.0", ["llm.example.org", "*.lab.example"])  # noqa: S104
    for name in ("192.168.0.9", "8.8.8.8", "localhost", "llm.example.org", "a.lab.example"):
        assert everywhere.has(name)
    for name in ("evil.example", "lab.example", "a.b.lab.example", "llm.example.org.evil.example"):
        assert not everywhere.has(name)
    assert Hosts("10.0.0.1").has("10.0.0.1") and not Hosts("10.0.0.1").has("localhost")
    assert Hosts("127.0.0.1", ["*"]).has("anything") and Hosts("llm").has("LLM")


def test_a_page_that_was_named_may_ask_and_another_may_not():
    with served(application(origins=("https://chat.example",))) as client:
        asks = {
            "Origin": "https://chat.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type",
        }
        before = client.options("/v1/echo", headers=asks)
        assert before.status_code == 200
        assert before.headers["access-control-allow-origin"] == "https://chat.example"
        assert "authorization" in before.headers["access-control-allow-headers"]
        answer = client.post("/v1/echo", json={}, headers={"Origin": "https://chat.example"})
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        for method in ("OPTIONS", "POST"):
            other = client.request(method, "/v1/echo", headers=asks | {"Origin": "https://evil"})
            assert other.status_code == 403
            assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "json"]
)
def test_what_a_page_may_send_unasked_is_not_taken(client, kind):
    answer = client.post("/v1/echo", content=b"{}", headers={"Content-Type": kind})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
    told = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert client.post("/v1/echo", content=b"{}", headers=told).status_code == 200


def test_a_packed_body_is_told_to_be_one(client):
    sent = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    answer = client.post("/v1/echo", content=gzip.compress(b"{}"), headers=sent)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (415, "unsupported_encoding")
    assert "'gzip'; send it without Content-Encoding" in error["message"]
    plain = sent | {"Content-Encoding": "Identity"}
    assert client.post("/v1/echo", content=b"{}", headers=plain).status_code == 200


def test_a_body_over_the_limit_is_refused_before_it_is_read(client, monkeypatch):
    monkeypatch.setattr(refusals, "LINGER_S", 0.3)
    # nothing of it is sent, so an answer shows that none was waited for
    announced = POST + b"Content-Length: 1001\r\n\r\n"
    with connection(client) as sock:
        began = time.monotonic()
        sock.sendall(announced)
        first = sock.recv(1 << 16)
        assert time.monotonic() - began < 10
        # still read for a while, so that no reset takes the answer away
        sock.sendall(b"x" * 1001)
        refused(first + rest(sock), 413, "over 1,000 bytes")
    asks_first = POST + b"Content-Length: 1001\r\nExpect: 100-continue\r\n\r\n"
    refused(raw(client, asks_first), 413, "over 1,000 bytes")
    # without a length in the headers: as soon as it is too long
    chunked = POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"1f4\r\n" + b"x" * 500 + b"\r\n"
    again = b"1f4\r\n" + b"x" * 500 + b"\r\n" + b"1\r\nx\r\n"
    refused(raw(client, chunked, again), 413, "over 1,000 bytes")
    assert client.post("/v1/echo", content=b"1" * 1000, headers=JSON).json()["length"] == 1000


def test_what_does_not_come_to_its_end_is_ended(hasty):
    began = time.monotonic()
    assert raw(hasty) == b""  # a browser's connection ahead of need: no answer to show
    refused(raw(hasty, b"POST /v1/echo HT"), 408, "no whole request")
    drops = [b"X-Slow: 1\r\n"] * 6
    refused(raw(hasty, b"GET /healthz HTTP/1.1\r\n", *drops, pause_s=0.1), 408, "no whole request")
    announced = POST + b"Content-Length: 50\r\n\r\n"
    refused(raw(hasty, announced, *[b"x"] * 6, pause_s=0.1), 408, "not whole after")
    # a second request within a connection is waited for no longer
    first = b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n"
    both = raw(hasty, first, b"GET /hea", pause_s=0.1)
    assert both.count(b"HTTP/1.1") == 2 and status(both) == 200 and b"408" in both
    assert time.monotonic() - began < 50


def test_who_does_not_read_is_let_go(hasty):
    app = hasty.server.config.app
    with connection(hasty) as sock:
        sock.sendall(POST.replace(b"echo", b"stream") + b"Content-Length: 2\r\n\r\n{}")
        # megabytes lie in the sockets until the server waits for room, and then no longer
        until(lambda: app.state.left)
        until(lambda: not hasty.server.server_state.connections)


def test_connections_beyond_the_limit_are_told_so_or_ended():
    limits = ConnectionLimits(connections=3, header_seconds=60)
    rest = b" /%s HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
    get = b"GET" + rest
    with served(application(connections=limits)) as client:
        open_now = client.server.server_state.connections
        held = [connection(client) for _ in range(3)]
        until(lambda: len(open_now) == 3)
        refused(raw(client, get % b"readyz"), 503, "too many connections")
        # who asks these restarts a server that does not answer
        for path in (b"healthz", b"metrics"):
            assert status(raw(client, get % path)) == 200
            assert status(raw(client, b"HEAD" + rest % path)) == 200
        until(lambda: len(open_now) == 3)
        # those that say nothing are not held for ever either
        held += [connection(client) for _ in range(3)]
        until(lambda: len(open_now) == 6)
        assert raw(client) == b""
        for sock in held:
            sock.close()
        until(lambda: not open_now)
        assert status(raw(client, get % b"readyz")) == 200


LENGTH = b"Content-Length: 5\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
SECRET = b"GET /v1/secret HTTP/1.1\r\n" + HOST + b"\r\n"
# Two requests in one, as servers in a row may see it differently
SMUGGLED = {
    "two lengths": b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}" + SECRET,
    "a length and chunks": b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    + SECRET,
    "chunks and a length": b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n"
    + SECRET,
    "a length in a list": b"Content-Length: 2, 3\r\n\r\n{}" + SECRET,
    "a signed length": b"Content-Length: +2\r\n\r\n{}" + SECRET,
    "a length below 0": b"Content-Length: -1\r\n\r\n" + SECRET,
    "a length in hex": b"Content-Length: 0x2\r\n\r\n{}" + SECRET,
    "an odd coding": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SECRET,
    "two codings": b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + SECRET,
    "a space before the colon": b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + SECRET,
    "a bad chunk length": b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n" + SECRET,
    "a chunk that is longer": b"Transfer-Encoding: chunked\r\n\r\n1\r\nxyz\r\n0\r\n\r\n" + SECRET,
    "a NUL": b"X: a\0b\r\nContent-Length: 2\r\n\r\n{}" + SECRET,
    "a name with a space": b"X Y: 1\r\nContent-Length: 2\r\n\r\n{}" + SECRET,
    "two hosts": b"Host: evil.example\r\nContent-Length: 2\r\n\r\n{}" + SECRET,
}


@pytest.mark.parametrize("rest_of", SMUGGLED.values(), ids=SMUGGLED)
def test_a_request_within_a_request_is_not_answered(client, rest_of):
    answer = raw(client, POST + rest_of)
    refused(answer, status(answer), ".")
    assert status(answer) in (400, 421, 501)
    assert client.get("/healthz").status_code == 200


def test_headers_are_bounded(client):
    for long in (b"X: " + b"x" * (40 << 10), b"X: x\r\n" * 9000, b"GET /" + b"x" * (40 << 10)):
        answer = raw(client, b"GET /healthz HTTP/1.1\r\n" + HOST + long)
        refused(answer, 400, "no valid HTTP")


def test_what_is_no_http_gets_an_answer_or_none_and_the_next_request_its_own(client, caplog):
    draw = random.Random(0)
    begins = [b"", b"GET / HTTP/1.1\r\n", POST, b"\x16\x03\x01", b"PRI * HTTP/2.0\r\n\r\n"]
    for _ in range(40):
        data = draw.choice(begins) + draw.randbytes(draw.randrange(200)) + b"\r\n\r\n\r\n"
        with connection(client) as sock:
            sock.sendall(data)
            sock.shutdown(1)
            answer = rest(sock) if b"Content-Length" not in data else b""
        assert not answer or status(answer) in (400, 404, 405, 408, 415, 421), answer
    assert client.get("/healthz").status_code == 200
    assert "Traceback" not in caplog.text and "raised_at" not in caplog.text


def test_garbage_behind_a_request_that_is_being_answered_ends_its_connection_alone(client, caplog):
    stream = POST.replace(b"echo", b"stream") + b"Content-Length: 2\r\n\r\n{}"
    with connection(client) as sock:
        sock.sendall(stream + b"\0garbage\r\n\r\n")
        assert status(sock.recv(1 << 16)) == 200
    assert client.post("/v1/echo", json={}).status_code == 200
    assert not [record for record in caplog.records if record.exc_info]


def test_bodies_of_all_requests_have_one_bound():
    app = application(connections=ConnectionLimits(bodies_bytes=2500))
    with served(app) as client:
        held = []

        def wait():
            held.append(client.post("/v1/wait", content=b"x" * 1000, headers=JSON))

        threads = [threading.Thread(target=wait) for _ in range(2)]
        for thread in threads:
            thread.start()
        until(lambda: app.state.waiting == 2)
        answer = client.post("/v1/echo", content=b"x" * 1000, headers=JSON)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
        assert client.post("/v1/echo", content=b"x" * 400, headers=JSON).status_code == 200
        app.state.release.set()
        for thread in threads:
            thread.join()
        assert [each.status_code for each in held] == [200, 200]
        assert client.post("/v1/echo", content=b"x" * 1000, headers=JSON).status_code == 200


def test_a_large_limit_is_not_held_in_memory_for_what_is_not_sent():
    limits = RequestLimits(body_bytes=1 << 40)
    with served(application(limits)) as client:
        announced = POST + b"Content-Length: " + str(1 << 39).encode() + b"\r\n\r\n"
        with connection(client) as sock:
            sock.sendall(announced)
        assert client.get("/healthz").status_code == 200


def test_no_address_leads_to_another_and_a_long_one_is_told_in_part(client, caplog):
    # it would be of the scheme on this side of a proxy, so it is answered where it is
    assert client.post("/v1/echo/", json={}).status_code == 200
    assert client.post("/v1/none/", json={}).status_code == 404

    def paths() -> list[str]:
        logged = (each for each in caplog.records if each.getMessage() == "request")
        return [path for path in (each.fields["path"] for each in logged) if path.startswith("/a")]

    with caplog.at_level("INFO", "pipeline"):
        answer = client.get("/" + "a" * 20_000)
        # a request is written down when its answer has left
        until(paths)
    assert answer.status_code == 404 and len(answer.content) < 1000
    (path,) = paths()
    assert len(path) <= 300
