"""Ctrl-C, SIGTERM and SIGKILL at any moment of a command: one line, status 130, and no process left
of it, by the system's own list of processes."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from itertools import cycle
from pathlib import Path

import psutil
import pytest
from small_tasks import Source, simple
from test_backend import PATIENCE_S, ROOT, until

from pipeline import __main__, interrupts

GONE_S = 1.5  # less than the imports take that a process is in the middle of


def start(arguments, **environment):
    """Start a command in a session of its own."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def catches(process):
    """Whether a process has a handler for SIGTERM, which Python itself has not."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    caught = next(line.split()[1] for line in lines if line.startswith("SigCgt"))
    return int(caught, 16) >> (signal.SIGTERM - 1) & 1


def session(process):
    """Return the living processes of a command's session."""
    found = []
    for each in psutil.process_iter():
        try:
            alive = each.status() != psutil.STATUS_ZOMBIE
            if alive and os.getsid(each.pid) == process.pid:
                found.append(each.cmdline())
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return found


def processes(process, name):
    """Count the processes of a command's session that have a name in their command line."""
    return sum(name in " ".join(line) for line in session(process))


def send(process, number, whole_group):
    (os.killpg if whole_group else os.kill)(process.pid, number)


def outcome(process):
    """Return status and lines of a command, after a check that no process of it is left."""
    # what is left would keep the pipes open: so first the processes, then what they said
    process.wait(PATIENCE_S)
    end = time.monotonic() + GONE_S
    while left := session(process):
        assert time.monotonic() < end, left
        time.sleep(0.01)
    out, err = process.communicate()
    return process.returncode, (out + err).splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("number", "whole_group", "again"),
    [(signal.SIGINT, True, 0), (signal.SIGINT, True, 1), (signal.SIGTERM, False, 1)],
)
def test_a_command_that_is_stopped_while_it_starts_says_one_line(
    tiny, store_path, number, whole_group, again
):
    draw = random.Random(f"{number} {again}")
    configs = [tiny, ROOT / "config" / "tiny_vlm.yaml"]
    draw.shuffle(configs)
    # imports of the command; imports of the process that jobs are forked from; any moment
    for phase, config in zip(("command", "forked", "any"), cycle(configs), strict=False):
        process = start(["-m", "pipeline", "run", "--config", config, "--store", store_path])
        until(lambda process=process: process.poll() is not None or catches(process))
        if phase == "forked":
            until(lambda process=process: processes(process, "forkserver"))
        time.sleep(draw.uniform(0, 1.5 if phase == "any" else 0.1))
        for _ in range(1 + again):
            if process.poll() is None:
                send(process, number, whole_group)
                time.sleep(draw.uniform(0, 0.4))
        status, lines = outcome(process)
        assert (status, len(lines)) == (interrupts.STOPPED, 1), lines
        assert "stopped" in lines[0]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere jobs are not forked")
def test_nothing_is_left_of_a_command_that_was_killed_while_jobs_were_to_be_forked(
    tiny, store_path
):
    for delay_s in (0.0, 0.05, 0.3):
        process = start(["-m", "pipeline", "run", "--config", tiny, "--store", store_path])
        until(lambda process=process: processes(process, "forkserver"))
        time.sleep(delay_s)
        process.kill()
        status, lines = outcome(process)
        assert status == -signal.SIGKILL and not lines, lines


PREPARE = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
from small_tasks import LIMITS, entry, jsonl
from pipeline import interrupts
from pipeline.data.tasks import prepare
if __name__ == "__main__":
    print("here", flush=True)
    task = entry(jsonl(sys.argv[1]) | {"max_bad_share": 1})
    # as a job does it: what a library swallows comes again
    interrupts.raise_once(again_s=interrupts.SWALLOWED_S)
    try:
        prepare.prepare(task, LIMITS, 0, Path(sys.argv[2]), processes=2)
    except KeyboardInterrupt:
        interrupts.ignore()
        sys.exit(interrupts.STOPPED)
