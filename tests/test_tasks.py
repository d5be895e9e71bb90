"""Task rows: what comes out, what is dropped and why, and who stays with whom."""

import json
import os
from zlib import crc32

import numpy as np
import pytest
from PIL import Image
from small_tasks import SPLITS, Source, entry, jsonl, picture, prepared, simple

from pipeline.data.tasks import prepare
from pipeline.data.tasks.groups import Groups, SplitAssignment
from pipeline.data.tasks.rows import TaskRows
from pipeline.errors import DamagedArtifact, DataError, MissingArtifact


@pytest.fixture
def source(tmp_path):
    return Source(tmp_path / "data")


def test_rows_come_out_whole_and_in_order(tmp_path, source):
    path = source(simple(answers=["it", "it is"], license="free"))
    metrics, rows, report = prepared(tmp_path, entry(jsonl(path)))
    assert list(rows) == [f"r{i}" for i in range(12)] and metrics["rows"] == dict.fromkeys(
        SPLITS, 4
    )
    row = rows["r5"]
    assert (row.prompt, row.answer, row.split) == ("what is 5?", "it is 5", "valid")
    assert row.source == {"dataset": "rows.jsonl", "id": "r5", "revision": None}
    assert row.extra == {"answers": ["it", "it is"]}
    assert report["dropped"] == {} and report["kept"] == report["seen"] == 12
    stored = TaskRows(tmp_path / "out")
    assert [r.id for r in stored.rows("valid")] == ["r4", "r5", "r6", "r7"] and stored.rows(
        "valid"
    )[1] == row
    expected = picture(crc32(b"images/5.png"))
    np.testing.assert_array_equal(np.asarray(stored.picture(row)), np.asarray(expected))
    assert {f"images/{file.name}" for file in (tmp_path / "out/images").iterdir()} == {
        image for row in rows.values() for image in row.images
    }


def test_one_line_of_rows_jsonl_is_as_the_other_stages_read_it(tmp_path, source):
    prepared(
        tmp_path, entry(jsonl(source(simple(boxes=[{"bbox": [0, 10, 20, 30], "label": "dot"}]))))
    )
    line = json.loads((tmp_path / "out/rows.jsonl").read_text().splitlines()[0])
    assert list(line) == ["id", "images", "prompt", "answer", "split", "source", "group", "boxes"]
    assert line["boxes"] == [{"bbox_2d": [0, 250, 500, 750], "label": "dot"}]
    assert line["group"].startswith("sha256:") and line["images"] == [
        f"images/{line['group'][7:23]}.png"
    ]


def bad_rows(folder):
    """Return {reason: row} of everything that can be wrong with a row."""
    good = folder / "images/good.png"
    picture(0).save(good)
    (folder / "images/torn.png").write_bytes(good.read_bytes()[:900])
    (folder / "images/leads_out.png").symlink_to("/etc/hostname")
    Image.new("1", (9000, 9000)).save(folder / "images/bomb.png")
    picture(1, (4, 2000)).save(folder / "images/thin.png")
    rows = {
        "missing picture": {"image": "none.png"},
        "corrupt picture": {"image": "images/torn.png"},
        "too large a picture": {"image": "images/bomb.png"},
        "too long and thin": {"image": "images/thin.png"},
        "path outside its root": {"image": "images/leads_out.png"},
        "no picture": {"image": None},
        "empty answer": {"answer": " \n"},
        "empty prompt": {"prompt": ""},
        "no field answer": {"answer": None},
        "answer too long": {"answer": "x" * 4001},
        "not Unicode": {"answer": "half \ud800"},
        "unknown split": {"split": "unittest"},
    }
    given = {"image": "images/good.png", "prompt": "what?", "split": "train"}
    return {reason: given | {"id": reason, "answer": reason} | row for reason, row in rows.items()}


def test_every_bad_row_is_dropped_with_its_reason_and_the_first_are_shown(tmp_path, source):
    bad = bad_rows(tmp_path / "data")
    path = source(simple(600) + [row | {"id": f"{i}"} for i in range(2) for row in bad.values()])
    with open(path, "a") as file:
        file.write('{"torn": \n[1, 2]\n')
    with open(path, "ab") as file:
        file.write(b'{"id": "\xff"}\n\n')
    _, rows, report = prepared(tmp_path, entry(jsonl(path)))
    assert report["dropped"] == dict.fromkeys(bad, 2) | {"not JSON": 2, "not UTF-8": 1}
    assert report["seen"] == 627 and report["kept"] == len(rows) == 600 and report["bad"] == 27
    assert {len(shown) for shown in report["examples"].values()} == {1, 2}
    assert report["examples"]["missing picture"][0] == "rows.jsonl:601: none.png does not exist"
    assert report["examples"]["not JSON"][0].startswith("rows.jsonl:625: ")
    assert str(tmp_path) not in json.dumps(report)  # the same on any machine


