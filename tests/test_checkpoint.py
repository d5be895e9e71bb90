"""Two slots: what a save leaves, and what happens when a slot is not what was written."""

import gc
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from fakes import Killed, dying, equal, flip, in_bf16, small_task, train_io, values

from pipeline.errors import DiskFull
from pipeline.train import checkpoint, loop
from pipeline.train.checkpoint import TrainState
from pipeline.train.loop import fit
from pipeline.train.memory_plan import MemoryPlan

FILES = ("state.safetensors", "state.json")


def flip_letter(path):
    """Change one bit near the middle, but of no digit: the last one of a long number may change and
    leave the number as it is."""
    data = path.read_bytes()
    at = len(data) // 2
    while data[at] in b"0123456789":
        at += 1
    flip(path, at)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "flipped at the start": lambda path: flip(path, 12),
    "flipped": flip_letter,
    "flipped near the end": lambda path: flip(path, -3),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
    "replaced": lambda path: path.write_bytes(b"[1, 2]"),
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Leave out what costs time and decides nothing here: the machine's rate, and waiting for the
    disk."""
    monkeypatch.setattr("pipeline.train.loop.product_flops_per_s", lambda bf16: 1e9)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def stopped(tmp_path):
    """Folder of a run that was killed before step 7: one slot holds step 6, the other 7; and what
    it leads to."""
    task = small_task()
    fit(task, train_io(tmp_path / "whole"))
    with pytest.raises(Killed):
        fit(dying(small_task(), 7), train_io(tmp_path / "stopped"))
    return tmp_path / "stopped", values(task)


def slots(folder):
    """Return {step: slot}."""
    found = sorted(folder.glob("*/state.json"))
    return {json.loads(path.read_text())["run"]["step"]: path.parent for path in found}


def resume(folder, reseed=True):
    task, here = small_task(), train_io(folder)
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
    assert len(recorder.notes) == 2 and all(
        n.endswith("; starting over at step 0") for n in recorder.notes
    )


@pytest.mark.parametrize("name", FILES)
def test_the_good_slot_is_not_the_next_one_written_over(stopped, name, monkeypatch):
    folder, wanted = stopped
    flip(slots(folder)[7] / name)

    def dies(path, tensors):
        path.write_bytes(b"half")
        raise Killed

    monkeypatch.setattr(checkpoint, "save_tensors", dies)
    with pytest.raises(Killed):
        fit(small_task(), train_io(folder))
    monkeypatch.undo()
    got, recorder = resume(folder)
    assert recorder.starts == [6] and equal(got, wanted)


def test_a_changed_number_in_state_json_is_seen(stopped):
    folder, wanted = stopped
    path = slots(folder)[7] / "state.json"
    path.write_text(path.read_text().replace('"step": 7', '"step": 8'))
    got, recorder = resume(folder)
    assert "checksum differs" in recorder.notes[0] and equal(got, wanted)


def test_a_checkpoint_of_other_parameters_is_not_used(stopped):
    folder, _ = stopped
    task = small_task()
    renamed = {f"new {name}": p for name, p in task.parameters.items()}
    here = train_io(folder)
    fit(replace(task, parameters=renamed), here)
    assert (
        here.recorder.starts == [0] and "another version of this program" in here.recorder.notes[0]
    )


def test_leftovers_of_a_killed_save_do_not_pile_up(stopped):
    folder, _ = stopped
    slot = slots(folder)[6]
    (slot / ".tmpABC123").write_bytes(b"x" * 100)
    with pytest.raises(Killed):
        fit(dying(small_task(), 9), train_io(folder))
    assert sorted(p.name for p in slot.iterdir()) == sorted(FILES)


def test_a_save_that_fails_leaves_the_newest_slot(stopped, monkeypatch):
    folder, wanted = stopped

    def full(path, tensors):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    with pytest.raises(DiskFull, match="no room to write"):
        fit(small_task(), train_io(folder))
    monkeypatch.undo()
    got, recorder = resume(folder)
    assert recorder.starts == [7] and equal(got, wanted)


def test_tensors_are_on_disk_before_the_numbers_that_vouch_for_them(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(
        os, "fsync", lambda handle: flushed.append(Path(f"/proc/self/fd/{handle}").readlink().name)
    )
    fit(small_task(steps=1), train_io(tmp_path))
    assert (
        flushed.index("state.safetensors.part")
        < flushed.index("state.json.part")
        < flushed.index("state.json")
    )


def falling(task=None, **changes):
    """Return a task each of whose evaluations, at steps 3, 6, 9 and 10, is better than the last."""
    task = task or small_task(**changes)
    now = [0]
    return replace(
        task, before_step=lambda at: now.__setitem__(0, at + 1), validate=lambda: 1 / (1 + now[0])
    ), now


def killed(folder, step, task=None):
    """Leave what a run with falling losses leaves that ends before a step."""
    first, now = falling(task)

    def before_step(at):
        now[0] = at + 1
        if at == step:
            raise Killed

    with pytest.raises(Killed):
        fit(replace(first, before_step=before_step), train_io(folder))


def went_on(folder, task=None):
    """Finish that run; return its parameters and recorder."""
    again, now = falling(task)
    torch.manual_seed(5)
    here = train_io(folder)
    here.recorder.start = lambda step: (now.__setitem__(0, step), here.recorder.starts.append(step))
    fit(again, here)
    return values(again), here.recorder


def best_files(folder):
    return sorted(path.name for path in folder.glob("best-*"))


@pytest.fixture
def better(tmp_path):
    """Folder of a run with falling losses that was killed before step 6; and what it leads to."""
    task, _ = falling()
    fit(task, train_io(tmp_path / "whole"))
    killed(tmp_path / "better", 6)
    return tmp_path / "better", values(task)


def test_the_best_state_is_a_file_beside_the_slots_that_both_name(better):
    folder, _ = better
    found = slots(folder)
    assert sorted(found) == [5, 6] and best_files(folder) == [
        "best-3.safetensors",
        "best-6.safetensors",
    ]
    assert sorted(p.name for p in folder.iterdir()) == ["a", "b", *best_files(folder)]
    named = {
        step: json.loads((slot / "state.json").read_text())["run"] for step, slot in found.items()
    }
    for step, best in {5: 3, 6: 6}.items():
        path = folder / f"best-{best}.safetensors"
        assert named[step]["best_step"] == best and named[step]["best_sha256"] == checkpoint.sha256(
            path
        )


def test_best_states_that_nothing_names_are_removed(better):
    folder, wanted = better
    (folder / "best-1.safetensors").write_bytes(b"old")
    (folder / "best-4.safetensors.part").write_bytes(b"torn")
    got, _ = went_on(folder)
    assert equal(got, wanted) and best_files(folder) == [
        "best-10.safetensors",
        "best-9.safetensors",
    ]


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_best_state_costs_the_slots_that_name_it(better, how):
    folder, wanted = better
    DAMAGE[how](folder / "best-6.safetensors")
    got, recorder = went_on(folder)
    assert recorder.starts == [5] and equal(got, wanted)
    assert len(recorder.notes) == 1 and "best-6.safetensors" in recorder.notes[0]
    assert recorder.notes[0].endswith("; going on from the other one, step 5")


def test_two_damaged_best_states_start_over(better):
    folder, _ = better
    for name in best_files(folder):
        flip(folder / name)
    _, recorder = went_on(folder)
    assert recorder.starts == [0] and len(recorder.notes) == 2


def test_a_run_killed_between_its_best_state_and_its_slot_ends_the_same(better, monkeypatch):
    folder, wanted = better
    calls, real = [], loop.save

    def save(folder, task, optimizer, run):
        calls.append(run.step)
        if run.step == 9:
            raise Killed
        real(folder, task, optimizer, run)

    monkeypatch.setattr(loop, "save", save)
    with pytest.raises(Killed):
        went_on(folder)
    monkeypatch.undo()
    assert calls[-1] == 9 and "best-9.safetensors" in best_files(folder)
    got, recorder = went_on(folder)
    assert recorder.starts == [8] and recorder.notes == [] and equal(got, wanted)


def test_a_run_killed_while_it_writes_its_best_state_ends_the_same(better, monkeypatch):
    folder, wanted = better

    def half(path, tensors):
        real(path, tensors)
        if path.name.startswith("best-9"):
            path.write_bytes(path.read_bytes()[:100])
            raise Killed

    real = checkpoint.save_tensors
    monkeypatch.setattr(checkpoint, "save_tensors", half)
    with pytest.raises(Killed):
        went_on(folder)
    monkeypatch.undo()
    assert "best-9.safetensors" not in best_files(folder)
    got, recorder = went_on(folder)
    assert recorder.starts == [8] and equal(got, wanted)


def test_the_kept_state_is_the_best_one_in_both_arithmetics(tmp_path):
    for name, kind in (("fp32", lambda task: task), ("bf16", in_bf16)):
        losses, seen = iter([3.0, 1.0, 2.0, 2.0]), []
        task = kind(small_task())

        def validate(losses=losses, seen=seen, task=task):
            seen.append(values(task))
            return next(losses)

        metrics = fit(replace(task, validate=validate), train_io(tmp_path / name))
        kept = values(task)
        assert metrics["kept_step"] == 6 and {p.dtype for p in kept.values()} == {torch.float32}
        assert equal({n: p.to(seen[1][n].dtype) for n, p in kept.items()}, seen[1])
        fine = [not torch.equal(kept[n], kept[n].bfloat16().float()) for n in ("first", "second")]
        assert fine == [True, True]  # the masters, not what computed


def alive() -> int:
    """Return how many tensors Python holds."""
    gc.collect()
    return sum(type(thing) in (torch.Tensor, torch.nn.Parameter) for thing in gc.get_objects())


def test_no_copy_of_the_best_state_is_held(tmp_path):
    counts = {}
    gc.collect()
    # what other tests left behind may go at any time, and looking through it takes seconds
    gc.freeze()
    try:
        for keep in ("best", "last"):
            task, _ = falling(keep=keep, noisy=False)
            counts[keep] = []
            seen = replace(task, after_step=lambda keep=keep: counts[keep].append(alive()) or {})
            fit(seen, train_io(tmp_path / keep, save_every_s=1e9))
            del task, seen
    finally:
        gc.unfreeze()
    assert counts["best"] == counts["last"] and len(counts["best"]) == 10
    assert json.loads(json.dumps(asdict(TrainState()))) == asdict(TrainState())


@pytest.mark.parametrize("step", range(1, 10))
def test_a_bf16_run_that_was_killed_is_the_undisturbed_one_bit_for_bit(tmp_path, step):
    whole = in_bf16(small_task())
    fit(whole, train_io(tmp_path / "whole"))
    with pytest.raises(Killed):
        fit(dying(in_bf16(small_task()), step), train_io(tmp_path / "killed"))
    task, here = in_bf16(small_task()), train_io(tmp_path / "killed")
    torch.manual_seed(9)
    with torch.no_grad():
        task.parameters["first"].fill_(7.0)
    fit(task, here)
    assert here.recorder.starts == [step] and equal(values(task), values(whole))


def test_a_bf16_checkpoint_keeps_the_low_bits(tmp_path):
    with pytest.raises(Killed):
        fit(dying(in_bf16(small_task()), 5), train_io(tmp_path))
    stored = checkpoint.load_tensors(slots(tmp_path)[5] / "state.safetensors")
    kinds = {name: tensor.dtype for name, tensor in stored.items()}
    assert kinds["parameter/first"] == torch.bfloat16 and kinds["residual/first"] == torch.int16
    assert kinds["parameter/bias"] == torch.float32 and "residual/bias" not in kinds
    assert stored["residual/first"].any()


@pytest.mark.parametrize("kinds", [(in_bf16, lambda task: task), (lambda task: task, in_bf16)])
def test_a_checkpoint_of_the_other_arithmetic_is_not_mistaken(tmp_path, kinds):
    before, after = kinds
    with pytest.raises(Killed):
        fit(dying(before(small_task()), 5), train_io(tmp_path))
    here, task = train_io(tmp_path), after(small_task())
    fit(task, here)
    assert (
        here.recorder.starts == [0] and "another version of this program" in here.recorder.notes[0]
    )


@pytest.mark.parametrize(
    ("before", "after"), [("int8", "bf16"), ("bf16", "int8"), ("fp32", "bf16"), ("int8", "fp32")]
)
def test_a_run_whose_moments_are_kept_otherwise_from_now_on_goes_on(tmp_path, before, after):
    if "int8" in (before, after):
        pytest.importorskip("bitsandbytes")
    start, plain = values(small_task()), small_task()
    fit(plain, train_io(tmp_path / "plain"))
    with pytest.raises(Killed):
        fit(
            dying(replace(small_task(), memory_plan=MemoryPlan(8, moments=before)), 5),
            train_io(tmp_path / "run"),
        )
    task, here = (
        replace(small_task(), memory_plan=MemoryPlan(8, moments=after)),
        train_io(tmp_path / "run"),
    )
    fit(task, here)
    assert here.recorder.starts == [5] and here.recorder.notes == []
    for name, value in values(plain).items():
        assert (values(task)[name] - value).norm() < 0.1 * (value - start[name]).norm()
