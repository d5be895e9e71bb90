"""The page at / in a headless Chromium, in front of a server that says what the real one says."""

import base64
import re

import browsing
import httpx
import pytest
from browsing import WHOLE, generate, painted
from pages import BOXES, BROKEN, LAYERS, MARKUP, NAMES, WORDS, FakeServer, picture
from playwright.sync_api import expect

from pipeline.metrics.answers import read_boxes
from pipeline.report.style import DARK, LIGHT
from tests.test_serve import running

browser = browsing.browser  # fixtures
visit = browsing.visit

PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def servers():
    """The addresses of two servers, of texts and of pictures, with what they were asked."""
    texts = FakeServer()
    pictures = FakeServer(pictures=True)
    with running(texts.app) as one, running(pictures.app) as other:
        texts.url = str(one.base_url)
        pictures.url = str(other.base_url)
        yield texts, pictures


@pytest.fixture
def texts(servers):
    """The server of texts, as if it were new."""
    return _fresh(servers[0])


@pytest.fixture
def pictures(servers):
    """The server of pictures, as if it were new."""
    return _fresh(servers[1])


def _fresh(server):
    server.asked.clear()
    server.left = 0
    server.key = None
    server.said = list(WORDS)
    return server


def test_what_is_typed_goes_on_token_by_token_in_the_colours_of_who_spoke(visit, texts):
    page = visit(texts.url)
    expect(page.locator("h1")).to_have_text("small")
    generate(page)
    assert page.locator(".tokens").inner_text() == "".join(WORDS)
    expect(page.locator(".flow .asked")).to_have_text("The tide")
    classes = page.locator(".token").evaluate_all("all => all.map(each => each.classList[1])")
    assert classes == [f"c{place % len(NAMES)}" for place in range(len(WORDS))]
    ((kind, body),) = texts.asked
    assert kind == "completions" and body["return_experts"] and body["stream"]
    assert body["prompt"] == "The tide" and body["model"] == "small" and body["max_tokens"] == 64
    facts = page.locator(".column .facts").inner_text()
    assert f"{len(WORDS)} tokens" in facts and f"seed {body['seed']}" in facts
    assert "reached max tokens" in facts
    # By weight each of them spoke a third, and the legend names all, and who is no expert.
    assert page.locator(".shares > span:not(.bar)").all_inner_texts().count("33 %") == 3
    assert page.locator("#legend button").all_inner_texts() == [*NAMES, "base"]


def test_a_token_that_is_pointed_at_tells_its_layers_and_is_marked_below(visit, texts):
    page = visit(texts.url)
    generate(page)
    page.hover(".token >> nth=1")
    detail = page.locator("#detail")
    expect(detail.locator("h2")).to_have_text("␣tide shop 83 %")
    rows = detail.locator(".layers > span:not(.bar)").all_inner_texts()
    assert rows == ["layer 0", "shop 100 %", *_layer(1), *_layer(2)]
    widths = (
        detail.locator(".layers .bar >> nth=1")
        .locator("i")
        .evaluate_all("all => all.map(each => each.style.width)")
    )
    assert widths == ["75%", "25%"]
    mark = page.locator(".strip i")
    assert mark.evaluate("each => each.style.left") == "8px"
    # and from below to the text, with the layer
    page.locator(".strip canvas").hover(position={"x": 9 * 4 + 3, "y": 20})
    assert page.locator(".token.at").inner_text() == " net"
    expect(detail.locator(".here").first).to_have_text("layer 1")
    # one that was pressed stays
    page.click(".token >> nth=3")
    page.hover(".token >> nth=0")
    assert page.locator(".token.at").inner_text() == " the"


def _layer(number):
    return [f"layer {number}", f"shop 75 %, {MARKUP} 25 %"]


def test_the_strip_has_a_pixel_for_each_token_and_layer_in_its_experts_colour(visit, texts):
    page = visit(texts.url)
    generate(page)
    painted(page)
    read = """canvas => [canvas.width, canvas.height, canvas.getAttribute("aria-label"),
        [...canvas.getContext("2d").getImageData(0, 0, 3, 1).data]]"""
    width, height, label, data = page.locator(".strip canvas").evaluate(read)
    assert (width, height) == (len(WORDS), LAYERS)
    assert "sea 33 %" in label
    # In the first layer one expert has all the weight, so it has all of its colour.
    drawn = [data[i : i + 3] for i in (0, 4, 8)]
    assert drawn == [_rgb(LIGHT[f"c{number}"]) for number in range(3)]


