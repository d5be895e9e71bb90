"""The page of histories in a headless Chromium: hover, zoom, toggles, heat maps, phones, and that
it asks nothing of anybody."""

import json
import re

import browsing
import pytest
import small_histories as small
from playwright.sync_api import expect

from pipeline.__main__ import main
from pipeline.report.history_page.charts import Canvas, TrainingRows
from pipeline.report.history_page.drawn import DrawnRun, HistoryPage, Listed
from pipeline.report.history_page.page import history_page
from pipeline.report.style import DARK, LIGHT
from tests.small_reports import NASTY

browser = browsing.browser  # a fixture
SECTION = "section:has(h2:text-is('train_router'))"
CHART = f"{SECTION} .chart:has(b:text-is('training loss'))"
# Whether a canvas has a pixel of a colour.
HAS_COLOUR = """(canvas, colour) => {
    const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    for (let i = 0; i < data.length; i += 4)
        if (colour.every((part, j) => data[i + j] === part) && data[i + 3] === 255) return true;
    return false;
}"""
PINCH = """(over, places) => {
    const box = over.getBoundingClientRect();
    const fire = (name, at) => {
        const touches = at.map((part, i) => new Touch({identifier: i, target: over,
            clientX: box.left + part * box.width, clientY: box.top + 20}));
        over.dispatchEvent(new TouchEvent(name, {touches, cancelable: true, bubbles: true}));
    };
    fire("touchstart", places[0]);
    fire("touchmove", places[1]);
}"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The page of a filled store, and the ids of its runs, the latest first."""
    folder = tmp_path_factory.mktemp("page")
    store, ids = small.filled(folder / "store")
    to = folder / "history.html"
    assert main(["history", "report", "--store", str(store.root), "--to", str(to)]) == 0
    return to, ids[::-1]


