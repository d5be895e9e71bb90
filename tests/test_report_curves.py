"""Charts of a run's history, as the page draws them."""

import io
import json
import math
import random
import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from types import SimpleNamespace

import pytest
from rich.console import Console

from pipeline.families.report_files import histories as of_run
from pipeline.report import page
from pipeline.report.curves import COLOURS, POINTS, Line, curves
from pipeline.store.history import Recorder, read
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


def recorded(path, every: int, validate: int, steps: int) -> list[dict]:
    """Write a history as training does; return its rows."""
    recorder = Recorder(
        path, job="j", total_steps=steps, every=every, console=Console(file=io.StringIO())
    )
    recorder.start(0)
    rows = []
    for step in range(steps + 1):
        place = {"step": step, "tokens": 100 * step}
        if step and step % every == 0:
            rows.append(place | {"train_nats": 5.0, "lr": 1.0, "load": [0.5, 0.5]})
        # a validation comes before the step that would make the next row
        if step % validate == 0 or step == steps:
            rows.append(place | {"valid_nats": 5.0})
    for row in rows:
        recorder.row(row)
    return rows


def drawn(path, steps: int):
    """Return by line how many pieces it is drawn in, and what is said to be missing."""
    cfg = SimpleNamespace(
        stages={"train_shared": SimpleNamespace(name="train_shared", kind="training")},
        items=lambda stage: [None],
    )
    parts = SimpleNamespace(
        manifest=lambda stage, item: SimpleNamespace(metrics={"planned_steps": steps}),
        history=lambda stage, item: read(path, steps),
    )
    rows, missing = of_run(cfg, parts)
    (stage,) = curves(rows)
    loss, lr = stage.charts
    pieces = {}
    for line in (*loss.lines, *lr.lines):
        alone = 0 if line.name == "validation" else len(line.dots)
        pieces[line.name] = len(line.paths) + alone
    return pieces, missing.get("train_shared", ""), page(language_report(), rows, missing)


def stretches(steps: list[int], every: int) -> int:
    """Return in how many runs steps follow each other as they should."""
    return 1 + sum(later - earlier > every for earlier, later in pairwise(steps))


@pytest.mark.parametrize("seed", range(40))
def test_lost_rows_are_gaps_that_the_caption_names_and_nothing_else_is(tmp_path, seed):
    draw = random.Random(seed)
    every = draw.choice((1, 5, 10))
    validate = every * draw.choice((1, 2, 7)) + draw.choice((0, 0, 1))
    steps = every * draw.choice((40, 160, 900)) + draw.choice((0, 3))
    rows = recorded(tmp_path / "rows", every, validate, steps)
    whole, said, text = drawn(tmp_path / "rows", steps)
    assert whole == {"train": 1, "validation": 1, "train_shared": 1}
    assert said == "" and "has lost" not in text
    lines = (tmp_path / "rows").read_text().splitlines(keepends=True)
    keep = set(range(1, len(lines)))
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(2, len(lines) - 2)
        keep -= set(range(at, min(at + draw.choice((1, 2, 9)), len(lines) - 2)))
    rows = [rows[i - 1] for i in sorted(keep)]
    blank = draw.choice(("", "\n", " \n"))
    kept = [lines[0], *(json.dumps(row) + "\n" + blank for row in rows)]
    (tmp_path / "rows").write_text("".join(kept))
    pieces, said, text = drawn(tmp_path / "rows", steps)
    trained = [row["step"] for row in rows if "train_nats" in row]
    due = set(range(every, steps + 1, every))
    lost = sorted(due - set(trained))
    # what is missing before the first or after the last row begins or ends the line
    assert pieces["train"] == pieces["train_shared"] == stretches(trained, every)
    validated = [row["step"] for row in rows if "valid_nats" in row]
    runs = [1]
    for earlier, later in pairwise(validated):
        is_lost = any(earlier < step <= later for step in lost)
        if later - earlier > 1.5 * validate and is_lost:
            runs.append(0)
        runs[-1] += 1
    # a handful of validations shows no usual distance
    if len(validated) > 8:
        # each of them is a dot, so one alone has no line beside it
        assert pieces["validation"] == sum(length > 1 for length in runs)
    assert bool(said) == bool(lost)
    if lost:
        assert "or steps that the history has lost" in text
        assert f"is not whole: {said}. Its curves" in text
        named = [int(number) for number in re.findall("[0-9]+", said)]
        assert named[0] == lost[0]
        assert named[-1] == lost[-1]
        assert {lost[0], lost[-1]} <= set(named)


def test_a_validation_made_again_leaves_the_trainings_row_of_its_step(tmp_path):
    rows = recorded(tmp_path / "rows", 5, 10, 20)
    again = Recorder(
        tmp_path / "rows", job="j", total_steps=20, every=5, console=Console(file=io.StringIO())
    )
    again.start(20)
    again.row({"step": 20, "tokens": 2000, "valid_nats": 4.0})
    found = read(tmp_path / "rows", 20)
    assert found.missing == ""
    assert found.rows == [*rows[:-1], {"step": 20, "tokens": 2000, "valid_nats": 4.0}]


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