def test_arrows_move_over_tokens(visit, texts):
    page = visit(texts.url)
    generate(page)
    page.locator(".tokens").focus()
    at = page.locator(".token.at")
    assert at.inner_text() == "The"
    # the prompt stands in front of the first line, so what is below its first token is the last one
    for key, wanted in [
        ("ArrowRight", " tide"),
        ("ArrowLeft", "The"),
        ("ArrowDown", "."),
        ("ArrowLeft", " home"),
        ("ArrowUp", "The"),
        ("End", "."),
        ("Home", "The"),
    ]:
        page.keyboard.press(key)
        assert at.inner_text() == wanted
    active = page.locator(".tokens").get_attribute("aria-activedescendant")
    assert page.locator(f"#{active}").get_attribute("aria-label") == '"The", sea 83 %'
    page.keyboard.press("Escape")
    assert at.count() == 0


def test_only_the_route_shows_the_prompt_as_the_server_says_who_reads_it(visit, texts):
    page = visit(texts.url)
    page.fill("#prompt", "tide reef net")
    page.click("#route")
    expect(page.locator(".facts")).to_contain_text("3 tokens of the prompt")
    told = httpx.post(f"{texts.url}/v1/route", json={"text": "tide reef net"}).json()["tokens"]
    labels = page.locator(".token").evaluate_all(
        "all => all.map(each => each.getAttribute('aria-label'))"
    )
    assert [label.split(", ")[1] for label in labels] == [f"{each['top']} 83 %" for each in told]
    assert [kind for kind, _ in texts.asked] == ["route", "route"]


def test_two_readers_answer_side_by_side_with_one_seed(visit, texts):
    page = visit(texts.url)
    page.select_option("#beside", "base")
    generate(page)
    assert page.locator(".column h2").all_inner_texts() == ["small (the stack)", "base"]
    # at once: which of them comes first is open
    (one, other) = (body for _, body in texts.asked)
    assert {one.pop("model"), other.pop("model")} == {"small", "base"}
    assert one == other
    assert page.locator(".tokens").all_inner_texts() == ["".join(WORDS)] * 2
    boxes = [each.bounding_box() for each in page.locator(".column").all()]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
    # one expert's tokens alone, in both
    page.click("#legend button >> nth=1")
    picked = page.locator(".token.picked").all_inner_texts()
    assert picked == [" tide", " net", " home"] * 2


def test_a_dense_model_stands_beside_the_stack_and_is_nobody_s(visit, texts):
    page = visit(texts.url)
    assert page.locator("#beside option").last.text_content() == "dense total"
    page.select_option("#beside", "dense")
    generate(page)
    assert page.locator(".column h2").all_inner_texts() == ["small (the stack)", "dense total"]
    dense = page.locator(".column").last
    assert dense.locator(".tokens").inner_text() == "".join(WORDS)
    labels = dense.locator(".token").evaluate_all(
        "all => all.map(each => each.getAttribute('aria-label'))"
    )
    assert all(label.endswith(", no expert") for label in labels)
    expect(dense.locator(".hint")).to_have_text("A dense model: no experts in it.")
    # no colour of it in the legend, and none of its tokens among an expert's
    assert "dense" not in page.locator("#legend").inner_text()
    page.click("#legend button >> nth=1")
    assert dense.locator(".token.picked").count() == 0
    page.click("#legend button >> nth=1")
    assert dense.locator(".token.picked").count() == 0


