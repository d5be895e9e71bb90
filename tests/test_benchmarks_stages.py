"""The benchmark on the memory of every stage at a toy size, by the product's own commands, and that
what it watches is seen."""

import sys

import local_jobs
import pytest

from benchmarks import memory_stages
from benchmarks.memory_stages import Row, Taken, page, watched
from benchmarks.runner import StageFailed
from pipeline.__main__ import main

quick = local_jobs.quick  # a fixture
FORK = """
import os, time
held = b"x" * {before}
if os.fork():
    os.wait()
else:
    time.sleep(.2)
    more = b"y" * 60_000_000
    time.sleep(.5)
"""


def in_process(words) -> Taken:
    """Carry out a command without a process of its own."""
    assert main(list(words[3:])) == 0
    return Taken(anonymous=7 * 10**8, mapped=10**6, imports=[3 * 10**8], seconds=1.0)


def test_a_run_from_its_model_to_its_exports(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory_stages, "watched", in_process)
    work = tmp_path / "work"
    # the other exports are tested elsewhere
    exports = ["deploy", "adapters", "hf, bf16"]
    command = ["--size", "toy", "--rank", "2", "--context", "16", "--work", str(work)]
    command += ["--out", str(tmp_path / "page.md"), "--exports", *exports]
    assert memory_stages.main(command) == 0
    text = (tmp_path / "page.md").read_text("utf-8")
    lines = text.splitlines()
    rows = [line.split(" | ")[0].strip("| ") for line in lines if "|" in line][2:]
    stages = ["tokenizer", "preprocess", "train_shared", "train_experts", "train_router"]
    assert rows == [*stages, "evaluate", "deploy", "export adapters", "export hf, bf16"]
    # what is measured is held against a plan that was made before
    told = ("| train_", "| deploy", "| export")
    planned = [line.split(" | ")[2] for line in lines if line.startswith(told)]
    assert len(planned) == 6 and all(planned) and "reached" in text and str(tmp_path) not in text
    # what was measured is not done again
    monkeypatch.setattr(memory_stages, "watched", None)
    assert memory_stages.main(command) == 0
    again = (tmp_path / "page.md").read_text("utf-8").splitlines()
    assert [line for line in again if "|" in line] == [line for line in lines if "|" in line]
    # an export is gone once it is measured
    assert not (work / "export").exists() and not list(work.glob("store/artifacts/deploy-*"))


def test_the_process_that_takes_most_is_seen_and_what_it_began_with(monkeypatch):
    taken = watched([sys.executable, "-c", FORK.format(before=120_000_000)])
    assert 180e6 < taken.anonymous < 230e6 and taken.seconds >= 0.5
    # the child began with what its parent had
    assert any(120e6 < level < 180e6 for level in taken.imports)
    with pytest.raises(StageFailed, match="no such"):
        watched([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_a_training_may_take_more_than_the_others():
    large = Taken(anonymous=3 * 10**9)
    rows = [Row("train_experts", large, 10**9), Row("evaluate", Taken(anonymous=15 * 10**8))]
    text, reached = page(rows, 10**8)
    assert reached and "| train_experts | 2,900 | 1,000 | 3,000 |" in text
    text, reached = page([*rows, Row("export hf", large)], 10**8)
    assert not reached and "2,900 MB above" in text and "(export hf)" in text
