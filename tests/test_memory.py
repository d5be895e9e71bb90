"""What a job measures and does: its peak of memory (tens of MB, as the system tells), allocator,
threads, guard."""

import errno
import io
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes import FaultyReads, Killed, dying, equal, small_task, train_io, values

from pipeline import hardware
from pipeline.errors import UnreadableFile
from pipeline.hardware import fastest_threads
from pipeline.store.reading import sealed, unsealed
from pipeline.train import memory_meter
from pipeline.train.checkpoint import TrainState
from pipeline.train.loop import fit
from pipeline.train.memory_meter import Peak
from pipeline.train.memory_plan import LOW_TRIM_THRESHOLD_BYTES, MemoryGuard, MemoryPlan

ROOT = Path(__file__).parent.parent
MB = 10**6
needs_linux = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="asks the Linux kernel"
)
needs_glibc = pytest.mark.skipif(
    os.confstr_names.get("CS_GNU_LIBC_VERSION") is None, reason="glibc's allocator"
)


@pytest.fixture(autouse=True)
def _own_allocator(monkeypatch):
    """Leave out what would stay in this process."""
    monkeypatch.setattr("pipeline.train.loop.set_malloc_thresholds", lambda *_bytes: None)


def filled(size_mb: int) -> bytearray:
    """Return so much resident memory."""
    return bytearray(b"x") * (size_mb * MB)


@needs_linux
def test_a_peak_is_what_was_reached_above_its_start_and_is_over():
    held, peak = filled(30), Peak()
    more = filled(50)
    del more
    assert 45 * MB < peak.bytes() < 60 * MB
    assert (
        peak.report()["peak_mb"]
        == peak.report()["host_peak_mb"]
        == pytest.approx(peak.bytes() / 1e6)
    )
    del held


@needs_linux
def test_what_was_reached_before_is_not_the_jobs():
    before = filled(80)
    del before
    assert Peak().report()["peak_mb"] < 8


@needs_linux
def test_a_cleared_peak_starts_again_and_stays_in_the_report():
    peak = Peak()
    more = filled(50)
    del more
    peak.clear()
    assert peak.bytes() < 8 * MB
    assert 45 < peak.report()["peak_mb"] < 60


