"""Metrics of trainings: from rows and manifests as worked out by hand, from anything that may stand
in a history, from a real run by every name that it can be called."""

import dataclasses
import json
import math
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_backend import typed

import pipeline
from pipeline.errors import ConfigError
from pipeline.families.load import load
from pipeline.metrics import training
from pipeline.metrics.training import LossParts, training_metrics
from pipeline.run import find, show_trainings, stages
from pipeline.run.history import lines
from pipeline.run.history.chosen import one_of
from pipeline.run.reach import root_of
from pipeline.run.stages import Addresses
from pipeline.store import history
from pipeline.store.artifacts import Store
from pipeline.store.history_db import history_db
from pipeline.store.reading import sealed
from pipeline.store.roots import leave

ROOT = Path(__file__).parent.parent
ADDRESS = "train_joint-moe-0123456789ab"


def epoch(number, valid, shares, temperature):
    """Return the rows of an epoch of ten steps, as a joint training writes them."""
    step = 10 * number
    use = {"shares": shares, "entropy": 0.5 / number, "dropped": 0.1}
    return [
        {
            "step": step,
            "tokens": 100 * step,
            "train_nats": 9.0,
            "lr": 1 / step,
            "tokens_per_s": 50.0,
        },
        {
            "step": step,
            "tokens": 100 * step,
            "valid_nats": valid,
            "epoch": number,
            "valid_total": valid + 0.25,
            "valid_aux": 0.25,
            "train_total": valid - 0.5,
            "train_ce": valid - 1,
            "train_aux": 0.5,
            "temperature": temperature,
            "experts": {"layer": {"2": use, "4": use | {"dropped": None}}},
        },
    ]


JOINT = [
    *epoch(1, 4.0, [0.5, 0.25, 0.25], 2.0),
    *epoch(2, 3.0, [0.25, 0.25, 0.5], 1.5),
    *epoch(3, 3.0, [1.0, 0.0, 0.0], 1.0),
    *epoch(4, 3.5, [0.4, 0.2, 0.4], 1.0),
]
MADE = {
    "steps": 40,
    "planned_steps": 200,
    "patience": 2,
    "tokens": 4000,
    "tokens_per_s": 123.0,
    "seconds": 60.0,
    "forward_s": 10.0,
    "backward_s": 20.0,
    "optimizer_s": 2.0,
    "data_s": 0.5,
    "save_s": 3.0,
    "train_nats": 2.5,
    "valid_nats": 3.0,
    "peak_mb": 77.0,
    "mfu": 0.2,
    "parameters": 12,
}


def test_a_training_by_epochs_is_what_was_written_of_it():
    found = training_metrics(ADDRESS, "train_joint", "moe", MADE, JOINT)
    assert (found.steps, found.planned_steps, found.stopped_early) == (40, 200, True)
    assert (found.epochs, found.patience, found.since_best) == (4, 2, 2)
    # of equal losses the first, as the loop takes it
    assert (found.best_nats, found.best_step, found.best_epoch) == (3.0, 20, 2)
    first = found.losses[0]
    assert (first.train, first.valid) == (LossParts(3.5, 3.0, 0.5), LossParts(4.25, 4.0, 0.25))
    assert [point.temperature for point in found.losses] == [2.0, 1.5, 1.0, 1.0]
    assert [layer.layer for layer in found.experts] == ["2", "4"]
    uses = found.experts[0].points
    assert [use.least for use in uses] == [(1, 0.25), (0, 0.25), (1, 0.0), (1, 0.2)]
    assert [use.most for use in uses] == [(0, 0.5), (2, 0.5), (0, 1.0), (0, 0.4)]
    assert [(use.epoch, use.entropy) for use in uses] == [
        (1, 0.5),
        (2, 0.25),
        (3, 0.5 / 3),
        (4, 0.125),
    ]
    assert (uses[0].dropped, found.experts[1].points[0].dropped) == (0.1, None)
    assert (found.phases.forward, found.phases.steps) == (10.0, 32.5)
    assert [each.lr for each in found.logged] == [0.1, 1 / 20, 1 / 30, 1 / 40]
    said = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert said["experts"][0]["points"][0]["least"] == [1, 0.25] and said["best_epoch"] == 2


