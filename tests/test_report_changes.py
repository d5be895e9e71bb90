"""A stack's figures before and after, side by side: of either kind of report, whole or not."""

import io

from rich.console import Console
from small_reports import DOMAINS, language_report, request_report, spoiled

from pipeline.report import show_changes
from pipeline.report.changes import changes
from pipeline.report.schema.language import LanguageReport
from pipeline.report.schema.requests import RequestReport


def cells(table) -> dict[str, list[str]]:
    return {row.name: [cell.text for cell in row.cells] for row in table.rows}


def moved(report: LanguageReport, by: float) -> LanguageReport:
    """Return a report whose stack needs so many bits more."""
    rows = []
    for row in report.quality:
        bits = {name: value + by for name, value in row.bits_per_byte.items()}
        change = {"bits_per_byte": bits, "mean": row.mean + by} if row.is_stack else {}
        rows.append(row.model_copy(update=change))
    return report.model_copy(update={"quality": tuple(rows)})


def with_intervals(report: LanguageReport, intervals: dict) -> LanguageReport:
    """Return a report that says how sure the stack's figures are."""
    rows = []
    for row in report.quality:
        rows.append(row.model_copy(update={"intervals": intervals if row.is_stack else {}}))
    return report.model_copy(update={"quality": tuple(rows)})


def test_text_is_compared_domain_by_domain_and_the_mean_comes_last():
    before = language_report()
    after = moved(language_report((*DOMAINS, "new")), 0.25)
    bits, routes = changes(before, after)
    found = cells(bits)
    # The means are over other domains, so of those that both have there is one more
    assert list(found) == [*DOMAINS, "new", "mean", "mean of both"]
    for domain in DOMAINS:
        was = before.stack.bits_per_byte[domain]
        now = after.stack.bits_per_byte[domain]
        assert found[domain] == [f"{was:.3f}", f"{now:.3f}", f"{now - was:+.3f}".replace("-", "−")]
    assert found["new"][0] == found["new"][2] == "–"
    assert found["mean"][2] == "–"
    shared = [
        sum(report.stack.bits_per_byte[name] for name in DOMAINS) / len(DOMAINS)
        for report in (before, after)
    ]
    assert found["mean of both"][2] == f"{shared[1] - shared[0]:+.3f}".replace("-", "−")
    same = cells(changes(before, moved(before, 0.25))[0])
    assert same["mean"][2] == "+0.250" and "mean of both" not in same
    # Beside each figure its interval, where its report has one
    for each in (bits.rows[0], bits.rows[-2]):
        assert [cell.small != "" for cell in each.cells] == [True, True, False]
    sure = with_intervals(after, {DOMAINS[0]: (1.0, 1.25)})
    first, second, *_ = changes(with_intervals(before, {}), sure)[0].rows
    assert [cell.small for cell in first.cells] == ["", "[1.000, 1.250]", ""]
    assert not any(cell.small for cell in second.cells)
    # Where a whole text goes to one adapter, tokens have no ways of their own
    share = after.text_routing.agreement_by_domain[DOMAINS[0]]
    assert cells(routes)[DOMAINS[0]][1] == f"{100 * share:.1f} %"
    assert cells(routes)[DOMAINS[0]][2] == "0.0 points"


def test_what_has_gone_keeps_the_figure_that_it_had():
    bits, _ = changes(language_report(), language_report(DOMAINS[:-1]))
    gone = cells(bits)[DOMAINS[-1]]
    assert gone[0] != "–" and gone[1:] == ["–", "–"]


def test_requests_are_compared_task_by_task_and_set_by_set():
    report = request_report()
    scores, routes = changes(report, report)
    tasks = [task.task for task in report.adapters.tasks]
    assert list(cells(scores)) == [*tasks, "stack's answers"]
    assert {line[2] for line in cells(scores).values()} == {"0.000"}
    assert list(cells(routes)) == [routed.name for routed in report.routing.sets]
    accuracy = report.routing.sets[0].router.accuracy
    assert cells(routes)[report.routing.sets[0].name][0] == f"{100 * accuracy:.1f} %"


def test_whatever_is_missing_is_a_dash_and_stops_nothing():
    reports = (
        language_report(),
        request_report(),
        LanguageReport(run="none", family="ffn_moe"),
        RequestReport(run="none", family="lora_vlm"),
        LanguageReport.model_validate(spoiled(language_report().model_dump())),
        RequestReport.model_validate(spoiled(request_report().model_dump())),
    )
    for after in reports:
        for before in (None, *reports):
            out = io.StringIO()
            show_changes(before, after, Console(file=out, width=80))
            assert "nan" not in out.getvalue()
    assert all(line[0] == "–" for line in cells(changes(None, language_report())[0]).values())
