"""Boxes as other formats write them: whatever the corners, the units and where their names stand,
the same boxes are learned, or the row is refused."""

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_tasks import Source, entry, jsonl, picture, prepared, simple
from transformers.image_transforms import corners_to_center_format

from pipeline.data.images.box_formats import BoxFormat
from pipeline.data.images.boxes import BadBox, units
from pipeline.errors import DataError

ROOT = Path(__file__).parent.parent
NAMES = ("coverall", "face shield", "gloves", "goggles", "mask")
KEYS = {
    "xyxy": [("xmin", "ymin", "xmax", "ymax"), ("x1", "y1", "x2", "y2")],
    "xywh": [("x", "y", "w", "h"), ("x", "y", "width", "height")],
    "cxcywh": [("cx", "cy", "w", "h")],
}


def corners(draw, width, height):
    """Return a box of some size inside a picture, whole pixels."""
    x0, y0 = draw.randrange(width - 30), draw.randrange(height - 30)
    return [x0, y0, draw.randrange(x0 + 20, width), draw.randrange(y0 + 20, height)]


def in_form(box, form):
    x0, y0, x1, y1 = box
    if form == "xywh":
        return [x0, y0, x1 - x0, y1 - y0]
    if form == "cxcywh":
        return corners_to_center_format(np.array([box], float))[0].tolist()
    return list(box)


def in_units(box, kind, width, height):
    scale = {"pixels": (1, 1), "thousandths": (1000 / width, 1000 / height)}
    across, down = scale.get(kind, (1 / width, 1 / height))
    return [box[0] * across, box[1] * down, box[2] * across, box[3] * down]


def placed(draw, found, labels, numbered):
    """Return columns that hold boxes and labels in one of the ways of public data sets, and the
    setting that reads them."""
    said = [NAMES.index(label) for label in labels] if numbered else labels
    key = draw.choice(["label", "category", "class_name"])
    plural = draw.choice(["category", "labels", "classes", "category_id"])
    ways = [
        ({"boxes": [{"bbox": b, key: n} for b, n in zip(found, said, strict=True)]}, {}),
        ({"objects": {"bbox": found, plural: said}}, {"boxes": "objects.bbox"}),
        ({"objects": {"bbox": found, plural: said}}, {"boxes": "objects"}),
        (
            {"objects": [{"bbox": b, key: n} for b, n in zip(found, said, strict=True)]},
            {"boxes": "objects.bbox"},
        ),
        ({"bboxes": found, plural: said}, {"boxes": "bboxes"}),
        ({"boxes": found, "kinds": said}, {"labels": "kinds"}),
        (
            {"truth": json.dumps({"boxes": found, "kinds": said})},
            {
                "boxes": "truth.boxes",
                "labels": "truth.kinds",
            },
        ),
    ]
    return draw.choice(ways)


@pytest.mark.parametrize("seed", range(16))
def test_a_box_is_the_same_however_it_is_written(tmp_path, seed):
    draw = random.Random(seed)
    form = draw.choice(list(KEYS))
    kind = draw.choice(["pixels", "thousandths", "fractions"])
    numbered = draw.random() < 0.4
    made, wanted = [], {}
    named = draw.choice(KEYS[form]) if draw.random() < 0.3 else None
    state = draw.getstate()
    rows = simple(6)
    source = Source(tmp_path / "data")
    for i, row in enumerate(rows):
        size = (draw.randrange(60, 400), draw.randrange(60, 300))
        picture(i, size).save(tmp_path / "data" / row["image"])
        boxes = [corners(draw, *size) for _ in range(draw.randrange(1, 5))]
        labels = [draw.choice(NAMES) for _ in boxes]
        wanted[row["id"]] = [
            ([round(x) for x in in_units(box, "thousandths", *size)], label)
            for box, label in zip(boxes, labels, strict=True)
        ]
        written = [in_form(in_units(box, kind, *size), form) for box in boxes]
        if named:
            written = [dict(zip(named, each, strict=True)) for each in written]
        made.append((row, written, labels))
    # every row in the same way
    draw.setstate(state)
    way = draw.randrange(1 << 30)
    for row, written, labels in made:
        columns, fields = placed(random.Random(way), written, labels, numbered)
        row |= columns
    more = {"box_format": form, "fields": fields}
    if kind != "pixels" or draw.random() < 0.5:
        more["box_units"] = kind
    if numbered:
        more["class_names"] = list(NAMES)
    task = entry(jsonl(source(rows), **more), answer="{boxes_json}")
    _, found, _ = prepared(tmp_path, task)
    for name, boxes in wanted.items():
        answer = json.loads(found[name].answer)
        assert [box["label"] for box in answer] == [label for _, label in boxes]
        for box, (expected, _) in zip(answer, boxes, strict=True):
            # a middle and a size are rounded once more than corners are
            assert np.abs(np.subtract(box["bbox_2d"], expected)).max() <= 1


