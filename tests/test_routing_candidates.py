"""Which split a picture goes to, which rows stay together, and which requests are the same."""

import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.errors import DataError
from tests.small_routing import counts, generate, settings, task


def by_picture(root: Path, rows: list[dict]) -> dict[str, set[str]]:
    """Return the splits of every picture by its content's name."""
    found = defaultdict(set)
    for row in rows:
        for image in row["images"]:
            assert (root / "routing-1" / image).exists()
            found[Path(image).name].add(row["split"])
    return found


@pytest.mark.parametrize("seed", range(4))
def test_no_picture_is_in_two_splits_however_rows_share_them(tmp_path, seed):
    draw = random.Random(seed)
    shared = [f"p{i}" for i in range(60)]
    rows = {
        name: [
            {"pictures": draw.sample(shared, draw.choice((1, 1, 2))), "split": None}
            for _ in range(40)
        ]
        for name in ("ocr", "count")
    }
    for each in rows.values():
        for i, row in enumerate(each):
            row["prompt"], row["group"] = f"Row {i} of {id(each)}", f"sha256:{row['pictures'][0]}"
    tasks = {name: task(tmp_path, name, each) for name, each in rows.items()}
    wanted = settings(short="accept", seed=seed, per_expert={"train": 99, "valid": 99, "test": 99})
    out, _ = generate(wanted, tasks, tmp_path)
    assert all(len(splits) == 1 for splits in by_picture(tmp_path, out).values())
    number = {name: i for i, name in enumerate(shared)}
    pairs = [
        (number[row["pictures"][0]], number[p])
        for each in rows.values()
        for row in each
        for p in row["pictures"]
    ]
    ends = np.array(pairs).T
    graph = coo_array((np.ones(len(pairs)), tuple(ends)), shape=(60, 60))
    _, islands = connected_components(graph, directed=False)
    found = {
        (
            row["group"],
            islands[number[rows[row["expert"]][int(row["source"]["row"])]["pictures"][0]]],
        )
        for row in out
    }
    assert (
        len(found) == len({group for group, _ in found}) == len({island for _, island in found}) > 3
    )


def test_rows_of_one_document_stay_together_though_their_pictures_differ(tmp_path):
    rows = [
        {"group": f"document-{i // 5}", "split": None, "prompt": f"Page {i}"} for i in range(100)
    ]
    tasks = {"ocr": task(tmp_path, "ocr", rows), "count": task(tmp_path, "count")}
    out, _ = generate(settings(short="accept"), tasks, tmp_path)
    splits = defaultdict(set)
    for row in out:
        splits[row["group"]].add(row["split"])
    assert all(len(each) == 1 for each in splits.values())
    assert max(counts([row for row in out if row["expert"] == "ocr"], "group").values()) > 1


def test_rows_without_splits_are_divided_by_the_shares(tmp_path):
    tasks = {name: task(tmp_path, name, [{"split": None}] * 100) for name in ("ocr", "count")}
    shares = {"train": 0.6, "valid": 0.2, "test": 0.2}
    sizes = {"train": 60, "valid": 20, "test": 10}
    rows, _ = generate(settings(splits=shares, per_expert=sizes), tasks, tmp_path)
    assert (
        counts(rows, "split", "expert")["test_held", "ocr"] == 10
    )  # exact, so that no draw of luck falls short


def test_a_picture_that_another_expert_holds_out_is_not_trained_with(tmp_path):
    """Both experts have the same pictures, but one tests with what the other trains with."""
    names = [[f"same-{i}"] for i in range(60)]
    ocr = [{"pictures": name, "prompt": f"Read {i}"} for i, name in enumerate(names)]
    count = [row | {"split": "test", "prompt": f"Count {i}"} for i, row in enumerate(ocr[:30])]
    count += [{"split": ("train", "valid")[i % 2]} for i in range(60)]
    tasks = {"ocr": task(tmp_path, "ocr", ocr), "count": task(tmp_path, "count", count)}
    out, manifest = generate(settings(short="accept"), tasks, tmp_path)
    assert manifest["dropped"] == {
        "picture that another source holds out": 20
    }  # 4 of every 6 of the first 30
    assert all(len(splits) == 1 for splits in by_picture(tmp_path, out).values())
    assert (
        max(
            int(row["source"]["row"])
            for row in out
            if row["expert"] == "ocr" and row["split"] == "train"
        )
        >= 30
    )


def test_one_expert_with_a_picture_in_two_splits_loses_that_row_or_is_an_error(tmp_path):
    rows = [
        {"pictures": ["same"], "split": "train", "prompt": "a"},
        {"pictures": ["same"], "split": "test"},
    ]
    tasks = {"ocr": task(tmp_path, "ocr", [*rows, *[{}] * 60]), "count": task(tmp_path, "count")}
    with pytest.raises(
        DataError,
        match="picture in two splits: of expert ocr, row '0000' is in train and row '0001' in",
    ):
        generate(settings(max_bad_share=0.01), tasks, tmp_path)
    out, manifest = generate(settings(), tasks, tmp_path)
    assert manifest["dropped"] == {"picture that another source holds out": 1}
    assert manifest["examples"] == {"picture that another source holds out": ["0000"]}
    assert all(len(splits) == 1 for splits in by_picture(tmp_path, out).values())


