"""Two slots: what a save leaves, and what happens when a slot is not what was written."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes import Killed, dying, equal, flip, place, small_task, values

from pipeline import checkpoint
from pipeline.errors import DiskFull
from pipeline.train import fit

FILES = ("state.safetensors", "state.json")
DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "flipped at the start": lambda path: flip(path, 12),
    "flipped": flip,
    "flipped near the end": lambda path: flip(path, -3),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
    "replaced": lambda path: path.write_bytes(b"[1, 2]"),
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Leave out what costs time and decides nothing here: the machine's rate, and waiting for the disk."""
    monkeypatch.setattr("pipeline.train.product_flops_per_s", lambda bf16: 1e9)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def stopped(tmp_path):
    """Folder of a run that was killed before step 7: one slot holds step 6, the other 7; and what it leads to."""
    task = small_task()
    fit(task, place(tmp_path / "whole"))
    with pytest.raises(Killed):
        fit(dying(small_task(), 7), place(tmp_path / "stopped"))
    return tmp_path / "stopped", values(task)


def slots(folder):
    """Return {step: slot}."""
    return {json.loads((s / "state.json").read_text())["run"]["step"]: s for s in sorted(folder.iterdir())}


def resume(folder, reseed=True):
    task, here = small_task(), place(folder)
    if reseed:
        torch.manual_seed(5)  # a generator that was not restored would show
    fit(task, here)
    return values(task), here.recorder


def test_two_slots_hold_the_last_two_steps(stopped):
    folder, _ = stopped
    found = slots(folder)
    assert sorted(found) == [6, 7]
    for slot in found.values():
        assert sorted(p.name for p in slot.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_newest_slot_costs_one_checkpoint(stopped, name, how):
    folder, wanted = stopped
    DAMAGE[how](slots(folder)[7] / name)
    got, recorder = resume(folder)
    assert recorder.starts == [6] and equal(got, wanted)
    assert len(recorder.notes) == 1 and str(folder) in recorder.notes[0]
    assert recorder.notes[0].endswith("; going on from the other one, step 6")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_older_slot_costs_nothing(stopped, name, how):
    folder, wanted = stopped
    DAMAGE[how](slots(folder)[6] / name)
    got, recorder = resume(folder)
    assert recorder.starts == [7] and equal(got, wanted)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", DAMAGE)
def test_two_damaged_slots_start_over_and_say_so(stopped, name, how):
    folder, wanted = stopped
    for slot in slots(folder).values():
        DAMAGE[how](slot / name)
    got, recorder = resume(folder, reseed=False)
    assert recorder.starts == [0] and equal(got, wanted)
    assert len(recorder.notes) == 2 and all(n.endswith("; starting over at step 0") for n in recorder.notes)


@pytest.mark.parametrize("name", FILES)
def test_the_good_slot_is_not_the_next_one_written_over(stopped, name, monkeypatch):
    folder, wanted = stopped
    flip(slots(folder)[7] / name)

    def dies(path, tensors):
        path.write_bytes(b"half")
        raise Killed

    monkeypatch.setattr(checkpoint, "save_tensors", dies)
    with pytest.raises(Killed):
        fit(small_task(), place(folder))
    monkeypatch.undo()
    got, recorder = resume(folder)
    assert recorder.starts == [6] and equal(got, wanted)


def test_a_changed_number_in_state_json_is_seen(stopped):
    folder, wanted = stopped
    path = slots(folder)[7] / "state.json"
    path.write_text(path.read_text().replace('"step": 7', '"step": 8'))
    got, recorder = resume(folder)
    assert "seal differs" in recorder.notes[0] and equal(got, wanted)


def test_a_checkpoint_of_other_parameters_is_not_used(stopped):
    folder, _ = stopped
    task = small_task()
    renamed = {f"new {name}": p for name, p in task.parameters.items()}
    here = place(folder)
    fit(replace(task, parameters=renamed), here)
    assert here.recorder.starts == [0] and "another version of this program" in here.recorder.notes[0]


def test_leftovers_of_a_killed_save_do_not_pile_up(stopped):
    folder, _ = stopped
    slot = slots(folder)[6]
    (slot / ".tmpABC123").write_bytes(b"x" * 100)
    with pytest.raises(Killed):
        fit(dying(small_task(), 9), place(folder))
    assert sorted(p.name for p in slot.iterdir()) == sorted(FILES)


def test_a_save_that_fails_leaves_the_newest_slot(stopped, monkeypatch):
    folder, wanted = stopped

    def full(path, tensors):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    with pytest.raises(DiskFull, match="What was finished is kept"):
        fit(small_task(), place(folder))
    monkeypatch.undo()
    got, recorder = resume(folder)
    assert recorder.starts == [7] and equal(got, wanted)


def test_tensors_are_on_disk_before_the_numbers_that_vouch_for_them(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(Path(f"/proc/self/fd/{handle}").readlink().name))
    fit(small_task(steps=1), place(tmp_path))
    assert flushed.index("state.safetensors.part") < flushed.index("state.json.part") < flushed.index("state.json")
