"""Jobs as processes of this machine: killed, stopped, failing, side by side, and the command line
around them.

Jobs are started from this process, so that their imports are paid once; commands are whole
processes in a session of their own, and what ends them ends all of it.
"""

import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fakes import contents, flip, traces

from pipeline import hardware
from pipeline.__main__ import main
from pipeline.errors import GivenUp, Interrupted, JobsFailed, PipelineError
from pipeline.families import OPENS_GPU, PRELOAD
from pipeline.families.load import load
from pipeline.run import backend, stages
from pipeline.run.advice import CommandLine, sentence
from pipeline.run.backend import Local, run_stage
from pipeline.store.artifacts import Store
from pipeline.store.history import read

ROOT = Path(__file__).parents[1]
STOPS = [
    (signal.SIGTERM, False),
    (signal.SIGINT, True),
    (signal.SIGTERM, True),
]  # and whether all processes get it
PATIENCE_S = 120  # longer than anything here takes; then a test fails instead of hanging


def store_with(store_path, finished, *kept):
    """Return a store that holds copies of the finished artifacts of some stages."""
    store = Store(store_path).open()
    for here in Store(finished[1]).addresses():
        if here.split("-")[0] in kept:
            shutil.copytree(Store(finished[1]).folder(here), store.folder(here))
    return store


def until(condition):
    """Wait until condition returns something true; return that."""
    end = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)
    return found


def stepping(store):
    """Count the trainings that have done a step: a history's first row only says that one begins,
    and before the first step there is nothing to save."""
    files = store.root.glob("history/*.jsonl")
    return sum('"train_nats"' in file.read_text("utf-8") for file in files)


class Killer:
    """Kills the next processes that the backend starts, each after its delay."""

    def __init__(self, monkeypatch):
        self.start, self.delay_s, self.killed = backend._start, None, 0
        monkeypatch.setattr(backend, "_start", self)

    def __call__(self, *args):
        process, pipe = self.start(*args)
        if self.delay_s is not None:
            threading.Timer(self.delay_s, process.kill).start()
        return process, pipe


def test_jobs_killed_at_random_moments_leave_the_same_bytes(finished, store_path, monkeypatch):
    cfg, store, draw, killer = (
        load(finished[0]),
        Store(store_path).open(),
        random.Random(7),
        Killer(monkeypatch),
    )
    jobs = [job for stage in stages.RUN for job in stages.jobs(cfg, stage)]
    for stage, item, here in jobs:
        most_s = 0.6 * max(Store(finished[1]).manifest(here).made["seconds"], 0.05)
        for _ in range(3):
            most_s = killed(killer, Local(store), cfg, (stage, item, here), draw, most_s)
        killer.delay_s = None
        assert not Local(store).run_jobs(stage, cfg, [item])
    assert len(jobs) == 12 and contents(store_path) == contents(finished[1])


def killed(killer, local, cfg, job, draw, most_s: float) -> float:
    """Kill a job at a random moment; return the latest moment to try, sooner each time that it was
    done before."""
    stage, item, here = job
    killer.delay_s = draw.uniform(0.0, most_s)
    while not (failed := local.run_jobs(stage, cfg, [item])):
        shutil.rmtree(local.store.folder(here))
        most_s = killer.delay_s = killer.delay_s / 2
    assert "SIGKILL" in str(failed[item])
    return most_s


def command(path, store_path, *more, stage="run"):
    """Start the command line in a session of its own."""
    arguments = [
        sys.executable,
        "-m",
        "pipeline",
        stage,
        "--config",
        path,
        "--store",
        store_path,
        *more,
    ]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(arguments, cwd=ROOT, start_new_session=True, **both)


def typed(capfd, code, *arguments):
    """Do a command in this process; return what it printed on one line, after a check of its exit
    code."""
    assert main([str(argument) for argument in arguments]) == code
    return " ".join("".join(capfd.readouterr()).split())


def ended(process, code=None):
    """Wait for a command; return what it printed on one line, after a check of its exit code."""
    try:
        text, _ = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert code is None or process.returncode == code, text
    assert "Traceback" not in text, text
    return " ".join(text.split())


def checkpoints(store):
    return lambda: list((store.root / "resume").glob("*/*/state.json"))


def test_a_command_killed_with_all_its_processes(finished, store_path):
    store, draw, kills = Store(store_path), random.Random(3), 0
    for stage in ("train_shared", "train_experts", "evaluate"):
        process = command(finished[0], store_path)
        began = f"artifacts/{stage}-*"
        until(
            lambda began=began, process=process: (
                list(store.root.glob(began)) or process.poll() is not None
            )
        )
        time.sleep(draw.uniform(0, 0.2))
        if process.poll() is None:  # else its number may be another's
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
    ended(command(finished[0], store_path), 0)
    assert kills >= 2 and contents(store_path) == contents(finished[1])


