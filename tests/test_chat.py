"""A bundle of adapters behind a real uvicorn: answers with pictures, routes, and what a client may
get wrong."""

import base64
import gc
import io
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from PIL import Image
from rich.console import Console

from benchmarks.interface import ask
from pipeline.data.images import images
from pipeline.data.images.images import decoding_bytes
from pipeline.data.images.inline import bytes_in
from pipeline.errors import DataError
from pipeline.families.adapters.inference import Request
from pipeline.serve import engine, pictures
from pipeline.serve.app import Access, closed, create, open_bundle
from pipeline.serve.chat_engine import ChatAdapters, SteadyChat
from pipeline.serve.engines import engine_of
from pipeline.serve.generation import Sampling
from pipeline.serve.limits import RequestLimits
from pipeline.serve.messages import Turn
from pipeline.serve.prompts import TaskPrompts
from pipeline.serve.terminal.bundle import OpenBundle
from pipeline.serve.terminal.conversation import chat
from pipeline.serve.terminal.drawing import drawing
from pipeline.serve.terminal.one_text import Asked, generate
from tests import small_stack
from tests.small_stack import EXPERTS
from tests.test_serve import asked, check_leaving, refused, running, wait_for

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def application(tasks_bundle):
    """The application on the bundle of a small run."""
    return create(tasks_bundle)


@pytest.fixture(scope="module")
def client(application):
    """A client of it, over a socket."""
    with running(application) as client:
        yield client


@pytest.fixture(scope="module")
def stack(application):
    """What runs behind it."""
    return application.state.service.engine.stack


def encoded(image: Image.Image, kind: str = "PNG") -> str:
    """Return a picture as a data: URI."""
    held = io.BytesIO()
    image.save(held, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(held.getvalue()).decode()}"