def test_a_mark_that_the_kernel_reports_lower_than_before_lowers_no_peak(monkeypatch):
    mark = {}
    monkeypatch.setattr(
        memory_meter, "_status", lambda key, *_file: mark["mb"] * MB if key == "VmHWM" else 0
    )
    peak, found = Peak(), []
    for mark["mb"] in (9, 7):
        found.append(peak.bytes() // MB)
    peak.clear()
    for mark["mb"] in (3, 2):
        found.append(peak.bytes() // MB)
    assert found == [9, 9, 3, 3] and peak.report()["peak_mb"] == peak.report()["host_peak_mb"] == 9


MAPPER = """
import json, mmap, sys
from pipeline.train import memory_meter
# torch is hundreds of MB of files that any other process may begin or cease to share
memory_meter.device = lambda: "cpu"
peak = memory_meter.Peak()
file = open(sys.argv[1], "rb")
mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
mapped.find(b"y")  # reads every page
for _ in sys.stdin:
    print(json.dumps(peak.report()), flush=True)
"""


@pytest.fixture
def mapped_file():
    """A file of 64 MB on a disk: pages of one in memory do not count as a file's."""
    for folder in (Path(tempfile.gettempdir()), Path("/var/tmp"), ROOT):
        kind = subprocess.run(
            ["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=False
        ).stdout
        if kind.strip() not in ("", "tmpfs", "ramfs") and os.access(folder, os.W_OK):
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".mapped") as file:
                file.write(b"x" * 64 * MB)
                file.flush()
                yield file.name
            return
    pytest.skip("no folder on a disk to map a file from")


def mapper(path: str) -> subprocess.Popen:
    """Start a process that maps a file and reports its memory for every line it is sent."""
    command = [sys.executable, "-c", MAPPER, path]
    return subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def reported(process: subprocess.Popen) -> dict[str, float]:
    """Return what it reports, once it has mapped the file."""
    process.stdin.write("\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


@needs_linux
def test_mapped_files_are_told_apart_and_shared_ones_by_their_share(mapped_file):
    with mapper(mapped_file) as one:
        alone = reported(one)
        with mapper(mapped_file) as other:
            reported(other)
            together = reported(one)
            other.communicate()
        one.communicate()
    assert (
        62 < alone["mapped_mb"] < 68 and 60 < alone["mapped_share_mb"] < 68
    )  # a little code is mapped as it runs
    assert 62 < together["mapped_mb"] < 68 and 28 < together["mapped_share_mb"] < 36


def test_a_system_that_tells_nothing_stops_nothing(monkeypatch):
    for name in ("read_text", "write_text"):
        monkeypatch.setattr(Path, name, lambda *_: (_ for _ in ()).throw(PermissionError(13, "no")))
    peak = Peak()
    peak.clear()
    assert peak.bytes() == 0 and set(peak.report().values()) == {0.0}


def test_on_a_gpu_the_peak_is_what_was_allocated_there(monkeypatch):
    allocated = [700 * MB]
    monkeypatch.setattr(memory_meter, "device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: allocated[0])
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda: allocated.__setitem__(0, 100 * MB)
    )
    peak = Peak()
    assert peak.bytes() == 100 * MB
    allocated[0] = 300 * MB
    assert (
        peak.bytes() == 300 * MB
        and peak.report()["peak_mb"] == 300
        and peak.report()["host_peak_mb"] < 100
    )
    peak.clear()
    assert peak.bytes() == 100 * MB and peak.report()["peak_mb"] == 300


ALLOCATOR = """
from pipeline.train import memory_meter
def rss(): return memory_meter._status("VmRSS")
bytearray(b"x") * 1_000_000  # freed: from now on glibc takes blocks of this size from its heap
{}
start, blocks = rss(), [bytearray(b"x") * 1_000_000 for _ in range(60)]
full = rss()
del blocks[::2]
print(full - rss())
memory_meter.trim_heap()
print(rss() - start)
"""


@needs_glibc
@pytest.mark.parametrize(
    ("calls", "given_back"),
    [
        ("", False),
        ("memory_meter.lower_mmap_threshold()", True),
        (
            "memory_meter.lower_mmap_threshold(); memory_meter.set_malloc_thresholds(2**22, 10**8)",
            False,
        ),
        ("memory_meter.set_malloc_thresholds(900_000, 128_000)", True),
    ],
)
def test_freed_blocks_go_back_where_that_was_asked_for(calls, given_back):
    run = subprocess.run(
        [sys.executable, "-c", ALLOCATOR.format(calls)], cwd=ROOT, capture_output=True, check=True
    )
    freed, held = (int(line) for line in run.stdout.split())
    assert (28 * MB < freed < 34 * MB) if given_back else freed < 4 * MB
    assert 26 * MB < held < 34 * MB  # after all was asked for


KERNELS = """
import torch
from pipeline.hardware import bound_kernel_caches
from pipeline.train import memory_meter
{}
torch.set_num_threads(1)
weight = torch.ones(64, 64, dtype=torch.bfloat16)
def multiply(lengths):
    for rows in lengths:
        torch.ones(rows, 64, dtype=torch.bfloat16) @ weight
    memory_meter.trim_heap()
    return memory_meter._status("RssAnon")
start = multiply(range(1, 5))
print(multiply(range(5, 400)) - start)
"""


@needs_glibc
def test_kernels_of_products_of_many_lengths_have_a_bound():
    grown = {}
    unbounded = {k: v for k, v in os.environ.items() if k not in hardware.KERNEL_CACHES}
    for call in ("pass", "bound_kernel_caches()"):
        script = KERNELS.format(call)
        told = subprocess.check_output([sys.executable, "-c", script], cwd=ROOT, env=unbounded)
        grown[call] = int(told)
    if grown["pass"] < 160 * MB:
        pytest.skip("this processor's products keep no kernel a length")
    assert grown["bound_kernel_caches()"] < 130 * MB


def test_a_bound_of_kernels_that_the_environment_has_stays(monkeypatch):
    one, other = hardware.KERNEL_CACHES
    monkeypatch.setenv(one, "7")
    # so that it is what it was after the test
    monkeypatch.setenv(other, "")
    monkeypatch.delenv(other)
    hardware.bound_kernel_caches()
    assert (os.environ[one], os.environ[other]) == ("7", str(hardware.KEPT_KERNELS))


HEAP_END = """
from pipeline.train import memory_meter
memory_meter.set_malloc_thresholds(2**22, {})
blocks = [bytearray(b"x") * 1_000_000 for _ in range(60)]
full = memory_meter._status("VmRSS")
del blocks
print(full - memory_meter._status("VmRSS"))
"""


@needs_glibc
@pytest.mark.parametrize(("trim_threshold_bytes", "kept"), [(128_000, False), (100_000_000, True)])
def test_the_end_of_the_heap_is_kept_up_to_what_was_asked_for(trim_threshold_bytes, kept):
    program = HEAP_END.format(trim_threshold_bytes)
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True)
    assert int(run.stdout) < 4 * MB if kept else int(run.stdout) > 50 * MB


def test_another_allocator_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory_meter.ctypes, "CDLL", lambda _name: object())
    memory_meter.lower_mmap_threshold()
    memory_meter.set_malloc_thresholds(2**22, 10**8)


@pytest.mark.parametrize(
    ("most", "tried"),
    [(1, []), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])],
)
def test_threads_are_the_fastest_of_the_powers_of_two_and_the_most(monkeypatch, most, tried):
    seen, before = [], torch.get_num_threads()

    def seconds(count):
        torch.set_num_threads(count)
        seen.append(count)
        return abs(count - 2.1)

    monkeypatch.setattr(hardware, "_product_seconds", seconds)
    assert fastest_threads(most) == min(most, 2)
    assert sorted(seen) == tried and torch.get_num_threads() == before