@pytest.mark.parametrize(("number", "whole_group"), STOPS)
def test_a_command_that_is_stopped_saves_and_tells_where(finished, store_path, number, whole_group):
    store = store_with(store_path, finished, "tokenizer", "preprocess")
    process = command(
        finished[0], store_path, "--override", "runtime.save_every_s=1e-9", stage="train_shared"
    )
    until(lambda: checkpoints(store)() or process.poll() is not None)
    if process.poll() is None:
        (os.killpg if whole_group else os.kill)(process.pid, number)
    text = ended(process)
    here = stages.address(load(finished[0]), "train_shared")
    if process.returncode == 0:
        pytest.skip("it had ended before the signal came")
    assert process.returncode == 130
    if not store.has(here):  # else the last step was done when it came
        assert (
            "train_shared: stopped and saved at step" in text
            and "the same command goes on from there" in text
        )
    run_stage("train_shared", load(finished[0]), Local(store))
    name = f"{here}/trunk.safetensors"
    assert contents(store_path)[name] == contents(finished[1])[name]


def test_a_job_whose_parent_is_killed_saves_and_ends(finished, store_path):
    store = store_with(store_path, finished, "tokenizer", "preprocess")
    long = ("--override", "trunk.steps=5000", "--override", "runtime.save_every_s=1e6")
    process = command(finished[0], store_path, *long, stage="train_shared")
    until(lambda: stepping(store) == 1)
    os.kill(process.pid, signal.SIGKILL)  # not reaped: the job must not take a zombie for a parent
    until(checkpoints(store))
    cfg = load(finished[0], ("trunk.steps=5000",))
    with store.lock(stages.address(cfg, "train_shared")):
        assert not store.has(stages.address(cfg, "train_shared"))
    process.communicate(timeout=PATIENCE_S)


def test_two_commands_at_once_make_one_artifact(finished, store_path):
    store = store_with(store_path, finished, "tokenizer", "preprocess", "train_shared")
    both = [command(finished[0], store_path, stage="train_experts") for _ in range(2)]
    texts = [ended(process, 0) for process in both]
    assert sum("another process is making" in text for text in texts) >= 1
    found = {
        name: sha for name, sha in contents(store_path).items() if name.startswith("train_experts-")
    }
    assert found == {
        n: s for n, s in contents(finished[1]).items() if n.startswith("train_experts-")
    }
    assert len(found) > 5
    assert not list(store.root.glob("resume/*"))


def test_a_second_run_starts_no_process_and_changes_no_file(finished, monkeypatch):
    monkeypatch.setattr(backend, "_start", lambda *_: pytest.fail("started a process"))
    before = traces(finished[1])
    cfg = load(finished[0])
    for stage in stages.RUN:
        run_stage(stage, cfg, Local(Store(finished[1]).open()))
    assert traces(finished[1]) == before


def test_one_failing_expert_costs_only_itself(finished, store_path):
    cfg, store = (
        load(finished[0]),
        store_with(store_path, finished, "tokenizer", "preprocess", "train_shared"),
    )
    here = {item: stages.address(cfg, "train_experts", item) for item in cfg.experts}
    store.history(here["shop"]).mkdir(parents=True)  # a folder where a file belongs
    with pytest.raises(JobsFailed) as error:
        run_stage("train_experts", cfg, Local(store))
    lines = sentence(error.value, CommandLine(), again="the command").splitlines()
    assert lines[0] == "2 of 3 jobs of train_experts are finished and kept:"
    assert [line.split(":")[0].strip() for line in lines[1:4]] == [
        f"train_experts {name}" for name in ("sea", "shop", "hall")
    ]
    assert "finished" in lines[1] and "failed: history" in lines[2] and "finished" in lines[3]
    assert lines[4].endswith("run again: the command")
    before = {f: m for f, m in traces(store_path).items() if "/artifacts/" in f}
    store.history(here["shop"]).rmdir()
    run_stage("train_experts", cfg, Local(store))
    after = traces(store_path)
    assert {f: after[f] for f in before} == before
    found = {
        name: sha for name, sha in contents(store_path).items() if name.startswith("train_experts-")
    }
    assert found == {
        n: s for n, s in contents(finished[1]).items() if n.startswith("train_experts-")
    }


def test_side_by_side_leaves_the_same_bytes(finished, store_path):
    cfg, store = (
        load(finished[0]),
        store_with(store_path, finished, "tokenizer", "preprocess", "train_shared"),
    )
    run_stage("train_experts", cfg, Local(store, parallel=3))
    found = {
        name: sha for name, sha in contents(store_path).items() if name.startswith("train_experts-")
    }
    assert (
        found == {n: s for n, s in contents(finished[1]).items() if n.startswith("train_experts-")}
        and found
    )


