"""The report as tables on a terminal and in a log."""

import io
import re

import pytest
from rich.console import Console

from pipeline.report import LanguageReport, Report, RequestReport, show
from pipeline.report.terminal import clean
from tests.small_reports import (
    DOMAINS,
    NASTY,
    language_report,
    language_values,
    request_report,
)


def printed(report: Report, **options) -> str:
    """Return what show prints to something that is no terminal."""
    out = io.StringIO()
    show(report, Console(file=out, **options))
    return out.getvalue()


@pytest.mark.parametrize("domains", [DOMAINS, tuple(f"a_long_domain_{i}" for i in range(12))])
def test_plain_output_is_120_wide_and_has_every_row(domains):
    report = language_report(domains)
    text = printed(report, width=200)
    assert max(map(len, text.splitlines())) <= 120
    assert "\x1b" not in text
    assert "…" not in text
    flat = re.sub(r"\s+", "", text)
    for row in report.quality:
        assert row.name.replace(" ", "") in flat
    for name in ("Quality", "Cost", "Opt-out", "Routing", "Active", "Wins", "Criteria"):
        assert re.search(f"^{name}  ", text, re.M)
    assert text.count("1.310") >= 1  # the stack on the second domain


def test_every_table_of_a_report_on_requests_is_printed():
    text = printed(request_report())
    for name in (
        "Routes",
        "Margins",
        "Confusion",
        "Calibration",
        "Coverage",
        "None",
        "Consistency",
        "Adapters",
        "Figures",
        "Answers",
        "Criteria",
    ):
        assert re.search(f"^{name}  ", text, re.M), name


def test_a_console_keeps_its_width_afterwards():
    console = Console(file=io.StringIO(), width=77)
    show(language_report(), console)
    assert console.width == 77


def test_a_terminal_gets_colours_and_its_own_width():
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=True, width=90, color_system="standard", legacy_windows=False
    )
    show(language_report(), console)
    assert "\x1b[" in out.getvalue()
    bare = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    assert max(len(line) for line in bare.splitlines()) <= 90


def test_an_ascii_log_is_possible():
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    show(language_report(("pythön", "c", "docs")), Console(file=out))
    out.flush()
    text = out.buffer.getvalue().decode("ascii")
    assert "stack (top-2)" in text
    assert "pyth?n" in text


def test_headings_of_names_are_not_broken_within_a_word():
    text = printed(request_report())
    for corner in ("criterion", "change", "belongs"):
        assert re.search(rf"^ {corner}\b", text, re.M), corner


def test_names_reach_the_terminal_without_control_characters():
    report = language_report((NASTY, "c", "docs"), run=NASTY, notes=[NASTY], family=NASTY)
    text = printed(report)
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_an_error_of_several_lines_is_read_in_a_cell():
    assert clean("a run:\n  one\tproblem\r", "utf-8") == "a run:   one problem?"


def test_a_lone_surrogate_does_not_stop_it():
    printed(language_report(run="a\ud800b")).encode("utf-8")


def test_a_win_is_always_printed_with_its_axis():
    text = printed(language_report())
    for axis in ("same total tokens", "same active parameters"):
        assert axis in text
    wins = language_values()["wins"]
    wins[0]["axis"] = ""
    assert "axis not stated" in printed(language_report(wins=wins))


@pytest.mark.parametrize("kind", [LanguageReport, RequestReport])
def test_a_report_without_any_table_is_its_title(kind):
    assert printed(kind(run="empty", family="some")) == "empty  some\n"
