"""Threads are lowered while a training runs on a machine that others come to use, and only then.

What decides are times of steps, which are given here as they were recorded or drawn; one run is
told by its clock that the machine is busy, one is on cores that others really spin on.
"""

import os
import random
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import make_text, tiny_config
from fakes import Killed, dying, small_task, train_io

from pipeline.families.load import load
from pipeline.hardware import fastest_threads
from pipeline.run import training
from pipeline.run.context import JobContext
from pipeline.run.job import run_job
from pipeline.store.artifacts import Store
from pipeline.store.reading import unsealed
from pipeline.train import loop, thread_watch
from pipeline.train.loop import fit
from pipeline.train.thread_watch import LOOK_EVERY_S, SLOWER, WINDOW, ThreadWatch
from tests import lora_small

# tokens/s of a training of 2,048 tokens a step, before and after others came: 5,100 against 83
RECORDED_S = [2048 / 5100] * 30 + [2048 / 83] * 30


def watched(times_s, fastest, monkeypatch, had=(2,), first_s=0.0):
    """Return the watch of a training whose steps took so long, what it told, what it kept and how
    often it looked; `fastest` is how many threads are fastest, or a function of those it has."""
    looked, kept = [], []

    def measured(most):
        looked.append(most)
        return fastest(most) if callable(fastest) else min(fastest, most)

    monkeypatch.setattr(thread_watch, "fastest_threads", measured)
    monkeypatch.setattr(torch, "set_num_threads", lambda _count: None)
    watch = ThreadWatch(had, first_s, lambda *note: kept.append(note))
    told = [watch.after_step(seconds) for seconds in times_s]
    return watch, [text for text in told if text], kept, looked


def test_what_was_recorded_on_a_crowded_machine_lowers_them(monkeypatch):
    watch, told, kept, looked = watched(RECORDED_S, 1, monkeypatch)
    assert watch.had == (2, 1) and looked == [2]
    # the middle of a few steps, of which half were slow
    [text] = told
    assert text.startswith("the machine is busy: a step takes 31 times as long as at first; ")
    assert text.endswith("going on with 1 of 2 threads")
    assert [had for had, _ in kept] == [(2,), (2, 1)]


@pytest.mark.parametrize("seed", range(20))
def test_steps_of_any_length_that_are_not_much_longer_change_nothing(monkeypatch, seed):
    draw = random.Random(seed)
    step_s = 10 ** draw.uniform(-4, 2)
    # some steps take long by themselves, fewer than half of any few
    times = [step_s * draw.uniform(0.7, 1.4) for _ in range(300)]
    for at in range(0, 300, 3):
        times[at] *= draw.choice((1, 1, 50))
    watch, told, _, looked = watched(times, 1, monkeypatch, had=(draw.choice((1, 2, 8)),))
    assert len(watch.had) == 1 and told == looked == []


@pytest.mark.parametrize("seed", range(20))
def test_steps_much_longer_are_looked_into_and_fewer_threads_kept(monkeypatch, seed):
    draw = random.Random(seed)
    step_s, slower = 10 ** draw.uniform(-3, 1), draw.uniform(2 * SLOWER, 200)
    crowd = draw.randrange(20, 200)
    times = [step_s * draw.uniform(0.8, 1.2) for _ in range(crowd)]
    times += [step_s * slower * draw.uniform(0.8, 1.2) for _ in range(3 * WINDOW)]
    most = draw.choice((2, 3, 4, 16))
    fewer = draw.randrange(1, most)
    watch, told, kept, _ = watched(times, fewer, monkeypatch, had=(most,))
    assert watch.had == (most, fewer) and len(told) == 1
    # before anybody came, nothing was lowered
    assert len(watched(times[:crowd], fewer, monkeypatch, had=(most,))[0].had) == 1
    # a job that goes on where it was lowered has what it knew
    assert kept[-1] == (watch.had, watch.first_s)


def test_where_fewer_are_no_faster_a_look_costs_little(monkeypatch):
    times = [0.1] * 20 + [1.0] * 1000
    watch, told, _, looked = watched(times, lambda most: most, monkeypatch)
    assert watch.had == (2,) and told == []
    assert 1 <= len(looked) <= 1000 / LOOK_EVERY_S + 1


def test_a_machine_that_gets_busier_lowers_them_again(monkeypatch):
    times = [0.1] * 20 + [1.0] * 20 + [40.0] * 20
    watch, told, _, _ = watched(times, lambda most: most // 2, monkeypatch, had=(8,))
    assert watch.had[:2] == (8, 4) and watch.had[-1] == 1 and len(told) == len(watch.had) - 1
    assert list(watch.had) == sorted(watch.had, reverse=True)


def test_a_job_that_goes_on_knows_how_fast_it_was(monkeypatch):
    # begun on a quiet machine, going on when it is crowded already: the times alone do not tell
    watch, told, _, _ = watched([24.7] * 12, 1, monkeypatch, had=(2,), first_s=0.4)
    assert watch.had == (2, 1) and len(told) == 1
    assert watched([24.7] * 100, 1, monkeypatch, had=(2,))[0].had == (2,)
    assert watched([24.7] * 100, 1, monkeypatch, had=(2, 1), first_s=0.4)[3] == []


# ---------------------------------------------------------------- in a run


@pytest.fixture
def busy(monkeypatch):
    """The clock of a run says that the machine is busy from its 12th step on; one thread is then
    fastest. Returns the threads that torch was told to use."""
    set_to, taken = [], []

    def since_step(_clock):
        taken.append(0.01 if len(taken) < 12 else 1.0)
        return taken[-1]

    monkeypatch.setattr(loop.StepClock, "since_step", since_step)
    monkeypatch.setattr(thread_watch, "fastest_threads", lambda _most: 1)
    monkeypatch.setattr(training, "fastest_threads", lambda _most: 2)
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: (set_to or [2])[-1])
    monkeypatch.setattr(loop, "product_flops_per_s", lambda _bf16: 1e9)
    return set_to


