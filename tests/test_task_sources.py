"""Every kind of source of task rows, the columns templates name, and what a source may not do."""

import io
import json

import numpy as np
import pytest
from pydantic import ValidationError
from small_tasks import SPLITS, Source, entry, jsonl, picture, prepared, simple, write_rows

from pipeline.config.task_data import ImageLimitsConfig
from pipeline.data.images import images
from pipeline.data.sources import tasks
from pipeline.data.tasks.rows import TaskRows
from pipeline.data.tasks.templates import template_parts
from pipeline.errors import ConfigError, DataError


@pytest.fixture
def source(tmp_path):
    return Source(tmp_path / "data")


def test_columns_go_by_other_names_and_templates_take_any(tmp_path, source):
    rows = [
        {
            "pic": r["image"],
            "qa": {"q": r["prompt"], "a": i},
            "split": r["split"],
            "sure": True,
            "n": 0.5,
        }
        for i, r in enumerate(simple())
    ]
    for row in rows:
        source([{"image": row["pic"]}], "unused.jsonl")
    path = write_rows(tmp_path / "data/rows.jsonl", rows)
    task = entry(
        jsonl(path, image_field="pic", fields={"question": "qa.q", "answer": "qa.a"}),
        prompt="Q: {question} {{as JSON}}",
        answer='{{"answer": {answer}, "sure": {sure}, "n": {n}}}',
    )
    _, found, _ = prepared(tmp_path, task)
    row = found["look-3"]
    assert row.prompt == "Q: what is 3? {as JSON}" and json.loads(row.answer) == {
        "answer": 3,
        "sure": True,
        "n": 0.5,
    }


def test_a_missing_column_is_named_beside_those_there_are(tmp_path, source):
    with pytest.raises(
        DataError,
        match=r"12 no field question .*names \{question\}, and the row has answer, boxes_json, id",
    ):
        prepared(tmp_path, entry(jsonl(source(simple())), prompt="{question}"))


@pytest.mark.parametrize(
    "template", ["{prompt", "{a.b}", "{a[0]}", "{a!r}", "{a:>5}", "{}", "{a} }"]
)
def test_a_template_that_is_more_than_columns_is_a_configuration_error(tmp_path, source, template):
    with pytest.raises(ConfigError, match="the prompt template"):
        template_parts(template, "prompt")
    with pytest.raises(ConfigError):
        prepared(tmp_path, entry(jsonl(source(simple())), prompt=template))


def test_files_give_splits_and_missing_ones_are_cut_from_training(tmp_path, source):
    rows = [row | {"split": "whatever"} for row in simple(80)]
    source(rows[:60], "a.jsonl")
    source(rows[60:], "b.jsonl")
    data = jsonl(tmp_path / "data", train="a.jsonl", test="b.jsonl")
    metrics, found, report = prepared(tmp_path, entry(data))
    assert metrics["rows"]["test"] == 20 and report["carved"] == ["valid"]
    assert {row.id for row in found.values() if row.split == "test"} == {
        f"r{i}" for i in range(60, 80)
    }
    assert 1 <= metrics["rows"]["valid"] <= 15


def test_synthetic_rows_are_task_rows(tmp_path):
    given = {
        "source": "synthetic",
        "synthetic": {"kind": "locate", "train": 30, "valid": 5, "test": 7, "size_px": 96},
    }
    metrics, rows, _ = prepared(
        tmp_path, entry(given), image=ImageLimitsConfig(min_pixels=4096, max_pixels=16384)
    )
    assert metrics["rows"] == {"train": 30, "valid": 5, "test": 7} and metrics["rows_resized"] == 0
    row = rows["locate-0-test-3"]
    assert row.source["dataset"] == "synthetic/locate"
    assert row.extra["boxes"] == [{"bbox_2d": json.loads(row.answer), "label": "square"}]
    assert TaskRows(tmp_path / "out").picture(row).size == (96, 96)