def test_without_epochs_a_point_has_the_mean_since_the_one_before():
    rows = [
        {"step": 5, "train_nats": 4.0, "load": [0.75, 0.25], "entropy": 0.56, "dropped": 0.0},
        {"step": 10, "train_nats": 2.0, "load": [0.5, 0.5], "entropy": 0.69, "dropped": 0.0},
        {"step": 10, "valid_nats": 3.5},
        {"step": 15, "train_nats": 1.5},
        {"step": 15, "valid_nats": 3.75},
        {"step": 15, "valid_nats": None},
    ]
    found = training_metrics("train_router-0123456789ab", "train_router", None, None, rows)
    assert [point.train.ce for point in found.losses] == [3.0, 1.5, None]
    assert all(point.train.total is None and point.epoch is None for point in found.losses)
    assert (found.best_nats, found.since_best, found.epochs) == (3.5, 2, None)
    (layer,) = found.experts
    assert layer.layer == training.ALL_LAYERS and layer.points[0].most == (0, 0.75)
    assert (found.finished, found.stopped_early, found.planned_steps) == (False, None, None)


def test_of_what_has_not_finished_rates_and_times_are_those_of_its_rows():
    rows = [
        {"step": 10, "tokens": 100, "tokens_per_s": 50.0, "forward_s": 1.0, "rss_mb": 9.0},
        {"step": 20, "tokens": 200, "tokens_per_s": 25.0, "forward_s": 3.0, "rss_mb": 7.0},
    ]
    found = training_metrics(ADDRESS, "train_joint", "moe", None, rows)
    # 100 tokens in 2 s and 100 in 4 s
    assert math.isclose(found.tokens_per_s, 200 / 6)
    assert (found.steps, found.tokens, found.peak_mb, found.phases.forward) == (20, 200, 9.0, 4.0)
    nothing = training_metrics(ADDRESS, "train_joint", "moe", None, [])
    assert (nothing.steps, nothing.losses, nothing.best_nats) == (0, (), None)


def test_whatever_stands_in_a_row_is_taken_or_left_out():
    draw = random.Random(0)
    junk = [None, True, "x", [], {}, [None, "x"], 1e400, -1.5, 7, {"layer": 3}, {"layer": {"2": 1}}]
    junk += [{"layer": {"2": {"shares": [None, "x", 0.5], "entropy": "y"}}}, [0.5, None]]
    keys = sorted(
        {key for row in JOINT for key in row} | {"load", "dropped", "rss_mb", "forward_s"}
    )
    keys.remove("step")
    for _ in range(300):
        rows = []
        for step in range(6):
            row = {"step": step}
            for key in draw.sample(keys, 8):
                row[key] = draw.choice(junk)
            rows.append(row)
        found = training_metrics(ADDRESS, "train_joint", "moe", None, rows)
        json.dumps(found.as_json(), allow_nan=False)


@pytest.fixture(scope="module")
def kept(finished, tmp_path_factory):
    """Configuration, a copy of the finished store with its run's root, and the addresses."""
    root = tmp_path_factory.mktemp("metrics") / "store"
    shutil.copytree(finished[1], root)
    store = Store(root)
    cfg = load(finished[0])
    leave(store, root_of(cfg, finished[0]))
    return finished[0], store, Addresses(cfg)