def test_a_run_is_lowered_says_so_once_and_goes_on_with_fewer(tmp_path, busy, capsys, monkeypatch):
    path = tiny_config(tmp_path / "tiny", runtime={"threads": "auto", "save_every_s": 1e-9})
    store = Store(tmp_path / "store").open()
    cfg = load(path)
    make_text(cfg, store)
    real = JobContext.function

    def killed_at_30(job):
        make = real(job)
        return lambda *args: dying(make(*args), 30)

    monkeypatch.setattr(JobContext, "function", killed_at_30)
    with pytest.raises(Killed):
        run_job("train_shared", cfg, store, progress=lambda *_: None)
    assert busy == [2, 1]
    told = capsys.readouterr().err
    assert told.count("the machine is busy") == 1 and "going on with 1 of 2 threads" in told
    (note,) = (tmp_path / "store").rglob("threads.json")
    assert unsealed(note.read_bytes())["threads"] == [2, 1]

    monkeypatch.setattr(JobContext, "function", real)
    manifest = run_job("train_shared", cfg, store, progress=lambda *_: None)
    assert busy == [2, 1, 1] and "busy" not in capsys.readouterr().err
    assert manifest.made["machine"]["threads"] == 1
    rounded = manifest.metrics["rounding"]
    assert [each["threads"] for each in rounded] == [2, 1]
    # with whatever a few steps take to tell
    assert rounded[0]["step"] == 0 and 12 < rounded[1]["step"] < 12 + WINDOW
    assert manifest.metrics["steps"] == 40


def test_a_number_of_threads_is_kept_whatever_happens(tmp_path, busy):
    path = tiny_config(tmp_path / "tiny", runtime={"threads": 2})
    cfg, store = load(path), Store(tmp_path / "store").open()
    make_text(cfg, store)
    manifest = run_job("train_shared", cfg, store, progress=lambda *_: None)
    assert busy == [] and len(manifest.metrics["rounding"]) == 1


def test_an_adapters_training_is_lowered_too(tmp_path, busy):
    parts = lora_small.prepared(tmp_path, loras__defaults__steps=30)
    watch = ThreadWatch((2,), 0.0, lambda *_: None)
    here = replace(train_io(tmp_path / "slots", save_every_s=1e9), watch=watch)
    fit(lora_small.task_of(parts, "color"), here)
    assert watch.had == (2, 1) and busy == [1]
    assert sum("busy" in note for note in here.recorder.notes) == 1


def test_the_time_of_a_step_is_that_of_its_phases(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "product_flops_per_s", lambda _bf16: 1e9)
    taken, real = [], loop.StepClock.since_step
    monkeypatch.setattr(
        loop.StepClock, "since_step", lambda clock: taken.append(real(clock)) or taken[-1]
    )
    watch = ThreadWatch((2,), 0.0, lambda *_: None)
    metrics = fit(small_task(steps=10), replace(train_io(tmp_path), watch=watch))
    # without evaluating, saving and starting
    assert len(taken) == 10 and sum(taken) == pytest.approx(metrics["training_s"])


SPIN = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile os.getppid() > 1: pass"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs affinity of processes")
def test_on_cores_that_others_spin_on_it_does_what_was_measured(monkeypatch):
    real, before = fastest_threads, torch.get_num_threads()
    answers, times, spinning = [], [], []
    monkeypatch.setattr(
        thread_watch, "fastest_threads", lambda most: answers.append(real(most)) or answers[-1]
    )
    watch = ThreadWatch((2,), 0.0, lambda *_: None)
    a = torch.ones(256, 256)
    try:
        torch.set_num_threads(2)
        for step in range(40):
            if step == 15:
                for core in 2 * sorted(os.sched_getaffinity(0)):
                    spinning.append(subprocess.Popen([sys.executable, "-c", SPIN, str(core)]))
            start_s = time.perf_counter()
            a = (a @ a).tanh_()
            times.append(time.perf_counter() - start_s)
            watch.after_step(times[-1])
            # each step takes long from now on
            if answers:
                break
    finally:
        for process in spinning:
            process.kill()
            process.wait()
        torch.set_num_threads(before)
    # how busy is the machine's own affair; what was decided follows from what was measured
    given = iter(answers)
    again, _, _, looked = watched(times, lambda _most: next(given), monkeypatch)
    assert again.had == watch.had and len(looked) == len(answers)
    assert watch.had[-1] == min([2, *answers])
