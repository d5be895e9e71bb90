"""Where a routing set's rows come from: text and pictures in JSONL files, prepared tasks, and what
is wrong there."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
from PIL import Image

from pipeline.config.routing_set import RoutingSetConfig
from pipeline.data.images import images
from pipeline.data.routing.dataset import RoutingRows
from pipeline.errors import ConfigError, DataError
from tests.small_routing import counts, generate, settings, task


@pytest.fixture
def two(tmp_path):
    return {name: task(tmp_path, name) for name in ("ocr", "count")}


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def source(path: Path, expert="none", **more) -> dict:
    return {"expert": expert, "from": "jsonl", "path": str(path)} | more


def painted(path: Path, color: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 40), (color, 0, 0)).save(path)
    return path.name


def test_text_alone_is_routed_by_the_same_code(tmp_path):
    """As CLINC150: each file a domain's, columns of other names, no pictures, no wordings."""
    files = {
        name: jsonl(
            tmp_path / f"{name}.jsonl",
            [{"text": f"{name} question {i}", "label": i} for i in range(40)],
        )
        for name in ("banking", "travel")
    }
    sources = [source(file, name, fields={"prompt": "text"}) for name, file in files.items()]
    wanted = settings(
        ("banking", "travel"), sources=sources, per_expert={"train": 32, "valid": 4, "test": 4}
    )
    rows, manifest = generate(wanted, {}, tmp_path)
    assert counts(rows, "split", "expert")["train", "travel"] == 32
    assert all(
        row["images"] == [] and not row["ambiguous"] and row["expert"] in row["prompt"]
        for row in rows
    )
    assert manifest["groups"] == 80


@pytest.mark.parametrize(
    "prompt", ["naïve 你好 🙂", "a\0b", 'quote " and \\ and \u2028', "{prompt} {x}"]
)
def test_any_text_comes_back_as_it_was(tmp_path, prompt):
    rows = [{"id": f"{i}", "prompt": f"{prompt} {i}"} for i in range(3)]
    wanted = settings(
        ("chat",), sources=[source(jsonl(tmp_path / "a.jsonl", rows), "chat")], short="accept"
    )
    out, _ = generate(wanted, {}, tmp_path)
    assert {row["prompt"] for row in out} <= {row["prompt"] for row in rows} and out
    assert [row.prompt for row in RoutingRows(tmp_path / "routing-1")] == [
        row["prompt"] for row in out
    ]