def test_splitting_by_id_lets_pictures_be_in_two_splits(tmp_path):
    rows = [{"pictures": [f"p{i // 6}"], "prompt": f"Row {i}"} for i in range(60)]
    tasks = {"ocr": task(tmp_path, "ocr", rows), "count": task(tmp_path, "count")}
    out, _ = generate(settings(split_by="id"), tasks, tmp_path)
    assert max(map(len, by_picture(tmp_path, out).values())) > 1


def test_the_same_request_twice_is_taken_once(tmp_path):
    rows = [
        {
            "pictures": [f"p{i % 30}"],
            "split": "train",
            "prompt": ("Read this.", "READ  this")[i // 30],
        }
        for i in range(60)
    ]
    tasks = {"ocr": task(tmp_path, "ocr", rows), "count": task(tmp_path, "count")}
    wanted = settings(
        short="accept",
        paraphrases={},
        ambiguous_share=0,
        per_expert={"train": 60, "valid": 1, "test": 1},
    )
    out, manifest = generate(wanted, tasks, tmp_path)
    assert counts(out, "expert")["ocr",] == 30
    assert manifest["dropped"] == {"same request twice": 30}
    exact = wanted.model_copy(
        update={"dedupe": wanted.dedupe.model_copy(update={"prompt": "exact"})}
    )
    assert counts(generate(exact, tasks, tmp_path)[0], "expert")["ocr",] == 60


@pytest.mark.parametrize(
    ("dedupe", "left"),
    [
        ({}, 36),
        ({"prompt": "exact"}, 48),
        ({"prompt": "off"}, 12),
        ({"image": "off"}, 3),
        ({"image": "off", "prompt": "exact"}, 4),
        ({"image": "off", "prompt": "off"}, 60),
    ],
)
def test_each_part_of_a_request_is_compared_or_not(tmp_path, dedupe, left):
    """12 pictures, each asked Read, READ, Tell, Name, and Name once more; `off` is what YAML calls
    false."""
    asked = ("Read this.", "READ  this", "Tell this", "Name this", "Name this")
    rows = [
        {"pictures": [f"p{i % 12}"], "split": "train", "prompt": asked[i // 12]} for i in range(60)
    ]
    dedupe = {key: False if value == "off" else value for key, value in dedupe.items()}
    sizes = {"train": 60, "valid": 1, "test": 1}
    wanted = settings(
        ("ocr",), short="accept", paraphrases={}, ambiguous_share=0, per_expert=sizes, dedupe=dedupe
    )
    out, manifest = generate(wanted, {"ocr": task(tmp_path, "ocr", rows)}, tmp_path)
    assert len(out) == left and manifest["dropped"].get("same request twice", 0) == 60 - left


def test_text_alone_is_one_request_by_its_prompt_or_not_at_all(tmp_path):
    rows = [{"pictures": [], "prompt": f"Say {i // 2}", "group": f"{i // 2}"} for i in range(60)]
    rows = [row | {"split": "train"} for row in rows]
    for prompt, left in (("normalized", 30), ("off", 60)):
        root = tmp_path / prompt
        tasks = {"ocr": task(root, "ocr", rows)}
        sizes = {"train": 60, "valid": 1, "test": 1}
        wanted = settings(
            ("ocr",), short="accept", per_expert=sizes, dedupe={"prompt": prompt}, paraphrases={}
        )
        assert len(generate(wanted, tasks, root)[0]) == left


def test_paraphrases_do_not_make_duplicates(tmp_path):
    rows = [
        {"pictures": [f"p{i // 10}"], "split": "train", "prompt": f"Question {i}"}
        for i in range(60)
    ]
    tasks = {"ocr": task(tmp_path, "ocr", rows), "count": task(tmp_path, "count")}
    out, _ = generate(
        settings(short="accept", per_expert={"train": 60, "valid": 1, "test": 1}), tasks, tmp_path
    )
    assert max(Counter((*row["images"], row["prompt"]) for row in out).values()) == 1


def test_a_request_of_two_experts_teaches_neither(tmp_path):
    same = [{"pictures": [f"p{i}"], "prompt": "Do it.", "split": "train"} for i in range(3)]
    tasks = {name: task(tmp_path, name, [*same, *[{}] * 60]) for name in ("ocr", "count")}
    rows, manifest = generate(settings(), tasks, tmp_path)
    assert manifest["dropped"] == {"same request in two experts": 6}
    assert not {"0000", "0001", "0002"} & {row["source"]["row"] for row in rows}
    off = settings(dedupe={"image": "off", "prompt": "off"})
    assert generate(off, tasks, tmp_path)[1]["dropped"] == manifest["dropped"]


def test_a_neutral_prompt_never_stands_with_a_picture_of_two_experts(tmp_path):
    shared = [{"pictures": [f"p{i}"]} for i in range(60)]
    tasks = {name: task(tmp_path, name, shared) for name in ("ocr", "count")}
    tasks["color"] = task(tmp_path, "color")
    wanted = settings(("ocr", "count", "color"), ambiguous_share=0.9, short="accept")
    rows, _ = generate(wanted, tasks, tmp_path)
    assert {row["expert"] for row in rows if row["ambiguous"]} == {"color"}
