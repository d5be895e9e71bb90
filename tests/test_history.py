"""History: what a reader gets after kills and restarts, what stands on the screen, what wandb is
given."""

import errno
import io
import json
import os
import pty
import random
import resource
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fakes import FaultyReads
from rich.console import Console

from pipeline.errors import ConfigError, DiskFull, StoreError, UnreadableFile
from pipeline.store import display, history
from pipeline.store.history import Recorder, read

ROOT = Path(__file__).parent.parent


def screen(terminal=False):
    return Console(
        file=io.StringIO(), force_terminal=terminal, width=120, _environ={"TERM": "xterm"}
    )


def record(path, start, steps, mark="", **options):
    recorder = Recorder(path, job="trunk", total_steps=100, console=screen(), **options)
    recorder.start(start)
    for step in steps:
        recorder.row({"step": step, "train_nats": 1.0, "mark": mark})
    return recorder


def marks(path):
    return [(row["step"], row["mark"]) for row in read(path).rows]


def test_rows_come_back_as_they_were_given(tmp_path):
    recorder = Recorder(
        tmp_path / "new" / "rows.jsonl", job="trunk", total_steps=2, console=screen()
    )
    recorder.start(0)
    rows = [
        {"step": 1, "loss": 0.1 + 0.2, "load": [0.25, 0.75], "text": "é\n"},
        {"step": 2, "deep": {"a": None}},
    ]
    for row in rows:
        recorder.row(row)
    recorder.close()
    assert read(tmp_path / "new" / "rows.jsonl").rows == rows


def test_every_row_is_on_disk_as_one_line_of_strict_json_before_the_next(tmp_path):
    recorder = record(tmp_path / "rows.jsonl", 0, [])

    def refuse(name):
        raise AssertionError(name)

    for step in range(3):
        recorder.row(
            {"step": step, "loss": float("nan"), "load": [float("inf"), np.float32("nan"), 1.0]}
        )
        lines = (tmp_path / "rows.jsonl").read_text().splitlines()
        assert [json.loads(line, parse_constant=refuse)["step"] for line in lines] == list(
            range(step + 1)
        )
    assert read(tmp_path / "rows.jsonl").rows[0] == {
        "step": 0,
        "loss": None,
        "load": [None, None, 1.0],
    }


def test_arrays_tensors_and_their_scalars_are_plain_numbers_on_disk(tmp_path):
    torch = pytest.importorskip("torch")
    recorder = record(tmp_path / "rows.jsonl", 0, [])
    recorder.row(
        {"step": np.int64(3), "a": np.float64(0.5), "b": torch.tensor(2.0), "c": np.array([1, 2])}
    )
    assert read(tmp_path / "rows.jsonl").rows == [{"step": 3, "a": 0.5, "b": 2.0, "c": [1, 2]}]


def test_no_file_is_open_between_rows(tmp_path):
    recorder = record(tmp_path / "rows.jsonl", 0, range(3))
    opened = {fd.resolve() for fd in Path("/proc/self/fd").iterdir()}
    assert recorder.path.resolve() not in opened


@pytest.mark.parametrize(
    ("attempts", "expected"),
    [
        ([(0, [1, 2, 3])], [(1, 0), (2, 0), (3, 0)]),
        ([(0, [1, 2, 3, 4]), (2, [3])], [(1, 0), (2, 0), (3, 1)]),  # 4 was gone back over
        ([(0, [1, 2, 3]), (2, [2, 3])], [(1, 0), (2, 1), (3, 1)]),  # equal steps: the last attempt
        ([(0, [1, 2]), (5, [6])], [(1, 0), (2, 0), (6, 1)]),  # nothing between is made up
        ([(0, [1, 2, 3]), (2, []), (2, [])], [(1, 0), (2, 0)]),
        ([(0, [1, 2, 3, 4]), (3, [4, 5]), (1, [2])], [(1, 0), (2, 2)]),
        ([(0, [1, 2]), (0, [])], []),  # from the beginning again
        ([(0, [1, 1, 2])], [(1, 0), (1, 0), (2, 0)]),  # training and evaluation rows of one step
    ],
)
def test_restarts(tmp_path, attempts, expected):
    for number, (start, steps) in enumerate(attempts):
        record(tmp_path / "rows.jsonl", start, steps, number)  # never closed, as after a kill
    assert marks(tmp_path / "rows.jsonl") == expected


def test_a_row_without_start_starts_there(tmp_path):
    for mark in "ab":
        recorder = Recorder(tmp_path / "rows.jsonl", job="trunk", total_steps=9, console=screen())
        recorder.row({"step": 4, "mark": mark})
    assert marks(tmp_path / "rows.jsonl") == [(4, "b")]


