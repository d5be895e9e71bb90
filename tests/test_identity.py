"""What a run reads outside its store is in its addresses by content: what is made again when it
changes is what the table of docs/store.md says."""

import importlib.metadata
from pathlib import Path

import pytest
from small_sources import (
    added,
    beside,
    deleted,
    edited,
    hidden,
    moved,
    picture_run,
    renamed,
    text_run,
    touched,
)
from yaml_text import yaml_text

from pipeline.config.base import merge
from pipeline.data.sources import installed
from pipeline.families.load import load, parse
from pipeline.run import stages
from pipeline.run.identity import begin
from pipeline.store import looking
from pipeline.store.artifacts import Store

ROOT = Path(__file__).parents[1]


def all_addresses(cfg) -> dict:
    """Return {job: address} of a run."""
    addresses = stages.Addresses(cfg)
    jobs = [each for stage in stages.STAGES for each in addresses.jobs(stage)]
    return {(stage, item): address for stage, item, address in jobs}


def standing_on(cfg, start) -> set:
    """Return some jobs and those that read them, directly or not."""
    found = set(start)
    for stage in stages.STAGES:
        for item in cfg.items(stage):
            if found & set(cfg.needs(stage, item)):
                found.add((stage, item))
    return found


CHANGES = {
    "a file is edited": edited,
    "a file comes that a setting means": added,
    "a file is renamed": renamed,
    "a file gets another time, or is replaced by its copy": touched,
    "a file is deleted": deleted,
    "a file becomes one that cannot be read": hidden,
    "all of it is moved, and the setting with it": moved,
    "something comes that no setting and no row names": beside,
}
# by the words of the table, the job that a change of that file makes again first
FIRST = {
    "text": (
        "sea/1.jsonl",
        dict.fromkeys(
            ("its documents", "its documents, where their order is another"), ("preprocess", "sea")
        ),
    ),
    "named": ("one/images/3.png", {"its task": ("preprocess", "one")}),
    "folder": ("two/train/class1/a.png", {"its task": ("preprocess", "two")}),
}


def table() -> list[list[str]]:
    """Return the rows of the table: what happens, and what is made again of each kind of data."""
    text = (ROOT / "docs/store.md").read_text("utf-8")
    part = text.partition("## What is read outside the store")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


CASES = []
for what, *cells in table():
    for kind, cell in zip(("text", "named", "folder"), cells, strict=True):
        if what in CHANGES and cell != "–":
            CASES.append((what, kind, cell))


def test_the_table_has_every_change_and_no_other():
    settings = {"a package is updated", "a revision on the Hub is another", "a model is edited"}
    assert {row[0] for row in table()} == CHANGES.keys() | settings


@pytest.mark.parametrize(("what", "kind", "cell"), CASES)
def test_what_a_change_makes_again_is_what_the_table_says(what, kind, cell, tmp_path, monkeypatch):
    # what is unchanged by size and times is never read again, however new it is
    monkeypatch.setattr(looking, "SETTLED_NS", -(10**18))
    path = (text_run if kind == "text" else picture_run)(tmp_path / "run")
    path = path.rename(path.with_name("run.yaml"))
    store = Store(tmp_path / "store").open()
    before = all_addresses(begin(load(path), store)[0])
    file, jobs = FIRST[kind]
    CHANGES[what](tmp_path / "run" / file)
    cfg = begin(load(path), store)[0]
    after = all_addresses(cfg)
    first = set()
    if cell != "nothing":
        first = {jobs[cell]}
        if kind == "text":
            # Which is trained on that domain's text too
            first.add(("tokenizer", None))
    again = {each for each in after if after[each] != before[each]}
    assert again == standing_on(cfg, first)
    # and whoever looks without a store sees the same
    assert all_addresses(load(path)) == after


def test_a_package_that_text_is_taken_from_makes_it_again(tmp_path, monkeypatch):
    path = tmp_path / "run.yaml"
    path.write_text(yaml_text({"partition": {"domains": ["headers", "python"]}}))
    versions = dict(installed.taken_from("licences"))
    before = all_addresses(load(path))
    text = [("a.h", f"#define a header of many words {n}\n" * 3) for n in range(9)]
    monkeypatch.setitem(installed.READERS, "headers", lambda: iter(text))
    for name, makes_again in (("torch", True), ("rich", False)):
        changed = [(each, "0.1") if each == name else (each, v) for each, v in versions.items()]
        with monkeypatch.context() as patch:
            patch.setattr(installed, "_versions", lambda _ns, it=tuple(changed): it)
            assert (all_addresses(load(path)) != before) == makes_again
    with monkeypatch.context() as patch:
        # The same version for another machine
        patch.setattr(installed.sysconfig, "get_platform", lambda: "other")
        assert all_addresses(load(path)) != before
    # The same documents under another version are the same
    monkeypatch.setattr(installed.platform, "python_version", lambda: "3.99.0")
    assert all_addresses(load(path)) == before
    assert importlib.metadata.version("torch") == versions["torch"]


def test_a_revision_on_the_hub_is_in_the_address_and_nothing_is_fetched_to_tell():
    def hub(revision):
        return parse({"data": {"source": "hub", "hub": [{"dataset": "a/b", "revision": revision}]}})

    one, other = hub("1" * 40), hub("2" * 40)
    for stage, item in (("tokenizer", None), ("preprocess", "python")):
        assert stages.address(one, stage, item) != stages.address(other, stage, item)


@pytest.mark.parametrize("family", ["ffn_moe", "lora_vlm"])
def test_a_model_that_is_edited_makes_again_what_stands_on_it(family, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md"):
        (model / name).write_text("{}")
    if family == "ffn_moe":
        path = text_run(tmp_path / "run", trunk={"init": str(model), "steps": 0})
        raw = load(path, ("tokenizer.pretrained=package:none",)).model_dump(mode="json")
    else:
        raw = load(picture_run(tmp_path / "run")).model_dump(mode="json")
        base = {"model": str(model), "build": None, "revision": None}
        raw = merge(raw, {"loras": {"base": base}})
    raw["dense"] = raw.get("dense") and raw["dense"] | {"baselines": []}
    cfg = parse({key: value for key, value in raw.items() if value is not None})
    before = all_addresses(cfg)
    (model / "README.md").write_text("other")
    assert all_addresses(cfg) == before
    (model / "model.safetensors").write_text("{ }")
    after = all_addresses(cfg)
    again = {each for each in after if after[each] != before[each]}
    assert (
        again == standing_on(cfg, {("train_shared", None)}) and ("preprocess", "sea") not in again
    )
