"""The report as tables on a terminal and as one HTML file, read back by parsers that we did not
write."""

import copy
import io
import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from rich.console import Console

from pipeline.report import page, show
from pipeline.report.format import (
    DASH,
    count,
    figures,
    fixed,
    megabytes,
    seconds,
    share,
    signed,
    ticks,
)
from pipeline.report.language import opt_out, quality
from pipeline.report.markup import VOID, join, tag
from pipeline.report.style import DARK, LIGHT

NASTY = '<script>alert("x")</script>&\x1b[31m\u202e'
DOMAINS = ("python", "c", "docs")


def made(domains=DOMAINS) -> dict:
    """Return a complete report with an anchor, a dense row, an oracle and the stack."""

    def row(name, kind, mean, **more):
        each = {d: mean + 0.01 * i for i, d in enumerate(domains)}
        base = {
            "row": name,
            "kind": kind,
            "axis": "",
            "bits_per_byte": each,
            "mean": mean,
            "is_stack": False,
        }
        base |= {
            "interval": [mean - 0.01, mean + 0.01],
            "perplexity": dict.fromkeys(domains, 20 * mean),
        }
        base |= {
            "mean_perplexity": 20 * mean,
            "active_parameters": 7_400_000,
            "total_parameters": 30_000_000,
        }
        base |= {
            "flops_per_token": 44_000_000,
            "train_tokens": 12_000_000,
            "oracle_gain": 0.5,
            "versus_stack": None,
        }
        return base | more

    experts = ["anchor", *domains]
    shares = {
        d: [0.1] + [0.7 if e == d else 0.2 / (len(domains) - 1) for e in domains] for d in domains
    }
    versus = {"difference": 0.07, "interval": [0.05, 0.09]}
    t5 = {
        "share": shares,
        "agreement": 0.712,
        "agreement_by_domain": dict.fromkeys(domains, 0.7),
        "entropy": 1.31,
    }
    t5 |= {
        "max_entropy": math.log(4),
        "max_violation": 0.25,
        "least": ["anchor", 0.1],
        "most": ["c", 0.31],
        "dead": [],
    }
    t5["layers"] = [
        {"layer": i, "share": shares, "agreement": 0.6, "entropy": 1.3, "max_violation": 0.2}
        for i in range(3)
    ]
    t3 = [
        {
            "removed": e,
            "ratio": {d: 1.4 if e == d else 1.01 for d in domains},
            "delta_bits": dict.fromkeys(domains, 0.1),
        }
        for e in experts
    ]
    flat = dict.fromkeys(domains, 1.2)
    return {
        "run": "demo",
        "family": "ffn_moe",
        "seed": 3,
        "made": "2026-05-01T10:00:00+00:00",
        "experts": experts,
        "domains": list(domains),
        "metric": "bits per byte on held-out text",
        "model": {
            "layers": 3,
            "d_model": 64,
            "top_k": 2,
            "active_parameters": 11_800_000,
            "total_parameters": 30.1e6,
        },
        "data": {
            k: dict.fromkeys(domains, 41) for k in ("test_tokens", "test_documents", "train_tokens")
        },
        "T1": [
            row("trunk + dummy", "part", 1.5),
            *(row(f"expert {d}", "expert", 1.1) for d in domains),
            row("dense continued", "dense", 1.4, axis="same total tokens", versus_stack=versus),
            row("random router", "router", 9.0),
            row("stack (top-2)", "router", 1.3, is_stack=True),
            row("oracle expert", "oracle", 1.0),
        ],
        "T3": {"rows": t3},
        "T5": t5,
        "T6": [
            {"top_k": k, "bits_per_byte": flat, "mean": 1.2 + k / 50, "interval": [1.1, 1.4]}
            for k in (1, 2)
        ],
        "matrix": {
            "rows": ["trunk + dummy", *experts, "stack"],
            "bits_per_byte": [[1.5] * len(domains)]
            + [[1.2 if e == d else 1.9 for d in domains] for e in experts]
            + [[1.3] * len(domains)],
        },
        "criteria": [
            {"name": "primary", "text": "beats dense", "passed": True, "detail": "by 0.1"},
            {"name": "tertiary", "text": "all used", "passed": False, "detail": "4 %"},
        ],
        "wins": [
            {
                "against": "dense continued",
                "axis": "same total tokens",
                "difference": 0.1,
                "interval": [0.05, 0.15],
                "verdict": "better",
            },
            {
                "against": "dense wide",
                "axis": "same active parameters",
                "difference": -0.02,
                "interval": [-0.03, -0.01],
                "verdict": "worse",
            },
        ],
        "speed": {
            "jobs": [
                {
                    "job": "train_shared",
                    "seconds": 372.0,
                    "tokens": 8e6,
                    "tokens_per_s": 22e3,
                    "data_s": 1.0,
                    "forward_s": 100.0,
                    "backward_s": 200.0,
                    "optimizer_s": 40.0,
                    "peak_mb": 812.0,
                }
            ]
        },
        "machine": {
            "cpu": "some processor",
            "cores": 2,
            "threads": 2,
            "torch": "2.13.0",
            "dtype": "bf16",
            "gpu": None,
        },
        "notes": ["one seed only; see https://example.org for more"],
    }


