"""routing-generator/generate.py: from JSONL alone, or the experts' rows, in a store or prepared
here."""

import errno
import importlib.util
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from yaml_text import yaml_text

from pipeline.data.routing import dataset
from pipeline.data.tasks import prepare
from pipeline.families.load import parse
from pipeline.families.lora_vlm.config import LoraVlmConfig
from pipeline.run.stages import address
from pipeline.store.artifacts import Manifest, Store, inventory

PROGRAM = Path(__file__).parent.parent / "routing-generator" / "generate.py"
SIZES = {"train": 8, "valid": 2, "test": 2}
LORAS = {
    "base": {"build": {}, "image": {"min_pixels": 1024, "max_pixels": 4096}},
    "defaults": {"steps": 1},
    "experts": [
        {
            "name": name,
            "label": label,
            "dataset": {
                "source": "synthetic",
                "synthetic": {"kind": kind, "train": 10, "valid": 2, "test": 4, "size_px": 32},
            },
        }
        for name, label, kind in (("color", "A", "color"), ("ocr", "B", "digits"))
    ],
    "router": {"steps": 1},
}
SET = {
    "per_expert": SIZES,
    "sources": [{"expert": "color", "from": "loras"}, {"expert": "ocr", "from": "loras"}],
    "paraphrases": "words.yaml",
    "neutral": {"seen": ["Look."], "held": ["See?"]},
}
HALVES = {"train": 0.5, "valid": 0.25, "test": 0.25}
WORDS = {"color": {"held": ["Its color?"]}, "ocr": {"held": ["Its digit?"]}}


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("generate", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with configurations of two synthetic experts, and of text alone; it is the current
    one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOLEFORGE_STORE", raising=False)
    Path("loras.json").write_text(json.dumps(LORAS))
    Path("words.yaml").write_text(yaml_text(WORDS))
    Path("dataset.yaml").write_text(yaml_text(SET | {"loras": "loras.json"}))
    Path("bare.yaml").write_text(yaml_text(SET))
    Path("run.yaml").write_text(
        yaml_text({"family": "lora_vlm", "loras": "loras.json", "dataset": "bare.yaml"})
    )
    for name in ("banking", "travel"):
        lines = (
            json.dumps({"text": f"{name} {i}", "kind": "odd" if i % 2 else "even"})
            for i in range(30)
        )
        Path(f"{name}.jsonl").write_text("\n".join(lines))
    sources = [
        {"expert": name, "from": "jsonl", "path": f"{name}.jsonl", "fields": {"prompt": "text"}}
        for name in ("banking", "travel")
    ]
    Path("text.yaml").write_text(yaml_text({"per_expert": SIZES, "sources": sources}))
    return tmp_path


def rows(file: Path | str) -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text("utf-8").splitlines()]


def test_text_from_jsonl_needs_nothing_else(program, here, capsys):
    assert (
        program.main(["--config", "text.yaml", "--output", "out/routes.jsonl", "--preview", "3"])
        == 0
    )
    found = rows("out/routes.jsonl")
    assert len(found) == 24 and {row["expert"] for row in found} == {"banking", "travel"}
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "routes.jsonl",
        "routes.manifest.json",
    ]
    said = capsys.readouterr().out
    assert re.search(r"banking +│ +8 │ +2 │ +2 │ +0", said)
    assert len(re.findall(r"│ banking-\d+ +│", said)) == 3


@pytest.mark.parametrize("part", ["generate", "show"])
def test_who_stops_it_is_told_whether_the_set_is_there(program, here, monkeypatch, capsys, part):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, part, stop)
    assert program.main(["--config", "text.yaml", "--output", "out/[a].jsonl"]) == 130
    said = {"generate": "nothing was written", "show": "out/[a].jsonl is written"}[part]
    assert capsys.readouterr().err == f"stopped; {said}\n"
    assert Path("out/[a].jsonl").exists() == (part == "show")


def test_a_fault_of_an_open_file_names_the_folder(program, here, monkeypatch, capsys):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(dataset, "generate", fail)
    assert program.main(["--config", "text.yaml", "--output", "out/a.jsonl"]) == 2
    assert "error: out: Input/output error; choose another" in capsys.readouterr().err


def test_rows_of_synthetic_experts_are_prepared_once(program, here, monkeypatch, capsys):
    assert program.main(["--config", "dataset.yaml"]) == 0
    first = Path("routing.jsonl").read_bytes()
    found = rows("routing.jsonl")
    assert len(found) == 2 * 14
    assert all((here / row["images"][0]).is_file() for row in found)
    assert all(row["images"][0].startswith("routing-work/preprocess-") for row in found)
    assert "color (A)" in capsys.readouterr().out
    monkeypatch.setattr(prepare, "prepare", None)
    assert program.main(["--config", "dataset.yaml"]) == 0
    assert Path("routing.jsonl").read_bytes() == first


