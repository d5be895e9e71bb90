"""The routing set: balance, shortages, wordings, the same bytes, and what is read back."""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from pipeline.data.routing import candidates, dataset
from pipeline.data.routing.dataset import RoutingRows
from pipeline.data.routing.sampling import apportioned
from pipeline.errors import ConfigError, DataError, DiskFull
from tests.small_routing import WORDS, counts, generate, settings, task


@pytest.fixture
def two(tmp_path):
    return {name: task(tmp_path, name) for name in ("ocr", "count")}


def test_equal_balance_gives_every_expert_the_same_number_in_every_split(two, tmp_path):
    rows, manifest = generate(settings(), two, tmp_path)
    assert counts(rows, "split", "expert") == {
        (split, expert): n
        for split, n in {"train": 20, "valid": 4, "test": 5, "test_held": 5}.items()
        for expert in ("ocr", "count")
    }
    assert manifest["rows"]["train"] == {"ocr": 20, "count": 20}
    assert len({row["id"] for row in rows}) == len(rows)
    assert set(rows[0]) == {
        "id",
        "images",
        "prompt",
        "expert",
        "source",
        "split",
        "ambiguous",
        "group",
    }


def test_a_row_says_where_it_comes_from(two, tmp_path):
    rows, _ = generate(settings(), two, tmp_path)
    row = next(row for row in rows if row["expert"] == "ocr")
    original = next(
        each
        for each in map(json.loads, (two["ocr"] / "rows.jsonl").read_text().splitlines())
        if each["id"] == row["source"]["row"]
    )
    assert row["id"] == f"ocr-{original['id']}"
    assert row["source"] == original["source"] | {"row": original["id"]}
    assert (tmp_path / "routing-1" / row["images"][0]).samefile(two["ocr"] / original["images"][0])
    assert row["images"] == [f"../preprocess-ocr/{original['images'][0]}"]


def test_the_share_of_neutral_prompts_is_kept_by_every_expert_and_split(two, tmp_path):
    rows, manifest = generate(settings(ambiguous_share=0.4), two, tmp_path)
    neutral = counts([row for row in rows if row["ambiguous"]], "split", "expert")
    assert neutral == {
        (split, expert): n
        for split, n in {"train": 8, "valid": 2, "test": 2, "test_held": 2}.items()
        for expert in ("ocr", "count")
    }
    assert manifest["ambiguous"]["train"] == {"ocr": 8, "count": 8}
    for row in rows:
        said = WORDS["neutral"]["held" if row["split"] == "test_held" else "seen"]
        assert (row["prompt"] in said) == row["ambiguous"]


def test_held_out_wordings_are_in_test_held_alone(two, tmp_path):
    rows, _ = generate(settings(), two, tmp_path)
    held = {row["prompt"] for row in rows if row["split"] == "test_held"}
    assert held == {"What is written?", "Give their number.", "See?"}
    assert not held & {row["prompt"] for row in rows if row["split"] != "test_held"}


def test_seen_wordings_are_all_used_and_may_hold_the_rows_own_prompt(two, tmp_path):
    rows, _ = generate(settings(), two, tmp_path)
    said = {row["prompt"] for row in rows if row["expert"] == "ocr" and row["split"] == "train"}
    assert said == {"Do ocr.", "Read it.", "Transcribe: Do ocr.", "What is this?", "Look."}


def test_without_held_out_wordings_there_is_no_test_held_and_test_has_all_pictures(two, tmp_path):
    words = {"ocr": {"seen": ["Read it."]}}
    rows, _ = generate(
        settings(paraphrases=words, per_expert={"train": 20, "valid": 4, "test": 20}), two, tmp_path
    )
    assert counts(rows, "split") == {("train",): 40, ("valid",): 8, ("test",): 40}


def test_a_set_is_shuffled_within_its_splits(two, tmp_path):
    rows, _ = generate(settings(), two, tmp_path)
    train = [row["expert"] for row in rows if row["split"] == "train"]
    assert [row["split"] for row in rows] == sorted(
        (row["split"] for row in rows), key=dataset.SPLITS.index
    )
    assert len(set(train[:10])) == 2 and train != sorted(train)


SHARES = {"ocr": 0.75, "count": 0.25}


@pytest.mark.parametrize(
    ("balance", "expected"),
    [("natural", {"ocr": 27, "count": 13}), (SHARES, {"ocr": 30, "count": 10})],
)
def test_other_balances_divide_the_same_total(tmp_path, balance, expected):
    tasks = {"ocr": task(tmp_path, "ocr", 120), "count": task(tmp_path, "count", 60)}
    _, manifest = generate(settings(balance=balance), tasks, tmp_path)
    assert manifest["rows"]["train"] == expected


def test_natural_balance_takes_what_there_is_and_is_never_short(tmp_path):
    tasks = {"ocr": task(tmp_path, "ocr", 60), "count": task(tmp_path, "count", 6)}
    sizes = {"train": 500, "valid": 500, "test": 500}
    _, manifest = generate(settings(balance="natural", per_expert=sizes), tasks, tmp_path)
    assert manifest["rows"]["train"] == {"ocr": 30, "count": 3}
    assert manifest["short"] == []