def test_settings_are_sent_and_a_link_brings_them_back_without_asking(visit, texts):
    page = visit(texts.url)
    page.fill("#temperature", "0.7")
    page.fill("#top_p", "0.9")
    page.fill("#top_k", "40")
    page.fill("#min_p", "0.05")
    page.fill("#max_tokens", "12")
    page.fill("#seed", "7")
    page.fill("#stop_strings", "\\n\nEnd.")
    page.select_option("#beside", "expert:shop")
    generate(page, "a & b = <c> #d\nünd")
    body = texts.asked[0][1]
    assert body["stop"] == ["\n", "End."]
    numbers = {name: body[name] for name in ("temperature", "top_p", "top_k", "min_p", "seed")}
    assert numbers == {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "seed": 7}
    link = page.url
    texts.asked.clear()
    again = visit(texts.url, at=link.partition("/#")[2] and "#" + link.partition("#")[2])
    expect(again.locator("h1")).to_have_text("small")
    assert again.input_value("#prompt") == "a & b = <c> #d\nünd"
    assert again.input_value("#beside") == "expert:shop"
    assert again.input_value("#stop_strings") == "\\n\nEnd."
    assert not texts.asked
    again.press("#prompt", "Control+Enter")
    expect(again.locator("#status")).to_contain_text(WHOLE)
    assert texts.asked[0][1] == body


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_to_stop_leaves_the_server_and_keeps_the_text(visit, texts, how):
    page = visit(texts.url)
    page.fill("#prompt", "for ever")
    page.click("#send")
    expect(page.locator(".tokens")).to_contain_text("home....")
    if how == "button":
        page.click("#stop")
    else:
        page.keyboard.press("Escape")
    expect(page.locator(".facts")).to_contain_text("stopped")
    assert page.locator("#send").is_enabled() and not page.locator("#stop").is_enabled()
    for _ in range(100):
        if texts.left:
            break
        page.wait_for_timeout(20)
    assert texts.left == 1


@pytest.mark.parametrize(
    ("prompt", "told", "field"),
    [
        ("too long", "prompt: 90 tokens; shorten prompt", "prompt"),
        ("hot", "temperature: must be at most 2", "temperature"),
        ("full", "40 requests are waiting already", None),
        ("breaks", "the text failed", None),
        ("sheds", "this server is shutting down", None),
    ],
)
def test_an_error_is_told_in_the_server_s_words_where_it_belongs(visit, texts, prompt, told, field):
    page = visit(texts.url)
    page.fill("#prompt", prompt)
    page.press("#prompt", "Control+Enter")
    notice = page.locator(".column [role=alert]")
    expect(notice).to_contain_text(told)
    marked = page.locator("[aria-invalid]").evaluate_all("all => all.map(each => each.id)")
    assert marked == ([field] if field else [])
    # where another try may do, it is offered, and a server that is busy is told from a fault
    advice = {"full": "tried again in 7 s", "sheds": "tried again in a moment", "breaks": "a fault"}
    expect(notice.get_by_role("button", name="Try again")).to_have_count(int(prompt in advice))
    expect(notice).to_contain_text(advice.get(prompt, told))
    if prompt in BROKEN:
        # what came until then stays
        assert page.locator(".tokens").inner_text() == "".join(WORDS)


def test_a_server_that_went_away_is_told(visit, texts):
    page = visit(texts.url)
    page.route("**/v1/completions", lambda route: route.fulfill(status=502, body="<h1>gone</h1>"))
    page.fill("#prompt", "x")
    page.press("#prompt", "Control+Enter")
    expect(page.locator(".column [role=alert]")).to_contain_text("status 502")


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(visit, texts):
    texts.key = "se cret-1"
    page = visit(texts.url)
    expect(page.locator("#notice")).to_contain_text("the API key is missing")
    assert page.evaluate("document.activeElement.id") == "key"
    page.fill("#key", "se cret-1")
    texts.key = "secret-1"
    page.fill("#key", "secret-1")
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("small")
    generate(page)
    assert "secret" not in page.url
    stored = page.evaluate("[Object.values(sessionStorage), Object.values(localStorage)]")
    assert stored == [["secret-1"], []]
    assert "secret" not in page.context.cookies().__repr__()
    page.reload()
    expect(page.locator("h1")).to_have_text("small")
    # another tab is asked again
    other = page.context.new_page()
    other.goto(texts.url)
    expect(other.locator("#notice")).to_contain_text("the API key is missing")


def test_what_is_asked_before_the_server_has_said_whom_it_has_is_asked_then(visit, texts):
    page = visit(texts.url)
    held = []
    page.route("**/v1/models", lambda route: held.append(route))
    page.reload()
    page.fill("#prompt", "The tide")
    page.press("#prompt", "Control+Enter")
    expect(page.locator("h1")).to_have_text("…")
    (models,) = held
    models.continue_()
    expect(page.locator("#status")).to_contain_text(WHOLE)


def test_what_is_written_as_markup_stays_text(visit, texts):
    texts.said = ["<script>alert(1)</script>", MARKUP, "&amp;"]
    page = visit(texts.url)
    generate(page, f'{MARKUP}"><svg onload=alert(1)>')
    assert page.locator(".tokens").inner_text() == "".join(texts.said)
    expect(page.locator(".asked")).to_have_text(f'{MARKUP}"><svg onload=alert(1)>')
    page.hover(".token >> nth=1")
    page.click("#legend button >> nth=2")
    assert page.locator("img, main svg, main script").count() == 0
    # a letter with hundreds of marks over it covers nothing above the text
    assert page.locator(".flow").evaluate("it => getComputedStyle(it).overflowY") == "clip"
    again = visit(texts.url, at=f"#prompt={MARKUP}&beside={MARKUP}")
    expect(again.locator("#prompt")).to_have_value(MARKUP)


