"""What the tables of a report say, before they are drawn."""

from pipeline.report.language import opt_out, quality
from tests.small_reports import language_report, language_values


def test_best_is_marked_among_rows_that_serve_every_domain():
    rows = {row.name: row for row in quality(language_report()).rows}
    marked = [cell.best for cell in rows["stack (top-2)"].cells]
    assert marked == [True, False, False, True, True, True]
    for name in ("oracle expert", "expert c", "trunk + dummy"):
        assert not any(cell.best for cell in rows[name].cells)
    assert rows["stack (top-2)"].main


def test_opting_out_frames_the_domain_of_the_expert_that_left():
    framed = {}
    for row in opt_out(language_report()).rows:
        framed[row.name] = [cell.text for cell in row.cells if cell.own]
    assert framed == {"anchor": [], "python": ["1.400"], "c": ["1.400"], "docs": ["1.400"]}


def test_small_losses_are_not_painted_like_great_gains():
    values = language_values()["opt_out"]
    values[0]["ratio"]["python"] = 0.999
    heat = opt_out(language_report(opt_out=values)).rows[0].cells[0].heat
    assert 0 < heat < 0.05