def test_none_may_be_text_alone_beside_pictures(program, here):
    lines = (json.dumps({"id": f"n{i}", "prompt": f"Book table {i}"}) for i in range(60))
    Path("none.jsonl").write_text("\n".join(lines))
    source = {
        "expert": "none",
        "from": "jsonl",
        "path": "none.jsonl",
        "per_split": SIZES | {"test": 1},
    }
    loras = LORAS | {"router": {"steps": 1, "none_label": "Z"}}
    Path("none.yaml").write_text(
        yaml_text(
            SET | {"loras": "none.json", "sources": [*SET["sources"], source], "paraphrases": WORDS}
        )
    )
    Path("none.json").write_text(json.dumps(loras))
    assert program.main(["--config", "none.yaml"]) == 0
    none = [row for row in rows("routing.jsonl") if row["expert"] == "none"]
    assert len(none) == 12 and not any(row["images"] or row["ambiguous"] for row in none)


def test_requests_of_nobody_from_jsonl_are_prepared_as_in_a_run(program, here):
    """Some are text alone; the pictures of others are resized. With a store or alone, the stage's
    bytes."""
    Path("none").mkdir()
    for i in range(40):
        Image.effect_noise((90, 90 + i), 50).save(f"none/{i}.png")
    lines = (
        json.dumps(
            {"id": f"n{i}", "prompt": f"Book {i}"} | ({"image": f"{i}.png"} if i % 2 else {})
        )
        for i in range(40)
    )
    Path("none/rows.jsonl").write_text("\n".join(lines))
    source = {
        "expert": "none",
        "from": "jsonl",
        "path": str(here / "none"),
        "per_split": SIZES | {"test": 1},
    }
    raw = SET | {
        "sources": [*SET["sources"], source],
        "paraphrases": WORDS,
        "seed": 5,
        "splits": HALVES,
    }
    loras = LORAS | {"router": {"steps": 1, "none_label": "Z"}}
    Path("whole.yaml").write_text(yaml_text({"family": "lora_vlm", "loras": loras, "dataset": raw}))
    cfg = parse({"family": "lora_vlm", "loras": loras, "dataset": raw})
    store = Store(here / "kept").open()
    found = in_store(store, cfg)
    stage = store.root / "artifacts" / "routing-y"
    stage.mkdir()
    dataset.generate(cfg.dataset, found, cfg.loras.labels, stage)
    beside = store.root / "artifacts" / "routing-x"
    assert (
        program.main(
            ["--config", "whole.yaml", "--store", "kept", "--output", str(beside / "routing.jsonl")]
        )
        == 0
    )
    assert (beside / "routing.jsonl").read_bytes() == (stage / "routing.jsonl").read_bytes()
    assert program.main(["--config", "whole.yaml", "--output", "routing.jsonl"]) == 0
    alone = [
        row | {"images": [Path(image).name for image in row["images"]]}
        for row in rows("routing.jsonl")
    ]
    staged = [
        row | {"images": [Path(image).name for image in row["images"]]}
        for row in rows(stage / "routing.jsonl")
    ]
    assert alone == staged
    none = [row for row in staged if row["expert"] == "none"]
    assert len(none) == 12 and {len(row["images"]) for row in none} == {0, 1}
    splits = [
        row.split
        for split in ("train", "valid", "test")
        for row in prepare.TaskRows(found["none"]).rows(split)
    ]
    assert splits.count("train") < 28  # dataset.splits divides them, which has .5 for train


def test_half_prepared_rows_are_prepared_again(program, here):
    assert program.main(["--config", "dataset.yaml"]) == 0
    first = Path("routing.jsonl").read_bytes()
    for mark in Path("routing-work").glob("*/done"):
        mark.unlink()
        (mark.parent / "rows.jsonl").write_text("torn")
    assert program.main(["--config", "dataset.yaml"]) == 0
    assert Path("routing.jsonl").read_bytes() == first


def test_experts_may_be_named_by_the_file_a_run_or_the_command(program, here):
    for i, where in enumerate(
        (["dataset.yaml"], ["run.yaml"], ["bare.yaml", "--loras", "loras.json"])
    ):
        assert program.main(["--config", *where, "--output", f"{i}.jsonl", "--preview", "0"]) == 0
    assert (
        Path("0.jsonl").read_bytes() == Path("1.jsonl").read_bytes() == Path("2.jsonl").read_bytes()
    )
    manifests = [Path(f"{i}.manifest.json").read_bytes() for i in range(3)]
    assert len(set(manifests)) == 1