def test_a_killed_job_is_told_apart(finished, store_path, monkeypatch):
    store = store_with(store_path, finished, "tokenizer", "preprocess")
    Killer(monkeypatch).delay_s = 0.05
    with pytest.raises(
        PipelineError, match=r"train_shared was killed by SIGKILL \(out of memory\?\)"
    ):
        run_stage("train_shared", load(finished[0], ("trunk.steps=5000",)), Local(store))


def test_a_job_that_is_given_up_saves_and_ends_and_the_next_one_is_done(finished, store_path):
    store, came = store_with(store_path, finished, "tokenizer", "preprocess"), []
    # Of two runs, as trials of experiments are
    long, short = (load(finished[0], (f"trunk.steps={steps}",)) for steps in (10**6, 3))
    address = stages.address(long, "train_shared")

    def gives_up(at):
        rows = read(store.history(address)).rows
        return at == 0 and any("valid_nats" in row for row in rows)

    jobs = [(long, None), (short, None)]
    Local(store).run_several("train_shared", jobs, lambda *each: came.append(each), gives_up)
    (first, error), (second, none) = came
    assert (first, type(error), second, none) == (0, GivenUp, 1, None)
    assert str(error) == "train_shared was given up"
    assert not store.has(address) and store.has(stages.address(short, "train_shared"))
    assert (store.resume(address) / "a/state.json").exists()


def test_a_job_that_is_stopped_stops_the_others(finished, store_path, monkeypatch):
    store, start, found = (
        store_with(store_path, finished, "tokenizer", "preprocess", "train_shared"),
        backend._start,
        [],
    )
    cfg = load(finished[0], ("expert.steps=5000", "runtime.save_every_s=1e6"))

    def watched(*args):
        found.append(start(*args))
        return found[-1]

    monkeypatch.setattr(backend, "_start", watched)

    def stop_one():
        until(lambda: stepping(store) == 2)
        os.kill(found[0][0].pid, signal.SIGINT)

    thread = threading.Thread(target=stop_one)
    thread.start()
    with pytest.raises(Interrupted) as error:
        run_stage("train_experts", cfg, Local(store, parallel=2))
    thread.join()
    text = str(error.value)
    assert (
        "train_experts sea: stopped and saved" in text
        and "train_experts shop: stopped and saved" in text
    )
    assert len(checkpoints(store)()) == 2


@pytest.mark.parametrize("how", ["bit", "manifest", "newer", "file"])
def test_what_a_person_must_mend_ends_with_2(finished, store_path, how, capfd):
    cfg = load(finished[0])
    store = store_with(store_path, finished, "tokenizer", "preprocess", "train_shared")
    folder = store.folder(stages.address(cfg, "train_shared"))
    if how == "bit":
        flip(folder / "trunk.safetensors", -5)
    elif how == "manifest":
        (folder / "manifest.json").write_text("{")
    elif how == "newer":
        (store_path / "store.json").write_text('{"format": 99}')
    else:
        shutil.rmtree(store_path)
        store_path.write_text("mine")
    arguments = ["train_experts", "--config", finished[0], "--store", store_path]
    if how in (
        "bit",
        "manifest",
    ):  # found when everything is imported, which costs seconds in a process of its own
        text = typed(capfd, 2, *arguments)
    else:
        text = ended(command(finished[0], store_path, stage="train_experts"), 2)
    wanted = {
        "bit": f"remove {folder}",
        "manifest": f"remove {folder}",
        "newer": "format 99",
        "file": "--store",
    }
    assert "error:" in text.lower() or "failed:" in text
    assert wanted[how] in text


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own of 256 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk], check=False
        ).returncode
    ):
        pytest.skip("mounting a small file system needs root and a system that allows it")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_keeps_what_is_finished_and_goes_on_after(finished, small_disk, capfd):
    store_path, seen = small_disk / "store", set()
    arguments = ["run", "--config", finished[0], "--store", store_path]
    for size_kb in (40, 170, 256):
        subprocess.run(["mount", "-o", f"remount,size={size_kb}k", str(small_disk)], check=True)
        text = (
            typed(capfd, 2, *arguments)
            if size_kb < 256
            else ended(command(finished[0], store_path), 2)
        )
        # in an artifact, in a history, or before there is a store
        full = r"no room to write .* MB free|no room left to add a row|cannot be used as a store"
        assert re.search(full, text), text
        kept = {
            n: s for n, s in contents(store_path).items() if Store(store_path).has(n.split("/")[0])
        }
        assert kept.items() <= contents(finished[1]).items() and seen <= kept.keys()
        seen = set(kept)
    assert seen
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    typed(capfd, 0, *arguments)
    assert contents(store_path) == contents(finished[1])