@pytest.mark.parametrize(
    "reason", ["corrupt picture", "path outside its root", "too large a picture", "answer too long"]
)
def test_more_bad_rows_than_allowed_is_an_error_that_shows_them(tmp_path, source, reason):
    rows = [*simple(18), bad_rows(tmp_path / "data")[reason]]
    with pytest.raises(
        DataError,
        match=rf"1 of 19 rows of loras\.experts\.look\.dataset .*max_bad_share .*1 {reason} \(rows",
    ):
        prepared(tmp_path, entry(jsonl(source(rows))))
    assert prepared(tmp_path, entry(jsonl(source(simple(20) + rows[-1:]))), "fewer")[2]["bad"] == 1


def test_a_source_of_which_nothing_fits_is_given_up_early(tmp_path, source):
    row = {"id": "x", "prompt": "p", "answer": "a", "image": "nowhere.png"}
    with pytest.raises(DataError, match="1008 of 1008 rows"):
        prepared(tmp_path, entry(jsonl(source([row] * 5000))))


def test_the_same_row_twice_is_kept_once_and_ids_become_unique(tmp_path, source):
    rows = simple(12)
    path = source(
        [*rows, rows[0], rows[1] | {"id": "other"}, rows[2] | {"answer": "something else"}]
    )
    metrics, found, report = prepared(tmp_path, entry(jsonl(path)))
    assert report["dropped"] == {"duplicate": 2} and report["bad"] == 0
    assert len(found) == 13 and metrics["ids_changed"] == 2
    assert {row.answer for row in found.values() if row.source["id"] == "r2"} == {
        "it is 2",
        "something else",
    }


def by_pictures(rows):
    """Return {group: splits its rows are in}."""
    out = {}
    for row in rows.values():
        out.setdefault(row.group, set()).add(row.split)
    return out


def test_a_picture_in_two_files_is_one_group_and_in_one_split(tmp_path, source):
    rows = []
    for i in range(60):
        for name in (f"images/{i}.png", f"images/copy-{i}.bmp"):
            picture(i).save(tmp_path / "data" / name)
            rows.append({"id": name, "image": name, "prompt": "what?", "answer": f"{name}"})
    metrics, found, _ = prepared(
        tmp_path, entry(jsonl(source(rows), valid_share=0.2, test_share=0.3))
    )
    groups = by_pictures(found)
    assert len(groups) == metrics["groups"] == metrics["pictures"] == 60 and all(
        len(s) == 1 for s in groups.values()
    )
    assert all(
        found[f"images/{i}.png"].group == found[f"images/copy-{i}.bmp"].group for i in range(60)
    )
    assert 8 <= metrics["rows"]["valid"] <= 40 and 18 <= metrics["rows"]["test"] <= 54
    other = prepared(tmp_path, entry(jsonl(source(rows)), prompt="{answer}?"), "other task")[1]
    again = {row.group: row.split for row in other.values()}
    assert {
        g: s
        for g, (s,) in by_pictures(prepared(tmp_path, entry(jsonl(source(rows))), "b")[1]).items()
    } == again
    seeded = prepared(tmp_path, entry(jsonl(source(rows))), "seeded", seed=1)[1]
    assert {row.group: row.split for row in seeded.values()} != again


def test_what_a_source_leaks_into_training_is_dropped_and_counted(tmp_path, source):
    rows = simple(12)
    leak = rows[-1] | {"id": "leak", "split": "train", "prompt": "the test picture again"}
    _, found, report = prepared(tmp_path, entry(jsonl(source([*rows, leak]))))
    assert (
        report["dropped"] == {"picture also in test": 1}
        and report["bad"] == 0
        and "leak" not in found
    )


def test_a_handful_of_pictures_still_fills_every_split(tmp_path, source):
    for seed in range(5):
        metrics, _, _ = prepared(
            tmp_path,
            entry(jsonl(source([r | {"split": None} for r in simple(3)]))),
            f"{seed}",
            seed=seed,
        )
        assert metrics["rows"] == dict.fromkeys(SPLITS, 1)
    with pytest.raises(DataError, match=r"gives no (valid|test) row, out of 2 seen"):
        prepared(
            tmp_path, entry(jsonl(source([r | {"split": None} for r in simple(2)], "two.jsonl")))
        )