def test_torn_at_any_byte_the_whole_lines_stay_and_the_next_attempt_goes_on(tmp_path):
    record(tmp_path / "whole", 0, [1, 2, 3])
    data = (tmp_path / "whole").read_bytes()
    ends = [0, *(i + 1 for i, byte in enumerate(data) if byte == ord("\n"))]
    for size in range(len(data) + 1):
        torn = tmp_path / "torn"
        torn.write_bytes(data[:size])
        whole = sum(
            end - 1 <= size for end in ends[1:]
        )  # a row that lacks only its newline is whole
        assert [row["step"] for row in read(torn).rows] == list(range(1, whole + 1)), size
        record(torn, 9, [9], "next")
        assert [row["step"] for row in read(torn).rows] == [*range(1, whole + 1), 9], size


def test_killed_while_writing_reads_back_as_a_prefix(tmp_path):
    program = (
        "import sys; from pathlib import Path; from pipeline.store.history import Recorder\n"
        "r = Recorder(Path(sys.argv[1]), job='j', total_steps=10**9); r.start(0)\n"
        "for step in range(10**9):\n"
        "    r.row({'step': step, 'pad': 'x' * 3000})\n"
        "    step or print('on', flush=True)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "rows")]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as job:
        assert job.stdout.readline() == b"on\n"
        while (tmp_path / "rows").stat().st_size < 3000 * random.Random(0).randint(20, 60):
            pass
        job.send_signal(signal.SIGKILL)
    steps = [row["step"] for row in read(tmp_path / "rows").rows]
    assert len(steps) >= 20
    assert steps == list(range(len(steps)))


@pytest.mark.parametrize("line", [b"{", b"[1]", b"{}", b'{"step":"x"}', b"\xff\xfe", b"\0\0"])
def test_what_is_no_row_is_left_out_and_told(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step":1}\n' + line + b'\n{"step":2}\n' + line + b"\n")
    found = read(path)
    assert [row["step"] for row in found.rows] == [1, 2]
    assert found.missing == "2 lines cannot be read"


@pytest.mark.parametrize("line", [b"", b" ", b"\t", b"\r", b"\n\n"])
def test_blank_lines_mean_nothing(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line + b'\n{"step":1}\r\n' + line + b'\n {"step":2}\n' + line)
    assert read(path, 2) == history.History([{"step": 1}, {"step": 2}])


def test_a_missing_file_is_told(tmp_path):
    assert read(tmp_path / "absent.jsonl", 5) == history.History([], "the file is gone")


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_file_that_cannot_be_read_is_an_error(tmp_path, monkeypatch, error):
    record(tmp_path / "rows.jsonl", 0, [1])
    reads = FaultyReads(monkeypatch, tmp_path)
    for at in range(2):
        reads.fail(at, error)
        with pytest.raises(UnreadableFile, match=os.strerror(error)):
            read(tmp_path / "rows.jsonl")


def begun(path, seed):
    """Write the history of a job that was killed and gone on with at random places, some of them
    with another distance between rows; return how far it came."""
    draw = random.Random(seed)
    at, every = 0, draw.choice((1, 2, 5))
    for _ in range(draw.randint(1, 4)):
        goes_to = at + draw.randint(1, 40)
        steps = [step for step in range(at + 1, goes_to + 1) if step % every == 0]
        record(path, at, steps, every=every)
        # a checkpoint lies anywhere before, and rows are as far apart as that attempt wants them
        at = draw.randint(at, goes_to)
        every = draw.choice((every, every, 10))
    steps = [step for step in range(at + 1, at + 60) if step % every == 0]
    record(path, at, steps, every=every)
    return at + 59


@pytest.mark.parametrize("seed", range(12))
def test_a_history_that_was_only_killed_is_whole(tmp_path, seed):
    assert read(tmp_path / "rows", begun(tmp_path / "rows", seed)).missing == ""


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("how", ["halved", "zeroed", "zeroed at the end", "one line gone"])
def test_what_a_history_lost_is_told(tmp_path, seed, how):
    path = tmp_path / "rows"
    came_to = begun(path, seed)
    whole = path.read_bytes()
    rows = read(path, came_to).rows
    draw = random.Random(seed)
    half = len(whole) // 2
    lines = whole.splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if b"start" in line)
    row = draw.randrange(last + 1, len(lines))
    path.write_bytes(
        {
            "halved": whole[:half],
            "zeroed": bytes(len(whole)),
            "zeroed at the end": whole[:half] + bytes(len(whole) - half),
            "one line gone": b"".join(lines[:row] + lines[row + 1 :]),
        }[how]
    )
    found = read(path, came_to)
    assert found.missing
    assert len(found.rows) < len(rows)
    if how == "one line gone":
        assert "not in it" in found.missing
    # who goes on with it hears of it, once, and adds to what is left
    console = screen()
    recorder = Recorder(path, job="trunk", total_steps=500, every=10, console=console)
    recorder.start(came_to)
    recorder.row({"step": came_to + 1, "train_nats": 1.0})
    recorder.close()
    assert "its curves will lack that" in console.file.getvalue()
    assert read(path).rows[-1]["step"] == came_to + 1


@pytest.mark.parametrize("terminal", [False, True])
def test_steps_between_two_rows_are_shown_and_not_kept(tmp_path, monkeypatch, terminal):
    """Ten of a large model take minutes, in which nothing would move."""
    monkeypatch.setattr(display, "LINE_EVERY_S", 0.0)
    console = screen(terminal)
    recorder = Recorder(tmp_path / "rows.jsonl", job="trunk", total_steps=100, console=console)
    recorder.start(0)
    recorder.step_taken(37)
    recorder.close()
    shown = console.file.getvalue()
    assert ("37%" if terminal else "step 37 of 100 · 0:00 left") in shown
    assert read(tmp_path / "rows.jsonl").rows == []


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        Recorder(tmp_path / "file" / "rows.jsonl", job="trunk", total_steps=1, console=screen())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_says_so(tmp_path):
    recorder = record(tmp_path / "rows.jsonl", 0, [])
    (tmp_path / "rows.jsonl").symlink_to("/dev/full")
    with pytest.raises(DiskFull, match=r"no room to write .*rows.jsonl"):
        recorder.row({"step": 1})


def test_a_row_that_only_half_fits_is_told_and_written_again(tmp_path):
    """The system takes what it has room for, and says so at the next write alone."""
    path = tmp_path / "rows.jsonl"
    record(path, 0, [1, 2])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (1, 9, 20):
        recorder = record(path, 2, [])
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room, hard))
        try:
            with pytest.raises(DiskFull, match=r"no room to write .*rows.jsonl \(File too large"):
                recorder.row({"step": 3, "train_nats": 1.5})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    record(path, 2, [3])
    found = read(path, 3)
    assert [row["step"] for row in found.rows] == [1, 2, 3]
    assert not found.missing


