"""One bad element is dropped, counted and named; what it stands among stays: boxes of a row."""

import json
import random

import pytest
from small_tasks import Source, entry, jsonl, prepared, simple

from pipeline.data.images import boxes
from pipeline.data.images.box_formats import BoxFormat
from pipeline.errors import DataError

WORDS = [f"word{k}" for k in range(10)]

# Ways to spoil the numbers of a box that lies at x, y.
SPOILED = {
    "no height": lambda x, y: [x, y, x + 4, y],
    "no width": lambda x, y: [x, y, x, y + 4],
    "a point": lambda x, y: [x, y, x, y],
    "turned": lambda x, y: [x + 4, y + 4, x, y],
    "outside": lambda x, y: [x + 400, y, x + 404, y + 4],
    "not a number": lambda x, y: [x, y, float("nan"), y + 4],
    "no end": lambda x, y: [x, y, float("inf"), y + 4],
    "too few": lambda x, y: [x, y, x + 4],
    "odd": lambda x, y: [x, y, x + 4, y, x],
    "text": lambda x, y: ["a", y, x + 4, y + 4],
    "nothing": lambda x, y: None,
    "a name": lambda x, y: "box",
}
FLAT = ("no height", "no width", "a point")


def ten(rng, spoil=None):
    """Return ten boxes of a line of words, perhaps one of them spoiled, and which."""
    bad = rng.randrange(10)
    found = []
    for k, word in enumerate(WORDS):
        x, y = 4 * k, 10
        corners = [x, y, x + 3, y + 6]
        if spoil and k == bad:
            corners = SPOILED[spoil](x, y)
        found.append({"bbox": corners, "text": word})
    return found, bad


def given(tmp_path, spoil, **more):
    """Return rows of a source, half of whose rows have one spoiled box."""
    rng = random.Random(spoil)
    rows = simple(20)
    spoiled = {}
    for i, row in enumerate(rows):
        row["boxes"], bad = ten(rng, spoil if i % 2 else None)
        if i % 2:
            spoiled[row["id"]] = bad
    path = Source(tmp_path / "data")(rows)
    return jsonl(path, max_bad_share=0.5, **more), spoiled


@pytest.mark.parametrize("spoil", SPOILED)
def test_one_bad_box_of_ten_leaves_the_nine(tmp_path, spoil):
    data, spoiled = given(tmp_path, spoil)
    _, rows, report = prepared(tmp_path, entry(data, answer="{boxes_json}"))
    assert len(rows) == 20 and report["dropped"] == {}
    assert report["boxes"]["seen"] == 200 and report["boxes"]["dropped"] == {"bad box": 10}
    _first, bad = next(iter(spoiled.items()))
    assert report["boxes"]["examples"]["bad box"][0].startswith(
        f"rows.jsonl:2: box {bad + 1} of 10: "
    )
    for name, row in rows.items():
        left = [word for k, word in enumerate(WORDS) if k != spoiled.get(name)]
        assert [box["label"] for box in json.loads(row.answer)] == left


@pytest.mark.parametrize("spoil", SPOILED)
def test_a_transcript_is_whole_or_it_is_none(tmp_path, spoil):
    """What a box without area says keeps its place; of one that is nowhere the page is dropped."""
    data, _spoiled = given(tmp_path, spoil, ocr=True)
    task = entry(data, prompt="Read it.", answer="{text}")
    _, rows, report = prepared(tmp_path, task)
    assert {row.answer for row in rows.values()} == {" ".join(WORDS)}
    assert len(rows) == (20 if spoil in FLAT else 10)
    assert report["dropped"] == ({} if spoil in FLAT else {"bad box": 10})


@pytest.mark.parametrize("spoil", SPOILED)
def test_one_bad_region_leaves_the_others(tmp_path, spoil):
    data, _spoiled = given(tmp_path, spoil, ocr=True, regions=True, region_padding=0)
    _, rows, report = prepared(tmp_path, entry(data, prompt="Read it."))
    assert len(rows) == 190 and report["dropped"] == {"bad box": 10}


def test_more_bad_boxes_than_allowed_is_an_error_that_shows_them(tmp_path):
    data, _ = given(tmp_path, "a point")
    task = entry(data | {"max_bad_share": 0.04}, answer="{boxes_json}")
    with pytest.raises(DataError, match=r"10 of 200 boxes of .*look.*max_bad_share \(0.04\)"):
        prepared(tmp_path, task)
    # Boxes that nothing is made of are nobody's loss.
    unused = entry(data | {"max_bad_share": 0.04})
    assert len(prepared(tmp_path, unused, "unused")[1]) == 20


def test_a_box_without_area_at_the_edge_still_has_a_place():
    for corners in ([100, 50, 100, 50], [0, 60, 100, 60], [100, 0, 100, 60]):
        found, faults = BoxFormat().parse_each(
            [{"bbox": corners, "text": "t"}], (100, 60), keep_text=True
        )
        assert len(faults) == len(found) == 1 and not faults[0].lost_text
        assert boxes.units(found[0], 100, 60)
