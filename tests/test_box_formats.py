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


def tools(corners, size):
    """Return one box as tools and data sets write it that say what they mean, with its kind."""
    x0, y0, x1, y1 = corners
    width, height = size
    outline = [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]
    named = dict(zip(("xmin", "ymin", "xmax", "ymax"), map(str, corners), strict=True))
    shares = {"XMin": x0 / width, "XMax": x1 / width, "YMin": y0 / height, "YMax": y1 / height}
    return {
        "LabelMe": {"label": "mask", "points": [[x1, y0], [x0, y1]], "shape_type": "rectangle"},
        "PaddleOCR": {"label": "mask", "points": outline},
        "vertices": {"label": "mask", "points": [{"x": x, "y": y} for x, y in outline]},
        "VOC": {"name": "mask", "bndbox": named},
        "Visual Genome": {"names": ["mask"], "x": x0, "y": y0, "w": x1 - x0, "h": y1 - y0},
        "an object's name": {"bbox": corners, "category": {"id": 4, "name": "mask"}},
        "a table's number": {"bbox": corners, "label": "4"},
        "with a gap": {"bbox": corners, "label": 4.0},
        "Open Images": shares | {"label": "mask"},
    }


@pytest.mark.parametrize("tool", tools([1, 2, 3, 4], (9, 9)))
def test_what_a_tool_writes_is_the_same_box_whatever_the_settings_say(tool):
    draw = random.Random(tool)
    for form in KEYS:
        size = (draw.randrange(60, 400), draw.randrange(60, 300))
        box = corners(draw, *size)
        # bare numbers are what the setting is about
        if form != "xyxy" and "bbox" in tools(box, size)[tool]:
            continue
        kind = "fractions" if tool == "Open Images" else None
        reads = BoxFormat(form, kind, NAMES)
        (found,) = reads.parse([tools(box, size)[tool]], reads.frame(None, None, size), size)
        assert found.label == "mask" and units(found, *size) == [
            round(x) for x in in_units(box, "thousandths", *size)
        ]


HUGE = 10**400
NO_BOXES = [
    ({"shape_type": "circle", "points": [[10, 20], [30, 40]]}, "a circle is no box"),
    ({"shape_type": "linestrip", "points": [[1, 2], [30, 40]]}, "a linestrip is no box"),
    ({"bbox": [1, 2, 30, 40], "iscrowd": 1}, "a crowd"),
    ({"x": 1, "y": 2, "width": 30, "height": 40, "original_width": 9}, "box_units to fractions"),
    ({"bbox": [1, 2, 30, 40], "labels": ["a", "b"]}, "2 labels in labels"),
    ({"bbox": [0.1, 0.1, 1.0, 1.02]}, "box_units to fractions"),
    ({"bbox": [0, 0, HUGE, 5]}, "not a list of numbers"),
    ({"points": [{"x": 1}, {"x": 3}]}, "not a list of numbers"),
]


@pytest.mark.parametrize(("box", "said"), NO_BOXES)
def test_what_stands_among_boxes_and_is_none_is_said(box, said):
    with pytest.raises(BadBox, match=said) as caught:
        BoxFormat().parse([box], (100, 200))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("form", ["xyxy", "xywh"])
def test_coco_is_a_corner_and_a_size_and_its_outlines_are_not_nothing(tmp_path, form):
    source = Source(tmp_path / "data")
    rows = simple(12)
    source(rows)
    kinds = [{"id": 7, "name": "cup"}]
    images = [{"id": i, "file_name": each["image"]} for i, each in enumerate(rows)]
    around = [{"image_id": i, "category_id": 7, "bbox": [4, 8, 20, 12]} for i in range(12)]
    path = tmp_path / "data/instances.json"

    def said(annotations, out):
        about = {"images": images, "annotations": annotations, "categories": kinds}
        path.write_text(json.dumps(about))
        task = entry(jsonl(path, box_format=form), prompt="Find.", answer="{boxes_json}")
        return {row.answer for row in prepared(tmp_path, task, out)[1].values()}

    assert said(around, "out") == {'[{"bbox_2d": [100, 200, 600, 500], "label": "cup"}]'}
    outlines = [each | {"bbox": None, "segmentation": [[1, 2, 3, 4, 5, 6]]} for each in around]
    with pytest.raises(DataError, match="no corners are among"):
        said(outlines, "outlines")


@pytest.mark.parametrize("as_text", [False, True])
def test_sides_of_a_table_scale_and_contradict_as_numbers_do(as_text):
    """A CSV has all its numbers as text: boxes of the larger picture were taken as they stood."""
    write = str if as_text else float
    reads = BoxFormat()
    frame = reads.frame(write(400), write(200), (200, 100))
    (box,) = reads.parse([[100, 50, 300, 150]], frame, (200, 100))
    assert units(box, 200, 100) == [250, 250, 750, 750]
    with pytest.raises(BadBox, match="cannot be placed"):
        reads.frame(write(100), write(200), (200, 100))
    for none in (HUGE, "", "wide", "nan", 0, -3, True, None):
        assert reads.frame(none, none, (200, 100)) == (200, 100)


@pytest.mark.parametrize(
    ("columns", "fields", "said"),
    [
        ({}, {}, "no row of 12 has a box; name the column of boxes in fields.boxes"),
        ({"box": [[1, 2, 30, 30]]}, {}, "no row of 12 has a box"),
        ({"boxes": []}, {}, "no row of 12 has a box"),
        ({"objects": {"bbox": [[1, 2, 30, 30]]}}, {"boxes": "objects.bboxes"}, "no row of 12"),
        ({"boxes": [[1, 2, 30, 30]]}, {"labels": "kinds"}, "fields.labels is kinds"),
        ({"boxes": [[1, 2, 30, 30]], "kind": "cup"}, {"labels": "kind"}, "no list of as many"),
    ],
)
def test_a_column_that_is_not_there_is_told_and_not_learned_as_none(
    tmp_path, columns, fields, said
):
    source = Source(tmp_path / "data")
    data = jsonl(source(simple(12, **columns)), fields=fields)
    with pytest.raises(DataError, match=said):
        prepared(tmp_path, entry(data, answer="{boxes_json}"))


@pytest.mark.parametrize("scale", [0.001, 1, 9])
@pytest.mark.parametrize("points", [5, 500])
def test_what_to_set_is_told_of_a_polygon_of_any_length(scale, points):
    """A report cuts a message after 300 characters."""
    around = [scale * (x + 100 * (x % 2)) for x in range(points) for _ in "xy"]
    flat = [scale * 7, *around[1:]] if scale < 9 else around
    if scale == 1:
        flat = [7.0, 3.0] * points  # no area
    with pytest.raises(BadBox) as caught:
        BoxFormat().parse([flat], (800, 600))
    assert "dataset.box_" in str(caught.value)[:300]
