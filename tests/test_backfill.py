"""Histories from elsewhere: files that the real libraries wrote, whole, torn and garbage, are read
as they are, once, and what was left out is told."""

import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import pipeline
from pipeline.__main__ import main as commands
from pipeline.run.leftovers import leftovers
from pipeline.run.reach import Reach
from pipeline.store import history
from pipeline.store.artifacts import Manifest, Store, inventory
from pipeline.store.imported import Origin, imported, keep, origin_of
from pipeline.store.roots import Root, leave
from scripts.backfill_history import main

ROOT = Path(__file__).parents[1]
LOSSES = [3.5, 3.25, 3.0, 2.75]
ROW = re.compile(b"train.loss", re.DOTALL)  # in a file of wandb's, whatever stands between


def run(capsys, *words, code=0):
    """Run the script; return what it printed."""
    assert main([str(word) for word in words]) == code
    told = capsys.readouterr()
    return told.out + told.err


def only(store):
    """Return the rows and the origin of the one imported history."""
    ((address, origin),) = imported(Store(store))
    found = history.read(Store(store).history(address))
    assert not found.missing
    return found.rows, origin


def trainer_state(folder, steps, max_steps=40):
    """Leave what Hugging Face's Trainer leaves after so many steps."""
    from transformers import TrainerState

    state = TrainerState(global_step=steps, max_steps=max_steps, num_train_epochs=2)
    for at, nats in enumerate(LOSSES[: steps // 10], 1):
        step = {"loss": nats, "grad_norm": 0.5, "learning_rate": 1e-3, "epoch": at / 2}
        state.log_history.append(step | {"step": 10 * at})
        state.log_history.append({"eval_loss": nats + 1, "epoch": at / 2, "step": 10 * at})
    if steps == max_steps:
        ended = {"train_loss": 3.125, "train_runtime": 9.0, "epoch": 2.0, "step": steps}
        state.log_history.append(ended)
    folder.mkdir(parents=True)
    state.save_to_json(str(folder / "trainer_state.json"))
    return folder / "trainer_state.json"


def test_a_trainers_states_are_one_training_as_far_as_it_came(tmp_path, capsys, store_path):
    first = trainer_state(tmp_path / "out" / "checkpoint-20", 20)
    told = run(capsys, tmp_path / "out", "--store", store_path)
    rows, origin = only(store_path)
    assert "1 read, 0 skipped" in told
    metrics = f"next: python -m pipeline metrics {origin.address} --store {store_path}"
    assert told.splitlines()[-1] == metrics
    assert rows[:2] == [
        {"step": 10, "train_nats": 3.5, "grad_norm": 0.5, "lr": 1e-3, "passes": 0.5},
        {"step": 10, "valid_nats": 4.5},
    ]
    assert (origin.kind, origin.name, origin.metrics) == ("transformers", "out", {})
    # it goes on, and ends: the same training, longer
    trainer_state(tmp_path / "out" / "checkpoint-40", 40)
    told = run(capsys, tmp_path / "out", "--store", store_path)
    assert f"skipped {first}: is an earlier part of" in told and "1 read, 1 skipped" in told
    rows, origin = only(store_path)
    assert len(rows) == 8 and origin.metrics == {"steps": 40, "planned_steps": 40}
    address = origin.address
    found = pipeline.metrics_of(address, store=store_path)
    assert (found.finished, found.best_nats, found.steps) == (True, 3.75, 40)
    before = Store(store_path).history(address).stat().st_mtime_ns
    assert "there already" in run(capsys, tmp_path / "out", "--store", store_path)
    assert Store(store_path).history(address).stat().st_mtime_ns == before
    # an earlier part alone takes nothing away
    assert "with more rows" in run(capsys, first, "--store", store_path)
    assert len(only(store_path)[0]) == 8


@pytest.mark.parametrize("text", ["", "{", "[]", '{"log_history": 3, "global_step": 1}', "\0\0"])
def test_what_is_no_state_is_told(tmp_path, capsys, store_path, text):
    (tmp_path / "trainer_state.json").write_text(text)
    told = run(capsys, tmp_path / "trainer_state.json", "--store", store_path, code=2)
    assert "is torn, or no state of a Trainer" in told and "0 read, 1 skipped" in told
    assert not list(imported(Store(store_path)))


@pytest.fixture(scope="module")
def wandb_run(tmp_path_factory):
    """The file of an offline run of wandb."""
    import wandb

    folder = tmp_path_factory.mktemp("wandb")
    quiet = wandb.Settings(silent=True, console="off")
    logged = wandb.init(
        mode="offline",
        project="elsewhere",
        name="a run: 1/2",
        dir=folder,
        config={"lr": 0.1, "deep": {"a": [1, 2]}},
        reinit="create_new",
        settings=quiet,
    )
    for at, nats in enumerate(LOSSES):
        logged.log({"train/loss": nats, "lr": 0.1, "word": "x", "odd": float("nan")}, step=10 * at)
    logged.log({"eval/loss": 2.5, "shares": {"a": 0.25}}, step=50)
    logged.finish()
    (path,) = folder.rglob("*.wandb")
    # a process of wandb's own writes it, and may do so after its run has ended here
    until = time.monotonic() + 60
    while len(ROW.findall(path.read_bytes())) < len(LOSSES) and time.monotonic() < until:
        time.sleep(0.1)
    return path


def test_a_run_of_wandb_is_read_by_wandb_itself(wandb_run, tmp_path, capsys, store_path):
    torn = tmp_path / "run-torn.wandb"
    whole = wandb_run.read_bytes()
    # in the middle of a row, wherever what is told of the machine before the rows ends
    places = [found.start() for found in ROW.finditer(whole)]
    torn.write_bytes(whole[: places[len(places) // 2] + 4])
    told = run(capsys, torn, "--store", store_path)
    assert "left out: " in told and "incomplete .wandb file" in told
    rows, _ = only(store_path)
    assert 1 <= len(rows) < 5 and rows[0]["train_nats"] == 3.5
    told = run(capsys, wandb_run.parents[1], "--store", store_path)
    assert "1 read" in told and "texts are left out: word" in told
    rows, origin = only(store_path)
    assert [row.get("train_nats") for row in rows] == [*LOSSES, None, None]
    assert rows[-1]["step"] == 50 and rows[-1]["valid_nats"] == 2.5 and rows[-2]["shares.a"] == 0.25
    assert rows[0]["odd"] is None and rows[0]["lr"] == 0.1
    assert origin.name == "a run: 1/2" and origin.address.startswith("imported-a-run-1-2-")
    assert origin.settings == {"lr": 0.1, "deep": {"a": [1, 2]}} and origin.made[:2] == "20"


def test_what_wandb_cannot_read_is_told_in_its_words(tmp_path, capsys, store_path):
    (tmp_path / "run-a.wandb").write_bytes(random.Random(0).randbytes(900))
    (tmp_path / "run-b.wandb").write_bytes(b"")
    told = run(capsys, tmp_path, "--store", store_path, code=2)
    assert "bad header" in told and "no row with a step" in told and "0 read, 2 skipped" in told


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    """A folder with an event file of torch's SummaryWriter."""
    from torch.utils.tensorboard import SummaryWriter

    folder = tmp_path_factory.mktemp("events") / "runs" / "first"
    with SummaryWriter(folder) as writer:
        for at, nats in enumerate(LOSSES, 1):
            writer.add_scalar("Loss/train", nats, at)
            writer.add_scalar("grads/all", 0.5, at)
        writer.add_scalar("Loss/val", 2.5, 4)
        writer.add_scalar("lr", float("inf"), 4)
        writer.add_histogram("weights", np.arange(2.0), 4)
    return folder


def test_tensorboards_files_are_read_as_far_as_they_are_whole(events, tmp_path, capsys, store_path):
    told = run(capsys, events.parent, "--store", store_path)
    assert "weights is no scalar" in told
    rows, origin = only(store_path)
    assert [row["train_nats"] for row in rows if "train_nats" in row] == LOSSES
    assert rows[-1]["valid_nats"] == 2.5 and rows[-2]["lr"] is None and rows[0]["grads/all"] == 0.5
    assert (origin.kind, origin.name) == ("tensorboard", "first") and rows[0]["time"] > 1e9
    (path,) = events.iterdir()
    torn = tmp_path / "torn" / path.name
    torn.parent.mkdir()
    torn.write_bytes(path.read_bytes()[:-400])
    other = tmp_path / "other"
    told = run(capsys, torn.parent, "--store", other)
    assert f"{path.name} is whole up to byte" in told
    rows, _ = only(other)
    assert 1 <= len(rows) < 6 and rows[0]["train_nats"] == 3.5
    torn.write_bytes(random.Random(0).randbytes(500))
    told = run(capsys, torn.parent, "--store", tmp_path / "third", code=2)
    assert "is whole up to byte 0 of 500" in told and "has no scalar" in told


def test_plain_files_take_a_map_and_lose_only_what_is_torn(tmp_path, capsys, store_path):
    path = tmp_path / "log.jsonl"
    lines = [
        '{"batch": 1, "nll": 3.5, "epoch": 1}',
        "[1]",
        '{"batch": 2.0, "nll": NaN, "epoch": 1}',
        '{"nll": 1.0}',
        '{"batch": 3, "nll": 2.5, "held_out": 2.75, "epoch": 2}',
        '{"batch": 4, "nl',
    ]
    path.write_text("\n".join(lines))
    told = run(capsys, path, "--store", store_path, code=2)
    assert "its columns: batch, nll, epoch" in told and "--map" in told
    mapped = ["step=batch", "train_nats=nll", "valid_nats=held_out", "epoch=epoch"]
    flags = [word for each in mapped for word in ("--map", each)]
    told = run(capsys, path, *flags, "--store", store_path)
    assert "2 lines cannot be read" in told and "1 row without a step" in told
    rows, _ = only(store_path)
    assert rows == [
        {"step": 1, "train_nats": 3.5, "epoch": 1},
        {"step": 2, "train_nats": None, "epoch": 1},
        {"step": 3, "train_nats": 2.5},
        {"step": 3, "valid_nats": 2.75, "epoch": 2},
    ]
    assert pipeline.metrics_of("log", store=store_path).best_epoch == 2


def test_tables_are_read_whatever_their_cells(tmp_path, capsys, store_path):
    path = tmp_path / "log.csv"
    path.write_text("\ufeffStep,Loss,note\n1,3.5,a\n2,,b\n3,nan,\n4\n5,2.5,x,y\n6,2.0,z\n", "utf-8")
    told = run(capsys, path, "--store", store_path)
    assert "2 lines cannot be read" in told
    rows, _ = only(store_path)
    assert [(row["step"], row["train_nats"]) for row in rows] == [(1, 3.5), (6, 2.0)]
    path.write_bytes(b"\xff\xfe\x00step")
    assert "cannot be read" in run(capsys, path, "--store", store_path, code=2)
    shutil.copy(tmp_path / "log.csv", tmp_path / "log.txt")
    told = run(capsys, tmp_path / "log.txt", tmp_path / "gone", "--store", store_path, code=2)
    assert "ends in none of" in told and "gone: is not there" in told


def test_columns_parted_otherwise_and_called_as_rows_of_a_history_are_read(
    tmp_path, capsys, store_path
):
    for name, parted in (("a.csv", ";"), ("b.csv", "\t"), ("c.tsv", ",")):
        path = tmp_path / name
        lines = [["\ufeffstep", "start", "loss"], ["5", "2", "3.5"], ["9", "0", "2.5"]]
        path.write_text("\n".join(parted.join(line) for line in lines), "utf-8")
        run(capsys, path, "--store", store_path)
        found = pipeline.metrics_of(path.stem, store=store_path)
        assert [(each.step, each.nats) for each in found.logged] == [(5, 3.5), (9, 2.5)]


def test_a_name_of_letters_that_take_four_bytes_is_a_files(tmp_path, capsys, store_path):
    path = tmp_path / f"{chr(0x1D49C) * 60}.jsonl"
    path.write_text('{"step": 1, "loss": 3.5}')
    run(capsys, path, "--store", store_path)
    (address,) = (each.stem for each in (store_path / "history").glob("*.jsonl"))
    assert address.startswith(f"imported-{chr(0x1D49C) * 45}-")


def test_who_reads_no_further_gets_no_traceback(tmp_path, store_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 3.5}')
    script = ROOT / "scripts/backfill_history.py"
    words = [sys.executable, str(script), str(path), "--store", str(store_path)]
    read, written = os.pipe()
    os.close(read)
    done = subprocess.run(words, stdout=written, stderr=subprocess.PIPE, check=False)
    os.close(written)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_file_whose_name_is_no_text_is_read(tmp_path, store_path):
    path = tmp_path / os.fsdecode(b"\xff.csv")
    path.write_text("step,loss\n1,3.5\n")
    script = ROOT / "scripts/backfill_history.py"
    words = [sys.executable, str(script), str(path), "--store", str(store_path)]
    done = subprocess.run(words, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"imported imported-csv-" in done.stdout and b"?.csv" in done.stdout


def test_imported_histories_are_ranked_and_stand_in_one_row(tmp_path, capsys, store_path):
    for number in range(7):
        path = tmp_path / f"run{number}.jsonl"
        path.write_text(json.dumps({"step": 1, "loss": 3.5, "eval_loss": 9 - number}))
        run(capsys, path, "--store", store_path)
    names = sorted(each.stem for each in (store_path / "history").glob("*.jsonl"))
    assert commands(["history", "compare", "--store", str(store_path)]) == 0
    ranked = re.findall(r"imported-run\d-\w+", capsys.readouterr().out)
    assert ranked[:7] == names[::-1]
    assert commands(["history", "compare", *names[:2], "--store", str(store_path)]) == 0
    assert re.search(r"imported: best valid, nats\W+9.00\W+8.00", capsys.readouterr().out)


def trained(store, address, steps, finished=True):
    """Leave in a store what a training leaves."""
    recorder = history.Recorder(
        store.history(address),
        job="x",
        total_steps=steps,
        every=5,
        console=Console(file=io.StringIO()),
    )
    recorder.start(0)
    for step in range(5, steps + 1, 5):
        recorder.row({"step": step, "tokens": 8 * step, "train_nats": 9.0 / step, "time": 1.0})
        recorder.row({"step": step, "valid_nats": 10.0 / step, "time": 1.0})
    recorder.close()
    if finished:
        folder = store.begin(address)
        (folder / "run.json").write_text('{"seed": 3}')
        metrics = {"steps": steps, "planned_steps": steps, "tokens_per_s": 7.5}
        made = {"at": "2026-01-01T00:00:00Z"}
        found = Manifest(address, *address.split("-")[:2], {}, inventory(folder), metrics, made)
        store.finish(found)


def test_another_stores_histories_come_with_their_figures(tmp_path, capsys, store_path):
    source = Store(tmp_path / "old" / "store").open()
    whole, torn = "train_experts-sea-0123456789ab", "train_shared-ba9876543210"
    trained(source, whole, 20)
    trained(source, torn, 10, finished=False)
    leave(source, Root("mine", "ffn_moe", "2026", "x.yaml", (), (whole,), {}))
    lines = source.history(torn).read_bytes().splitlines(keepends=True)
    source.history(torn).write_bytes(b"".join([*lines[:1], b"\0\0\n", *lines[2:]]))
    (source.root / "history" / "notes.jsonl").write_text("")
    told = run(capsys, tmp_path / "old", "--store", store_path)
    assert "2 read, 1 skipped" in told and "notes.jsonl: its name is no address" in told
    assert "left out: 1 line cannot be read and step 5 is not in it" in told
    mine = pipeline.metrics_of("mine-train_experts", store=store_path)
    theirs = pipeline.metrics_of(whole, store=source.root)
    assert mine.losses == theirs.losses and mine.tokens_per_s == 7.5 and mine.finished
    assert mine.stage == "imported" and not pipeline.metrics_of("train_shared", store_path).finished
    assert run(capsys, source.root, "--store", store_path).count("there already imported-") == 2
    assert "is this store's own" in run(capsys, source.root, "--store", source.root, code=2)
    # what is imported is imported from no second store
    told = run(capsys, store_path, "--store", tmp_path / "third", code=2)
    assert "was imported there" in told
    # nobody could make them again, so prune has nothing to say of them
    store = Store(store_path)
    assert list(leftovers(store, Reach(store, {}), False, lambda _text: None)) == []


def test_an_origin_that_is_damaged_is_none(tmp_path):
    store = Store(tmp_path / "store").open()
    origin = Origin("csv", "x.csv", "...", "x")
    assert origin.address.startswith("imported-csv-")
    keep(store, origin, [{"step": 1, "train_nats": 1.0}])
    assert origin_of(store, origin.address) == origin
    path = store.history(origin.address)
    for junk in (
        b"",
        b"{\n",
        b'{"start": 0}\n',
        b'{"start":0,"origin":{"kind":1}}\n',
        os.urandom(9),
    ):
        path.write_bytes(junk)
        assert origin_of(store, origin.address) is None
    assert list(imported(store)) == []
    assert json.loads(json.dumps(pipeline.metrics_of(origin.address, tmp_path / "store").as_json()))
