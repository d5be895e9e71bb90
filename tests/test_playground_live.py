"""The page at / in front of the real server, over small random bundles: what it shows is what the
interface says."""

import base64

import browsing
import pytest
import torch
from browsing import generate
from pages import picture
from playwright.sync_api import expect

from pipeline.serve.app import create
from tests.test_serve import NAMES, PROMPT, running

browser = browsing.browser  # fixtures
visit = browsing.visit

TOKENS = 8


@pytest.fixture(scope="module")
def text(bundled):
    """A client of a server of experts of each token."""
    torch.set_num_threads(1)
    with running(create(bundled[2])) as client:
        yield client


@pytest.fixture(scope="module")
def chat(tasks_bundle):
    """A client of a server of adapters over a model that sees."""
    with running(create(tasks_bundle)) as client:
        yield client


def labels(page, column=0):
    """Return who spoke each token of a column, as the page says it."""
    spans = page.locator(".column").nth(column).locator(".token")
    told = spans.evaluate_all("all => all.map(each => each.getAttribute('aria-label'))")
    # the text may hold a comma too
    return [label.rpartition(", ")[2].rpartition(" ")[0].rpartition(" ")[0] for label in told]


def test_a_text_goes_on_as_the_interface_says_it_and_in_its_experts_colours(visit, text):
    page = visit(str(text.base_url))
    page.fill("#seed", "3")
    page.fill("#max_tokens", str(TOKENS))
    page.select_option("#beside", f"expert:{NAMES[1]}")
    generate(page, PROMPT)
    body = {"prompt": PROMPT, "seed": 3, "max_tokens": TOKENS, "return_experts": True}
    answer = text.post("/v1/completions", json=body).json()["choices"][0]
    assert page.locator(".tokens").first.inner_text() == answer["text"]
    told = answer["experts"]["tokens"]
    assert labels(page) == [token["top"] for token in told]
    assert set(labels(page, 1)) == {NAMES[1]}
    # A token is spoken by those who read the one before it, the first by the prompt's last one.
    read = text.post("/v1/route", json={"text": PROMPT}).json()["tokens"]
    assert told[0]["experts"] == read[-1]["experts"]
    assert len({str(token["experts"]) for token in told}) > 1


def test_only_the_route_is_what_the_interface_says(visit, text):
    page = visit(str(text.base_url))
    page.fill("#prompt", PROMPT)
    page.click("#route")
    expect(page.locator(".facts")).to_contain_text("tokens of the prompt")
    told = text.post("/v1/route", json={"text": PROMPT}).json()["tokens"]
    assert labels(page) == [token["top"] for token in told]
    assert page.locator(".tokens").inner_text() == PROMPT


def test_a_question_about_a_picture_shows_whom_the_router_chose(visit, chat):
    page = visit(str(chat.base_url))
    content = picture((96, 64))
    expect(page.locator("#picture-field")).to_be_visible()
    page.set_input_files("#pick", {"name": "a.png", "mimeType": "image/png", "buffer": content})
    expect(page.locator("#pictures img")).to_have_count(1)
    page.fill("#max_tokens", "4")
    generate(page, "what color?")
    shown = page.locator(".chances > span:not(.bar)").all_inner_texts()
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "what color?"},
    ]
    body = {"messages": [{"role": "user", "content": parts}]}
    told = chat.post("/v1/route", json=body).json()
    assert shown[::2] == [each["expert"] for each in told["alternatives"]]
    answering = page.locator(".chosen .hint").inner_text()
    answer = chat.post("/v1/chat/completions", json=body | {"max_tokens": 4}).json()
    assert answering == f"Answered by {answer['expert']}."
    said = page.locator(".text").inner_text()
    assert said == answer["choices"][0]["message"]["content"]
