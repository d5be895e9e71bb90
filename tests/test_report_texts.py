"""Texts and requests that a report shows: word for word, in their speakers' colours, inside the
page and nowhere else."""

import re

import pytest
from pydantic import ValidationError
from small_reports import (
    NASTY,
    PICTURE,
    language_report,
    language_values,
    request_report,
    request_values,
)
from test_report_page import Reader, _contrast

from pipeline.families.report_files import NOTE
from pipeline.report import LanguageReport, RequestReport, page, read, split
from pipeline.report.spoken import LINES, looks, speakers
from pipeline.report.style import DARK, LIGHT

TINT = 0.25  # of the colour in what is said; the rest is paper


def passages(report) -> list[str]:
    """Return the texts of a page's passages as a browser has them."""
    text = page(report, {})
    found = re.findall(r'<p class="passage" dir="auto">(.*?)</p>', text, re.S)
    return ["".join(Reader(f"<p>{each}</p>").texts) for each in found]


def test_a_text_stands_in_the_page_as_it_is():
    spans = [
        {"speaker": "c", "tokens": 1, "text": "  if a < b:\n\n\treturn"},
        {"speaker": "docs", "tokens": 1, "text": ""},
        {"speaker": "base", "tokens": 1, "text": " \n &amp; <b>"},
    ]
    sample = {"domain": "c", "spans": spans, "goes_on": False}
    report = language_report(samples=[sample], continuations=[])
    assert passages(report) == ["".join(span["text"] for span in spans)]
    longer = language_report(samples=[sample | {"goes_on": True}], continuations=[])
    assert passages(longer) == [f"{passages(report)[0]} …"]


def test_each_piece_has_its_speakers_colour_and_name_and_the_base_none():
    report = language_report()
    pieces = re.findall(r'<span class="said (\w+)" title="(\w+)">([^<]*)</span>', page(report, {}))
    assert ("c0", "anchor", "How to\n") in pieces
    assert ("c3", "docs", "  begin") in pieces
    # of the stack's continuation
    assert ("c1", "python", "list): ") in pieces and ("c2", "c", "return 1") in pieces
    assert len(pieces) == 4
    assert [each.name for each in speakers(report)] == ["anchor", "python", "c", "docs", "base"]
    # as it was written, without a colour
    assert "the the the" in passages(report)


def test_experts_beyond_the_colours_are_told_apart_by_a_line():
    names = [f"e{i}" for i in range(8 * len(LINES))]
    found = looks(language_report(experts=names))
    assert len(set(found.values())) == len(names)
    assert found["e1"] == "c1" and found["e9"] == "c1 dotted"


def test_shares_below_a_text_are_of_its_tokens():
    text = page(language_report(continuations=[]), {})
    told = re.findall(r"</i>(\w+) <b>(\d+ %)</b>", text[text.index('class="spoken"') :])
    assert told[:3] == [("docs", "62 %"), ("anchor", "25 %"), ("base", "12 %")]


@pytest.mark.parametrize("colours", [LIGHT, DARK])
def test_words_keep_their_contrast_on_every_speakers_colour(colours):
    for number in range(8):
        mixed = "#"
        for i in (1, 3, 5):
            tint = int(colours[f"c{number}"][i : i + 2], 16)
            paper = int(colours["paper"][i : i + 2], 16)
            mixed += f"{round(TINT * tint + (1 - TINT) * paper):02x}"
        assert _contrast(colours["ink"], mixed) >= 4.5, number
    assert f"var(--key) {TINT:.0%},var(--paper)" in page(language_report(), {})


def test_requests_are_shown_with_their_pictures_and_nothing_of_them_is_markup():
    values = request_values()
    values["misrouted"][0] |= {"prompt": NASTY, "choice": NASTY}
    values["examples"][0] |= {"prompt": NASTY, "right": NASTY}
    values["examples"][0]["answers"][0] |= {"text": NASTY, "by": NASTY}
    text = page(RequestReport.model_validate(values), {})
    reader = Reader(text)
    assert "script" not in reader.tags and "\x1b" not in text
    assert [value for key, value in reader.attributes if key == "src"] == [PICTURE, PICTURE]
    assert "76 % sure" in text.replace("\xa0", " ") and "0.284" in text


@pytest.mark.parametrize(
    "picture",
    [
        "https://elsewhere.example/p.jpg",
        "data:image/svg+xml;base64,PHN2Zz4=",
        "data:text/html;base64,PGI+",
        "javascript:alert(1)",
        f"{PICTURE}\n",
        f"{PICTURE} onerror=x",
    ],
)
def test_a_picture_is_in_the_report_or_is_refused(picture):
    values = request_values()
    values["examples"][0]["pictures"] = [picture]
    with pytest.raises(ValidationError):
        RequestReport.model_validate(values)


@pytest.mark.parametrize("report", [language_report(), request_report()])
def test_a_bundles_report_has_no_text_and_no_picture_of_the_data(report):
    lasting, _ = split(report, NOTE)
    kept = page(lasting, {})
    for field in type(report).texts:
        assert getattr(report, field) and not getattr(lasting, field)
    assert "data:image" not in kept and 'class="passage"' not in kept
    assert any("texts and pictures of the data" in note for note in lasting.notes)


def test_reports_from_before_texts_had_speakers_are_read():
    values = language_values()
    del values["samples"], values["continuations"][0]["spans"]
    report = LanguageReport.model_validate(values)
    assert read(report.to_json()) == report
    assert "return items[0]" in " ".join(passages(report))