@pytest.mark.parametrize("regions", [False, True])
def test_a_decoded_picture_is_encoded_once(tmp_path, monkeypatch, regions):
    count = []
    monkeypatch.setattr(
        images, "png", lambda image, png=images.png: count.append(image.size) or png(image)
    )
    rows = [
        {"id": f"r{i}", "image": picture(i), "prompt": "p", "answer": f"a{i}"} for i in range(20)
    ]
    rows = (
        [row | {"boxes": [{"bbox": [4, 4, 30, 20], "text": "a"}]} for row in rows]
        if regions
        else rows
    )
    monkeypatch.setitem(
        tasks._STREAMS, "hub", lambda *_: [(None, ((row["id"], row) for row in rows))]
    )
    given = {
        "source": "hub",
        "id": "some/set",
        "revision": "abc",
        "ocr": regions,
        "regions": regions,
    }
    _, found, report = prepared(tmp_path, entry(given))
    assert report["kept"] == len(count) == 20 and (regions or set(count) == {(40, 40)})
    if not regions:
        monkeypatch.undo()
        path = Source(tmp_path / "data")(
            [row | {"image": f"images/{i}.png"} for i, row in enumerate(rows)]
        )
        for i in range(20):
            picture(i).save(tmp_path / f"data/images/{i}.png")
        of_files = prepared(tmp_path, entry(jsonl(path)), "files")[1]
        assert [row.images for row in of_files.values()] == [row.images for row in found.values()]


def test_rows_of_text_alone_are_kept_where_they_are_meant(tmp_path, source):
    """Every, some or no rows have pictures; what is asked twice is in one split, and everything is
    counted."""
    text = [
        {
            "id": f"t{i}",
            "prompt": f"Say {i // 2}!",
            "answer": f"{i}",
            "image": ("", None, [])[i % 3],
        }
        for i in range(60)
    ]
    path = source(simple(40) + text)
    with pytest.raises(
        DataError,
        match=r"60 no picture \(rows.jsonl:41: none in column 'image' of id, .*text alone set",
    ):
        prepared(tmp_path, entry(jsonl(path)), "refused")
    lenient = prepared(tmp_path, entry(jsonl(path, max_bad_share=1)), "dropped")
    assert lenient[2]["dropped"] == {"no picture": 60} and lenient[0]["rows_without_picture"] == 0
    metrics, rows, report = prepared(tmp_path, entry(jsonl(path, pictures="some")), "some")
    assert report["kept"] == 100 and report["dropped"] == {}
    assert report["rows_without_picture"] == metrics["rows_without_picture"] == 60
    assert [len(rows[name].images) for name in ("r7", "t7")] == [1, 0]
    assert rows["t6"].group == rows["t7"].group != rows["t8"].group and rows["t6"].group.startswith(
        "text:"
    )
    groups = {}
    for row in rows.values():
        groups.setdefault(row.group, set()).add(row.split)
    assert len(groups) == metrics["groups"] == 70 and all(
        len(splits) == 1 for splits in groups.values()
    )
    none = prepared(tmp_path, entry(jsonl(path, pictures="none")), "none")
    assert none[0]["rows_without_picture"] == 100 and none[0]["pictures"] == 0
    told = TaskRows(tmp_path / "none")
    assert (
        sum(len(told.rows(split)) for split in SPLITS) == 100
        and told.pictures(told.rows("train")[0]) == []
    )


def test_a_text_in_two_splits_stays_in_the_stricter(tmp_path, source):
    rows = [
        {
            "id": f"t{i}",
            "prompt": f"Say {i % 20}",
            "answer": f"{i}",
            "split": "train" if i < 30 else "test",
        }
        for i in range(40)
    ]
    _, _, report = prepared(tmp_path, entry(jsonl(source(rows), pictures="none")))
    assert report["dropped"] == {"text also in test": 10} and report["bad"] == 0
    assert report["examples"]["text also in test"][0] == "t10: the prompt of its train rows"