def test_threads_are_really_measured_and_put_back(monkeypatch):
    before, set_to, real = torch.get_num_threads(), [], torch.set_num_threads
    monkeypatch.setattr(torch, "set_num_threads", lambda count: set_to.append(count) or real(count))
    assert fastest_threads(2) in (1, 2)
    assert set_to == [1, 2, before] and torch.get_num_threads() == before


def test_on_a_gpu_threads_are_not_measured(monkeypatch):
    monkeypatch.setattr(hardware, "device", lambda: "cuda")
    monkeypatch.setattr(hardware, "_product_seconds", lambda _count: pytest.fail("measured"))
    assert fastest_threads(7) == 7


def settled(folder, monkeypatch, measured, threads="auto") -> int:
    """Return the threads of a job that starts, or goes on, in a store."""
    from pipeline.run import training
    from pipeline.run.context import JobContext, StoredParts
    from pipeline.store.artifacts import Store
    from tests import small

    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(training, "fastest_threads", measured)
    cfg = small.config(runtime={"threads": threads})
    parts = StoredParts(cfg, Store(folder))
    training.set_threads(JobContext("train_shared", None, parts, "here", print))
    return set_to[-1] if set_to else 0


def test_a_job_that_goes_on_keeps_its_threads(tmp_path, monkeypatch):
    asked = []
    assert settled(tmp_path, monkeypatch, lambda most: asked.append(most) or 4) == 4
    assert asked == [8]
    (note,) = tmp_path.rglob("threads.json")
    assert unsealed(note.read_bytes()) == {"threads": [4], "first_s": 0.0}
    assert settled(tmp_path, monkeypatch, lambda _most: pytest.fail("measured again")) == 4


