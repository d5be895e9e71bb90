"""Two slots: what a save leaves, and what happens when a slot is not what was written."""

import errno
import gc
import json
import os
import random
import shutil
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from fakes import (
    FaultyReads,
    Killed,
    dying,
    equal,
    flip,
    in_bf16,
    small_task,
    told,
    train_io,
    unreadable,
    values,
)

from pipeline.errors import DamagedArtifact, DiskFull, OtherCheckpoint, UnreadableFile
from pipeline.store.artifacts import inventory
from pipeline.store.reading import sealed
from pipeline.train import checkpoint, loop
from pipeline.train.checkpoint import TrainState
from pipeline.train.loop import fit
from pipeline.train.memory_plan import MemoryPlan

FILES = ("state.safetensors", "state.json")
# What a system says of files that may be as good as ever.
REFUSALS = (errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE)


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


@pytest.fixture(scope="module")
def killed_once(tmp_path_factory):
    """Folder of a run that was killed before step 7: one slot holds step 6, the other 7; and what
    it leads to."""
    root = tmp_path_factory.mktemp("killed")
    task = small_task()
    fit(task, train_io(root / "whole"))
    with pytest.raises(Killed):
        fit(dying(small_task(), 7), train_io(root / "stopped"))
    return root / "stopped", values(task)


@pytest.fixture
def stopped(killed_once, tmp_path):
    """The same, which a test may change."""
    folder, wanted = killed_once
    return Path(shutil.copytree(folder, tmp_path / "stopped")), wanted


def slots(folder):
    """Return {step: slot}."""
    found = sorted(folder.glob("[ab]/state.json"))
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
def test_a_damaged_newest_slot_costs_one_checkpoint_and_is_kept_aside(stopped, name, how):
    folder, wanted = stopped
    slot = slots(folder)[7]
    DAMAGE[how](slot / name)
    found = inventory(slot)
    got, recorder = resume(folder)
    assert recorder.starts == [6] and equal(got, wanted)
    assert len(recorder.notes) == 1 and str(folder) in recorder.notes[0]
    assert recorder.notes[0].endswith("; going on from the other one, step 6")
    # until the artifact is whole
    aside = list(folder.glob("*.damaged-*"))
    if name == "state.json" and how == "deleted":
        # as a kill in a save leaves it: nothing that anyone could go on from
        assert not aside and "was not finished" in recorder.notes[0]
        return
    assert [path.name.partition(".")[0] for path in aside] == [slot.name]
    assert inventory(aside[0]) == found
    assert f"kept as {aside[0].name}" in recorder.notes[0]


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


@pytest.mark.parametrize("error", REFUSALS, ids=errno.errorcode.get)
def test_what_cannot_be_read_ends_the_run_and_stays(stopped, error, monkeypatch):
    folder, wanted = stopped
    # two slots are looked for, and each has its numbers; then the newer's tensors and best state
    assert unreadable(folder, small_task(), monkeypatch, error) == 2 + 2 * 2 + 5 + 2
    got, recorder = resume(folder)
    assert recorder.starts == [7] and recorder.notes == [] and equal(got, wanted)


@pytest.mark.parametrize("error", REFUSALS, ids=errno.errorcode.get)
def test_beside_a_damaged_slot_too_and_the_damage_is_told_by_the_next(stopped, error, monkeypatch):
    folder, wanted = stopped
    flip(slots(folder)[7] / "state.safetensors")
    # the tensors of both, and whether the damaged slot's next name is taken
    assert unreadable(folder, small_task(), monkeypatch, error) == 2 + 2 * 2 + 2 + 5 + 2 + 1
    # the attempt in which nothing failed has put the damaged slot aside
    got, recorder = resume(folder)
    assert recorder.starts == [6] and equal(got, wanted)


@pytest.mark.parametrize("error", REFUSALS, ids=errno.errorcode.get)
def test_a_save_that_cannot_see_which_slot_is_older_writes_over_neither(
    stopped, error, monkeypatch
):
    folder, wanted = stopped
    before = inventory(folder)
    for at in range(4):
        reads = FaultyReads(monkeypatch, folder)

        def save(*args, reads=reads, at=at):
            reads.fail(at, error)
            checkpoint.save(*args)

        monkeypatch.setattr(loop, "save", save)
        with pytest.raises(UnreadableFile, match=os.strerror(error)):
            fit(small_task(), train_io(folder))
        monkeypatch.undo()
        assert inventory(folder) == before
    got, recorder = resume(folder)
    assert recorder.starts == [7] and equal(got, wanted)