def test_boxes_and_regions_need_a_picture(tmp_path, source):
    placed = simple(12, boxes=[[1, 2, 30, 40]])
    rows = [*placed, {"id": "t", "prompt": "p", "answer": "a", "boxes": [[1, 2, 3, 4]]}]
    path = source(rows)
    metrics, found, _ = prepared(tmp_path, entry(jsonl(path, pictures="some")), "unboxed")
    assert metrics["rows_without_boxes"] == 1 and found["t"].extra == {}
    needed = entry(jsonl(path, pictures="some", max_bad_share=1), answer="{boxes_json}")
    assert prepared(tmp_path, needed, "needed")[2]["examples"]["bad box"] == [
        "rows.jsonl:13: the row has boxes and no picture that they lie on"
    ]
    for more in ({"source": "folder"}, {"ocr": True}):
        with pytest.raises(
            ValidationError, match="pictures is some, but .* picture; leave it at every"
        ):
            entry(jsonl(path, pictures="some") | more)


def test_files_named_for_splits_are_those_splits(tmp_path, source):
    for name, some in (
        ("train", simple(12)[:8]),
        ("val", simple(12)[8:10]),
        ("test", simple(12)[10:]),
    ):
        source([row | {"split": None} for row in some], f"{name}.jsonl")
    _, rows, report = prepared(tmp_path, entry(jsonl(tmp_path / "data")))
    assert report["splits"] == {"train": 8, "valid": 2, "test": 2} and rows["r9"].split == "valid"
    source(simple(3), "more.jsonl")
    with pytest.raises(DataError, match="should hold one .jsonl file"):
        prepared(tmp_path, entry(jsonl(tmp_path / "data")), "unclear")


def test_a_limit_is_one_of_each_split(tmp_path, source):
    metrics, rows, _ = prepared(tmp_path, entry(jsonl(source(simple(30)), limit=3)))
    assert metrics["rows"] == dict.fromkeys(SPLITS, 3) and list(rows)[:4] == [
        "r0",
        "r1",
        "r2",
        "r10",
    ]
    unsplit = jsonl(
        source([row | {"split": None} for row in simple(30)], "unsplit.jsonl"), limit=20
    )
    assert prepared(tmp_path, entry(unsplit), "unsplit")[2]["seen"] == 20


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (dict(path="nowhere.jsonl"), r"look\.dataset: .*nowhere\.jsonl does not exist"),
        (
            dict(path="data", train="a.jsonl"),
            r"a\.jsonl does not exist; correct path, or the name under train",
        ),
        (dict(path="data"), "should hold one .jsonl file, found one.jsonl, two.jsonl"),
        (
            dict(path="data/one.jsonl", train="a.jsonl"),
            r"one\.jsonl must be the folder of a\.jsonl",
        ),
        (dict(path="data/one.jsonl"), "the source has no rows"),
        (dict(source="folder", path="nowhere"), "is not a folder of images"),
        (
            dict(source="folder", path="data", train="training"),
            "training is not a folder of images",
        ),
    ],
)
def test_a_source_that_is_not_there_names_its_setting(tmp_path, source, data, message):
    for name in ("one", "two"):
        source([], f"{name}.jsonl")
    data["path"] = str(tmp_path / data["path"])
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, entry({"source": "jsonl"} | data))


def test_an_empty_answer_and_a_table_in_another_encoding_are_called_so(tmp_path, source):
    """An answer that is empty is no column that is missing, a byte of Latin-1 no surrogate."""
    rows = simple()
    rows[3]["answer"] = ""
    with pytest.raises(DataError, match=r"no field answer \(rows\.jsonl:4: its answer is empty; "):
        prepared(tmp_path, entry(jsonl(source(rows))))
    table = tmp_path / "data/rows.csv"
    lines = [f"{row['image']},{row['prompt']},K\u00e4se" for row in rows]
    table.write_text("\n".join(["image,prompt,answer", *lines]), "latin-1")
    with pytest.raises(DataError, match="12 not UTF-8 .*byte 0xE4 after .*K'; write the file as"):
        prepared(tmp_path, entry(jsonl(table)), "table")
    (tmp_path / "data/old.jsonl").write_text('{"prompt": "K\u00e4se"}\n', "latin-1")
    told = (
        r"not UTF-8 \(old\.jsonl:1: byte 13; write the file as UTF-8 .*`iconv -f cp1252 -t UTF-8`"
    )
    with pytest.raises(DataError, match=told):
        prepared(tmp_path, entry(jsonl(tmp_path / "data/old.jsonl")), "lines")


