"""Domains come and go in a run: what is made for that, to the byte, and what stays as it was."""

import json
import random
import shutil

import pytest
from conftest import WORDS, make_all, tiny_config
from fakes import contents, traces

from pipeline.families.load import load
from pipeline.run import stages
from pipeline.store.artifacts import Store

FIVE = ("sea", "shop", "hall", "mill", "farm")
TRUNK = FIVE[:2]


def text(domain, number):
    draw = random.Random(f"{domain} {number}")
    words = draw.choices(WORDS["sea"] + WORDS["shop"], k=24)
    return f"{domain} {number} " + " ".join(f"{domain[:2]}{word}" for word in words)


def rows(domains, count=40):
    """Return rows of some domains, mixed."""
    return [{"text": text(name, n), "domain": name} for n in range(count) for name in domains]


def write(path, found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))


def configured(folder, *added):
    """Write a run of five domains in one file, whose trunk knows two, and of further ones in files
    of their own."""
    fitted = {"steps": 3, "batch_sequences": 4, "warmup_steps": 1, "eval_every_steps": 0}
    files = [{"paths": ["five.jsonl"]}]
    files += [{"paths": [f"{name}.jsonl"], "domain": name} for name in added]
    return tiny_config(
        folder,
        data={"files": files},
        partition={"domains": [*FIVE, *added]},
        trunk=fitted | {"domains": list(TRUNK), "layers": 1, "d_model": 16, "d_ff": 24},
        expert=fitted | {"statistics_tokens": 256},
        router=fitted,
        dense={"baselines": ["total"], "domains": list(FIVE)},
        evaluate={"tokens_per_domain": 128, "bootstrap": 10, "continuation_tokens": 0},
    )


def jobs(path):
    """Return the address of every job of a run, by its name."""
    cfg = load(path)
    return {
        stages.label(stage, item): address
        for stage in stages.RUN
        for _, item, address in stages.jobs(cfg, stage)
    }


def other(before, after):
    """Return the jobs that have an address which none had before."""
    return {name for name, address in after.items() if before.get(name) != address}


def products(store):
    """Return what a store holds less the settings, which have the paths of this copy's files."""
    return {name: each for name, each in contents(store).items() if "run.json" not in name}


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """(configuration, store) of a run of five domains; read it, never change it."""
    folder = tmp_path_factory.mktemp("five")
    path = configured(folder / "run")
    write(folder / "run/five.jsonl", rows(FIVE))
    make_all(path, folder / "store")
    return path, folder / "store"


@pytest.fixture
def copied(five, tmp_path):
    """A copy of both."""
    path, store = five
    folder = shutil.copytree(path.parent, tmp_path / "run")
    return folder / path.name, shutil.copytree(store, tmp_path / "store")


def test_one_that_comes_makes_its_own_parts_the_router_and_the_report_and_goes(copied):
    path, store = copied
    before = jobs(path)
    kept = traces(store / "artifacts")
    own = products(store)
    write(path.parent / "port.jsonl", [{"text": text("port", n)} for n in range(40)])
    configured(path.parent, "port")
    assert other(before, jobs(path)) == {
        "preprocess port",
        "train_experts port",
        "train_router",
        "evaluate",
    }
    make_all(path, store)
    with_it = jobs(path)
    # Nothing that was there was even written to
    now = traces(store / "artifacts")
    assert {name: now.get(name) for name in kept} == kept
    router = Store(store).folder(with_it["train_router"])
    report = json.loads((Store(store).folder(with_it["evaluate"]) / "report.json").read_text())
    assert report["experts"] == [*FIVE, "port"] == report["domains"]
    configured(path.parent)
    assert jobs(path) == before
    for address in with_it.values():
        if address not in before.values():
            shutil.rmtree(Store(store).folder(address))
    shutil.rmtree(Store(store).folder(before["train_router"]))
    make_all(path, store)
    assert not router.exists() and products(store) == own


def test_in_front_of_all_others_it_is_the_same_where_it_shares_nothing(copied):
    path, _ = copied
    write(path.parent / "port.jsonl", [{"text": text("port", n)} for n in range(40)])
    configured(path.parent, "port")
    last = jobs(path)
    cfg = load(path, ("partition.domains=[port, sea, shop, hall, mill, farm]",))
    parts = ("tokenizer", "preprocess", "train_shared", "train_experts", "train_dense")
    found = {
        stages.label(stage, item): address
        for stage in parts
        for _, item, address in stages.jobs(cfg, stage)
    }
    assert other(last, found) == set()
    # A document that it shares and decides on otherwise: of that domain alone the tokens are others
    shared = [{"text": text("mill", n)} for n in range(20)]
    write(path.parent / "port.jsonl", shared)
    found = {stages.label(s, i): a for s, i, a in stages.jobs(cfg, "preprocess")}
    assert other(last, found) <= {"preprocess port", "preprocess mill"}


def test_a_row_edited_in_a_file_of_five_makes_one_domains_parts_again(copied):
    path, store = copied
    before = jobs(path)
    kept = traces(store / "artifacts")
    found = rows(FIVE)
    at = next(i for i, row in enumerate(found) if row["domain"] == "mill")
    found[at]["text"] += " and a word more"
    write(path.parent / "five.jsonl", found)
    wanted = {"preprocess mill", "train_experts mill", "train_router", "evaluate"}
    # The closest dense rival has seen that text too
    wanted.add("train_dense total")
    assert other(before, jobs(path)) == wanted
    make_all(path, store)
    now = traces(store / "artifacts")
    assert {name: now.get(name) for name in kept} == kept
    new = set(Store(store).addresses()) - set(before.values())
    assert new == {jobs(path)[name] for name in wanted}


def test_nothing_is_made_again_for_a_name_a_time_or_an_order(copied):
    path, _ = copied
    before = jobs(path)
    (path.parent / "five.jsonl").rename(path.parent / "mixed.jsonl")
    found = rows(FIVE)
    for name in FIVE:
        write(path.parent / f"{name}.jsonl", [row for row in found if row["domain"] == name])
    mixed = json.dumps([{"paths": [str(path.parent / "mixed.jsonl")]}])
    parted = json.dumps([{"paths": [str(path.parent / f"{name}.jsonl")]} for name in FIVE[::-1]])
    for files in (mixed, parted):
        cfg = load(path, (f"data.files={files}",))
        found = {
            stages.label(stage, item): address
            for stage in stages.RUN
            for _, item, address in stages.jobs(cfg, stage)
        }
        assert found == before