def histories(rows: int = 30) -> dict[str, list[dict]]:
    """Return a trunk's and a router's history."""
    steps = [
        {
            "step": s,
            "tokens": s * 1000,
            "train_nats": 9 - s / 10,
            "lr": 1e-3,
            "tokens_per_s": 2e4,
            "rss_mb": 800.0 + s,
        }
        for s in range(1, rows + 1)
    ]
    for row in steps[::10]:
        row["valid_nats"] = row["train_nats"] + 0.1
    routed = [row | {"load": [0.25] * 4, "entropy": 1.38, "temperature": 1.0} for row in steps]
    return {
        "train_shared": steps,
        "train_experts python": list(steps),
        "train_experts c": list(steps),
        "train_router": routed,
    }


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


def printed(report: dict, **options) -> str:
    """Return what show prints to something that is no terminal."""
    out = io.StringIO()
    show(report, Console(file=out, **options))
    return out.getvalue()


def bare(report: dict) -> str:
    """Return the page without histories."""
    return page(report, {})


def test_page_is_well_formed_and_every_table_is_rectangular():
    reader = Reader(page(made(), histories()))
    assert len(reader.tables) >= 10
    for table in reader.tables:
        assert len({len(line) for line in table}) == 1
    assert reader.tags.count("h1") == 1
    names = [line[0] for table in reader.tables for line in table]
    for wanted in ("trunk + dummy", "stack (top-2)", "oracle expert", "train_shared", "anchor"):
        assert any(wanted in name for name in names)


def test_links_lead_to_sections_that_exist():
    attributes = Reader(page(made(), histories())).attributes
    ids = [value for key, value in attributes if key == "id"]
    assert len(ids) == len(set(ids))
    assert {value.removeprefix("#") for key, value in attributes if key == "href"} == set(ids)


def test_page_refers_to_nothing_outside():
    text = page(made(), histories())
    reader = Reader(text)
    assert not {"script", "link", "iframe", "img", "object", "base"} & set(reader.tags)
    for key, value in reader.attributes:
        assert "//" not in (value or ""), (key, value)
    style = re.search("<style>(.*?)</style>", text, re.S).group(1)
    assert "url(" not in style
    assert "@import" not in style
    assert any("https://example.org" in words for words in reader.texts)


def test_names_are_escaped_everywhere():
    report = made((NASTY, "c", "docs"))
    report |= {"run": NASTY, "notes": [NASTY], "family": NASTY}
    report["machine"]["cpu"] = NASTY
    report["criteria"][0] |= {"name": NASTY, "text": NASTY, "detail": NASTY}
    report["wins"][0] |= {"against": NASTY, "axis": NASTY}
    report["T1"][0] |= {"row": NASTY, "axis": NASTY, "kind": NASTY}
    report["speed"]["jobs"][0]["job"] = NASTY
    rows = histories()["train_router"]
    text = page(
        report,
        {f"train_router {NASTY}": rows, f"train_experts {NASTY}": rows, "train_experts b": rows},
    )
    assert "script" not in Reader(text).tags
    assert "<script" not in text
    assert "\x1b" not in text
    assert text.encode("utf-8")
    assert "\x1b" not in printed(report)


def test_lone_surrogates_do_not_stop_the_page_or_the_terminal():
    report = made() | {"run": "a\ud800b"}
    assert "a\ufffdb" in page(report, {})
    printed(report).encode("utf-8")