def test_names_of_what_is_kept_aside_are_not_used_twice(stopped, monkeypatch):
    folder, _ = stopped
    stands_still = time.gmtime(0)
    monkeypatch.setattr("pipeline.train.checkpoint.time.gmtime", lambda: stands_still)
    for _ in range(3):
        flip(slots(folder)[max(slots(folder))] / "state.safetensors")
        with pytest.raises(Killed):
            fit(dying(small_task(), 8), train_io(folder))
    assert len(list(folder.glob("*.damaged-19700101T000000Z*"))) == 3


@pytest.mark.parametrize("put", ["a file", "a link that leads nowhere", "a folder for a file"])
def test_what_is_no_slot_is_renamed_aside(stopped, put):
    folder, wanted = stopped
    slot = slots(folder)[7]
    shutil.rmtree(slot)
    if put == "a file":
        slot.write_text("x")
    elif put == "a folder for a file":
        (slot / "state.json").mkdir(parents=True)
    else:
        slot.symlink_to(folder / "nowhere")
    got, recorder = resume(folder)
    assert recorder.starts == [6] and equal(got, wanted)
    assert len(recorder.notes) == 1 and f"kept as {slot.name}.damaged-" in recorder.notes[0]


def test_a_file_in_the_place_of_the_checkpoints_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UnreadableFile, match="it is no folder"):
        fit(small_task(), train_io(tmp_path / "file"))


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


def test_every_bit_of_state_json_counts(stopped):
    folder, _ = stopped
    slot = slots(folder)[7]
    path = slot / "state.json"
    whole = path.read_bytes()
    for at in range(len(whole)):
        flip(path, at)
        with pytest.raises(DamagedArtifact):
            checkpoint._read_numbers(slot)
        path.write_bytes(whole)
    assert checkpoint._read_numbers(slot)["run"]["step"] == 7


def test_a_changed_number_in_state_json_is_seen(stopped):
    folder, wanted = stopped
    path = slots(folder)[7] / "state.json"
    path.write_text(path.read_text().replace('"step": 7', '"step": 8'))
    got, recorder = resume(folder)
    assert "checksum differs" in recorder.notes[0] and equal(got, wanted)


def refused(folder, task):
    """Resume a run that cannot go on; return the error, having seen that nothing was touched."""
    before = inventory(folder)
    here = train_io(folder)
    with pytest.raises(OtherCheckpoint) as found:
        fit(task, here)
    assert inventory(folder) == before
    assert here.recorder.starts == here.recorder.notes == []
    assert found.value.remove == folder
    assert f"remove {folder} to start over at step 0" in told(found.value)
    return found.value


def rewritten(folder, change):
    """Change the numbers of both slots as a program that writes others would; sums stay right."""
    for slot in slots(folder).values():
        numbers = json.loads((slot / "state.json").read_text())
        numbers.pop("checksum")
        change(numbers)
        (slot / "state.json").write_text(sealed(numbers))


def test_a_checkpoint_of_other_parameters_is_refused(stopped):
    folder, wanted = stopped
    task = small_task()
    renamed = {f"new {name}": p for name, p in task.parameters.items()}
    error = refused(folder, replace(task, parameters=renamed))
    assert "exp_avg/bias is [8] there and absent here" in str(error)
    got, recorder = resume(folder)
    assert recorder.starts == [7] and equal(got, wanted)


def test_a_checkpoint_of_other_sizes_is_refused(stopped):
    folder, _ = stopped
    task = small_task()
    wider = dict(task.parameters, bias=torch.nn.Parameter(torch.zeros(9)))
    assert "is [8] there and [9] here" in str(refused(folder, replace(task, parameters=wider)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda numbers: numbers.update(format=7, version="9.9"),
            "by MoleForge 9.9, which goes on",
        ),
        (lambda numbers: [numbers.pop(k) for k in ("format", "version", "dtype")], "by an earlier"),
        (lambda numbers: numbers["run"].pop("best_step"), "cannot"),
        (lambda numbers: numbers["run"].update(more=1), "cannot"),
    ],
)
def test_a_checkpoint_of_another_version_is_refused(stopped, change, said):
    folder, _ = stopped
    rewritten(folder, change)
    assert said in str(refused(folder, small_task()))