@pytest.mark.parametrize("total", [0, 1, 7, 100])
@pytest.mark.parametrize("shares", [[1], [1, 1, 1], [0.2, 0.8], [3, 5, 11, 0]])
def test_apportioned_numbers_add_up_and_are_near_their_shares(total, shares):
    found = apportioned(total, dict(enumerate(shares)))
    assert sum(found.values()) == total
    assert all(abs(found[i] - total * share / sum(shares)) < 1 for i, share in enumerate(shares))


def test_weights_divide_an_experts_rows_among_its_sources(two, tmp_path):
    more = tmp_path / "more.jsonl"
    more.write_text(
        "".join(json.dumps({"id": f"m{i}", "prompt": f"Read line {i}"}) + "\n" for i in range(60))
    )
    sources = [
        {"expert": "ocr", "weight": 3},
        {"expert": "ocr", "from": "jsonl", "path": str(more)},
        {"expert": "count"},
    ]
    rows, _ = generate(settings(sources=sources, ambiguous_share=0, short="accept"), two, tmp_path)
    found = Counter(
        bool(row["images"]) for row in rows if row["expert"] == "ocr" and row["split"] == "train"
    )
    assert found == {True: 15, False: 5}


def test_a_source_with_its_own_numbers_keeps_them(two, tmp_path):
    own = {"train": 7, "valid": 2, "test": 1}
    sources = [{"expert": "ocr"}, {"expert": "count", "per_split": own}]
    _, manifest = generate(settings(sources=sources), two, tmp_path)
    assert manifest["rows"]["train"] == {"ocr": 20, "count": 7}
    assert manifest["rows"]["test_held"] == {"ocr": 5, "count": 1}


def test_a_shortage_names_expert_wanted_found_and_what_mends_it(tmp_path):
    tasks = {"ocr": task(tmp_path, "ocr"), "count": task(tmp_path, "count", 12)}
    with pytest.raises(DataError) as caught:
        generate(settings(), tasks, tmp_path)
    said = str(caught.value)
    assert "count, train: 6 of 20 wanted by dataset.per_expert.train" in said
    assert (
        "count, test: 2 of 5 wanted by dataset.per_expert.test (test and test_held have different"
        in said
    )
    assert "ocr" not in said and "dataset.short" in said
    assert list((tmp_path / "routing-1").iterdir()) == []


def test_a_shortage_that_is_of_duplicates_says_so(tmp_path):
    tasks = {name: task(tmp_path, name, [{"prompt": "Same?"}] * 60) for name in ("ocr", "count")}
    with pytest.raises(
        DataError,
        match=r"(?s)ocr, train: 0 of 20.*dropped before: 118 same request twice\nGive these",
    ):
        generate(settings(dedupe={"image": "off"}, short="accept"), tasks, tmp_path)


def test_accepting_a_shortage_takes_what_there_is_and_says_so(tmp_path):
    tasks = {"ocr": task(tmp_path, "ocr"), "count": task(tmp_path, "count", 12)}
    rows, manifest = generate(settings(short="accept"), tasks, tmp_path)
    assert counts(rows, "split", "expert")["train", "count"] == 6
    assert {
        "expert": "count",
        "split": "train",
        "wanted": 20,
        "found": 6,
        "setting": "dataset.per_expert.train",
    } in (manifest["short"])


def test_upsampling_repeats_training_rows_in_other_words_and_no_test_rows(tmp_path):
    tasks = {"ocr": task(tmp_path, "ocr"), "count": task(tmp_path, "count", 12)}
    rows, manifest = generate(settings(short="upsample"), tasks, tmp_path)
    here = [row for row in rows if row["expert"] == "count" and row["split"] == "train"]
    assert len(here) == 20 and manifest["copies"]["train"] == {"ocr": 0, "count": 14}
    assert max(Counter(row["source"]["row"] for row in here).values()) == 4
    assert len({row["id"] for row in rows}) == len(rows)
    assert (
        len({(row["source"]["row"], row["prompt"]) for row in here}) > 12
    )  # each in two wordings or more
    assert counts(rows, "split", "expert")["test", "count"] == 2


@pytest.mark.parametrize("short", ["accept", "upsample"])
def test_an_expert_without_a_training_row_is_an_error_all_the_same(tmp_path, short):
    tasks = {
        "ocr": task(tmp_path, "ocr"),
        "count": task(tmp_path, "count", [{"split": "test"}] * 30),
    }
    with pytest.raises(DataError, match="count, train: 0 of 20"):
        generate(settings(short=short), tasks, tmp_path)


def test_an_expert_without_held_out_wording_is_not_tested_on_seen_wording(tmp_path):
    tasks = {"ocr": task(tmp_path, "ocr"), "color": task(tmp_path, "color")}
    with pytest.raises(
        DataError, match=r"color, test_held: 0 of 5 .* dataset.paraphrases.color.held"
    ):
        generate(settings(("ocr", "color")), tasks, tmp_path)
    free = task(tmp_path / "free", "color", [{"prompt": f"Is thing {i} red?"} for i in range(60)])
    rows, _ = generate(settings(("ocr", "color")), tasks | {"color": free}, tmp_path)
    assert counts(rows, "split", "expert")["test_held", "color"] == 5


