"""The report as one HTML file, read back by parsers that we did not write."""

import copy
import re
from html.parser import HTMLParser

import browsing
import pytest
from jinja2 import StrictUndefined

from pipeline.report import LanguageReport, RequestReport, page, read
from pipeline.report.card import _ENVIRONMENT as card_templates
from pipeline.report.format import DASH
from pipeline.report.page import _ENVIRONMENT as page_templates
from pipeline.report.style import DARK, LIGHT
from tests.small_reports import (
    NASTY,
    histories,
    language_report,
    language_values,
    request_report,
    request_values,
    spoiled,
)
from tests.test_report_terminal import printed

browser = browsing.browser  # a fixture
VOID = {"meta", "img"}  # elements without an end


class Reader(HTMLParser):
    """Checks that every element is closed in order, and keeps tables, texts and attributes."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.attributes, self.texts, self.tables, self.tags = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attrs):
        self.tags.append(name)
        self.attributes += attrs
        if name == "table":
            self.tables.append([])
        if name == "tr":
            self.tables[-1].append([])
        if name in ("td", "th"):
            self.tables[-1][-1].append("")
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def bare(report: LanguageReport) -> str:
    """Return the page without histories."""
    return page(report, {})


def test_page_is_well_formed_and_every_table_is_rectangular():
    reader = Reader(page(language_report(), histories()))
    assert len(reader.tables) >= 10
    for table in reader.tables:
        assert len({len(line) for line in table}) == 1
    assert reader.tags.count("h1") == 1
    names = [line[0] for table in reader.tables for line in table]
    for wanted in ("trunk + dummy", "stack (top-2)", "oracle expert", "train_shared", "anchor"):
        assert any(wanted in name for name in names)


@pytest.mark.parametrize("report", [language_report(), request_report()])
def test_links_lead_to_sections_that_exist(report):
    attributes = Reader(page(report, histories())).attributes
    ids = [value for key, value in attributes if key == "id"]
    assert len(ids) == len(set(ids))
    assert {value.removeprefix("#") for key, value in attributes if key == "href"} == set(ids)


@pytest.mark.parametrize("report", [language_report(), request_report()])
def test_page_refers_to_nothing_outside(report):
    text = page(report, histories())
    reader = Reader(text)
    assert not {"script", "link", "iframe", "object", "base"} & set(reader.tags)
    for key, value in reader.attributes:
        # a picture is in the page; its base64 may hold any letters
        inside = key == "src" and value.startswith("data:image/jpeg;base64,")
        assert inside or "//" not in (value or ""), (key, value)
    style = re.search("<style>(.*?)</style>", text, re.S).group(1)
    assert "url(" not in style
    assert "@import" not in style
    note = report.notes[0]
    assert any(note in words for words in reader.texts)


def test_names_are_escaped_everywhere():
    values = language_values((NASTY, "c", "docs"))
    values |= {"run": NASTY, "notes": [NASTY], "family": NASTY}
    values["machine"]["cpu"] = NASTY
    values["criteria"][0] |= {"name": NASTY, "text": NASTY, "detail": NASTY}
    values["wins"][0] |= {"against": NASTY, "axis": NASTY}
    values["quality"][0] |= {"name": NASTY, "axis": NASTY}
    values["speed"][0]["job"] = NASTY
    values["samples"][0]["spans"][0] |= {"speaker": NASTY, "text": NASTY}
    values["continuations"][0] |= {"prompt": NASTY, "held_out": NASTY, "written": [["x", NASTY]]}
    rows = histories()["train_router"]
    told = {f"train_router {NASTY}": rows, f"train_experts {NASTY}": rows, "train_experts b": rows}
    text = page(LanguageReport.model_validate(values), told)
    assert "script" not in Reader(text).tags
    assert "<script" not in text
    assert "\x1b" not in text
    assert text.encode("utf-8")


def test_lone_surrogates_do_not_stop_the_page():
    assert "a\ufffdb" in page(language_report(run="a\ud800b"), {})


def test_same_input_same_bytes_and_input_is_left_alone():
    report, rows = language_report(), histories()
    before = copy.deepcopy((report, rows))
    first = page(report, rows)
    assert first == page(read(report.to_json()), copy.deepcopy(rows))
    assert (report, rows) == before


def test_the_best_of_each_column_is_marked():
    text = bare(language_report())
    assert "oracle expert" in text
    # mean, three domains, perplexity, the best number of active experts, the rate that was taken
    assert len(re.findall('class="best"', text)) == 7


def test_a_win_is_always_drawn_with_its_axis():
    text = " ".join(Reader(bare(language_report())).texts)
    for axis in ("same total tokens", "same active parameters"):
        assert axis in text


def test_the_heat_map_frames_each_expert_on_its_own_domain():
    text = bare(language_report())
    section = text[text.index('id="map"') : text.index('id="routing"')]
    own = re.findall(r'<td class="own hot gain"[^>]*>(.*?)</td>', section)
    assert own == ["1.200<small>+0.300</small>"] * 3
    assert section.count("hot loss") == 3 * 3  # the anchor and the two others, on three domains


def fields_with_default(kind) -> list[str]:
    """Return the parts of a report that may be missing."""
    names = []
    for name, field in kind.model_fields.items():
        if not field.is_required() and name not in ("kind", "schema_version"):
            names.append(name)
    return names


@pytest.mark.parametrize(
    ("kind", "values", "gone"),
    [
        *(
            (LanguageReport, language_values(), name)
            for name in fields_with_default(LanguageReport)
        ),
        *((RequestReport, request_values(), name) for name in fields_with_default(RequestReport)),
    ],
)
def test_any_part_may_be_missing(kind, values, gone):
    values = {name: value for name, value in values.items() if name != gone}
    report = kind.model_validate(values)
    reader = Reader(page(report, histories()))
    assert not re.search(r"\bNone\b(?!  Requests)", " ".join(reader.texts))
    assert not re.search(r"\bNone\b(?!  Requests)", printed(report))


@pytest.mark.parametrize("kind", [LanguageReport, RequestReport])
def test_an_empty_report_is_a_page_too(kind):
    assert Reader(page(kind(run="empty", family="some"), {})).tags.count("h1") == 1


@pytest.mark.parametrize(
    "report",
    [
        LanguageReport.model_validate(spoiled(language_values())),
        RequestReport.model_validate(spoiled(request_values())),
    ],
)
def test_numbers_that_are_not_finite_become_dashes(report):
    assert "NaN" in report.to_json()  # and not null, which says that nothing was measured
    for text in (printed(report), " ".join(Reader(page(report, spoiled(histories()))).texts)):
        assert not re.search(r"\bnan\b|\binf\b", text, re.I)
        assert DASH in text


def test_one_expert_and_no_dense_row():
    quality = [row for row in language_values()["quality"] if row["kind"] != "dense"]
    one = {"experts": ["python"], "domains": ["python"], "opt_out": [], "quality": quality}
    report = LanguageReport.model_validate(language_values() | one)
    reader = Reader(bare(report))
    assert not any("leaves" in words for words in reader.texts)
    assert "Opt-out" not in printed(report)


def test_a_name_that_a_template_misspells_is_an_error_and_text_is_escaped():
    for environment in (page_templates, card_templates):
        assert environment.undefined is StrictUndefined
        assert environment.autoescape
        for name in environment.list_templates():
            text, _, _ = environment.loader.get_source(environment, name)
            assert "|safe" not in text


@pytest.mark.parametrize("colours", [LIGHT, DARK])
def test_text_keeps_its_contrast_on_every_colour(colours):
    for name in ("paper", "raised", "main", "gain", "loss", "share"):
        assert _contrast(colours["ink"], colours[name]) >= 4.5, name
    for name in ("soft", "accent", "good", "bad"):
        for ground in ("paper", "raised", "main"):
            assert _contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    for i in range(8):
        assert _contrast(colours[f"c{i}"], colours["paper"]) >= 3, i


def _contrast(one: str, other: str) -> float:
    """Return the contrast of two colours as WCAG 2 defines it."""

    def light(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (
            p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


def test_figures_of_forty_experts_in_a_layer_stand_beside_each_other(browser):
    """In a map of a quarter of the page they lay on each other, and nobody could read them."""
    values = language_values()
    values["experts"] = [f"expert{i}" for i in range(40)]
    for part in (values["routing"], *values["routing"]["layers"]):
        part["share"] = {name: [0.2] * 4 + [0.2 / 36] * 36 for name in part["share"]}
    tab = browser.new_page(viewport={"width": 1200, "height": 900})
    tab.set_content(bare(LanguageReport.model_validate(values)))
    assert tab.locator(".layers td").count() % 40 == 0 < tab.locator(".layers td").count()
    lying = "cells => cells.filter(cell => cell.scrollWidth > cell.clientWidth).length"
    assert tab.locator(".layers td").evaluate_all(lying) == 0
    # What has no room is reached by a scroll of the map and not of the page
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    tab.close()
