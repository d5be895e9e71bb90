"""Rows of the Hub whatever their columns are made of: pictures stay bytes and classes get names at
any depth."""

import io

import pytest
from small_tasks import entry, picture, prepared

from pipeline.data.sources import task_hub

ROWS = 24
TORN = 7
KINDS = ("cat", "dog", "newt")


def content(i):
    out = io.BytesIO()
    picture((9, i)).save(out, "PNG")
    data = out.getvalue()
    return {"bytes": data[: len(data) // 2] if i == TORN else data, "path": None}


def written(folder, make_features, columns):
    """Write a table as the library does, its pictures still as they are."""
    from datasets import Dataset, Image

    folder.mkdir()
    kept = Dataset.from_dict(columns, features=make_features(Image(decode=False)))
    kept.cast(make_features(Image())).to_parquet(folder / "train.parquet")
    return {"source": "hub", "id": str(folder), "revision": "main"}


NESTED = {
    "alone": (lambda image: image, lambda item: item, "image"),
    "in a list": (lambda image: [image], lambda item: [item], "image"),
    "in a struct": (lambda image: {"scan": image}, lambda item: {"scan": item}, "image.scan"),
    "in structs of a list": (
        lambda image: [{"scan": image}],
        lambda item: [{"scan": item}],
        "image.0.scan",
    ),
    "in a list of a struct": (
        lambda image: {"scans": [image]},
        lambda item: {"scans": [item]},
        "image.scans",
    ),
}


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


@pytest.mark.parametrize("kind", NESTED)
def test_one_torn_picture_costs_its_own_row_wherever_it_is_in_the_table(tmp_path, offline, kind):
    from datasets import Features, Value

    feature, value, column = NESTED[kind]
    columns = {
        "image": [value(content(i)) for i in range(ROWS)],
        "prompt": [f"what is {i}?" for i in range(ROWS)],
        "answer": [str(i) for i in range(ROWS)],
    }

    def features(image):
        words = {"prompt": Value("string"), "answer": Value("string")}
        return Features({"image": feature(image)} | words)

    data = written(tmp_path / "set", features, columns) | {"image_field": column}
    _, rows, report = prepared(tmp_path, entry(data))
    assert report["dropped"] == {"corrupt picture": 1}
    assert {row.answer for row in rows.values()} == {str(i) for i in range(ROWS) if i != TORN}


def test_classes_have_their_names_at_any_depth():
    from datasets import ClassLabel, Features, List, Value

    label = ClassLabel(names=list(KINDS))
    features = Features(
        {
            "one": label,
            "some": List(label),
            "objects": {"category": List(label), "area": List(Value("int64"))},
            "parts": List({"kind": label, "parents": List(label)}),
            "plain": Value("int64"),
        }
    )
    row = {
        "one": 2,
        "some": [0, -1, len(KINDS)],
        "objects": {"category": [1, 1], "area": [4, 5]},
        "parts": [{"kind": 0, "parents": []}, {"kind": 2, "parents": [0, 1]}],
        "plain": 2,
    }
    namings = task_hub._namings(features)
    named = {key: naming(row[key]) for key, naming in namings.items()}
    assert named == {
        "one": "newt",
        # Neither a secret nor a number that stands for nothing ends the stream.
        "some": ["cat", None, None],
        "objects": {"category": ["dog", "dog"], "area": [4, 5]},
        "parts": [{"kind": "cat", "parents": []}, {"kind": "newt", "parents": ["cat", "dog"]}],
    }
    # What a row leaves empty stays so.
    assert {naming(None) for naming in namings.values()} == {None}