def test_a_picture_is_dropped_or_pasted_or_chosen_and_its_boxes_are_drawn(visit, pictures):
    pictures.said = [BOXES[:20], BOXES[20:]]
    page = visit(pictures.url)
    expect(page.locator("#prompt-label")).to_have_text("Question")
    content = picture()
    give = """([kind, name, data]) => {
        const bytes = Uint8Array.from(atob(data), (char) => char.charCodeAt(0));
        const held = new DataTransfer();
        held.items.add(new File([bytes], name, { type: "image/png" }));
        const event = kind === "paste"
            ? new ClipboardEvent(kind, { clipboardData: held, bubbles: true })
            : new DragEvent(kind, { dataTransfer: held, bubbles: true, cancelable: true });
        document.getElementById(kind === "paste" ? "prompt" : "drop").dispatchEvent(event);
    }"""
    shown = page.locator("#pictures img")
    for kind in ("drop", "paste"):
        page.evaluate(give, [kind, f"{kind}.png", base64.b64encode(content).decode()])
        expect(shown).to_have_count(1)
        assert shown.evaluate("async each => (await each.decode(), each.naturalWidth)") == 80
        page.click("#pictures button")
        expect(shown).to_have_count(0)
    expect(page.locator("#picture-field")).to_be_visible()
    page.set_input_files("#pick", {"name": "a.png", "mimeType": "image/png", "buffer": content})
    expect(shown).to_have_count(1)
    generate(page, "locate the square")
    ((kind, body),) = pictures.asked
    assert kind == "chat/completions" and "max_tokens" not in body
    (message,) = body["messages"]
    url = message["content"][0]["image_url"]["url"]
    assert base64.b64decode(url.partition(",")[2]) == content
    assert message["content"][1] == {"type": "text", "text": "locate the square"}
    chances = page.locator(".chances > span:not(.bar)").all_inner_texts()
    assert chances == ["sea", "20 %", "shop", "40 %", MARKUP, "40 %"]
    expect(page.locator(".chosen")).to_contain_text("Answered by shop.")
    seen = page.locator(".seen img").bounding_box()
    drawn = page.locator(".seen .box").bounding_box()
    assert drawn["x"] - seen["x"] == pytest.approx(0.1 * seen["width"], abs=1)
    assert drawn["y"] - seen["y"] == pytest.approx(0.2 * seen["height"], abs=1)
    assert drawn["width"] == pytest.approx(0.4 * seen["width"], abs=1)
    expect(page.locator(".box")).to_have_text("red <b>square</b>")
    # where it goes, without an answer
    page.click("#route")
    expect(page.locator(".facts")).to_contain_text("nothing was generated")
    assert len(pictures.asked[1][1]["messages"][0]["content"]) == 2


def chats(page):
    """Choose to chat, as people do: the round button itself is hidden, and a click that is forced
    there misses where the page is still moving."""
    page.click("#mode-field label:has([value=chat])")
    assert page.is_checked("input[value=chat]")


def test_a_chat_goes_on_with_its_turns(visit, texts):
    page = visit(texts.url)
    chats(page)
    page.fill("#system", "Be brief.")
    generate(page, "hi")
    assert page.input_value("#prompt") == ""
    page.fill("#prompt", "and then?")
    page.press("#prompt", "Control+Enter")
    expect(page.locator(".turn")).to_have_count(2)
    expect(page.locator("#status")).to_contain_text(WHOLE)
    said = [(each["role"], each["content"]) for each in texts.asked[1][1]["messages"]]
    answer = "".join(WORDS)
    first = [("system", "Be brief."), ("user", "hi"), ("assistant", answer)]
    assert said == [*first, ("user", "and then?")]