@pytest.fixture
def visit(browser):
    """Open a file, in a browser of the language told; in the end it has neither complained nor
    asked for anything else."""
    contexts = []
    heard = []

    def opened(path, language=None, **options):
        context = browser.new_context(**options)
        if language:
            found = json.dumps({"value": language, "configurable": True})
            context.add_init_script(f"Object.defineProperty(navigator, 'language', {found})")
        context.set_default_timeout(browsing.PATIENCE_MS)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda asked: asked.url != path.as_uri() and heard.append(asked.url))
        # what a test that looks at pixels is told is no fault of the page's
        page.on("console", lambda m: "willReadFrequently" in m.text or heard.append(m.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("dialog", lambda dialog: (heard.append("a dialog"), dialog.dismiss()))
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert heard == []


def scrolled(chart):
    """Bring a chart where a mouse reaches it; return where its plot is."""
    over = chart.locator(".u-over")
    over.evaluate("each => each.scrollIntoView({block: 'center'})")
    return over.bounding_box()


def rgb(colour):
    """Return the parts of a colour of the style sheet."""
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def test_the_language_of_a_browser_under_the_c_locale_costs_no_chart(visit, made):
    charts = [visit(made[0], language=each).locator(CHART) for each in (None, "en-US@posix")]
    expect(charts[1]).to_have_count(charts[0].count())
    assert charts[0].count()


def test_a_hover_tells_the_nearest_line_and_every_value_there(visit, made):
    page = visit(made[0])
    chart = page.locator(CHART)
    values = chart.locator(".line b")
    ends = values.all_inner_texts()
    tip = chart.locator(".tip")
    expect(tip).to_be_hidden()
    box = scrolled(chart)
    page.mouse.move(box["x"] + 2, box["y"] + box["height"] / 2)
    expect(tip).to_be_visible()
    expect(tip).to_contain_text("train_router · step 10 · ")
    there = values.all_inner_texts()
    assert there != ends
    rows = small.rows(experts=True, seed=1)
    assert float(there[0]) == pytest.approx(rows[0]["train_nats"], abs=1e-3)
    # the other charts of the stage show the same place
    others = page.locator(f"{SECTION} .chart:has(b:text-is('learning rate')) .u-cursor-x")
    expect(others).to_be_visible()
    page.mouse.move(2, 2)
    expect(tip).to_be_hidden()
    assert values.all_inner_texts() == ends


def test_a_drag_zooms_all_charts_of_a_stage_and_a_double_click_shows_all_again(visit, made):
    page = visit(made[0])
    chart = page.locator(CHART)
    whole = page.locator(f"{SECTION} .whole:visible")
    assert whole.count() == 0
    before = chart.locator("canvas").screenshot()
    box = scrolled(chart)
    middle = box["y"] + box["height"] / 2

    def drag():
        page.mouse.move(box["x"] + 0.3 * box["width"], middle)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.7 * box["width"], middle, steps=4)
        page.mouse.up()

    drag()
    charts = page.locator(f"{SECTION} .chart")
    expect(whole).to_have_count(charts.count())
    page.mouse.move(2, 2)
    assert chart.locator("canvas").screenshot() != before
    chart.locator(".u-over").dblclick()
    expect(whole).to_have_count(0)
    drag()
    expect(whole).to_have_count(charts.count())
    chart.locator(".whole").click()
    expect(whole).to_have_count(0)
    page.mouse.move(2, 2)
    assert chart.locator("canvas").screenshot() == before


def test_a_run_and_a_line_are_hidden_and_shown_again(visit, made):
    page = visit(made[0])
    canvas = page.locator(CHART).locator("canvas")

    def colours():
        return [canvas.evaluate(HAS_COLOUR, rgb(LIGHT[f"c{number}"])) for number in range(2)]

    assert colours() == [True, True]
    heats = page.locator(f"{SECTION} .heat:visible")
    all_of_them = heats.count()
    button = page.locator(f"[data-run='{made[1][0]}']")
    button.click()
    expect(button).to_have_attribute("aria-pressed", "false")
    assert colours() == [False, True]
    expect(heats).to_have_count(all_of_them // 2)
    lines = page.locator(f"{CHART} .line")
    assert [each.get_attribute("aria-pressed") for each in lines.all()] == ["false", "true"]
    # what both runs share stays
    shared = page.locator("section:has(h2:text-is('train_shared')) .line")
    assert shared.first.get_attribute("aria-pressed") == "true"
    lines.last.click()
    assert colours() == [False, False]
    button.click()
    lines.last.click()
    assert colours() == [True, True]


def test_curves_lie_along_steps_tokens_or_hours(visit, made):
    page = visit(made[0])
    chart = page.locator(CHART)
    box = scrolled(chart)
    for along, told in (("tokens", "1000"), ("hours", "0"), ("step", "10")):
        page.select_option("#along", along)
        page.mouse.move(box["x"] + 2, box["y"] + 20)
        expect(chart.locator(".tip")).to_contain_text(re.compile(rf"\b{along} {told}(?![\d.])"))
        page.mouse.move(2, 2)


def test_heat_maps_have_a_cell_for_each_expert_and_step_and_tell_its_share(visit, made):
    page = visit(made[0])
    heats = page.locator(f"{SECTION} .heat")
    titles = heats.locator("figcaption").all_inner_texts()
    of_first = [title for title in titles if title.startswith(made[1][0])]
    # the mean and two layers over time, and all of them at the end
    assert len(of_first) == 4
    layer = heats.filter(has_text="layer 2").first
    validations = [row for row in small.rows(experts=True, seed=1) if "experts" in row]
    cells = layer.locator("i[data-tip]")
    assert cells.count() == small.EXPERTS * len(validations)
    shares = [row["experts"]["layer"]["2"]["shares"] for row in validations]
    last = cells.nth(len(validations) - 1)
    assert last.get_attribute("data-tip") == f"expert 0 · step 60 · {100 * shares[-1][0]:.1f} %"
    last.hover()
    expect(layer.locator(".tip")).to_contain_text("expert 0 · step 60")
    strengths = [
        float(cell.evaluate("each => each.style.getPropertyValue('--heat')"))
        for cell in cells.all()
    ]
    wanted = [min(1, each[i] * small.EXPERTS / 2) for i in range(small.EXPERTS) for each in shares]
    assert strengths == pytest.approx(wanted, abs=1e-3)


def test_tables_have_evaluations_deploys_and_times(visit, made):
    page = visit(made[0])
    for title in ("Figures of evaluations", "Evaluations", "Deploys", "What it took", "Notes"):
        expect(page.locator(f"section:has(h2:text-is('{title}'))")).to_be_visible()
    took = page.locator("section:has(h2:text-is('What it took')) tbody tr").all_inner_texts()
    assert [row.split()[0] for row in took][-1] == "all"
    assert "its last line is torn" in page.locator(".notes").inner_text()
    # who is used in which layer of held-out text
    assert page.locator("section:has(h2:text-is('experts in evaluations')) .heat").count() == 1


def test_a_phone_has_all_of_it_and_two_fingers_zoom(visit, made):
    page = visit(made[0], viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    assert page.evaluate("document.scrollingElement.scrollWidth") == 390
    chart = page.locator(CHART)
    width = chart.locator(".uplot").evaluate("each => each.getBoundingClientRect().width")
    assert 300 < width < 390
    over = chart.locator(".u-over")
    over.evaluate(PINCH, [[0.4, 0.6], [0.1, 0.9]])
    expect(chart.locator(".whole")).to_be_visible()
    page.set_viewport_size({"width": 844, "height": 390})
    expect(chart.locator(".uplot")).not_to_have_css("width", f"{width}px")


def test_the_dark_has_its_own_colours(visit, made):
    page = visit(made[0], color_scheme="dark")
    canvas = page.locator(CHART).locator("canvas")
    assert canvas.evaluate(HAS_COLOUR, rgb(DARK["c0"]))
    assert not canvas.evaluate(HAS_COLOUR, rgb(LIGHT["c0"]))


def test_names_end_neither_the_script_nor_the_page(visit, tmp_path):
    canvas = Canvas()
    bad = f"</script><!--{NASTY}"
    rows = small.rows(experts=True)
    section = canvas.section(bad, [TrainingRows(bad, bad, (0,), rows, (bad,) * small.EXPERTS)])
    runs = [DrawnRun(bad, bad, bad)]
    table = Listed(bad, (bad, bad), [(bad, bad)])
    page = HistoryPage(bad, bad, runs, canvas.axes, [section], [table], [bad])
    path = tmp_path / "bad.html"
    path.write_text(history_page(page), "utf-8")
    opened = visit(path)
    assert opened.locator("h2").first.inner_text().startswith("</script><!--<script>alert")
    assert opened.locator(".heat").count() == 4


def test_long_histories_are_thinned_to_what_a_chart_can_show_and_end_where_they_end():
    rows = [
        {"step": step, "train_nats": 5.0 - step / 1e4, "rss_mb": step % 100}
        for step in range(1, 20_001)
    ]
    canvas = Canvas()
    section = canvas.section(
        "train_shared", [TrainingRows("train_shared", "train_shared", (0,), rows)]
    )
    (axis,) = canvas.axes
    loss, memory = (chart.lines[0] for chart in section.charts)
    assert 200 < len(axis.step) == len(loss.values) <= 241
    assert axis.step[-1] == 20_000 and loss.values[-1] == pytest.approx(3.0)
    assert axis.tokens == [None] * len(axis.step)
    # of memory the peak, of losses the mean
    assert max(memory.values) == 99
    assert loss.values[0] == pytest.approx(5.0 - axis.step[0] / 2e4, abs=1e-3)


def test_equal_histories_give_equal_bytes_and_the_library_is_the_one_that_is_named(made):
    text = made[0].read_text("utf-8")
    store = made[0].parent / "store"
    again = made[0].parent / "again.html"
    options = ["--store", str(store), "--to", str(again), "--no-png"]
    assert main(["history", "report", *options]) == 0
    assert again.read_text("utf-8") == text
    assert "https://github.com/leeoniya/uPlot (v1.6.32)" in text
    # an address in its comment is all that names another place
    assert re.findall(r"https?://[^\s\"')]+", text) == ["https://github.com/leeoniya/uPlot"]
    drawn = json.loads(re.search(r'id="data">(.+?)</script>', text, re.DOTALL)[1])
    # a training that is of no run is drawn as one
    stray = small.address("train_dense", "total", 50)
    assert [run["id"] for run in drawn["runs"]] == [*made[1], stray]
    pictures = sorted(path.name for path in made[0].parent.glob("*.png"))
    stages = ("dense", "experts", "router", "shared")
    assert pictures == [f"history-train_{stage}.png" for stage in stages]
    assert all((made[0].parent / name).read_bytes()[:4] == b"\x89PNG" for name in pictures)