def in_store(store: Store, cfg: LoraVlmConfig) -> dict[str, Path]:
    """Leave the tasks' rows in a store, as the stage preprocess does."""
    found = {}
    for name in cfg.tasks:
        here = address(cfg, "preprocess", name)
        found[name] = store.begin(here)
        prepare.prepare(cfg.task(name), cfg.loras.base.image, cfg.seed, found[name])
        store.finish(Manifest(here, "preprocess", name, {}, inventory(found[name])))
    return found


def test_rows_in_the_store_are_used_and_the_bytes_are_those_of_the_stage(
    program, here, monkeypatch
):
    cfg = parse({"family": "lora_vlm", "loras": LORAS, "dataset": SET | {"paraphrases": WORDS}})
    store = Store(here / "kept").open()
    found = in_store(store, cfg)
    monkeypatch.setattr(prepare, "prepare", None)
    beside = store.root / "artifacts" / "routing-x"
    assert (
        program.main(
            ["--config", "run.yaml", "--store", "kept", "--output", str(beside / "routing.jsonl")]
        )
        == 0
    )
    assert not Path("routing-work").exists() and not (beside / "routing-work").exists()
    stage = store.root / "artifacts" / "routing-y"
    stage.mkdir()
    dataset.generate(cfg.dataset, found, cfg.loras.labels, stage)
    for name in ("routing.jsonl", "routing.manifest.json"):
        assert (beside / name).read_bytes() == (stage / name).read_bytes()


def test_seed_and_overrides_change_the_set(program, here):
    for i, more in enumerate(
        (
            [],
            ["--seed", "7"],
            ["--override", "per_expert.train=5"],
            ["--override", "dataset.seed=7"],
        )
    ):
        assert program.main(["--config", "text.yaml", "--output", f"{i}.jsonl", *more]) == 0
    assert len(rows("2.jsonl")) == 18
    assert (
        Path("1.jsonl").read_bytes() == Path("3.jsonl").read_bytes() != Path("0.jsonl").read_bytes()
    )
    assert program.main(["--config", "run.yaml", "--seed", "7", "--output", "4.jsonl"]) == 0
    assert json.loads(Path("4.manifest.json").read_text())["seed"] == 7


def test_the_contact_sheet_has_a_line_of_pictures_for_each_expert(program, here, capsys):
    assert program.main(["--config", "dataset.yaml", "--contact-sheet", "look/sheet.png"]) == 0
    with Image.open("look/sheet.png") as sheet:
        colors = {color for _, color in sheet.convert("RGB").getcolors(1 << 24)}
    assert len(colors) > 50
    assert program.main(["--config", "text.yaml", "--contact-sheet", "none.png"]) == 2
    assert "no row has a picture" in capsys.readouterr().err


WRONG = {
    "no file": ["gone.yaml", "gone.yaml does not exist"],
    "no source": ["empty.yaml", "sources: must be given"],
    "a typo": ["typo.yaml", "per_exprt: no such setting"],
    "another family": ["ffn.yaml", "which has no routing set"],
    "experts not named": ["bare.yaml", "loras: loras.json"],
    "short": ["text.yaml", "banking, train: ", "--override", "per_expert.train=99"],
    "bad override": ["text.yaml", "write it as section.field=value", "--override", "seed"],
    "bad seed": ["text.yaml", "seed: must be at least 0", "--seed", "-1"],
    "no such place": ["text.yaml", "loras.json", "--output", "loras.json/routing.jsonl"],
    "strange experts": ["strange.yaml", "no such expert color"],
}


@pytest.mark.parametrize(
    ("config", "expected", "more"), [(w[0], w[1], w[2:]) for w in WRONG.values()], ids=WRONG
)
def test_what_is_wrong_is_said_without_a_traceback(program, here, capsys, config, expected, more):
    Path("empty.yaml").write_text("seed: 1")
    Path("typo.yaml").write_text(Path("text.yaml").read_text() + "per_exprt: {}")
    Path("ffn.yaml").write_text("family: ffn_moe")
    Path("other.json").write_text(
        json.dumps(LORAS | {"experts": LORAS["experts"][1:]}).replace("ocr", "reader")
    )
    Path("strange.yaml").write_text(yaml_text(SET | {"loras": "other.json"}))
    assert program.main(["--config", config, *more]) == 2
    said = capsys.readouterr()
    assert expected in said.err.replace("\n", " ") and "Traceback" not in said.err
    assert not Path("routing.jsonl").exists()


def test_help_teaches(program, capsys):
    with pytest.raises(SystemExit) as stopped:
        program.main(["--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "--loras config/loras.json --output routing.jsonl" in said
    for option in (
        "--seed",
        "--preview",
        "--contact-sheet",
        "--store",
        "--work",
        "--override",
        "--loras",
    ):
        assert option in said