def test_a_real_training_says_what_its_manifest_and_history_say(kept):
    _, store, addresses = kept
    address = addresses.of("train_experts", "sea")
    made = store.manifest(address).metrics
    rows = history.read(store.history(address)).rows
    found = pipeline.metrics_of(address, store=str(store.root))
    assert (found.stage, found.item, found.finished) == ("train_experts", "sea", True)
    assert found.tokens_per_s == made["tokens_per_s"] and found.valid_nats == made["valid_nats"]
    assert found.phases.backward == made["backward_s"] and found.patience == 0
    assert [point.valid.ce for point in found.losses] == [
        row["valid_nats"] for row in rows if "valid_nats" in row
    ]
    assert found.best_step == made["kept_step"] and not found.missing
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.steps = 1
    router = pipeline.metrics_of("tiny/train_router", store=store.root)
    assert len(router.experts[0].points[0].shares) == 3


@pytest.mark.parametrize(
    "words",
    [
        ["tiny", "train_experts", "sea"],
        ["tiny/train_experts/sea"],
        ["train_experts", "sea"],
        ["{id}", "train_experts/sea"],
        ["{address}"],
        ["store/artifacts/{address}/"],
        ["store/history/{address}.jsonl"],
        ["{begun}"],
        ["{hash}"],
    ],
)
def test_every_name_of_a_thing_finds_it_by_every_command(kept, words):
    path, store, addresses = kept
    address = addresses.of("train_experts", "sea")
    known = {"id": root_of(load(path), path).id, "address": address, "begun": address[:-8]}
    known["hash"] = address[-12:-4]
    typed = [word.format(**known) for word in words]
    (found,) = find.found(store, typed)
    assert (found.address, found.name) == (address, "train_experts sea")
    with history_db(store) as index:
        past = one_of("/".join(typed), lines.known(index, store.root))
    assert past.address == address


@pytest.mark.parametrize("cut", [None, -6, 5])
def test_a_run_is_called_by_its_name_its_id_and_the_beginning_of_that(kept, cut):
    path, store, _ = kept
    id_ = root_of(load(path), path).id
    name = {None: "tiny", -6: id_[:-6], 5: id_[-12:-7]}[cut]
    assert {each.run for each in find.found(store, [name])} == {id_}
    with history_db(store) as index:
        assert one_of(name, lines.known(index, store.root)).id == id_