def test_one_slot_of_another_version_is_enough_to_refuse(stopped):
    folder, _ = stopped
    other = slots(folder)[7] / "state.json"
    older = slots(folder)[6] / "state.json"
    kept = older.read_text()
    rewritten(folder, lambda numbers: numbers.update(format=7))
    older.write_text(kept)
    assert other.parent.name in str(refused(folder, small_task()))


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


@pytest.fixture(scope="module")
def killed_better(tmp_path_factory):
    """Folder of a run with falling losses that was killed before step 6; and what it leads to."""
    root = tmp_path_factory.mktemp("better")
    task, _ = falling()
    fit(task, train_io(root / "whole"))
    killed(root / "better", 6)
    return root / "better", values(task)


@pytest.fixture
def better(killed_better, tmp_path):
    """The same, which a test may change."""
    folder, wanted = killed_better
    return Path(shutil.copytree(folder, tmp_path / "better")), wanted


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
    aside = {path.name.partition(".damaged-")[0] for path in folder.glob("*.damaged-*")}
    assert aside >= {"best-6.safetensors"} - ({"best-6.safetensors"} if how == "deleted" else set())
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
    for keep in ("best", "last"):
        task, _ = falling(keep=keep, noisy=False)
        counts[keep] = []
        seen = replace(task, after_step=lambda keep=keep: counts[keep].append(alive()) or {})
        fit(seen, train_io(tmp_path / keep, save_every_s=1e9))
        del task, seen
    assert counts["best"] == counts["last"] and len(counts["best"]) == 10
    assert json.loads(json.dumps(asdict(TrainState()))) == asdict(TrainState())


@pytest.fixture(scope="module")
def undisturbed_in_bf16(tmp_path_factory):
    """What the small task leads to in bf16."""
    task = in_bf16(small_task())
    fit(task, train_io(tmp_path_factory.mktemp("bf16")))
    return values(task)


@pytest.mark.parametrize("step", range(1, 10))
def test_a_bf16_run_that_was_killed_is_the_undisturbed_one_bit_for_bit(
    tmp_path, undisturbed_in_bf16, step
):
    with pytest.raises(Killed):
        fit(dying(in_bf16(small_task()), step), train_io(tmp_path / "killed"))
    task, here = in_bf16(small_task()), train_io(tmp_path / "killed")
    torch.manual_seed(9)
    with torch.no_grad():
        task.parameters["first"].fill_(7.0)
    fit(task, here)
    assert here.recorder.starts == [step] and equal(values(task), undisturbed_in_bf16)


def test_a_bf16_checkpoint_keeps_the_low_bits(tmp_path):
    with pytest.raises(Killed):
        fit(dying(in_bf16(small_task()), 5), train_io(tmp_path))
    stored = checkpoint.load_tensors(slots(tmp_path)[5] / "state.safetensors")
    kinds = {name: tensor.dtype for name, tensor in stored.items()}
    assert kinds["parameter/first"] == torch.bfloat16 and kinds["residual/first"] == torch.int16
    assert kinds["parameter/bias"] == torch.float32 and "residual/bias" not in kinds
    assert stored["residual/first"].any()


@pytest.mark.parametrize("kinds", [(in_bf16, lambda task: task), (lambda task: task, in_bf16)])
def test_a_checkpoint_of_the_other_arithmetic_is_refused_with_the_setting_that_continues_it(
    tmp_path, kinds
):
    before, after = kinds
    with pytest.raises(Killed):
        fit(dying(before(small_task()), 5), train_io(tmp_path))
    error = refused(tmp_path, after(small_task()))
    theirs = "bf16" if before is in_bf16 else "fp32"
    assert error.setting == f"dtype: {theirs}"
    assert f"set dtype: {theirs} to go on from it, or remove" in told(error)
    # the setting that it names does
    task, here = before(small_task()), train_io(tmp_path)
    fit(task, here)
    assert here.recorder.starts == [5]


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
    assert here.recorder.starts == [5] and len(here.recorder.notes) == 1
    assert f"with moments {after} ({before} before)" in here.recorder.notes[0]
    for name, value in values(plain).items():
        assert (values(task)[name] - value).norm() < 0.1 * (value - start[name]).norm()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What the small task leads to."""
    task = small_task()
    fit(task, train_io(tmp_path_factory.mktemp("whole")))
    return values(task)


def swapped(folder):
    """Let the slots have each other's names."""
    for name, other in (("a", "c"), ("b", "a"), ("c", "b")):
        if (folder / name).exists():
            (folder / name).rename(folder / other)


