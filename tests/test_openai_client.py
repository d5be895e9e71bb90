"""The real openai client in front of a bundle of adapters: what it sends in its many forms is
answered alike, and what is not served is told in a sentence that names the field."""

import base64
import io
import random
import re
import sys

import openai
import pytest
from PIL import Image

from pipeline.serve.app import create
from tests import small_stack
from tests.test_serve import running
from tests.test_serving_docs import done, examples

PICTURE = small_stack.pictures(1)[0]
QUESTION = {"type": "text", "text": "what color?"}
# What no message may hold: Python's types and pydantic's phrases
JARGON = re.compile(r"input should|validation|literal|NoneType|<class|\bdict\b|discriminator|0x")


@pytest.fixture(scope="module")
def client(tasks_bundle):
    with running(create(tasks_bundle)) as plain:
        address = f"{plain.base_url}/v1"
        yield openai.OpenAI(base_url=address, api_key="unused", max_retries=0, timeout=30)


def packed(image, kind="PNG", **options):
    held = io.BytesIO()
    image.save(held, kind, **options)
    return held.getvalue()


def part(url):
    return {"type": "image_url", "image_url": {"url": url}}


def ask(client, content, before=(), **more):
    messages = [*before, {"role": "user", "content": content}]
    done = client.chat.completions.create(**{"model": "small", "messages": messages} | more)
    return done.choices[0].message.content, done.model_extra["confidence"]


def told(client, *args, **more):
    """Return what the client's exception says of a request that is refused."""
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, *args, **more)
    message = error.value.body["message"]
    assert not JARGON.search(message) and len(message) < 400 and message.count(". ") <= 1
    return error.value.param, message


