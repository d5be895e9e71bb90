"""A domain with few test documents has no verdict: nothing is bold or coloured there, nor in a mean
that it is part of, and the report says so."""

import io
import random

import pytest
from rich.console import Console

from pipeline.report import LanguageReport, card, language, page, show
from tests.small_reports import language_values
from tests.test_report_card import ABOUT

DOMAINS = language_values()["domains"]


def report_with(few: list[str]) -> LanguageReport:
    """Return a report as a run makes it that has few documents of some domains."""
    values = language_values()
    values["data"]["too_few"] = few
    if few:
        for row in (*values["quality"], *values["active"]):
            row["interval"] = None
            if row.get("versus_stack"):
                row["versus_stack"]["interval"] = None
        for row in values["quality"]:
            for domain in few:
                del row["intervals"][domain]
        for win in values["wins"]:
            win |= {"interval": None, "verdict": "undecided"}
    return LanguageReport.model_validate(values)


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_marked_where_documents_are_few(seed):
    draw = random.Random(seed)
    few = draw.sample(DOMAINS, draw.randint(1, len(DOMAINS)))
    report = report_with(few)
    for table in (language.quality(report), language.cost(report), language.active(report)):
        for row in table.rows:
            for column, cell in zip(table.columns, row.cells, strict=True):
                assert not cell.best or column in set(DOMAINS) - set(few), (table.name, column)
                # A domain with enough of them has its interval, whatever others have
                is_sure = row.main and column in DOMAINS and column not in few
                assert ("[" in cell.small) == (is_sure and table.name == "Quality")
    for row in language.matrix(report).rows:
        heats = {cell.heat for cell in row.cells}
        assert (heats == {None}) == (row.name in few)
        assert any(cell.own for cell in row.cells) != (row.name in few)
    for row in language.opt_out(report).rows:
        for domain, cell in zip(DOMAINS, row.cells, strict=True):
            assert (cell.heat is None) == (domain in few)
            assert cell.own == (domain == row.name and domain not in few)
    assert {row.cells[1].tone for row in language.wins(report).rows} == {""}
    said = language.lead(report)
    assert "too few test documents" in said and "better than" not in said
    out = io.StringIO()
    show(report, Console(file=out))
    for text in (page(report, {}), out.getvalue(), card(report, ABOUT)):
        assert "undecided" in text


def test_with_enough_of_every_domain_all_is_marked_as_ever():
    report = report_with([])
    quality = language.quality(report)
    for place, name in enumerate(quality.columns):
        if name == "mean" or name in DOMAINS:
            assert any(row.cells[place].best for row in quality.rows)
    assert {row.cells[1].tone for row in language.wins(report).rows} == {"good", "bad"}