def test_a_store_that_cannot_be_written(finished, small_disk, capfd):
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    store_with(small_disk / "store", finished, "tokenizer", "preprocess")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    text = typed(capfd, 2, "train_shared", "--config", finished[0], "--store", small_disk / "store")
    assert "Read-only file system" in text and "--store" in text


# What a job finds: all of it imported, and nothing of that looked through for garbage ever again
FOUND = """
import gc, subprocess, sys
asked = [sys.executable, "-c", "import gc; print(gc.get_threshold())"]
usual = eval(subprocess.check_output(asked, text=True))
assert "pipeline.run.forked" in sys.modules
assert gc.get_threshold() == usual
assert gc.get_freeze_count() > len(gc.get_objects())
"""
FORK = """
import multiprocessing, sys
sys.path.insert(0, sys.argv[1])
from pipeline.run import backend
backend.PRELOAD["ffn_moe"] = []
backend._have_forked_from("ffn_moe")
process = multiprocessing.get_context("forkserver").Process(target=exec, args=(sys.argv[2],))
process.start()
process.join()
sys.exit(process.exitcode or "PYTHONPATH" in backend.os.environ)
"""


@pytest.mark.skipif(not backend.FORKS, reason="elsewhere jobs are not forked")
def test_jobs_are_forked_from_what_is_imported_already_in_any_folder(tmp_path):
    """Else every job imports all of it anew, and nobody is told."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(ROOT), FOUND],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# Imports modules where whatever asks for a GPU, which opens it, is the end
LEFT_ALONE = """
import importlib, sys, torch
def opened(*_, **__):
    raise SystemExit(f"{name} opens the GPU")
asking = "is_available device_count current_device get_device_properties init _lazy_init"
for asked in asking.split():
    setattr(torch.cuda, asked, opened)
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_nothing_that_jobs_are_forked_from_opens_a_gpu(monkeypatch):
    """Nor what an endpoint's image of memory has: there is no GPU yet when it is taken."""
    imported = set()
    monkeypatch.setattr(backend, "has_driver", lambda: True)
    monkeypatch.setattr(backend.forkserver, "set_forkserver_preload", imported.update)
    monkeypatch.setattr(backend.forkserver, "ensure_running", lambda: None)
    for name in PRELOAD:
        backend._have_forked_from(name)
    assert not imported & OPENS_GPU and len(imported) > len(PRELOAD)
    modules = [*sorted(imported - {backend.FORKED}), "pipeline.serve.app"]
    done = subprocess.run(
        [sys.executable, "-c", LEFT_ALONE, *modules],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("several", "parallel", "taken"),
    [
        (["3", "5"], 3, ["3", "5", "3", "3", "5"]),
        (["3", "5"], 1, [None] * 5),
        (["0"], 3, [None] * 5),
        ([], 3, [None] * 5),
    ],
)
def test_jobs_side_by_side_are_spread_over_the_gpus(several, parallel, taken, tiny, monkeypatch):
    found = []

    def start(*args):
        receive, send = multiprocessing.Pipe(duplex=False)
        send.send(None)
        found.append(args[-1])
        return SimpleNamespace(join=lambda: None), receive

    monkeypatch.setattr(backend, "gpus", lambda: several)
    monkeypatch.setattr(backend, "_start", start)
    ended = []
    jobs = [(load(tiny), str(number)) for number in range(5)]
    local = Local(Store(tiny.parent), parallel)
    local.run_several("preprocess", jobs, lambda *end: ended.append(end))
    assert found == taken and len(ended) == 5


def on_its_gpu(pipe, raw):
    """Do a job that tells which GPUs it sees."""

    def tell(*_args, **_kwargs):
        raise PipelineError(os.environ["CUDA_VISIBLE_DEVICES"])

    backend.run_job = tell
    backend.job(pipe, "tokenizer", raw, "nowhere", None, 1, backend.JobLines(True), "MIG-5")


def test_a_job_sees_its_gpu_alone(tiny):
    receive, send = multiprocessing.Pipe(duplex=False)
    raw = load(tiny).model_dump(mode="json")
    process = multiprocessing.get_context("fork").Process(target=on_its_gpu, args=(send, raw))
    process.start()
    assert receive.poll(PATIENCE_S) and str(receive.recv()) == "MIG-5"
    process.join()


@pytest.mark.parametrize(
    ("named", "found"), [(None, ["0", "1"]), ("2,3", ["2", "3"]), ("", []), ("7", ["7"])]
)
def test_gpus_are_those_that_a_process_may_use(named, found, monkeypatch):
    assert hardware.gpus() == []
    monkeypatch.setattr(hardware, "has_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    if named is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert hardware.gpus() == found