CONTENT = packed(PICTURE)
PLAIN = base64.b64encode(CONTENT).decode()
SPELLINGS = {
    "plain": f"data:image/png;base64,{PLAIN}",
    "in lines": f"data:image/png;base64,{base64.encodebytes(CONTENT).decode()}",
    "no type": f"data:;base64,{PLAIN}",
    "any bytes": f"data:application/octet-stream;base64,{PLAIN}",
    "another type": f"data:image/jpg;base64,{PLAIN}",
    "with a parameter": f"data:image/png;charset=utf-8;base64,{PLAIN}",
    "in capitals": f"DATA:image/PNG;BASE64,{PLAIN}",
    "for addresses": f"data:image/png;base64,{base64.urlsafe_b64encode(CONTENT).decode()}",
    "not padded": f"data:image/png;base64,{PLAIN.rstrip('=')}",
    "escaped": "data:image/png," + "".join(f"%{byte:02x}" for byte in CONTENT),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_picture_is_the_same_however_its_address_is_spelled(client, spelling):
    wanted = ask(client, [part(SPELLINGS["plain"]), QUESTION])
    assert ask(client, [part(SPELLINGS[spelling]), QUESTION]) == wanted
    assert ask(client, [QUESTION, part(SPELLINGS[spelling])]) == wanted


def test_a_picture_s_address_needs_no_object(client):
    wanted = ask(client, [part(SPELLINGS["plain"]), QUESTION])
    for spelling in ("plain", "in lines"):
        plain = {"type": "image_url", "image_url": SPELLINGS[spelling]}
        assert ask(client, [plain, QUESTION]) == wanted


@pytest.mark.parametrize("kind", ["WEBP", "BMP", "TIFF", "PPM", "GIF"])
def test_every_kind_of_picture_is_taken(client, kind):
    assert ask(client, [part(SPELLINGS["plain"].replace(PLAIN, _packed(kind))), QUESTION])


def _packed(kind):
    return base64.b64encode(packed(PICTURE, kind)).decode()


def test_a_photo_turned_by_its_data_is_seen_upright(client):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = packed(PICTURE.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    url = f"data:image/png;base64,{base64.b64encode(turned).decode()}"
    wanted = ask(client, [part(SPELLINGS["plain"]), QUESTION])
    assert ask(client, [part(url), QUESTION]) == wanted


@pytest.mark.parametrize("asked", ["<image>\n{}", "{}\n<image>", "<|image_1|>{}", "<img>a</img>{}"])
def test_a_placeholder_is_taken_out_of_a_question_as_it_was_in_training(client, asked):
    wanted = ask(client, [part(SPELLINGS["plain"]), QUESTION])
    question = {"type": "text", "text": asked.format(QUESTION["text"])}
    assert ask(client, [part(SPELLINGS["plain"]), question]) == wanted


def test_the_models_own_mark_in_a_text_without_pictures_is_text(client):
    question = "what is <|vision_start|><|image_pad|><|vision_end|> for?"
    assert ask(client, question)


def test_what_asks_for_nothing_is_as_good_as_left_out(client):
    wanted = ask(client, "hi")
    nothing = {"tools": [], "stop": [], "logprobs": False, "logit_bias": {}}
    nothing["response_format"] = {"type": "text"}
    assert ask(client, "hi", **nothing) == wanted


SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def test_a_system_text_and_earlier_turns_are_read_with_their_pictures(client):
    def prompt_tokens(before) -> int:
        messages = [*before, {"role": "user", "content": "what color?"}]
        done = client.chat.completions.create(model="small", messages=messages, max_tokens=1)
        return done.usage.prompt_tokens

    shown = {"role": "user", "content": [part(SPELLINGS["plain"]), QUESTION]}
    counts = [prompt_tokens(before) for before in ([], [SYSTEM], TURNS, [SYSTEM, *TURNS])]
    alone, told, turns, both = counts
    assert alone < told and alone < turns and both - turns == told - alone
    assert prompt_tokens([shown, TURNS[1]]) > turns + 4
    assert prompt_tokens([SYSTEM | {"role": "developer"}]) == told
    # The router reads the last question with the pictures of all.
    _, confidence = ask(client, "what color?", [shown, TURNS[1]])
    assert confidence == ask(client, [part(SPELLINGS["plain"]), QUESTION])[1]


REFUSED = [
    ("hi", {"before": [{"role": "tool", "content": "x"}]}, "messages", "nothing here calls tools"),
    ("hi", {"before": [{"role": "judge", "content": "x"}]}, "messages", "message 0: its role must"),
    (
        "hi",
        {"before": [{"role": "assistant", "content": [part(SPELLINGS["plain"])]}]},
        "messages",
        "a picture is shown by the user, not in a message of the role assistant",
    ),
    ([part("https://example.org/a.png"), QUESTION], {}, "messages", "fetches nothing"),
    (
        [{"type": "image_url", "image_url": 3}, QUESTION],
        {},
        "messages",
        "part 0 of content: image_url must be an object with a url",
    ),
    ([{"type": "input_image", "image_url": "x"}], {}, "messages", "has type 'input_image'"),
    ([QUESTION, {"type": "file", "file": {"file_id": "a"}}], {}, "messages", "part 1 of content"),
    ([{"text": "hi"}], {}, "messages", "it has no type"),
    ([{"type": "text", "text": 3}], {}, "messages", "text must be a text"),
    (["hi"], {}, "messages", "text and image_url are read"),
    ([], {}, "messages", "content must be a text, or a list of parts"),
    (None, {}, "messages", "content must be a text, or a list of parts"),
    ("hi", {"temperature": 2.5}, "temperature", "must be at most 2"),
    ("hi", {"n": 99}, "n", "must be at most 16"),
    ("hi", {"max_tokens": 0}, "max_tokens", "must be at least 1"),
    ("hi", {"max_tokens": "9"}, "max_tokens", "must be a whole number"),
    ("hi", {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "tools"),
    ("hi", {"response_format": {"type": "json_object"}}, "response_format", '{"type": "text"}'),
    ("hi", {"extra_body": {"expert": "poet"}}, "expert", "no such field"),
    ("<image>\nhi", {}, "messages", "the message has no picture; send it as an image_url"),
    (
        [part(SPELLINGS["plain"]), {"type": "text", "text": "<image> or <image>?"}],
        {},
        "messages",
        "is placeholder 2, and the message has 1 picture",
    ),
    ([part("data:image/png;base64,@@@"), QUESTION], {}, "messages", "no base64"),
    ([part("data:image/png;base64"), QUESTION], {}, "messages", "without a comma"),
    ([part(SPELLINGS["plain"][:300]), QUESTION], {}, "messages", "picture"),
    ([part(SPELLINGS["plain"])] * 5, {}, "messages", "at most 4"),
]


@pytest.mark.parametrize(("content", "more", "param", "said"), REFUSED)
def test_what_is_not_served_is_told_to_the_client(client, content, more, param, said):
    found, message = told(client, content, **more)
    assert found == param and said in message, message


def test_whatever_a_client_puts_into_a_message_is_answered_or_told(client):
    """Values of every JSON type at every place of a message."""
    draw = random.Random(0)
    values = [None, True, 3, -1.5, "", "hi", [], [1], {}, {"url": 3}, {"type": "text"}, [[]]]
    places = [
        lambda v: {"role": v, "content": "hi"},
        lambda v: {"role": "user", "content": v},
        lambda v: {"role": "user", "content": [v]},
        lambda v: {"role": "user", "content": [{"type": v, "text": "hi"}]},
        lambda v: {"role": "user", "content": [{"type": "text", "text": v}]},
        lambda v: {"role": "user", "content": [{"type": "image_url", "image_url": v}]},
        lambda v: {"role": "user", "content": [{"type": "image_url", "image_url": {"url": v}}]},
        lambda v: {"role": "user", "content": [QUESTION | {"odd": v}]},
        lambda v: {"role": "user", "content": "hi", "odd": v},
        lambda v: v,
    ]
    said = []
    for _ in range(60):
        message = draw.choice(places)(draw.choice(values))
        messages = draw.choice([[message], message, [message, message]])
        try:
            client.chat.completions.create(model="small", messages=messages, max_tokens=1)
        except openai.BadRequestError as error:
            said.append((error.param, error.body["message"]))
    assert len(said) > 20 and {param for param, _ in said} == {"messages"}
    assert not [message for _, message in said if JARGON.search(message)]


def test_the_example_with_a_picture_of_the_page_runs(client, tmp_path):
    """docs/serving.md, as it stands but for the address and the model's name."""
    _, program = examples("python")
    program = program.replace("http://localhost:8000/v1/", str(client.base_url))
    program = program.replace("http://localhost:8000/v1", str(client.base_url))
    (tmp_path / "picture.png").write_bytes(CONTENT)
    told = done(
        [sys.executable, "-c", program.replace("tiny-vlm", "small")], "http://localhost", tmp_path
    )
    wanted, confidence = ask(
        client,
        [part(SPELLINGS["plain"]), {"type": "text", "text": "What color is the shape?"}],
    )
    assert told.startswith(wanted) and told.strip().endswith(str(confidence))