NOT_SEALED = [b"", b"\0\0", b"4 4", b"[4]", b"0", b"-1", b"true", b"\xff"]
NOT_THREADS = [None, 4, [], [0], [-1], [True], ["4"], [2, 0]]
NOTES = [{"threads": threads, "first_s": 0.0} for threads in NOT_THREADS]
NOTES += [{"threads": [2], "first_s": time} for time in (-1.0, "x", None, [])]
NOTES += [{"threads": [2]}, {"first_s": 0.0}, {}]


@pytest.mark.parametrize("note", [*NOT_SEALED, *[sealed(note).encode() for note in NOTES]])
def test_a_damaged_note_of_threads_is_measured_again(tmp_path, monkeypatch, note):
    settled(tmp_path, monkeypatch, lambda _most: 4)
    (path,) = tmp_path.rglob("threads.json")
    path.write_bytes(note)
    assert settled(tmp_path, monkeypatch, lambda _most: 2) == 2
    assert unsealed(path.read_bytes())["threads"] == [2]


def test_a_note_of_threads_that_cannot_be_read_ends_the_job(tmp_path, monkeypatch):
    settled(tmp_path, monkeypatch, lambda _most: 4)
    reads = FaultyReads(monkeypatch, tmp_path)
    for at in range(2):
        reads.fail(at, errno.EIO)
        with pytest.raises(UnreadableFile, match="Input/output error"):
            settled(tmp_path, monkeypatch, lambda _most: pytest.fail("measured again"))


def test_given_threads_are_not_measured(tmp_path, monkeypatch):
    assert settled(tmp_path, monkeypatch, lambda _most: pytest.fail("measured"), threads=2) == 0
    assert not list(tmp_path.rglob("threads.json"))


class Modelled:
    """A peak that follows a rule: so much for a start and so much per row of the largest pass since
    the last clear."""

    def __init__(self, per_row, start=10 * MB, clears=True):
        self.per_row, self.start, self.clears, self.rows = per_row, start, clears, 0

    def passed(self, rows):
        self.rows = max(self.rows, rows)

    def clear(self):
        self.rows = 0 if self.clears else self.rows

    def bytes(self):
        return self.start + self.per_row * self.rows

    def reached(self):
        return self.bytes(), self.bytes()

    def carry(self, peak_bytes, host_peak_bytes):
        pass  # what is asked here is what one attempt measures

    def report(self):
        return {"peak_mb": self.bytes() / 1e6}


def steps(guard, peak, total=16, count=2) -> list[list[int]]:
    """Return the rows of each pass of some steps."""
    out = []
    for _ in range(count):
        out.append([])
        for size in guard.sizes(total):
            peak.passed(size)
            out[-1].append(size)
    return out


def guarded(per_row, run=None, notes=None, rows=8, clears=True, **memory_plan):
    """Return a guard that may use 100 MB, and its peak."""
    peak = Modelled(per_row, clears=clears)
    plan = MemoryPlan(rows, **{"budget_bytes": 100 * MB} | memory_plan)
    return MemoryGuard(
        plan, peak, run or TrainState(), ([] if notes is None else notes).append
    ), peak


def test_without_a_budget_every_pass_is_as_planned():
    assert steps(*guarded(10**12, budget_bytes=None)) == [[8, 8], [8, 8]]
    assert steps(*guarded(10**12, budget_bytes=None), total=11) == [[8, 3], [8, 3]]


def test_under_a_budget_the_first_step_grows_from_one_row():
    assert steps(*guarded(10 * MB)) == [[1, 2, 4, 8, 1], [8, 8]]
    assert steps(*guarded(10 * MB), total=4, count=3) == [[1, 2, 1], [4], [4]]
    assert steps(*guarded(10 * MB), total=2, count=3) == [[1, 1], [2], [2]]


def test_rows_grow_no_further_than_the_budget_by_what_was_measured():
    notes = []
    assert steps(*guarded(20 * MB, notes=notes)) == [[1, 2, 4, 4, 4, 1], [4] * 4]
    assert steps(*guarded(80 * MB, notes=notes)) == [[1] * 16, [1] * 16]
    assert notes == []
    assert steps(*guarded(500 * MB, notes=notes)) == [[1] * 16, [1] * 16]  # one row is the least


