"""Charts of a run's history, as the page draws them."""

import math
import re
import xml.etree.ElementTree as ET

from pipeline.report import page
from pipeline.report.curves import COLOURS, POINTS, Line, curves
from tests.small_reports import histories, language_report


def test_charts_are_xml_and_stay_inside_their_frame():
    rows = histories(1000)
    rows["train_shared"][500]["train_nats"] = math.nan
    rows["train_shared"][0]["train_nats"] = 5000.0  # a first loss far out of the top
    svgs = re.findall("<svg.*?</svg>", page(language_report(), rows), re.S)
    assert len(svgs) > 10
    for svg in svgs:
        root = ET.fromstring(svg)  # noqa: S314
        _, _, width, height = map(float, root.get("viewBox").split())
        for path in root.iter("path"):
            numbers = [float(n) for n in re.findall(r"-?\d+\.\d+", path.get("d"))]
            assert all(0 <= x <= width for x in numbers[::2])
            assert all(0 <= y <= height for y in numbers[1::2])
            assert len(numbers) <= 2 * (POINTS + 2)
        assert root.get("aria-label")


def test_a_nan_in_a_history_is_a_gap():
    rows = histories()
    whole = page(language_report(), rows)
    rows["train_shared"][15] = rows["train_shared"][15] | {"lr": math.nan}
    broken = page(language_report(), rows)
    assert broken.count("<path") == whole.count("<path") + 1
    assert not re.search(r"\bnan\b", broken)


def test_rows_of_validations_make_no_gaps_in_other_lines():
    rows = histories()
    whole = page(language_report(), rows)
    for key, steps in rows.items():
        split = []
        for row in steps:
            split.append({field: row[field] for field in row if field != "valid_nats"})
            if "valid_nats" in row:
                valid = row["valid_nats"]
                # as the loop writes them: at the step of a training row, and between two of them
                place = {"step": row["step"], "tokens": row["tokens"], "valid_nats": valid}
                split.append(place)
        between = {"step": 2.5, "tokens": 2500, "valid_nats": 8.0}
        rows[key] = [*split, between]
    assert page(language_report(), rows).count("<path") == whole.count("<path")


def test_what_a_history_lacks_is_said_above_the_charts_and_without_any():
    for rows in (histories(), {}):
        text = page(language_report(), rows, {"train_experts <c>": "the file is gone"})
        said = "The history of train_experts &lt;c&gt; is not whole: the file is gone."
        assert said in text and 'id="curves"' in text


def test_a_resumed_job_counts_the_later_row_of_a_step():
    once = histories()
    twice = {k: [row | {"lr": 77.0} for row in rows[:9]] + rows for k, rows in once.items()}
    assert page(language_report(), twice) == page(language_report(), once)


def test_rows_without_a_place_are_left_out():
    once = histories()
    more = {
        key: [*rows, {"train_nats": 1.0}, {"step": 99, "tokens": None, "lr": 5.0}]
        for key, rows in once.items()
    }
    assert page(language_report(), more) == page(language_report(), once)
    assert "<svg" not in page(language_report(), {"train_shared": [], "train_router": [{}]})


def test_the_peak_of_memory_is_not_averaged_away():
    rows = histories(1000)["train_shared"]
    rows[333]["rss_mb"] = 5000.0
    (stage,) = curves({"train_shared": rows})
    (memory,) = [chart for chart in stage.charts if chart.title == "memory"]
    assert memory.y_ticks[-1].text in ("5 k", "6 k")


def test_lines_beyond_the_palette_are_dashed():
    assert Line("last", [], colour=COLOURS - 1).look == f"c{COLOURS - 1}"
    assert Line("next", [], colour=COLOURS).look == "c0 dashed"


def test_a_job_of_one_row_is_a_dot():
    (stage,) = curves({"train_shared": histories(1)["train_shared"]})
    for chart in stage.charts:
        assert [(line.paths, len(line.dots)) for line in chart.lines] == [([], 1)] * len(
            chart.lines
        )