def test_without_a_terminal_there_is_a_line_at_start_and_end(tmp_path):
    console = screen()
    recorder = Recorder(
        tmp_path / "rows.jsonl", job="expert [0]", total_steps=2000, console=console
    )
    recorder.start(0)
    for step in range(1, 1201):
        recorder.row(
            {"step": step, "train_nats": 3.25, "tokens_per_s": 12345.6, "rss_mb": 900.0 - step}
        )
    recorder.note("see [this]")
    recorder.close(ok=False)
    recorder.close()
    first, note, last = console.file.getvalue().splitlines()
    assert first == "expert [0]: 2,000 steps"
    assert note == "expert [0]: see [this]"
    assert last.startswith("expert [0]: stopped at step 1,200 of 2,000 after 0:0")
    assert last.endswith("loss 3.2500 · 12,346 tokens/s · peak 899 MB")


def test_without_a_terminal_lines_come_now_and_then(tmp_path, monkeypatch):
    clock_s = 0.0
    monkeypatch.setattr(display.time, "monotonic", lambda: clock_s)
    console = screen()
    recorder = Recorder(tmp_path / "rows.jsonl", job="trunk", total_steps=100, console=console)
    recorder.start(10)
    for step in range(11, 71):
        clock_s += 1.0
        recorder.row({"step": step, "loss": 1.0})
    recorder.close()
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "trunk: goes on at step 10 of 100"
    assert lines[1:-1] == [
        f"trunk: step {10 + s} of 100 · loss 1.0000 · {left} left"
        for s, left in ((15, "1:15"), (30, "1:00"), (45, "0:45"), (60, "0:30"))
    ]
    assert lines[-1] == "trunk: done at step 70 of 100 after 1:00 · loss 1.0000"


@pytest.mark.parametrize("colour", ["FORCE_COLOR", "NO_COLOR"])
def test_a_pipe_gets_no_control_codes_and_stdout_stays_empty(tmp_path, colour):
    program = (
        "import sys; from pathlib import Path; from pipeline.store.history import Recorder\n"
        "r = Recorder(Path(sys.argv[1]), job='j', total_steps=3)\n"
        "r.row({'step': 3, 'loss': 1.5})\n"
        "r.close()"
    )
    command = [sys.executable, "-W", "error", "-c", program, str(tmp_path / "rows")]
    job = subprocess.run(
        command, cwd=ROOT, capture_output=True, check=True, env=os.environ | {colour: "1"}
    )
    assert job.stdout == b""
    assert len(job.stderr.splitlines()) == 2
    assert b"\x1b" not in job.stderr
    assert b"\r" not in job.stderr