def asking(*urls: str, text: str = "what color?") -> dict:
    """Return a request's body with pictures."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]}


def test_a_server_fetches_pictures_of_the_hosts_that_it_was_told_of_and_else_of_none(tasks_bundle):
    for hosts in ((), ("pictures.example",)):
        app = closed(Access())
        open_bundle(app, tasks_bundle, image_hosts=hosts)
        assert app.state.service.engine.room.fetcher.hosts == set(hosts)


def test_a_bundle_runs_in_bf16_where_that_is_wanted_or_does_no_harm(tasks_bundle, monkeypatch):
    opened = engine_of(tasks_bundle, None, "bf16")
    assert isinstance(opened.network, SteadyChat)
    turns = [Turn("user", "what color?", (encoded(PICTURE),))]
    prompt = TaskPrompts(opened).chat(turns, None, goes_on=False, seconds=60)
    assert opened.submit(prompt, Sampling(None, 0.0)).wait()[-1].finish
    monkeypatch.setattr(engine, "device", lambda: "cpu")
    monkeypatch.setattr(engine, "has_bf16", lambda: True)
    monkeypatch.setattr(engine, "is_steady", lambda *_: False)
    assert type(engine_of(tasks_bundle, None, "auto").network) is ChatAdapters


PICTURE = small_stack.pictures(1)[0]


def test_an_answer_is_the_stacks_own(client, stack):
    answer = client.post(CHAT, json=asking(encoded(PICTURE)))
    assert answer.status_code == 200, answer.text
    found, wanted = answer.json(), stack.answer([Request("what color?", (PICTURE,))])[0]
    assert found["object"] == "chat.completion" and found["model"] == "small"
    choice = found["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": wanted.text, "refusal": None}
    assert choice["finish_reason"] == wanted.finish and found["expert"] == wanted.expert
    assert found["confidence"] == pytest.approx(wanted.confidence, abs=1e-4)
    assert [each["expert"] for each in found["alternatives"]] == [
        name for name, _ in wanted.alternatives
    ]
    usage = found["usage"]
    assert (
        usage["completion_tokens"] == wanted.completion_tokens
        and usage["total_tokens"] == wanted.prompt_tokens + wanted.completion_tokens
    )


def test_in_a_terminal_the_same_is_answered_to_a_file_and_in_turns(application, stack, tmp_path):
    PICTURE.save(tmp_path / "p.png")
    service = application.state.service
    bundle = OpenBundle(service.engine, service.prompts, {})
    console = Console(file=io.StringIO())
    drawn = drawing(console, service.engine.speakers, experts=False, as_json=True)
    generate(bundle, Asked("what color?", [tmp_path / "p.png"]), drawn)
    wanted = stack.answer([Request("what color?", (PICTURE,))])[0]
    assert drawn.text == wanted.text
    *tokens, end = [json.loads(line) for line in console.file.getvalue().splitlines()]
    assert {token["expert"] for token in tokens} <= {wanted.expert}
    assert (end["finish"], end["choice"]["answered_by"]) == (wanted.finish, wanted.expert)
    assert end["choice"]["confidence"] == pytest.approx(wanted.confidence, abs=1e-4)
    said = []
    lines = [f"/image {tmp_path}/p.png", "/expert count", "what color?"]
    chat(bundle, drawn, lines, said.append)
    (by_count,) = stack.generate([Request("what color?", (PICTURE,))], [["count"]])
    assert drawn.text == by_count["count"].text
    assert said == ["pictures of the next question: 1", "count answers from now on"]
    with pytest.raises(DataError, match="cannot be read"):
        generate(bundle, Asked("what color?", [tmp_path / "none.png"]), drawn)


def test_the_picture_counts(client):
    seen = {
        client.post("/v1/route", json=asking(encoded(image))).json()["confidence"]
        for image in small_stack.pictures(4)
    }
    assert len(seen) > 1


def test_a_route_is_the_stacks_own(client, stack):
    found = client.post("/v1/route", json=asking(encoded(PICTURE))).json()
    wanted = stack.route([Request("what color?", (PICTURE,))])[0]
    assert (found["object"], found["expert"]) == ("route", wanted.expert)
    assert found["answered_by"] == list(wanted.answered_by)
    assert sum(each["probability"] for each in found["alternatives"]) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", [*EXPERTS, "base"])
def test_an_expert_can_be_asked_by_name(client, stack, name):
    model = name if name == "base" else f"expert:{name}"
    found = client.post(CHAT, json=asking(encoded(PICTURE)) | {"model": model}).json()
    assert (found["expert"], found["model"]) == (name, model)
    assert "confidence" not in found
    said = stack.generate([Request("what color?", (PICTURE,))], [[name]])[0][name]
    assert found["choices"][0]["message"]["content"] == said.text


def test_text_alone_and_fewer_tokens(client):
    body = {"messages": [{"role": "user", "content": "what color?"}], "model": "expert:locate"}
    long, short = (client.post(CHAT, json=body | more).json() for more in ({}, {"max_tokens": 2}))
    assert (
        short["usage"]["completion_tokens"] == 2
        and short["choices"][0]["finish_reason"] == "length"
    )
    assert long["usage"]["completion_tokens"] == 8


def test_a_large_picture_is_made_as_large_as_in_training(client):
    """16,384 px are 16 tokens; the picture has 400 times as many."""
    small = client.post(CHAT, json=asking(encoded(PICTURE.resize((128, 128))))).json()
    large = client.post(CHAT, json=asking(encoded(PICTURE.resize((2560, 2560)), "JPEG"))).json()
    assert large["usage"]["prompt_tokens"] == small["usage"]["prompt_tokens"]


def test_health_and_models(client):
    told = client.get("/healthz").json()
    assert told["status"] == "ok" and len(told["bundle"]["sha256"]) == 64
    listed = client.get("/v1/models").json()["data"]
    experts = [f"expert:{name}" for name in EXPERTS]
    assert [each["id"] for each in listed] == ["small", *experts, "base"]
    assert listed[0]["experts"] == list(EXPERTS) and listed[0]["limits"]["images"] == 4


# The start of a PNG that says it is 60,000 pixels wide and as many high
HEADER = bytes.fromhex("89504e470d0a1a0a0000000d49484452")
SIZE = (60_000).to_bytes(4, "big") * 2
BOMB = (
    "data:image/png;base64,"
    + base64.b64encode(HEADER + SIZE + bytes.fromhex("0802000000")).decode()
)


@pytest.mark.parametrize(
    ("body", "said", "param"),
    [
        (asking("https://example.org/a.png"), "this server fetches nothing", "messages"),
        (asking("file:///etc/passwd"), "this server fetches nothing", "messages"),
        (asking("data:image/png;base64,@@@@"), "is not base64", "messages"),
        (asking("data:image/png;base64,AAAA"), "messages: ", "messages"),
        (asking(BOMB), "messages: ", "messages"),
        (asking(*[encoded(PICTURE)] * 5), "5 images; at most 4 are taken", "messages"),
        (asking() | {"expert": "color"}, "expert: no such field", "expert"),
        (asking() | {"max_tokens": 0}, "must be at least 1", "max_tokens"),
        (asking() | {"best_of": 2}, "best_of: not supported yet", "best_of"),
        ({"messages": []}, "messages: ", "messages"),
        (
            {"messages": [{"role": "system", "content": "be nice"}]},
            "messages: one of them has to be of the user",
            "messages",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "url": "x"}]}]},
            "messages: ",
            "messages",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, "messages: ", "messages"),
        ({}, "messages: must be given", "messages"),
    ],
)
def test_a_wrong_request_is_refused_and_the_next_is_answered(client, body, said, param):
    refused(client.post(CHAT, json=body), 400, said, param)
    assert client.post(CHAT, json=asking(encoded(PICTURE)) | {"max_tokens": 1}).status_code == 200


def test_a_request_over_the_longest_is_told_by_its_code(client):
    """By which clients that trim a chat know that it has to be shorter; LiteLLM goes by words."""
    long = [
        (CHAT, asking(text="word " * 4000), "messages", "20,000 characters; at most 2,048"),
        ("/v1/completions", {"prompt": [1] * 5000}, "prompt", "5,000 tokens"),
    ]
    for path, body, param, said in long:
        error = refused(client.post(path, json=body), 400, said, param, "context_length_exceeded")
        assert "the maximum input length is 256 tokens" in error["message"]


def test_what_is_no_json_or_too_long_or_elsewhere(client, application):
    refused(client.post(CHAT, content=b"{"), 400, "the request is not a JSON object")
    refused(client.get("/v1/complete"), 404, f"is not served here; .*POST {CHAT}")
    refused(
        client.post(CHAT, json=asking() | {"model": "gpt-4"}),
        404,
        "there are small, expert:color, expert:count, expert:locate, base",
        "model",
        "model_not_found",
    )
    service = application.state.service
    before, service.limits = service.limits, RequestLimits(body_bytes=100)
    try:
        refused(
            client.post(CHAT, json=asking(encoded(PICTURE))),
            413,
            "over 100 bytes",
            None,
            "too_large",
        )
    finally:
        service.limits = before


def test_no_made_up_request_fails_or_is_answered_otherwise_than_described(client):
    found = ask(str(client.base_url).rstrip("/"), 100)
    assert {status for _, status in found} <= {200, 400, 404}
    assert found[f"POST {CHAT}", 400] and found["POST /v1/route", 400]


def test_a_completion_of_its_own_tokens_is_the_expert_s_answer(client, stack):
    """What /v1/chat/completions puts together, sent as tokens."""
    ids = list(stack.model.chat.prompt_ids("what color?"))
    body = {"prompt": ids, "model": "expert:color", "max_tokens": 4}
    found = client.post("/v1/completions", json=body).json()
    chat = {"messages": asking()["messages"], "model": "expert:color", "max_tokens": 4}
    wanted = client.post(CHAT, json=chat).json()
    assert found["choices"][0]["text"] == wanted["choices"][0]["message"]["content"]
    assert found["usage"] == wanted["usage"] and found["expert"] == "color"
    # A text that is no chat is routed as the question that it is.
    told = client.post("/v1/completions", json={"prompt": "what color?"}).json()
    route = client.post("/v1/route", json={"text": "what color?"}).json()
    assert told["confidence"] == route["confidence"]


def test_a_client_that_leaves_stops_its_answer_and_frees_its_place(client, application, stack):
    body = asking(text="what color?") | {"model": "expert:locate"}
    core = stack.model.core.base_model.language_model
    # one pass for the router, one for each of eight tokens
    check_leaving(client, application.state.service.engine, CHAT, body, core, 9)


@contextmanager
def watched(monkeypatch):
    """Yield a list of what those being decoded take, one entry for each picture begun."""
    held, seen = [], []

    def decode(data, **options):
        taken = decoding_bytes(data, options["area_px"])
        held.append(taken)
        seen.append(sum(held))
        time.sleep(0.02)  # long enough that all of a burst come together
        try:
            return images.open_checked(data, **options)
        finally:
            # not the last one's: they differ, and end in any order
            held.remove(taken)

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "open_checked", decode)
        yield seen


@pytest.mark.parametrize("together", [1, 2, 5])
def test_a_burst_of_large_pictures_is_decoded_under_one_bound(
    together, client, application, monkeypatch
):
    """Squares of 640 px, so many of which may be decoded together."""
    engine = application.state.service.engine
    kinds = [("PNG", "RGB"), ("PNG", "RGBA"), ("JPEG", "L"), ("WEBP", "RGB")]
    urls = [encoded(Image.new(mode, (640, 640)), kind) for kind, mode in kinds]
    area = engine.image.max_pixels
    bound = together * max(decoding_bytes(bytes_in(url), area) for url in urls)
    monkeypatch.setattr(engine, "room", pictures.DecodingRoom(bound))
    with watched(monkeypatch) as seen, ThreadPoolExecutor(8) as pool:
        bodies = [asking(urls[i % 4], urls[(i + 1) % 4]) for i in range(8)]
        answers = list(pool.map(lambda body: client.post("/v1/route", json=body), bodies))
    assert [answer.status_code for answer in answers] == [200] * 8
    assert len(seen) == 16
    assert max(seen) <= bound
    assert together == 1 or max(seen) > bound // together, "no two came together"


def test_who_finds_no_room_for_a_picture_is_sent_away_or_may_leave(
    client, application, monkeypatch
):
    service = application.state.service
    room = service.engine.room
    monkeypatch.setattr(service, "limits", RequestLimits(body_bytes=1 << 25, seconds=0.2))
    with room.taken(room.most_bytes, time.monotonic()):
        answer = client.post("/v1/route", json=asking(encoded(PICTURE)))
        refused(answer, 503, "too many large pictures at once", None, "overloaded")
        assert answer.headers["retry-after"] == "1"
        monkeypatch.setattr(service, "limits", RequestLimits(body_bytes=1 << 25, seconds=60))
        connection = asked(client, "/v1/route", asking(encoded(PICTURE)))
        wait_for(lambda: service.prepared == 1)
        connection.close()
        wait_for(lambda: not service.prepared)
    assert client.post("/v1/route", json=asking(encoded(PICTURE))).status_code == 200


def test_pictures_that_wait_to_be_read_have_a_bound_too(client, application, monkeypatch):
    engine = application.state.service.engine
    room = pictures.DecodingRoom()
    monkeypatch.setattr(engine, "room", room)
    url = encoded(PICTURE)
    kept = pictures.opened(url, engine.image, room, time.monotonic() + 60)
    bytes_of_one = kept.width * kept.height * 3
    assert room.opened_bytes == bytes_of_one
    monkeypatch.setattr(pictures, "OPENED_BYTES", 2 * bytes_of_one - 1)
    answer = client.post("/v1/route", json=asking(url))
    refused(answer, 503, "too many pictures wait to be read", None, "overloaded")
    del kept
    # at once, and not when Python next looks for what knows itself
    gc.collect()
    gc.disable()
    try:
        for path, more in (("/v1/route", {}), (CHAT, {}), (CHAT, {"stream": True, "n": 2})):
            assert client.post(path, json=asking(url) | more).status_code == 200
            wait_for(lambda: room.opened_bytes == 0)
        # who leaves does so before, while and after an answer is made
        for seconds in (0, 0.001, 0.003, 0.01, 0.03):
            for path, more in ((CHAT, {}), (CHAT, {"stream": True}), ("/v1/route", {})):
                connection = asked(client, path, asking(url) | more)
                time.sleep(seconds)
                connection.close()
                wait_for(lambda: room.opened_bytes == 0)
    finally:
        gc.enable()


def test_no_answer_tells_an_address_of_this_process(client):
    draw = random.Random(1)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        held = io.BytesIO()
        PICTURE.save(held, kind)
        whole = held.getvalue()
        for content in (whole[:4], whole[: len(whole) // 2], b"\0" + whole, draw.randbytes(99)):
            url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
            said = client.post("/v1/route", json=asking(url)).text
            assert "0x" not in said
            assert "BytesIO" not in said
