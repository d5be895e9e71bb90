"""Boxes in every form, and the text in them in the order it is read."""

import json
import unicodedata

import numpy as np
import pytest
from PIL import Image
from small_tasks import Source, entry, jsonl, picture, prepared, simple, write_rows

from pipeline.data.images import boxes
from pipeline.data.images.box_formats import BoxFormat
from pipeline.data.tasks.rows import TaskRows
from pipeline.errors import DataError


@pytest.fixture
def source(tmp_path):
    return Source(tmp_path / "data")


def test_pictures_are_fitted_and_boxes_do_not_notice(tmp_path, source):
    rows = simple(
        boxes=[
            {"bbox": [10.2, 0, 160, 50], "label": "sign"},
            {"bbox": [40, 20, 60, 40], "text": "stop"},
        ]
    )
    for i, row in enumerate(rows):
        picture(i, (200, 100)).save(tmp_path / "data" / row["image"])
    _, found, _ = prepared(tmp_path, entry(jsonl(source(rows)), answer="{boxes_json}"))
    assert json.loads(found["r0"].answer) == [
        {"bbox_2d": [51, 0, 800, 500], "label": "sign"},
        {"bbox_2d": [200, 200, 300, 400], "label": "stop"},
    ]
    with Image.open(tmp_path / "out" / found["r0"].images[0]) as image:
        assert image.size == (90, 45)  # 4050 of 4096 px, twice as wide as high


def test_boxes_of_another_scale_are_scaled_and_of_another_shape_refused(tmp_path, source):
    made_smaller = simple(
        6, boxes=[[100, 0, 200, 400]], width=400, height=400
    )  # of pictures of 40 x 40
    turned = made_smaller[0] | {"id": "turned", "image": "images/t.png", "height": 300}
    path = source([*made_smaller, turned])
    with pytest.raises(DataError, match=r"1 of 7 rows .* bad box .*width and height say 400 x 300"):
        prepared(tmp_path, entry(jsonl(path), answer="{boxes_json}"))
    metrics, rows, _ = prepared(tmp_path, entry(jsonl(path)), "unneeded")
    assert json.loads(rows["r0"].line())["boxes"][0]["bbox_2d"] == [250, 0, 500, 1000]
    assert metrics["rows_without_boxes"] == 1 and "boxes" not in rows["turned"].extra


@pytest.mark.parametrize(
    ("raw", "form", "expected"),
    [
        ([{"bbox": [1, 2, 30, 40]}], "xyxy", [10, 10, 300, 200]),
        ([[1, 2, 30, 40]], "xywh", [10, 10, 310, 210]),
        ([[[1, 2], [30, 4], [28, 40], [2, 39]]], "xyxy", [10, 10, 300, 200]),
        ([[1, 2, 30, 4, 28, 40, 2, 39]], "xyxy", [10, 10, 300, 200]),
        ([[-5, -5, 500, 500]], "xyxy", [0, 0, 1000, 1000]),
        ([[99.99, 0, 100, 0.01]], "xyxy", [999, 0, 1000, 1]),
    ],
)
def test_corners_of_every_form(raw, form, expected):
    (box,) = BoxFormat(form).parse(raw, (100, 200))
    assert boxes.units(box, 100, 200) == expected


@pytest.mark.parametrize(
    "raw",
    [
        [[1, 2, 3]],
        [[5, 5, 5, 9]],
        [[9, 0, 1, 5]],
        [[200, 0, 300, 5]],
        [["a", 0, 1, 2]],
        [{"label": "x"}],
        [[0, 0, float("nan"), 5]],
        {"bbox": [0, 0, 1, 1]},
        [None],
    ],
)
def test_what_is_no_box_says_why(raw):
    with pytest.raises(boxes.BadBox):
        BoxFormat().parse(raw, (100, 200))


LINES = [
    ("TOTAL", [10, 102, 60, 118]),
    ("12.00", [150, 100, 190, 117]),
    ("SHOP", [12, 10, 80, 30]),
    ("Ltd", [90, 14, 120, 31]),
    ("THANK YOU", [40, 200, 160, 220]),
]


def test_text_is_read_from_top_to_bottom_and_from_left_to_right():
    found = BoxFormat().parse([{"bbox": box, "text": text} for text, box in LINES], (200, 240))
    assert boxes.transcript(found) == "SHOP Ltd\nTOTAL 12.00\nTHANK YOU"
    for seed in range(5):
        assert boxes.transcript(
            np.random.default_rng(seed).permutation(np.array(found, object))
        ) == boxes.transcript(found)


def test_lines_that_lean_and_lines_that_touch_stay_lines():
    leaning = [
        {"bbox": [x, 50 + x / 8, x + 40, 70 + x / 8], "text": f"w{x // 50}"}
        for x in range(0, 400, 50)
    ]
    tight = [
        {"bbox": [0, y, 100, y + 22], "text": f"l{y // 20}"} for y in range(100, 200, 20)
    ]  # 2 px of overlap
    assert boxes.transcript(BoxFormat().parse(leaning, (500, 500))) == " ".join(
        f"w{i}" for i in range(8)
    )
    assert boxes.transcript(BoxFormat().parse(tight, (500, 500))) == "\n".join(
        f"l{i}" for i in range(5, 10)
    )


def test_transcripts_are_cleaned_and_nothing_is_lost():
    assert (
        boxes.clean("\ufeffCafe\u0301\u00a0 au  lait\t\r\n  1\u200b2\u00ad3 \n\n")
        == "Café au lait\n123"
    )
    joined = "می\u200cخواهم 👩\u200d💻"  # these joiners are spelling
    assert boxes.clean(joined) == unicodedata.normalize("NFC", joined)


def receipts(tmp_path, count=9):
    (tmp_path / "data/images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        picture(i, (200, 240)).save(tmp_path / f"data/images/{i}.png")
        found = [{"bbox": box, "text": f"{text}  {i}"} for text, box in LINES]
        rows.append({"id": f"r{i}", "image": f"images/{i}.png", "boxes": found})
    return write_rows(tmp_path / "data/rows.jsonl", rows)


def test_ocr_takes_the_transcript_of_boxes_where_no_answer_is_given(tmp_path):
    task = entry(jsonl(receipts(tmp_path), ocr=True), prompt="Read it.")
    assert prepared(tmp_path, task)[1]["r2"].answer == "SHOP 2 Ltd 2\nTOTAL 2 12.00 2\nTHANK YOU 2"


def test_ocr_by_region_has_a_row_for_each_box_and_a_receipt_in_one_split(tmp_path):
    data = jsonl(receipts(tmp_path), ocr=True, regions=True, region_padding=0)
    metrics, rows, _ = prepared(tmp_path, entry(data, prompt="Read it."))
    assert len(rows) == 45 and metrics["pictures"] == 45
    assert [rows[f"r4/{n}"].answer for n in range(5)] == [
        "SHOP 4",
        "Ltd 4",
        "TOTAL 4",
        "12.00 4",
        "THANK YOU 4",
    ]
    assert (
        len({rows[f"r4/{n}"].split for n in range(5)})
        == len({rows[f"r4/{n}"].group for n in range(5)})
        == 1
    )
    found = np.asarray(TaskRows(tmp_path / "out").picture(rows["r4/4"]))
    np.testing.assert_array_equal(
        found, np.asarray(picture(4, (200, 240)).crop((40, 200, 160, 220)))
    )