# What may happen to a folder of checkpoints while nobody trains.
PLANTED = {
    "leftovers": lambda folder, _draw: [
        (folder / name).write_bytes(b"x")
        for name in ("best-99.safetensors", "best-1.safetensors.part", "notes.txt", ".tmpX")
    ],
    "a third slot": lambda folder, _draw: (folder / "c").mkdir(exist_ok=True),
    "swapped": lambda folder, _draw: swapped(folder),
    "one copied over the other": lambda folder, _draw: (
        (folder / "a").exists() and shutil.copytree(folder / "a", folder / "b", dirs_exist_ok=True)
    ),
    "one gone": lambda folder, draw: shutil.rmtree(folder / draw.choice("ab"), ignore_errors=True),
    "all gone": lambda folder, _draw: shutil.rmtree(folder),
}


def harmed(folder, draw):
    """Do one of those to a folder, or damage one of its files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    how = draw.choice([*PLANTED, *DAMAGE, *DAMAGE])
    if how in PLANTED:
        PLANTED[how](folder, draw)
    elif files:
        DAMAGE[how](draw.choice(files))


@pytest.mark.parametrize("seed", range(12))
def test_kills_with_damage_and_a_clock_that_jumps_between_them_end_the_same(
    tmp_path, undisturbed, monkeypatch, seed
):
    draw = random.Random(seed)
    monkeypatch.setattr("time.time", lambda: draw.uniform(-1e9, 1e11))
    for _ in range(6):
        with suppress(Killed):
            fit(dying(small_task(), draw.randrange(10)), train_io(tmp_path / "run"))
        harmed(tmp_path / "run", draw)
        (tmp_path / "run").mkdir(exist_ok=True)
    task, here = small_task(), train_io(tmp_path / "run")
    metrics = fit(task, here)
    assert equal(values(task), undisturbed)
    assert metrics["steps"] == 10
    assert min(metrics[key] for key in ("seconds", "tokens_per_s", "training_s")) >= 0


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("rows", [2, 8])
def test_a_run_goes_on_with_other_threads_moments_and_rows_and_says_so(
    tmp_path, undisturbed, threads, moments, rows
):
    start = values(small_task())
    for step in (3, 5):
        with pytest.raises(Killed):
            fit(dying(small_task(), step), train_io(tmp_path))
    plan = MemoryPlan(rows, moments=moments)
    task, here = replace(small_task(), memory_plan=plan), train_io(tmp_path)
    torch.set_num_threads(threads)
    metrics = fit(task, here)
    assert here.recorder.starts == [5]
    words = {
        f"threads {threads} (1 before)": threads != 1,
        f"moments {moments} (fp32 before)": moments != "fp32",
        f"sequences at a time {rows} (8 before)": rows != 8,
    }
    changes = [word for word, differs in words.items() if differs]
    wanted = []
    if changes:
        wanted = [
            f"from step 5 on with {', '.join(changes)}: it rounds otherwise from there, so the "
            "result is not that of an undisturbed run bit for bit"
        ]
    assert here.recorder.notes == wanted
    # what the manifest has to say of it
    steps = [each["step"] for each in metrics["rounding"]]
    assert steps == ([0, 5] if changes else [0])
    if not changes:
        assert equal(values(task), undisturbed)
    for name, value in undisturbed.items():
        moved = (value - start[name]).norm()
        assert (values(task)[name] - value).norm() < 0.1 * moved


def test_a_checkpoint_from_before_jobs_and_rounding_were_noted_is_gone_on_from(stopped):
    folder, wanted = stopped
    rewritten(folder, lambda numbers: [numbers["run"].pop(k) for k in ("address", "rounding")])
    got, recorder = resume(folder)
    assert recorder.starts == [7] and recorder.notes == [] and equal(got, wanted)