def test_a_wording_that_is_seen_and_held_out_is_an_error(two, tmp_path):
    words = {
        "ocr": {"seen": ["Read it."], "held": ["What?"]},
        "count": {"seen": ["what"], "held": ["Number?"]},
    }
    with pytest.raises(
        ConfigError,
        match=r"paraphrases.ocr.held: 'What\?' also stands in dataset.paraphrases.count.seen",
    ):
        generate(settings(paraphrases=words), two, tmp_path)
    words["count"]["seen"], words["ocr"]["held"] = [], ["do count!"]  # the other's own prompt
    with pytest.raises(
        DataError, match=r"the held-out wording .* is also the prompt of row '\d+' in train"
    ):
        generate(settings(paraphrases=words), two, tmp_path)


def test_rows_over_the_limits_are_dropped_and_counted(tmp_path):
    rows = [{}] * 60 + [{"pictures": list("abc")}, {"prompt": "long " * 100}]
    tasks = {"ocr": task(tmp_path, "ocr", rows), "count": task(tmp_path, "count")}
    _, manifest = generate(
        settings(limits={"max_images": 2, "max_prompt_chars": 200}), tasks, tmp_path
    )
    assert manifest["dropped"] == {"over 2 pictures": 1, "prompt over 200 characters": 1}


def test_the_order_of_rows_does_not_matter_and_the_seed_does(two, tmp_path):
    first, _ = generate(settings(), two, tmp_path)
    lines = (two["ocr"] / "rows.jsonl").read_text().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    (two["ocr"] / "rows.jsonl").write_text("".join(lines))
    assert generate(settings(), two, tmp_path)[0] == first
    other, _ = generate(settings(seed=1), two, tmp_path)
    assert {row["id"] for row in other} != {row["id"] for row in first}


def test_two_processes_write_the_same_bytes(two, tmp_path):
    wanted = tmp_path / "settings.json"
    wanted.write_text(settings().model_dump_json(by_alias=True))
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from pipeline.config.routing_set import RoutingSetConfig\n"
        "from pipeline.data.routing import dataset\n"
        f"root = Path({str(tmp_path)!r})\n"
        "tasks = {name: root / f'preprocess-{name}' for name in ('ocr', 'count')}\n"
        f"wanted = RoutingSetConfig.model_validate_json(Path({str(wanted)!r}).read_text())\n"
        "dataset.generate(wanted, tasks, {'ocr': 'A'}, Path(sys.argv[1]))"
    )
    found = []
    for seed in "12":
        folder = tmp_path / f"routing-{seed}"
        folder.mkdir()
        environment = os.environ | {
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": str(Path(__file__).parent.parent),
        }
        subprocess.run([sys.executable, "-c", program, str(folder)], check=True, env=environment)
        found.append(
            [(folder / name).read_bytes() for name in ("routing.jsonl", "routing.manifest.json")]
        )
    assert found[0] == found[1]


def test_the_manifest_tells_what_went_in(two, tmp_path):
    rows, manifest = generate(settings(), two, tmp_path, labels={"ocr": "A", "count": "B"})
    folder = tmp_path / "routing-1"
    assert sorted(path.name for path in folder.iterdir()) == [
        "routing.jsonl",
        "routing.manifest.json",
    ]
    assert manifest["sha256"] == hashlib.sha256((folder / "routing.jsonl").read_bytes()).hexdigest()
    for read in manifest["read"]:
        content = (two[read["expert"]] / "rows.jsonl").read_bytes()
        assert read == {
            "expert": read["expert"],
            "rows": 60,
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    assert manifest["labels"] == {"ocr": "A", "count": "B"} and manifest["seed"] == 0
    assert manifest["groups"] == len({row["group"] for row in rows})
    assert generate(settings(seed=1), two, tmp_path)[1]["config"] != manifest["config"]


def test_a_set_is_read_back_row_by_row(two, tmp_path):
    rows, manifest = generate(settings(), two, tmp_path)
    found = RoutingRows(tmp_path / "routing-1")
    assert len(found) == len(rows) and found.manifest == manifest
    assert (
        [row.id for row in found]
        == [row["id"] for row in rows]
        == [found[i].id for i in range(len(found))]
    )
    assert found[-1].id == rows[-1]["id"]
    assert [row.id for row in found.rows("valid")] == [
        row["id"] for row in rows if row["split"] == "valid"
    ]
    with pytest.raises(DataError, match="no routing set"):
        RoutingRows(tmp_path)


def test_a_full_disk_is_said_and_leaves_nothing_behind(two, tmp_path, monkeypatch):
    monkeypatch.setattr(candidates, "_SCHEMA", f"PRAGMA max_page_count = 8; {candidates._SCHEMA}")
    wanted = r"no room to write .*routing.jsonl \(No space left on device; .* kB for each row"
    with pytest.raises(DiskFull, match=wanted):
        generate(settings(), two, tmp_path)
    assert list((tmp_path / "routing-1").iterdir()) == []