def test_rows_with_several_pictures_keep_all_of_them_in_one_split(tmp_path, source):
    rng = np.random.default_rng(0)
    rows = [
        {
            "id": f"r{i}",
            "image": [f"images/{n}.png" for n in rng.integers(0, 60, rng.integers(1, 3))],
            "prompt": "same?",
            "answer": str(i),
        }
        for i in range(50)
    ]
    for n in range(60):
        picture(n).save(tmp_path / f"data/images/{n}.png")
    _, found, _ = prepared(tmp_path, entry(jsonl(source(rows), valid_share=0.3, test_share=0.3)))
    split = {}
    for row in found.values():
        for image in row.images:
            assert split.setdefault(image, row.split) == row.split
    assert len(TaskRows(tmp_path / "out").pictures(found["r0"])) == len(rows[0]["image"])


def test_groups_are_the_connected_components():
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    rng, groups = np.random.default_rng(1), Groups()
    pairs = rng.integers(0, 300, (220, 2))
    for pair in pairs:
        groups.join([f"{n:03d}" for n in pair])
    _, labels = connected_components(
        coo_matrix((np.ones(220), pairs.T), shape=(300, 300)), directed=False
    )
    found = [groups.of(f"{n:03d}") for n in range(300)]
    smallest = [f"{min(np.flatnonzero(labels == label)):03d}" for label in labels]
    assert found == smallest


def test_an_assignment_does_not_depend_on_the_order_of_rows():
    given = [(f"g{i}", ["", "train", "test"][i % 3]) for i in range(300)] + [
        ("g1", "test"),
        ("g0", "train"),
    ]
    one, other = SplitAssignment(0, 0.2, 0.2), SplitAssignment(0, 0.2, 0.2)
    one.assign(given)
    other.assign(given[::-1])
    assert one.splits == other.splits and one.carved == ("valid",)
    assert one.splits["g1"] == "test" and all(
        one.splits[f"g{i}"] == "test" for i in range(2, 300, 3)
    )


def test_the_number_of_processes_changes_nothing(tmp_path, source):
    rows = [row | {"prompt": "é ü 漢"} for row in simple(40)]
    rows[7]["image"] = "../none.png"
    given = jsonl(source(rows))
    metrics = prepared(tmp_path, entry(given), "one")[0]
    among = prepared(tmp_path, entry(given), "two", processes=2)[0]
    timed = {"seconds", "rows_per_s"}
    assert {k: v for k, v in metrics.items() if k not in timed} == {
        k: v for k, v in among.items() if k not in timed
    }
    files = {
        p.relative_to(tmp_path / "one"): p.read_bytes() for p in (tmp_path / "one").rglob("*.*")
    }
    assert files == {
        p.relative_to(tmp_path / "two"): p.read_bytes() for p in (tmp_path / "two").rglob("*.*")
    }


def test_progress_is_said(tmp_path, source, monkeypatch):
    monkeypatch.setattr(prepare, "_PROGRESS_EVERY_S", -1)
    said = []
    prepared(
        tmp_path,
        entry(jsonl(source(simple(40)))),
        progress=lambda text, share: said.append((text, share)),
    )
    assert (
        said[0] == ("look: 16 rows read, 16 fit", None)
        and said[2][0] == "look: 40 rows read, 40 fit"
    )


def test_rows_that_are_not_there_or_torn_say_so(tmp_path, source):
    with pytest.raises(MissingArtifact, match=r"rows\.jsonl does not exist") as missing:
        TaskRows(tmp_path).rows("train")
    assert missing.value.stages == ("preprocess",)
    prepared(tmp_path, entry(jsonl(source(simple()))))
    rows = TaskRows(tmp_path / "out")
    with pytest.raises(DataError, match="no split 'held'"):
        rows.rows("held")
    row = rows.rows("test")[0]
    os.truncate(tmp_path / "out" / row.images[0], 100)
    with pytest.raises(DataError, match=r"images/.*png is no whole"):
        rows.picture(row)
    with open(tmp_path / "out/rows.jsonl", "a") as file:
        file.write('{"id": "x"')
    with pytest.raises(DamagedArtifact, match=r"rows\.jsonl:13 is no task row") as damaged:
        TaskRows(tmp_path / "out").rows("train")
    assert damaged.value.remove == tmp_path / "out"