def test_a_folder_of_images_with_text_or_json_beside_them(tmp_path):
    base = tmp_path / "scans"
    for split, count in (("train", 30), ("validation", 4), ("test", 4)):
        (base / split / "a").mkdir(parents=True)
        for i in range(count):
            path = base / split / "a" / f"{i}.png"
            picture(hash((split, i)) % 2**32).save(path)
            path.with_suffix(".txt").write_text(f"text {i}")
    (base / "train/a/3.txt").unlink()
    (base / "train/a/3.json").write_text(
        '{"answer": "from json", "prompt": "ignored", "image": "/etc/hostname"}'
    )
    (base / "train/a/4.txt").unlink()
    task = entry({"source": "folder", "path": str(base)}, prompt="Read it.")
    metrics, rows, report = prepared(tmp_path, task)
    assert metrics["rows"] == {"train": 29, "valid": 4, "test": 4} and report["dropped"] == {
        "no annotation": 1
    }
    assert rows["train/a/3.png"].answer == "from json" and rows["test/a/2.png"].answer == "text 2"


def test_a_folder_with_a_table_is_read_as_the_hub_writes_them(tmp_path, source):
    rows = [{"file_name": r["image"], "text": r["answer"], "split": r["split"]} for r in simple()]
    source([{"image": r["file_name"]} for r in rows], "metadata.jsonl")
    write_rows(tmp_path / "data/metadata.jsonl", rows)
    task = entry(
        {"source": "folder", "path": str(tmp_path / "data")}, prompt="Read it.", answer="{text}"
    )
    assert prepared(tmp_path, task)[0]["rows"] == dict.fromkeys(SPLITS, 4)


def hub_table(path, rows, seed=0):
    """Write parquet as `datasets` does: images as bytes, classes as numbers."""
    from datasets import ClassLabel, Dataset, Features, Image, Value

    def content(i):
        out = io.BytesIO()
        picture((seed, i)).save(out, "PNG")
        return {"bytes": out.getvalue(), "path": None}

    features = Features(
        {"image": Image(), "label": ClassLabel(names=["cat", "dog"]), "n": Value("int32")}
    )
    table = {
        "image": [content(i) for i in range(rows)],
        "label": [i % 2 for i in range(rows)],
        "n": [*range(rows)],
    }
    Dataset.from_dict(table, features=features).to_parquet(path)


def hub(path, **more):
    return {"source": "hub", "id": str(path), "revision": "main"} | more


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


def test_the_hubs_code_streams_a_local_data_set(tmp_path, offline):
    folder = tmp_path / "pets"
    folder.mkdir()
    hub_table(folder / "train-00000.parquet", 40)
    hub_table(folder / "test-00000.parquet", 5, seed=1)
    task = entry(
        hub(folder, train="train", test="test"),
        prompt="Which animal is number {n}?",
        answer="a {label}",
    )
    metrics, rows, _ = prepared(tmp_path, task)
    assert metrics["rows"]["test"] == 5 and sum(metrics["rows"].values()) == 45
    row = rows["look-3"]
    assert (row.prompt, row.answer) == ("Which animal is number 3?", "a dog") and row.source[
        "revision"
    ] == "main"
    found = np.asarray(TaskRows(tmp_path / "out").picture(row))
    np.testing.assert_array_equal(found, np.asarray(picture((0, 3))))
    limited, _, _ = prepared(
        tmp_path, entry(hub(folder, limit=8), prompt="?", answer="{label}"), "limited"
    )
    assert sum(limited["rows"].values()) == 8