def test_same_input_same_bytes_and_input_is_left_alone():
    report, rows = made(), histories()
    before = copy.deepcopy((report, rows))
    first = page(report, rows)
    assert first == page(json.loads(json.dumps(report)), json.loads(json.dumps(rows)))
    printed(report)
    assert (report, rows) == before


def test_charts_are_xml_and_stay_inside_their_frame():
    rows = histories(1000)
    rows["train_shared"][500]["train_nats"] = math.nan
    rows["train_shared"][0]["train_nats"] = 5000.0  # a first loss far out of the top
    svgs = re.findall("<svg.*?</svg>", page(made(), rows), re.S)
    assert len(svgs) > 10
    for svg in svgs:
        root = ET.fromstring(svg)  # noqa: S314
        _, _, width, height = map(float, root.get("viewBox").split())
        for path in root.iter("path"):
            numbers = [float(n) for n in re.findall(r"-?\d+\.\d+", path.get("d"))]
            assert all(0 <= x <= width for x in numbers[::2])
            assert all(0 <= y <= height for y in numbers[1::2])
            assert len(numbers) <= 2 * 202
        assert root.get("aria-label")


def test_a_nan_in_a_history_is_a_gap():
    rows = histories()
    whole = page(made(), rows)
    rows["train_shared"][15] = rows["train_shared"][15] | {"lr": math.nan}
    broken = page(made(), rows)
    assert broken.count("<path") == whole.count("<path") + 1
    assert not re.search(r"\bnan\b", broken)


def test_a_resumed_job_counts_the_later_row_of_a_step():
    once = histories()
    twice = {k: [row | {"lr": 77.0} for row in rows[:9]] + rows for k, rows in once.items()}
    assert page(made(), twice) == page(made(), once)


def test_rows_without_a_place_are_left_out():
    once = histories()
    more = {
        key: [*rows, {"train_nats": 1.0}, {"step": 99, "tokens": None, "lr": 5.0}]
        for key, rows in once.items()
    }
    assert page(made(), more) == page(made(), once)
    assert "<svg" not in page(made(), {"train_shared": [], "train_router": [{}]})


def test_best_is_marked_among_rows_that_serve_every_domain():
    rows = {row.name: row for row in quality(made()).rows}
    assert [cell.best for cell in rows["stack (top-2)"].cells] == [
        True,
        False,
        False,
        True,
        True,
        True,
    ]
    for name in ("oracle expert", "expert c", "trunk + dummy"):
        assert not any(cell.best for cell in rows[name].cells)
    assert rows["stack (top-2)"].main
    text = bare(made())
    assert "oracle expert" in text
    assert (
        len(re.findall('class="best"', text)) == 6
    )  # mean, three domains, perplexity, and k of T6


def test_a_win_is_always_printed_with_its_axis():
    for text in (printed(made()), " ".join(Reader(bare(made())).texts)):
        for axis in ("same total tokens", "same active parameters"):
            assert axis in text
    report = made()
    report["wins"][0]["axis"] = ""
    assert "axis not stated" in printed(report)


def test_the_heat_map_frames_each_expert_on_its_own_domain():
    text = bare(made())
    section = text[text.index('id="map"') : text.index('id="routing"')]
    own = re.findall(r'<td class="own hot gain"[^>]*>(.*?)</td>', section)
    assert own == ["1.200<small>+0.300</small>"] * 3
    assert section.count("hot loss") == 3 * 3  # the anchor and the two others, on three domains


def test_opting_out_frames_the_domain_of_the_expert_that_left():
    framed = {
        row.name: [cell.text for cell in row.cells if cell.own] for row in opt_out(made()).rows
    }
    assert framed == {"anchor": [], "python": ["1.400"], "c": ["1.400"], "docs": ["1.400"]}


def test_small_losses_are_not_painted_like_great_gains():
    report = made()
    report["T3"]["rows"][0]["ratio"]["python"] = 0.999
    heat = opt_out(report).rows[0].cells[0].heat
    assert 0 < heat < 0.05


@pytest.mark.parametrize(
    "key",
    [
        "experts",
        "domains",
        "model",
        "data",
        "T1",
        "T3",
        "T5",
        "T6",
        "matrix",
        "criteria",
        "wins",
        "speed",
        "machine",
        "notes",
        "run",
        "made",
        "seed",
    ],
)
@pytest.mark.parametrize("value", ["absent", None])
def test_any_part_may_be_missing(key, value):
    report = made()
    if value is None:
        report[key] = None
    else:
        del report[key]
    reader = Reader(page(report, histories()))
    assert "None" not in " ".join(reader.texts)
    assert "None" not in printed(report)


