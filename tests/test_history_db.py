"""history.db: what is folded in piece by piece is what is folded at once, whatever happened to the
database or to who was writing it."""

import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest
import small_histories as small
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.store import history_db as history_db_module
from pipeline.store.history_db import FILE, MEMORY, SUM, _made, history_db
from pipeline.store.history_schema import SCHEMA
from pipeline.store.roots import Root, leave


def tables(index):
    """Return the rows of all tables, in order."""
    names = [name for (name,) in index.execute("SELECT name FROM sqlite_master WHERE type='table'")]
    found = {}
    for name in names:
        rows = index.execute(f"SELECT * FROM {name}")  # noqa: S608
        found[name] = sorted(rows, key=repr)
    return found


def folded(store):
    """Return the tables of a store's history.db, brought up to date."""
    with history_db(store) as index:
        return tables(index)


def anew(store):
    """Return the tables that are made of a store from nothing."""
    with closing(_made(MEMORY, store, lambda *_: None, lambda: None)) as index:
        return tables(index)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A filled store that nobody changes."""
    return small.filled(tmp_path_factory.mktemp("made") / "store")


@pytest.fixture
def store(made, tmp_path):
    """A copy of it."""
    shutil.copytree(made[0].root, tmp_path / "store")
    return small.new_store(tmp_path / "store")


def test_every_file_is_in_the_tables_with_its_figures(made):
    store, ids = made
    found = anew(store)
    assert {row[0] for row in found["runs"]} == set(ids)
    assert len(found["run_addresses"]) == 10
    trunk = small.address("train_shared", None, 1)
    of_trunk = {row[1]: row[2:] for row in found["series"] if row[0] == trunk}
    written = small.rows()
    losses = [(row["train_nats"], row["step"]) for row in written if "train_nats" in row]
    low, high = min(losses), max(losses)
    ends = (losses[0][0], losses[-1][0])
    assert of_trunk["train_nats"] == (len(losses), *ends, *low, *high)
    # nested ones by their paths
    router = small.address("train_router", None, 20)
    keys = {row[1] for row in found["series"] if row[0] == router}
    assert {"load.3", "experts.layer.2.shares.0", "experts.layer.4.dropped"} <= keys
    validations = [row for row in found["validations"] if row[0] == trunk]
    assert [row[1:4] for row in validations] == [(20, 2000, 1.0), (40, 4000, 2.0), (60, 6000, 3.0)]
    results = {row[1]: row[2] for row in found["results"] if row[0].startswith("train_experts")}
    assert results == {"steps": 60, "plan.rows.0": 1, "plan.rows.1": 2}
    (evaluation,) = found["evaluations"]
    assert evaluation[1:3] == ("demo", "ffn_moe")
    stack = [row for row in found["scores"] if row[5]]
    assert [row[3] for row in stack] == ["bits per byte"]
    assert [row[0] for row in found["deploys"]] == [small.address("deploy", None, 40)]
    torn = {row[0]: row[6] for row in found["histories"]}
    assert sorted(torn.values()) == [0, 0, 0, 0, 0, 1]
    assert torn[small.address("train_router", None, 21)] == 1


def test_the_note_of_what_is_served_is_read_as_far_as_it_is_understood(store):
    at = small.address("deploy", None, 40)
    versions = [{"address": at, "at": "2026-11-27T09:00:00Z"}, {"address": "older", "at": ""}, 3]
    (store.root / "served.json").write_text(json.dumps({"address": at, "versions": versions}))
    assert folded(store)["served"] == [(at, "2026-11-27T09:00:00Z", 1), ("older", "", 0)]
    (store.root / "served.json").write_text("{")
    found = folded(store)
    assert found["served"] == []
    assert [row[5] for row in found["files"] if row[5]]
    (store.root / "served.json").unlink()
    assert folded(store) == anew(store)


CHANGES = ("row", "torn", "again", "history gone", "new run", "run gone", "artifact gone", "damage")


@given(st.lists(st.tuples(st.sampled_from(CHANGES), st.integers(0, 5)), max_size=6))
@settings(max_examples=6, deadline=None)
def test_what_is_folded_piece_by_piece_is_what_is_folded_at_once(made, tmp_path_factory, changes):
    root = tmp_path_factory.mktemp("folded") / "store"
    shutil.copytree(made[0].root, root)
    store = small.new_store(root)
    folded(store)
    for number, (change, place) in enumerate(changes):
        histories = sorted(root.glob("history/*.jsonl"))
        artifacts = sorted(root.glob("artifacts/*/manifest.json"))
        path = histories[place % len(histories)] if histories else root / "history/new.jsonl"
        if change == "row":
            with path.open("ab") as file:
                file.write(b'\n{"step":%d,"valid_nats":1.5}\n' % (100 + number))
        elif change == "torn":
            with path.open("ab") as file:
                file.write(b'{"step":9')
        elif change == "again":
            small.write_history(store, path.stem, small.rows(steps=20 + 10 * number, seed=number))
        elif change == "history gone":
            path.unlink(missing_ok=True)
        elif change == "new run":
            small.leave_run(store, f"new{number}", [path.stem])
        elif change == "run gone":
            for gone in sorted(root.glob("roots/*.json"))[:1]:
                gone.unlink()
        elif artifacts and change == "artifact gone":
            shutil.rmtree(artifacts[place % len(artifacts)].parent)
        elif artifacts:
            artifacts[place % len(artifacts)].write_text("{" * (number + 1))
        if place % 2:
            assert folded(store) == anew(store)
    assert folded(store) == anew(store)


ODD = (
    b'{"step":1,"valid_nats":[1,2],"tokens":"many","time":{},"epoch":true}',
    b'{"step":2,"valid_nats":NaN,"lr":Infinity,"load":[1,null,"x"],"tokens":1e999}',
    b'{"step":1' + b"0" * 40 + b',"valid_nats":1.0}',
    b'{"step":3,"valid_nats":1' + b"0" * 400 + b',"huge":2' + b"0" * 30 + b"}",
    b'{"start":3,"steps":1' + b"0" * 40 + b',"every":"x"}',
    b'{"step":-5,"train_nats":1.5,"deep":{"a":{"b":[{"c":2}]}}}',
    b'{"step":4,"valid_nats":2.5}',
)


def test_rows_that_nobody_of_ours_writes_stop_nothing(store):
    at = small.address("train_shared", None, 1)
    store.history(at).write_bytes(b"\n".join(ODD) + b"\n")
    found = folded(store)
    assert found == anew(store)
    of = {row[1]: row[2:] for row in found["series"] if row[0] == at}
    assert of["deep.a.b.0.c"] == (1, 2, 2, 2, -5, 2, -5)
    assert of["valid_nats"][3] == 2.5 and "lr" not in of
    assert not [row for row in found["files"] if row[5]]


DAMAGE = {
    "a byte in a page": lambda data, at: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :],
    "cut off": lambda data, at: data[:at],
    "empty": lambda _data, _at: b"",
    "something else": lambda _data, _at: b"no database",
    "longer": lambda data, _at: data + b"\0" * 4096,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_database_is_made_again(store, damage):
    wanted = folded(store)
    path = store.root / FILE
    data = path.read_bytes()
    for at in random.Random(7).sample(range(len(data)), 6):
        path.write_bytes(damage(data, at))
        assert folded(store) == wanted
        data = path.read_bytes()


def test_a_database_that_is_gone_is_made_again_and_one_that_stays_is_not(store):
    wanted = folded(store)
    path = store.root / FILE
    before = path.stat()
    assert folded(store) == wanted
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    path.unlink()
    assert folded(store) == wanted
    (store.root / SUM).unlink()
    assert folded(store) == wanted


def test_a_database_of_another_version_is_made_again(store, monkeypatch):
    wanted = folded(store)
    monkeypatch.setattr(history_db_module, "VERSION", 1_000)
    monkeypatch.setattr(history_db_module, "SCHEMA", SCHEMA + "CREATE TABLE more (a);")
    assert folded(store) == wanted | {"more": []}
    monkeypatch.undo()
    assert folded(store) == wanted


def test_who_was_killed_while_folding_is_gone_on_from(store, monkeypatch):
    wanted = anew(store)
    monkeypatch.setattr(history_db_module, "BATCH", 3)
    folds = []

    def dies(index, kind, subject, path):
        folds.append(path)
        if len(folds) == 8:
            raise KeyboardInterrupt
        return fold(index, kind, subject, path)

    fold = history_db_module.fold
    monkeypatch.setattr(history_db_module, "fold", dies)
    with pytest.raises(KeyboardInterrupt):
        folded(store)
    assert folded(store) == wanted
    # of the eight that were begun those of two whole batches were kept
    assert len(set(folds)) == len(wanted["files"])
    assert len(folds) == len(wanted["files"]) + 2


def test_a_write_that_was_cut_off_is_undone(store):
    wanted = folded(store)
    path = store.root / FILE
    program = (
        "import os, sqlite3, sys\n"
        "index = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "index.execute('PRAGMA cache_size = 1')\n"
        "index.execute('BEGIN IMMEDIATE')\n"
        "index.execute('DELETE FROM series')\n"
        "index.execute('UPDATE runs SET name = hex(randomblob(9000))')\n"
        "os._exit(9)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(path)])
    assert ended.returncode == 9
    assert path.with_name(f"{FILE}-journal").exists()
    assert folded(store) == wanted


def test_two_processes_that_make_it_at_once_both_get_all_of_it(store, tmp_path):
    program = (
        "import sys, json\n"
        "from pathlib import Path\n"
        "from pipeline.store.artifacts import Store\n"
        "from pipeline.store.history_db import history_db\n"
        "with history_db(Store(Path(sys.argv[1]))) as index:\n"
        "    print(json.dumps(index.execute('SELECT * FROM series ORDER BY 1, 2').fetchall()))\n"
    )
    command = [sys.executable, "-c", program, str(store.root)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    told = [json.loads(process.communicate()[0]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    wanted = [list(row) for row in anew(store)["series"]]
    assert sorted(told[0], key=repr) == sorted(told[1], key=repr) == sorted(wanted, key=repr)
    assert folded(store) == anew(store)


def test_where_nothing_can_be_written_it_is_made_in_memory(store, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert folded(store) == anew(store)
    assert not (store.root / FILE).exists()
    monkeypatch.undo()

    def full(*_, **__):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(history_db_module, "write_text", full)
    assert folded(store) == anew(store)


def test_a_file_that_could_not_be_read_is_read_again_when_it_can_be(store, monkeypatch):
    wanted = anew(store)
    monkeypatch.setattr(history_db_module, "fold", lambda *_: "it cannot be read")
    assert {row[5] for row in folded(store)["files"]} == {"it cannot be read"}
    monkeypatch.undo()
    # and nothing in the store has changed meanwhile
    assert folded(store) == wanted


def test_results_of_experiments_come_change_and_go(store):
    losses = {"base": (3.0, 1.5, small.address("train_joint", "dense", 1)), "mixed": (2.5, 1.4, "")}
    path = small.leave_experiments(store, "tried", losses)
    found = folded(store)
    assert found["experiments"] == [("tried", "2026-11-27T09:00:00Z")]
    rows = {row[2]: (row[5], *row[7:]) for row in found["trials"]}
    assert rows == {
        "base": (1, 3.0, None, 1.5, 0.5, 0, 0, 0),
        "mixed": (0, 2.5, None, 1.4, 0.5, 1, 0, 0),
    }
    assert [row[1:4] for row in found["trial_runs"]] == [("base", 0, "done"), ("mixed", 0, "done")]
    small.leave_experiments(store, "tried", {"base": (2.0, 1.5, "")})
    assert [row[7] for row in folded(store)["trials"]] == [2.0]
    path.write_bytes(path.read_bytes()[:-20])
    found = folded(store)
    assert not found["trials"] and any(
        "experiment_results.json" in row[5] for row in found["files"]
    )
    path.unlink()
    assert folded(store) == anew(store) and not folded(store)["experiments"]


def test_files_that_are_no_text_by_name_or_no_files_stop_nothing(store):
    name = os.fsdecode(b"m\xff.yaml")
    leave(store, Root("mine", "ffn_moe", "2026-01-01T00:00:00Z", name, (name,), (), {}))
    (store.root / "history" / os.fsdecode(b"\xff.jsonl")).write_text('{"start": 0}\n')
    (store.root / "history" / "folder.jsonl").mkdir()
    with history_db(store) as index:
        told = index.execute("SELECT file FROM runs WHERE name = 'mine'").fetchall()
        kept = index.execute("SELECT path FROM files WHERE kind = 'history'").fetchall()
    assert told == [("m?.yaml",)]
    assert not any("folder" in path for (path,) in kept)