def test_a_split_of_the_hub_with_fewer_rows_than_it_says_is_refused(tmp_path, offline):
    folder = tmp_path / "data"
    (folder / "data").mkdir(parents=True)
    hub_table(folder / "data/train-00000.parquet", 40)
    about = "dataset_info:\n  splits:\n  - name: train\n    num_bytes: 1\n    num_examples: "
    for said, more in ((40, {}), (41, {}), (41, {"allow_fewer_rows": True}), (41, {"limit": 20})):
        (folder / "README.md").write_text(f"---\n{about}{said}\n---\n")
        task = entry(hub(folder, **more), prompt="?", answer="{label}")
        out = f"{said}{len(more)}{'limit' in more}"
        if said == 41 and not more:
            with pytest.raises(DataError, match=r"gave 40 rows, and its metadata says 41"):
                prepared(tmp_path, task, out)
        else:
            prepared(tmp_path, task, out)


def test_a_folder_of_images_as_the_hub_has_them(tmp_path, offline, source):
    rows = simple(9)
    source(rows)
    write_rows(
        tmp_path / "data/images/metadata.jsonl",
        [
            {
                "file_name": r["image"].removeprefix("images/"),
                "prompt": r["prompt"],
                "answer": r["answer"],
            }
            for r in rows
        ],
    )
    metrics, found, _ = prepared(tmp_path, entry(hub(tmp_path / "data/images")))
    assert sum(metrics["rows"].values()) == 9 and {row.answer for row in found.values()} == {
        f"it is {i}" for i in range(9)
    }


@pytest.mark.parametrize(
    "url",
    [
        "https://host/x.png",
        "hf://datasets/other/set@main/x.png",
        "file:///etc/hostname",
        "zip://x.png::hf://datasets/some/settle/x.zip",
    ],
)
def test_a_picture_from_elsewhere_is_not_fetched(url):
    with pytest.raises(ValueError, match="is not in the data set some/set"):
        tasks._fetched(url, "some/set")


@pytest.mark.parametrize(
    ("raised", "told"), [(FileNotFoundError("x"), ValueError), (ConnectionError("x"), DataError)]
)
def test_a_picture_that_cannot_be_fetched_costs_its_row_only_where_it_is_gone(
    monkeypatch, raised, told
):
    def refuse(*_args):
        raise raised

    monkeypatch.setattr("fsspec.open", refuse)
    with pytest.raises(told, match="some/set@main/x.png"):
        tasks._fetched("hf://datasets/some/set@main/x.png", "some/set")


def test_a_data_set_may_not_point_out_of_itself(tmp_path, offline):
    from datasets import Dataset, Features, Image, Value
    from pyarrow.parquet import write_table

    (tmp_path / "sly").mkdir()
    picture(0).save(tmp_path / "secret.png")
    table = {"image": [{"bytes": None, "path": str(tmp_path / "secret.png")}], "answer": ["got it"]}
    features = Features({"image": Image(decode=False), "answer": Value("string")})
    write_table(
        Dataset.from_dict(table, features=features).data.table, tmp_path / "sly/train.parquet"
    )
    with pytest.raises(DataError, match="1 path outside its root"):
        prepared(tmp_path, entry(hub(tmp_path / "sly"), prompt="?"))


def test_a_data_set_that_cannot_be_reached_says_what_to_check(tmp_path, offline):
    with pytest.raises(
        DataError,
        match=r"look\.dataset: .*nowhere\[train\] at revision main cannot be streamed.*HF_TOKEN",
    ):
        prepared(tmp_path, entry(hub(tmp_path / "nowhere")))


def test_rows_of_text_among_others_name_no_picture_elsewhere(tmp_path, source):
    """Where pictures may be absent, one in a column of another name was taken for absent."""
    rows = simple(40)
    for each in rows[1:]:
        each["photo"] = each.pop("image").upper()
    rows[0]["image"] = "images/0.png"
    data = jsonl(source(rows), pictures="some")
    with pytest.raises(DataError, match=r"39 no picture .* photo names one; set dataset.image_fi"):
        prepared(tmp_path, entry(data))