"""


@pytest.mark.parametrize(
    ("number", "whole_group", "ended"),
    [(signal.SIGKILL, False, -signal.SIGKILL), (signal.SIGINT, True, interrupts.STOPPED)],
)
def test_processes_that_prepare_rows_end_with_their_job(tmp_path, number, whole_group, ended):
    rows = Source(tmp_path / "source")(simple(5000))
    script = tmp_path / "prepare_rows.py"
    script.write_text(PREPARE)
    process = start([script, rows, tmp_path / "out"], PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    # while they import, or when they have begun to work
    if whole_group:
        until(lambda: processes(process, "spawn_main") == 2)
    else:
        until(lambda: list(tmp_path.glob("out/images/*")))
    assert process.poll() is None
    send(process, number, whole_group)
    status, lines = outcome(process)
    assert status == ended and not any("Traceback" in line for line in lines), lines


@pytest.fixture
def silent_s3():
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PATIENCE_S)
        yield server


@pytest.mark.parametrize("second", ["at once", "when it has told"])
def test_ctrl_c_typed_twice_while_a_bundle_is_uploaded(bundled, silent_s3, second):
    path, store_path, folder = bundled
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    host, port = silent_s3.getsockname()
    to_s3 = ("--override", "deploy.upload=s3://shelf/models")
    process = start(
        ["-m", "pipeline", "deploy", "--config", path, "--store", store_path, *to_s3],
        AWS_ACCESS_KEY_ID="a",
        AWS_SECRET_ACCESS_KEY="b",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_ENDPOINT_URL=f"http://{host}:{port}",
    )
    connection, _ = silent_s3.accept()
    with connection:
        send(process, signal.SIGINT, True)
        told = []
        if second == "when it has told":
            # from here on Python takes its modules down, which takes longer than a second Ctrl-C
            until(lambda: told.append(process.stderr.readline()) or "stopped" in told[-1])
        if process.poll() is None:
            send(process, signal.SIGINT, True)
        status, lines = outcome(process)
    lines = [*"".join(told).splitlines(), *lines]
    assert status == interrupts.STOPPED, lines
    assert lines[-1] == "deploy: stopped; the same command goes on from there", lines
    assert not any("Traceback" in line for line in lines), lines
    assert {file: file.read_bytes() for file in before} == before


LATE = """
import os, runpy, signal, sys, time
from pipeline import interrupts
from pipeline.families import load
ignore = interrupts.ignore
second = int(sys.argv.pop())
def stopped(*_):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
def late():
    os.kill(os.getpid(), second)
    ignore()
load.load = stopped
interrupts.ignore = late
runpy.run_module("pipeline", run_name="__main__")
"""


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_the_end_of_a_command_and_the_process_says_nothing_more(second):
    process = start(["-c", LATE, "run", "--config", "x", int(second)])
    assert outcome(process) == (interrupts.STOPPED, ["stopped"])


IN_A_TEXT = """
import sys
from pipeline import interrupts
interrupts.raise_once()
try:
    exec("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
except KeyboardInterrupt:
    interrupts.ignore()
    sys.exit(interrupts.STOPPED)
"""


def test_a_signal_in_the_middle_of_a_text_that_a_library_executes_changes_no_status(tmp_path):
    (tmp_path / "in_a_text.py").write_text(IN_A_TEXT)
    process = start(["-m", "in_a_text"], PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert outcome(process) == (interrupts.STOPPED, [])


def test_a_command_that_is_called_gives_back_the_handlers_it_found(monkeypatch):
    def own(_number, _frame):
        raise AssertionError

    monkeypatch.setattr(__main__, "_dispatch", lambda _args: None)
    before = {number: signal.signal(number, own) for number in interrupts.SIGNALS}
    try:
        assert __main__.main(["run", "--config", "x"]) == 0
        assert {signal.getsignal(number) for number in before} == {own}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("up", [False, True])
def test_a_server_that_is_stopped_twice_ends_without_a_traceback(bundled, up):
    process = start(["-m", "pipeline", "serve", "--bundle", bundled[2], "--port", "0"])
    until(lambda: process.poll() is not None or catches(process))
    if up:
        until(lambda: "serving tiny" in process.stderr.readline())
    else:
        # in the imports, some of which take a KeyboardInterrupt for a module that is missing
        time.sleep(random.Random(4).uniform(1, 2))
    for _ in range(2):
        if process.poll() is None:
            send(process, signal.SIGINT, True)
            time.sleep(0.05)
    status, lines = outcome(process)
    assert status == interrupts.STOPPED and lines[-1] == "stopped", lines
    assert not any("Traceback" in line for line in lines) and (up or len(lines) == 1), lines


SWALLOWS = """
import sys, time
from pipeline import interrupts
interrupts.raise_once(again_s=0.2)
try:
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("swallowed", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    interrupts.ignore()
    time.sleep(0.4)
    print("told", flush=True)
"""


def test_what_a_library_swallowed_is_raised_again_until_it_arrives():
    process = start(["-c", SWALLOWS])
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert outcome(process) == (0, ["swallowed", "told"])


STUCK = """
import sys, time
from pipeline import __main__
def stuck(*_):
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            print("first", flush=True)
__main__._dispatch = stuck
sys.exit(__main__.main(["run", "--config", "x"]))
"""


def test_a_third_signal_does_not_wait_for_what_does_not_end():
    process = start(["-c", STUCK])
    until(lambda: process.poll() is not None or catches(process))
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "first\n"
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.send_signal(signal.SIGINT)
    told = ["ended without waiting; what was saved before is kept"]
    assert outcome(process) == (interrupts.STOPPED, told)