def test_a_run_is_all_that_is_there_of_it_in_order(kept):
    _, store, addresses = kept
    there = [each.address for each in find.found(store, ["tiny"])]
    expected = [address for stage in stages.RUN for _, _, address in addresses.jobs(stage)]
    assert set(there) == set(expected)
    assert [each.split("-")[0] for each in there] == [each.split("-")[0] for each in expected]
    assert there == [each.address for each in find.found(store, [])]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nobody"], "the runs in it are tiny"),
        (["tiny", "train_nothing"], "has no train_nothing; it has tokenizer, preprocess/hall"),
        (["tiny", "train_experts", "moon"], "has no train_experts/moon"),
        (["train_experts-"], "3 addresses begin with train_experts-"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(kept, words, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        find.found(kept[1], words)


def test_the_latest_run_of_a_name_is_meant_and_items_may_have_any_name(tmp_path):
    store = Store(tmp_path / "store").open()
    cfg = load(ROOT / "config/demo_from_zero.yaml")
    older = root_of(cfg)
    addresses = [
        "train_experts-a-b.c-0123456789ab",
        "train_experts-a/b-0123456789ab".replace("/", "%2F"),
        "train_shared-0123456789ab",
    ]
    for at, address in enumerate(addresses):
        (store.root / "history").mkdir(exist_ok=True)
        store.history(address).write_text("")
        leave(store, dataclasses.replace(older, at=f"2026-01-0{at + 1}", addresses=(address,)))
    (latest,) = find.found(store, ["demo_from_zero"])
    assert latest.stage == "train_shared"
    first = dataclasses.replace(older, addresses=(addresses[0],)).id
    (found,) = find.found(store, [first, "train_experts", "a-b.c"])
    assert (found.address, found.item) == (addresses[0], "a-b.c")
    # a root that is torn keeps nobody from the others
    (store.root / "roots" / "torn-0123456789ab.json").write_text(sealed({"version": 1})[:-9])
    assert find.found(store, [])[0].stage == "train_shared"


def test_the_command_shows_one_or_all_and_refuses_what_is_no_training(kept, capfd):
    _, store, addresses = kept
    shown = typed(capfd, 0, "metrics", "tiny", "--store", store.root)
    for name in ("train_shared", "train_experts hall", "train_dense total", "all steps"):
        assert name in shown
    shown = typed(capfd, 0, "metrics", "tiny", "train_router", "--store", store.root)
    assert addresses.of("train_router") in shown and "entropy, nats" in shown
    shown = typed(capfd, 0, "metrics", "train_shared", "--json", "--store", store.root)
    values = json.loads(shown)
    assert values["steps"] == 40 and values["losses"][-1]["valid"]["ce"] == values["valid_nats"]
    told = typed(capfd, 2, "metrics", "tiny/evaluate", "--store", store.root)
    assert "tiny/evaluate has no training" in told
    with pytest.raises(ConfigError, match="is several trainings"):
        pipeline.metrics_of("tiny", store=store.root)
    with pytest.raises(ConfigError, match="is no training"):
        pipeline.metrics_of("tiny/tokenizer", store=store.root)


def test_an_interrupted_training_is_answered_from_its_history(kept, tmp_path, capfd):
    _, store, addresses = kept
    address = addresses.of("train_shared")
    copy = Store(shutil.copytree(store.root, tmp_path / "store"))
    shutil.rmtree(copy.folder(address))
    path = copy.history(address)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:6]) + lines[6][:20])
    found = pipeline.metrics_of("tiny/train_shared", store=copy.root)
    assert not found.finished and found.steps < 40 and not found.missing
    # the store of this test was made just now, so its histories say how long they are to be
    assert found.planned_steps == 40 and found.stopped_early is None
    shown = typed(capfd, 0, "metrics", "tiny", "train_shared", "--store", copy.root)
    assert "not finished" in shown


def test_a_long_table_is_thinned_and_keeps_its_last_line():
    rows = []
    for number in range(1, 58):
        rows += epoch(number, 5.0 - number / 100, [0.5, 0.5], 1.0)
    long = training_metrics(ADDRESS, "train_joint", "moe", MADE, rows)
    table = show_trainings._losses(long.losses)
    epochs = list(table.columns[0].cells)
    assert len(epochs) == 19 and epochs[-1] == "57" and "every 3 of 57" in str(table.title)
    # a training without epochs has no column of dashes for them
    plain = training_metrics(ADDRESS, "train_shared", None, None, [{"step": 3, "valid_nats": 1.0}])
    assert [str(column.header) for column in show_trainings._losses(plain.losses).columns] == [
        "step",
        "valid ce",
    ]


def test_asking_needs_no_torch(kept):
    program = (
        "import pipeline, sys; before = set(sys.modules);"
        f"print(pipeline.metrics_of('tiny/train_shared', {str(kept[1].root)!r}).steps,"
        "'torch' in sys.modules, any(name.startswith('pipeline.') for name in before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["40", "False", "False"]


def test_the_page_has_every_field_and_every_key(kept):
    text = (ROOT / "docs/metrics.md").read_text("utf-8")
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`\n]+)`", text))))
    kinds = (
        training.TrainingMetrics,
        training.LossPoint,
        training.LossParts,
        training.LoggedStep,
        training.ExpertUse,
        training.LayerExperts,
        training.PhaseSeconds,
    )
    for kind in kinds:
        assert {field.name for field in dataclasses.fields(kind)} <= named, kind
    keys = {key for row in JOINT for key in row}
    for path in (kept[1].root / "history").iterdir():
        for line in path.read_text().splitlines():
            keys |= json.loads(line).keys()
    assert keys <= named