def test_a_question_whose_answer_broke_off_is_asked_again_without_the_half_answer(visit, texts):
    page = visit(texts.url)
    chats(page)
    generate(page, "hi")
    page.fill("#prompt", "breaks")
    page.press("#prompt", "Control+Enter")
    again = page.locator(".column [role=alert] button")
    expect(again).to_have_text("Try again")
    expect(page.locator(".turn")).to_have_count(2)
    expect(page.locator("#prompt")).to_have_value("breaks")
    texts.said = ["Once", " more"]
    with page.expect_request("**/v1/chat/completions"):
        again.click()
    # the half answer gives way to what comes now
    expect(page.locator(".turn .tokens").last).to_have_text("Once more")
    expect(page.locator(".turn")).to_have_count(2)
    first, second = (body for _, body in texts.asked[1:3])
    assert first["messages"] == second["messages"]
    # whoever is beside it was asked with that one
    assert first["seed"] == second["seed"]


def test_a_refused_question_is_asked_again_with_its_pictures(visit, pictures):
    page = visit(pictures.url)
    sent = []

    def refuse(route):
        sent.append(route.request.post_data_json["messages"])
        route.fulfill(status=503, headers={"Retry-After": "7"}, body="{}")

    page.route("**/v1/chat/completions", refuse)
    page.check("#goes_on")
    page.set_input_files("#pick", {"name": "a.png", "mimeType": "image/png", "buffer": picture()})
    expect(page.locator("#pictures img")).to_have_count(1)
    page.fill("#prompt", "which one?")
    page.press("#prompt", "Control+Enter")
    again = page.locator(".column [role=alert] button")
    expect(again).to_have_text("Try again")
    expect(page.locator("#prompt")).to_have_value("which one?")
    expect(page.locator("#pictures img")).to_have_count(1)
    with page.expect_request("**/v1/chat/completions"):
        again.click()
    expect(page.locator("#prompt")).to_have_value("which one?")
    assert sent[0] == sent[1] and len(sent[0][0]["content"]) == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_the_switch(visit, texts, scheme):
    page = visit(texts.url, color_scheme=scheme)
    other = {"light": "dark", "dark": "light"}[scheme]
    palettes = {"light": LIGHT, "dark": DARK}
    paper = "getComputedStyle(document.body).backgroundColor"
    assert _numbers(page.evaluate(paper)) == _rgb(palettes[scheme]["paper"])
    generate(page)
    page.select_option("#theme", other)
    assert _numbers(page.evaluate(paper)) == _rgb(palettes[other]["paper"])
    painted(page)
    pixel = page.locator(".strip canvas").evaluate(
        "each => [...each.getContext('2d').getImageData(0, 0, 1, 1).data]"
    )
    assert pixel[:3] == _rgb(palettes[other]["c0"])
    page.reload()
    assert _numbers(page.evaluate(paper)) == _rgb(palettes[other]["paper"])


def test_a_phone_shows_it_without_scrolling_sideways(visit, texts):
    texts.said = [*WORDS, "_" * 300, *WORDS * 20]
    page = visit(texts.url, viewport=PHONE, has_touch=True)
    page.select_option("#beside", "base")
    generate(page, "w" * 300)
    page.tap(".token >> nth=1")
    expect(page.locator("#detail h2")).to_contain_text("tide")
    wide = "document.documentElement.scrollWidth"
    assert page.evaluate(wide) <= PHONE["width"]
    assert page.locator("#detail").bounding_box()["y"] < PHONE["height"]


BOX_TEXTS = [
    BOXES,
    "[1, 2, 3, 4]",
    "[[1, 2, 3, 4], [5, 6, 7.5, 1000]]",
    '{"bbox_2d": [0, 0, 1, 1]}',
    '```json\n[{"bbox_2d": [1, 2, 3, 4], "label": null}]\n```',
    "[]",
    "no boxes",
    "[1, 2, 3]",
    "[1, 2, 3, 1001]",
    "[1, 2, 3, true]",
    "[[1, 2, 3, 4], 5]",
    "12",
    "[NaN, 1, 2, 3]",
    "[[[]]]",
]


def test_boxes_are_read_as_the_report_reads_them(visit, texts):
    page = visit(texts.url)
    found = page.evaluate(
        """async (all) => {
            const { readBoxes } = await import("/page/boxes.js");
            return all.map((each) => readBoxes(each)?.map(({ corners }) => corners) ?? null);
        }""",
        BOX_TEXTS,
    )
    wanted = []
    for text in BOX_TEXTS:
        boxes = read_boxes(text)
        wanted.append(None if boxes is None else [list(corners) for _, corners in boxes])
    assert found == wanted


def _rgb(colour):
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _numbers(colour):
    return [int(each) for each in re.findall(r"\d+", colour)][:3]