def test_an_empty_report_is_a_page_too():
    assert Reader(page({}, {})).tags.count("h1") == 1
    assert "None" not in printed({})


def test_numbers_that_are_not_finite_become_dashes():
    def spoil(value):
        if isinstance(value, dict):
            return {k: spoil(v) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(v) for v in value]
        return math.nan if isinstance(value, float) else value

    report = spoil(made())
    for text in (printed(report), " ".join(Reader(page(report, spoil(histories()))).texts)):
        assert not re.search(r"\bnan\b|\binf\b", text, re.I)
        assert DASH in text


def test_one_expert_and_no_dense_row():
    report = made(("python", "c"))
    report |= {"experts": ["python"], "domains": ["python"], "T3": {"rows": []}}
    report["T1"] = [row for row in report["T1"] if row["kind"] != "dense"]
    reader = Reader(bare(report))
    assert not any("leaves" in words for words in reader.texts)
    assert "T3" not in printed(report)


@pytest.mark.parametrize("domains", [DOMAINS, tuple(f"a_long_domain_{i}" for i in range(12))])
def test_plain_output_is_120_wide_and_has_every_row(domains):
    report = made(domains)
    text = printed(report, width=200)
    assert max(map(len, text.splitlines())) <= 120
    assert "\x1b" not in text
    assert "…" not in text
    flat = re.sub(r"\s+", "", text)
    for row in report["T1"]:
        assert row["row"].replace(" ", "") in flat
    for name in ("T1", "T3", "T5", "T6", "Criteria"):
        assert re.search(f"^{name}", text, re.M)
    assert text.count("1.310") >= 1  # the stack on the second domain


def test_a_console_keeps_its_width_afterwards():
    console = Console(file=io.StringIO(), width=77)
    show(made(), console)
    assert console.width == 77


def test_a_terminal_gets_colours_and_its_own_width():
    out = io.StringIO()
    show(
        made(),
        Console(
            file=out, force_terminal=True, width=90, color_system="standard", legacy_windows=False
        ),
    )
    assert "\x1b[" in out.getvalue()
    assert (
        max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in out.getvalue().splitlines()) <= 90
    )


def test_an_ascii_log_is_possible():
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    show(made(("pythön", "c", "docs")), Console(file=out))
    out.flush()
    text = out.buffer.getvalue().decode("ascii")
    assert "stack (top-2)" in text
    assert "pyth?n" in text


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        (fixed(-0.0004), "0.000"),
        (signed(0.0123), "+0.012"),
        (signed(-0.0004), "0.000"),
        (fixed(1234.5, 1), "1,234.5"),
        (figures(8.412), "8.41"),
        (figures(52.31), "52.3"),
        (figures(1234.4), "1,234"),
        (figures(0), "0.00"),
        (count(999), "999"),
        (count(999_600), "1 M"),
        (count(33_600_000), "33.6 M"),
        (count(0.25), "0.25"),
        (share(0.745), "74 %"),
        (share(-0.4), "−40 %"),
        (seconds(59.99), "1 min 00 s"),
        (seconds(7500), "2 h 05 min"),
        (megabytes(812.4), "812 MB"),
        (megabytes(12_345), "12.3 GB"),
        (count(None), DASH),
        (fixed("1"), DASH),
        (fixed(True), DASH),
        (share(math.inf), DASH),
        (figures(math.nan), DASH),
        (seconds(None), DASH),
    ],
)
def test_numbers_have_sensible_digits(written, wanted):
    assert written == wanted


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (2.9, 9.1), (0, 1e-8), (-3, 4), (5, 5), (0, 0), (1e6, 1.1e6)]
)
def test_ticks_enclose_the_range_in_even_steps(low, high):
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 8
    gaps = [b - a for a, b in pairwise(found)]
    assert max(gaps) == pytest.approx(min(gaps))


def test_markup_escapes_text_and_attributes():
    assert tag("p", "<b>", title='"') == '<p title="&quot;">&lt;b&gt;</p>'
    assert tag("p", tag("b", "x"), class_="") == "<p><b>x</b></p>"
    assert join("a&", tag("br")) == "a&amp;<br>"


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