def test_moments_that_came_with_the_first_row_do_not_come_with_the_next():
    for bytes_per_row, first in ((0, [1] * 16), (5 * MB, [1, 2, 4, 4, 4, 1])):
        guard, peak = guarded(5 * MB, bytes_per_row=bytes_per_row)
        peak.start += 50 * MB
        assert steps(guard, peak)[0] == first
    guard, peak = guarded(5 * MB, bytes_per_row=100 * MB)
    assert steps(guard, peak) == [[1, 2, 4, 8, 1], [8, 8]]  # measured to be less


def test_what_loading_reached_says_nothing_of_a_row():
    peak = Modelled(10 * MB)
    peak.passed(50)
    assert steps(
        MemoryGuard(MemoryPlan(8, budget_bytes=100 * MB), peak, TrainState(), print), peak
    ) == [
        [1, 2, 4, 8, 1],
        [8, 8],
    ]


def test_too_high_a_peak_halves_the_rows_and_says_so():
    notes = []
    guard, peak = guarded(10 * MB, notes=notes)
    steps(guard, peak)
    peak.per_row = 11 * MB + MB // 4
    assert steps(guard, peak, count=3) == [[8, 4, 4], [4] * 4, [4] * 4]
    assert notes == ["100 MB of 100 MB used: going on with 4 sequences at a time, same batches"]
    peak.per_row = 60 * MB
    assert steps(guard, peak, total=4, count=2) == [[4], [2, 1, 1]]
    assert len(notes) == 3


def test_a_peak_that_cannot_be_cleared_halves_once_for_each_new_height():
    notes = []
    guard, peak = guarded(10 * MB, notes=notes, clears=False)
    steps(guard, peak)
    peak.per_row = 12 * MB
    assert steps(guard, peak, count=3) == [[8, 4, 4], [4] * 4, [4] * 4]
    assert len(notes) == 1


def test_a_batch_that_must_run_whole_runs_whole():
    assert steps(*guarded(10**12, rows=16, whole_batch=True)) == [[16], [16]]


def test_rows_go_on_from_the_checkpoint_and_are_never_more_than_planned_now():
    run = TrainState()
    guard, peak = guarded(10 * MB, run)
    steps(guard, peak, total=2, count=1)
    assert (run.micro_batch, run.max_micro_batch) == (2, 8)
    assert steps(*guarded(10 * MB, run)) == [[2, 4, 8, 2], [8, 8]]
    assert steps(*guarded(10 * MB, TrainState(micro_batch=4, max_micro_batch=4))) == [
        [4] * 4,
        [4] * 4,
    ]
    assert steps(*guarded(10 * MB, TrainState(micro_batch=4, max_micro_batch=4), rows=2)) == [
        [2] * 8,
        [2] * 8,
    ]
    assert steps(
        *guarded(10 * MB, TrainState(micro_batch=4, max_micro_batch=4), budget_bytes=None)
    ) == [
        [4] * 4,
        [4] * 4,
    ]


def disturbed(at: int | None = 5, **options):
    """Return a task under a budget, its peak, and (first row, rows) of its passes; from step `at`
    it needs more."""
    task, peak, passes = small_task(noisy=False, **options), Modelled(10 * MB), []

    def batch(first, count):
        peak.per_row = (10 if at is None or first < at * 8 else 30) * MB
        peak.passed(count)
        passes.append((first, count))
        return task.batch(first, count)

    memory_plan = MemoryPlan(task.options.micro_batch_sequences or 8, budget_bytes=100 * MB)
    return replace(task, batch=batch, memory_plan=memory_plan), peak, passes