@pytest.mark.parametrize("kind", ["thousandths", "fractions", "pixels"])
@pytest.mark.parametrize("seed", range(3))
def test_units_that_nobody_declared_are_not_taken_for_pixels(tmp_path, kind, seed):
    """Of pictures below 1000 px, thousandths reach over the edge; fractions are no pixel at all."""
    draw = random.Random(seed)
    rows = simple(12)
    source = Source(tmp_path / "data")
    for i, row in enumerate(rows):
        size = (draw.randrange(200, 400), draw.randrange(200, 400))
        picture(i, size).save(tmp_path / "data" / row["image"])
        boxes = [corners(draw, *size) for _ in range(8)]
        row["boxes"] = [in_units(box, kind, *size) for box in boxes]
    data = jsonl(source(rows), class_names=["cup"])
    if kind == "pixels":
        prepared(tmp_path, entry(data, answer="{boxes_json}"))
        return
    with pytest.raises(DataError, match=r"dataset\.box_units"):
        prepared(tmp_path, entry(data, answer="{boxes_json}"))


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([{"bbox_2d": [1, 2, 30, 40]}], "box_units"),
        ({"bbox": [[1, 2, 30, 40]], "category": ["a", "b"]}, "1 boxes and category 2"),
        ([{"bbox": [1, 2, 30, 40], "category_id": 7}], "class 7 has no name"),
        ([{"x": 1, "y": 2}], "no corners are among x, y"),
        ([{"bbox": "1 2 30 40"}], "not a list of numbers"),
        ([[0.1, 0.2, 0.3, 0.4]], "box_units to fractions"),
        ([[10, 20, 300, 40]], "reaches beyond 100 x 200"),
    ],
)
def test_what_contradicts_the_format_names_its_setting(entries, said):
    with pytest.raises(BadBox, match=said):
        BoxFormat(class_names=("cup",)).parse(entries, (100, 200))


def test_a_page_of_a_thousand_by_a_thousand_is_one_of_layout_models():
    form = BoxFormat()
    frame = form.frame(1000, 1000, (640, 480))
    (box,) = form.parse([{"bbox_2d": [100, 200, 600, 450]}], frame, (640, 480))
    assert units(box, 640, 480) == [100, 200, 600, 450]


@pytest.mark.parametrize("nested", ["object of lists", "list of objects"])
def test_the_shipped_detector_learns_which_kind_each_box_is(tmp_path, monkeypatch, nested):
    """The entry of config/loras.json, on a table of the data set's own columns."""
    from datasets import ClassLabel, Dataset, Features, List, Value
    from datasets import Image as Picture

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    kinds = ["Coverall", "Face_Shield", "Gloves", "Goggles", "Mask"]
    box = {"id": Value("int64"), "area": Value("int64"), "category": ClassLabel(names=kinds)}
    box["bbox"] = List(Value("float32"), length=4)
    is_list = nested == "list of objects"
    objects = List(box) if is_list else {key: List(feature) for key, feature in box.items()}
    numbers = {"image_id": Value("int64"), "width": Value("int32"), "height": Value("int32")}
    features = Features({**numbers, "image": Picture(), "objects": objects})
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        table = {name: [] for name in features}
        for i in range(12):
            held = io.BytesIO()
            Image.effect_noise((96, 64), 40 + i).save(held, "PNG")
            own = [
                {"id": k, "area": 400, "bbox": [10.0 + 30 * k, 10.0, 20.0, 20.0], "category": k}
                for k in range(1 + i % 3)
            ]
            listed = own if is_list else {key: [each[key] for each in own] for key in box}
            row = {"image_id": i, "width": 96, "height": 64, "objects": listed}
            row["image"] = {"bytes": held.getvalue(), "path": None}
            for name, values in table.items():
                values.append(row[name])
        Dataset.from_dict(table, features=features).to_parquet(tmp_path / f"set/{split}.parquet")

    experts = json.loads((ROOT / "config/loras.json").read_text())["experts"]
    shipped = next(each for each in experts if each["name"] == "detect")
    data = shipped["dataset"] | {"id": str(tmp_path / "set")}
    task = entry(data, prompt=shipped["prompt"], answer=shipped["answer"])
    _, found, _ = prepared(tmp_path, task)
    answers = [json.loads(row.answer) for row in found.values()]
    assert {tuple(box["label"] for box in answer) for answer in answers} == {
        tuple(kinds[:1]),
        tuple(kinds[:2]),
        tuple(kinds[:3]),
    }
    assert {tuple(box["bbox_2d"]) for answer in answers for box in answer} == {
        (104, 156, 312, 469),
        (417, 156, 625, 469),
        (729, 156, 938, 469),
    }