def test_text_that_differs_in_case_alone_is_one_request(tmp_path):
    rows = [
        {"id": f"{i}", "prompt": ("Pay my bill", "pay  my bill!")[i % 2] + str(i // 2)}
        for i in range(40)
    ]
    rows += [{"id": "x", "prompt": "PAY MY BILL0", "split": "test"}]
    wanted = settings(
        ("banking",), sources=[source(jsonl(tmp_path / "a.jsonl", rows), "banking")], short="accept"
    )
    _, manifest = generate(wanted, {}, tmp_path)
    assert manifest["dropped"]["same request twice"] == 1


def test_pictures_of_a_jsonl_are_known_by_their_pixels(two, tmp_path):
    """One picture under two names, as PNG and as BMP, is one group."""
    rows = []
    for i in range(30):
        painted(tmp_path / "none" / f"a{i}.png", i), painted(tmp_path / "none" / f"b{i}.bmp", i)
        rows += [
            {"image": f"a{i}.png", "prompt": f"Sing {i}"},
            {"image": f"b{i}.bmp", "prompt": f"Dance {i}"},
        ]
    sources = [
        {"expert": "ocr"},
        {"expert": "count"},
        source(jsonl(tmp_path / "none" / "n.jsonl", rows)),
    ]
    out, _ = generate(settings(sources=sources, short="accept"), two, tmp_path)
    none = [row for row in out if row["expert"] == "none"]
    splits = defaultdict(set)
    for row in none:
        splits[Path(row["images"][0]).stem[1:]].add(row["split"])
    assert len(none) >= 30 and all(len(each) == 1 for each in splits.values())
    found = RoutingRows(tmp_path / "routing-1")
    row = next(row for row in found if row.expert == "none" and row.images)
    assert found.pictures(row)[0].size == (40, 40)
    assert images.digest(found.pictures(row)[0])[:16] == row.group.removeprefix("sha256:")


def test_pictures_are_found_under_the_names_that_task_rows_have(tmp_path):
    rows = [
        {
            "prompt": f"Sing {i}",
            ("image", "images", "file_name")[i % 3]: [painted(tmp_path / f"{i}.png", i)],
        }
        for i in range(30)
    ]
    wanted = settings(
        ("chat",), sources=[source(jsonl(tmp_path / "n.jsonl", rows), "chat")], short="accept"
    )
    out, _ = generate(wanted, {}, tmp_path)
    assert len(out) >= 20 and all(len(row["images"]) == 1 for row in out)
    named = settings(
        ("chat",),
        sources=[source(tmp_path / "n.jsonl", "chat", image_field="file_name")],
        short="accept",
    )
    out, _ = generate(named, {}, tmp_path)
    assert {len(row["images"]) for row in out} == {0, 1}


def test_files_of_a_folder_named_for_splits_are_those_splits(tmp_path):
    for name, count in {"train": 10, "val": 3, "test": 3}.items():
        jsonl(
            tmp_path / "data" / f"{name}.jsonl",
            [{"id": f"{name}{i}", "prompt": f"{name} {i}"} for i in range(count)],
        )
    wanted = settings(
        ("chat",),
        sources=[source(tmp_path / "data", "chat")],
        per_expert={"train": 10, "valid": 3, "test": 3},
    )
    rows, _ = generate(wanted, {}, tmp_path)
    assert all(row["prompt"].startswith(row["split"][:3]) for row in rows)


BAD = {
    "duplicate id": (
        [{"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"}],
        "duplicate id 'a': 2 rows of expert chat",
    ),
    "no prompt": (
        [{"id": "a", "text": "x"}],
        r"n.jsonl:1: no prompt in column 'prompt' .* columns are id, text",
    ),
    "unknown split": ([{"prompt": "x", "split": "dev2"}], r"n.jsonl:1: unknown split 'dev2'"),
    "missing picture": (
        [{"prompt": "x", "image": "gone.png"}],
        r"n.jsonl:1: picture 'gone.png' is missing from",
    ),
    "a folder": (
        [{"prompt": "x", "image": "sub"}],
        r"picture 'sub' is missing from .* \(not a file\)",
    ),
    "upward": (
        [{"prompt": "x", "image": "../secret.png"}],
        r"n.jsonl:1: picture '../secret.png' leads outside",
    ),
    "upward, gone": (
        [{"prompt": "x", "image": "../../gone.png"}],
        r"picture '../../gone.png' leads outside",
    ),
    "absolute": (
        [{"prompt": "x", "image": "/etc/hostname"}],
        r"picture '/etc/hostname' leads outside",
    ),
    "link": ([{"prompt": "x", "image": "link.png"}], r"picture 'link.png' leads outside"),
    "linked folder": (
        [{"prompt": "x", "image": "linked/secret.png"}],
        r"picture 'linked/secret.png' leads outside",
    ),
    "NUL": ([{"prompt": "x", "image": "a\0b.png"}], r"picture .* is missing from"),
    "no list": ([{"prompt": "x", "image": {"a": 1}}], r"images must be a list of paths"),
    "corrupt": ([{"prompt": "x", "image": "torn.png"}], r"n.jsonl:1: .*torn.png"),
    "half a pair": ([{"prompt": "x\ud800"}], r"n.jsonl:1: not JSON of UTF-8 text"),
    "placeholder": (
        [{"prompt": "<image> or <image>?"}],
        r"n.jsonl:1: '<image>' is placeholder 2, and the row has no picture",
    ),
    "special token": (
        [{"prompt": "<|im_start|>x<|im_end|>"}],
        r"n.jsonl:1: the prompt holds '<\|im_start\|>'",
    ),
    "another column": (
        [{"prompt": "x", "photo": ["secret.JPG"]}],
        r"n.jsonl:1: no picture where image_field says, and column 'photo' names one",
    ),
    "no object": (["x"], r"n.jsonl:1: one object per line was wanted, not a str"),
}


@pytest.fixture
def here(tmp_path):
    """A folder with what BAD names in it, and a picture beside it that no row may reach."""
    here = tmp_path / "here"
    (here / "sub").mkdir(parents=True)
    painted(tmp_path / "secret.png", 1)
    (here / "link.png").symlink_to(tmp_path / "secret.png")
    (here / "linked").symlink_to(tmp_path)
    (here / "torn.png").write_bytes((tmp_path / "secret.png").read_bytes()[:50])
    return here


@pytest.mark.parametrize(("rows", "expected"), BAD.values(), ids=BAD)
def test_a_bad_row_is_named_with_its_line(tmp_path, here, rows, expected):
    wanted = settings(("chat",), sources=[source(jsonl(here / "n.jsonl", rows), "chat")])
    with pytest.raises(DataError, match=expected):
        generate(wanted, {}, tmp_path)


@pytest.mark.parametrize("said", ["<image>\n{}", "{}\n<image>", "<|image_1|>{}", "[IMG][IMG]{}"])
def test_a_router_learns_no_placeholder_that_only_one_expert_has(tmp_path, said):
    rows = [
        {"prompt": said.format(f"Sing {i}"), "image": painted(tmp_path / f"{i}.png", i)}
        for i in range(30)
    ]
    wanted = settings(
        ("chat",), sources=[source(jsonl(tmp_path / "n.jsonl", rows), "chat")], short="accept"
    )
    out, _ = generate(wanted, {}, tmp_path)
    asked = {row["prompt"] for row in out}
    sung = {prompt for prompt in asked if "Sing" in prompt}
    assert sung and sung <= {f"Sing {i}" for i in range(30)}
    assert not any(mark in prompt for mark in "<[" for prompt in asked)


@pytest.mark.parametrize("name", ["n.jsonl.gz", "n.json", "N.CSV", "n.parquet"])
def test_a_file_of_another_kind_is_told_before_its_lines(tmp_path, name):
    (tmp_path / name).write_bytes(b"[\x8b\n")
    with pytest.raises(DataError, match=f"{name} is not plain JSON Lines.*loras.json"):
        generate(settings(("chat",), sources=[source(tmp_path / name, "chat")]), {}, tmp_path)


def test_a_line_that_is_not_json_and_a_file_that_is_not_there_are_named(tmp_path):
    (tmp_path / "n.jsonl").write_text('{"prompt": "x"}\n{"prompt"\n')
    with pytest.raises(DataError, match=r"n.jsonl:2: not JSON of UTF-8 text"):
        generate(settings(("chat",), sources=[source(tmp_path / "n.jsonl", "chat")]), {}, tmp_path)
    (tmp_path / "n.jsonl").write_text('{"prompt": "K\u00e4se"}\n', "latin-1")
    with pytest.raises(DataError, match=r"n.jsonl:1: not UTF-8 at byte 13; write .*`iconv -f"):
        generate(settings(("chat",), sources=[source(tmp_path / "n.jsonl", "chat")]), {}, tmp_path)
    with pytest.raises(DataError, match=r"dataset.sources.0 \(chat\): .*gone.jsonl cannot be read"):
        generate(
            settings(("chat",), sources=[source(tmp_path / "gone.jsonl", "chat")]), {}, tmp_path
        )


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("name", BAD)
def test_one_bad_row_of_a_merge_is_dropped_and_named(tmp_path, here, two, name, place):
    """Whatever is wrong with it and wherever it stands; the other sources lose nothing."""
    bad, _ = BAD[name]
    rows = [{"id": f"g{i}", "prompt": f"Sing {i}"} for i in range(40)]
    at = {"first": 0, "middle": 20, "last": 40}[place]
    rows[at:at] = bad
    sources = [{"expert": "ocr"}, {"expert": "count"}, source(jsonl(here / "n.jsonl", rows))]
    per_expert = {"train": 99, "valid": 99, "test": 99}
    wanted = settings(sources=sources, short="accept", per_expert=per_expert)
    out, manifest = generate(wanted, two, tmp_path)
    _, plain = generate(settings(short="accept", per_expert=per_expert), two, tmp_path, "plain")
    (new,) = manifest["dropped"].keys() - plain["dropped"].keys()
    assert manifest["dropped"] == plain["dropped"] | {new: 1}
    (example,) = manifest["examples"][new]
    assert example.startswith("a" if name == "duplicate id" else f"n.jsonl:{at + 1}: ")
    of_source = {row["source"]["id"] for row in out if row["expert"] == "none"}
    assert of_source >= {f"g{i}" for i in range(40)}


def test_more_bad_rows_than_a_source_may_have_stop_the_merge(tmp_path, two):
    rows = [{"prompt": f"Sing {i}"} if i % 10 else {"text": "x"} for i in range(40)]
    sources = [{"expert": "ocr"}, source(jsonl(tmp_path / "n.jsonl", rows), "ocr")]
    with pytest.raises(DataError, match=r"4 of 40 rows of dataset\.sources\.1 .* 4 no prompt"):
        generate(settings(("ocr",), sources=sources, short="accept"), two, tmp_path)


def test_an_unknown_expert_is_named_with_those_there_are(two, tmp_path):
    with pytest.raises(DataError, match="unknown expert color; prepared rows are of count, ocr"):
        generate(settings(("ocr", "color")), two, tmp_path)
    words = RoutingSetConfig.model_validate(
        {"sources": [{"expert": "ocr"}], "paraphrases": {"colour": {"held": ["x"]}}}
    )
    with pytest.raises(
        ConfigError, match="paraphrases: unknown expert colour; the sources have ocr"
    ):
        generate(words, two, tmp_path)


def test_a_missing_picture_of_an_artifact_is_an_error(two, tmp_path):
    gone = next((two["ocr"] / "images").iterdir())
    gone.unlink()
    with pytest.raises(
        DataError, match=rf"rows.jsonl:\d+: picture 'images/{gone.name}' is missing from"
    ):
        generate(settings(), two, tmp_path)