def test_a_run_that_was_disturbed_sees_the_same_rows_and_ends_the_same(tmp_path):
    plain = small_task(noisy=False)
    fit(plain, train_io(tmp_path / "plain"))
    task, peak, passes = disturbed()
    here = train_io(tmp_path / "disturbed", peak=peak)
    metrics = fit(task, here)
    assert [r for first, count in passes for r in range(first, first + count)] == list(
        range(10 * 8)
    )
    assert {first // 8: count for first, count in passes} == {0: 1} | dict.fromkeys(
        range(1, 5), 8
    ) | {5: 8} | (dict.fromkeys(range(6, 10), 2))
    assert len(here.recorder.notes) == 2 and metrics["memory_plan"]["micro_batch_sequences"] == 2
    for name, value in values(plain).items():
        torch.testing.assert_close(values(task)[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("at", [None, 3])
def test_a_run_that_was_killed_splits_its_batches_as_the_undisturbed_one(tmp_path, at):
    task, peak, passes = disturbed(at)
    fit(task, train_io(tmp_path / "whole", peak=peak))
    for step in range(1, 10):
        first, peak, seen = disturbed(at)
        with pytest.raises(Killed):
            fit(dying(first, step), train_io(tmp_path / str(step), peak=peak))
        again, peak, rest = disturbed(at)
        fit(again, train_io(tmp_path / str(step), peak=peak))
        assert seen + rest == passes, step
        assert equal(values(again), values(task)), step


@pytest.mark.parametrize("trim", [True, False])
def test_the_allocator_is_told_what_the_means_say(tmp_path, monkeypatch, trim):
    reused, given = [], []
    monkeypatch.setattr(
        "pipeline.train.loop.set_malloc_thresholds", lambda *bytes_: reused.append(bytes_)
    )
    monkeypatch.setattr("pipeline.train.loop.trim_heap", lambda: given.append(1))
    fit(
        replace(
            small_task(steps=2),
            memory_plan=MemoryPlan(2, mmap_threshold_bytes=300_000, trim_each_pass=trim),
        ),
        train_io(tmp_path),
    )
    assert reused == [(300_000, LOW_TRIM_THRESHOLD_BYTES)] and len(given) == (
        2 * 4 * 2 if trim else 0
    )  # forward and backward


@pytest.mark.parametrize(
    ("per_row", "rows", "memory_plan"), [(95 * MB, 8, {}), (12 * MB, 16, {"whole_batch": True})]
)
def test_a_budget_that_cannot_be_kept_is_told_once(per_row, rows, memory_plan):
    notes = []
    guard, peak = guarded(per_row, notes=notes, rows=rows, **memory_plan)
    steps(guard, peak, count=3)
    assert len(notes) == 1
    used, size = (202, 16) if memory_plan else (105, 1)
    assert notes[0] == (
        f"{used} MB of 100 MB used with {size} sequences at a time, and fewer cannot be: "
        f"the budget is not kept; raise runtime.memory_budget to {used}MB"
    )


def test_what_is_written_at_the_end_counts_too(tmp_path):
    from rich.console import Console

    from pipeline.run.context import JobContext, StoredParts
    from pipeline.run.training import fit_task
    from pipeline.store.artifacts import Store
    from tests import small

    peak, nowhere = Modelled(MB), Console(file=io.StringIO())
    parts = StoredParts(small.config(), Store(tmp_path).open())
    job = JobContext("train_shared", None, parts, "here", print, nowhere)
    job.folder.mkdir(parents=True)
    task = replace(small_task(steps=1), export=lambda _step: peak.passed(500) or {})
    assert fit_task(job, task, peak)["peak_mb"] == 510


def test_bf16_that_a_gpu_only_imitates_is_none(monkeypatch):
    monkeypatch.setattr(hardware, "device", lambda: "cuda")
    for native in (True, False):
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, n=native: n or including_emulation,
        )
        assert hardware.has_bf16() == native


def test_what_is_free_is_the_gpus_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7 * MB, 9 * MB))
    assert hardware.free_bytes() > 50 * MB
    monkeypatch.setattr(hardware, "device", lambda: "cuda")
    assert hardware.free_bytes() == 7 * MB