def test_on_a_terminal_there_is_a_bar_that_starts_where_the_job_goes_on(tmp_path):
    console = screen(terminal=True)
    recorder = Recorder(tmp_path / "rows.jsonl", job="expert [0]", total_steps=100, console=console)
    recorder.start(40)
    assert "40%" in console.file.getvalue()
    recorder.row({"step": 75, "train_nats": 2.5, "tokens_per_s": 1000, "rss_mb": 512})
    deadline_s = time.monotonic() + 10
    while "left" not in console.file.getvalue() and time.monotonic() < deadline_s:
        time.sleep(0.02)  # the bar draws itself a few times a second
    recorder.note("evaluated [fine]")
    recorder.close()
    recorder.close()
    text = console.file.getvalue()
    assert "\x1b[" in text
    for part in (
        "expert [0]",
        "75%",
        "loss 2.5000",
        "1,000 tokens/s",
        "peak 512 MB",
        "left",
        "evaluated [fine]",
    ):
        assert part in text


@pytest.fixture
def wandb_home(tmp_path, monkeypatch):
    """Keep wandb's caches, settings and keys below the test's own folder."""
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "home" / name))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def test_wandb_is_not_imported_unless_asked_for(tmp_path):
    program = (
        "import sys; from pathlib import Path; from pipeline.store.history import Recorder\n"
        "r = Recorder(Path(sys.argv[1]), job='j', total_steps=3); r.row({'step': 3}); r.close()\n"
        "print(*{'wandb', 'torch', 'numpy'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "rows")]
    assert (
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout == "\n"
    )


def test_offline_wandb_records_the_numbers_under_the_address_and_a_resumed_job_goes_on_with_it(
    wandb_home, capfd
):
    for start, steps in ((0, [1, 2]), (1, [2, 3])):
        recorder = Recorder(
            wandb_home / "rows.jsonl",
            job="trunk",
            total_steps=3,
            wandb_mode="offline",
            group="these-together",
            run_id="0badcafe",
            folder=wandb_home / "logs",
            settings={"seed": 7},
            console=screen(),
        )
        recorder.start(start)
        for step in steps:
            recorder.row(
                {
                    "step": step,
                    "loss": 0.5 * step,
                    "load": [0.25, 0.75],
                    "nothing": None,
                    "word": "x",
                }
            )
        recorder.close()
        ended_s = int(time.time())
        while int(time.time()) == ended_s:  # wandb names its folders by the second
            time.sleep(0.02)
    runs = sorted((wandb_home / "logs" / "wandb").glob("offline-run-*-0badcafe/run-0badcafe.wandb"))
    assert len(runs) == 2
    assert all(b"these-together" in run.read_bytes() for run in runs)
    sent = [logged(run) for run in runs]
    assert {(row["_step"], row["loss"], row["load/1"]) for rows in sent for row in rows} == {
        (step, 0.5 * step, 0.75) for step in (1, 2, 3)
    }
    assert not any({"nothing", "word"} & row.keys() for rows in sent for row in rows)
    assert capfd.readouterr() == ("", "")


def logged(path):
    """Read an offline run's history rows: a file header, then protocol buffers in a LevelDB log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, rows = path.read_bytes(), 7, b"", []
    while at < len(data):
        if 32768 - at % 32768 < 7:  # a block's last bytes hold no record's head
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record, parts = Record.FromString(parts), b""
            if record.WhichOneof("record_type") == "history":
                rows.append(
                    {
                        i.key or "/".join(i.nested_key): json.loads(i.value_json)
                        for i in record.history.item
                    }
                )
    return rows


def test_online_wandb_without_a_key_says_what_to_set(wandb_home, capfd):
    with pytest.raises(
        ConfigError, match=r"runtime\.wandb is online, but no .* key was found: set WANDB_API_KEY"
    ):
        record(wandb_home / "rows.jsonl", 0, [], wandb_mode="online")
    assert capfd.readouterr() == ("", "")


def test_online_wandb_without_a_key_never_asks_on_the_terminal(wandb_home):
    program = (
        "import sys; from pathlib import Path; from pipeline.store.history import Recorder\n"
        "Recorder(Path(sys.argv[1]), job='j', total_steps=3, wandb_mode='online')"
    )
    person, terminal = pty.openpty()
    try:
        command = [sys.executable, "-c", program, str(wandb_home / "rows")]
        ran = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"NO_COLOR": "1"},
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            timeout=120,
            check=False,
        )
        shown = os.read(person, 100_000).decode()
    finally:
        os.close(person)
        os.close(terminal)
    assert ran.returncode == 1
    assert "ConfigError: runtime.wandb is online, but no Weights & Biases key was found" in shown
