"""The program for a GPU, on a pretended one: its sections find what they should, one that fails or
has no time stops no other, and what was found is written as it comes."""

import json
import time
from dataclasses import replace

import pytest
from pretended_gpu import pretended_gpu

from benchmarks import gpu, gpu_parts
from benchmarks.gpu_parts import SECTIONS, Setup, agree, forward, generation, training
from benchmarks.gpu_parts.aims import verdicts
from benchmarks.gpu_parts.peak import published
from benchmarks.gpu_parts.wheels import NEEDED, pinned


@pytest.fixture
def setup(tmp_path):
    """What a section is told where there seems to be a GPU, with a minute to go."""
    with pretended_gpu():
        yield Setup("cuda", True, 1, str(tmp_path), time.time() + 60)


def started(monkeypatch, tmp_path, sections: dict, *options: str) -> tuple[int, list[dict], str]:
    """Run the program with other sections; return its exit status and both of its files."""
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    monkeypatch.setattr(gpu, "_machine", lambda device: ("a machine", "a rate", "card"))
    command = ["--device", "cpu", "--small", "--out", str(tmp_path), "--sections", *sections]
    status = gpu.main([*command, *options])
    (written,) = tmp_path.glob("gpu_card_*.json")
    return status, json.loads(written.read_text()), written.with_suffix(".md").read_text()


def test_a_section_that_fails_is_told_and_the_next_one_runs(monkeypatch, tmp_path):
    absent = replace(SECTIONS["agree"], place="nowhere.at_all")
    status, found, text = started(
        monkeypatch, tmp_path, {"agree": absent, "forward": SECTIONS["forward"]}
    )
    assert status == 1
    assert found[0]["ended"].startswith("failed: ModuleNotFoundError") and not found[0]["rows"]
    assert found[1]["ended"] == "finished" and len(found[1]["rows"]) == 14
    assert "No module named 'benchmarks.gpu_parts.nowhere'" in text
    assert "| D 64, F 172: 2 of 8 rank-64 experts |" in text and "a machine" in text


def test_what_has_no_time_left_is_not_begun(monkeypatch, tmp_path):
    status, found, text = started(monkeypatch, tmp_path, SECTIONS, "--budget", "0.5")
    assert status == 1 and [each["name"] for each in found] == list(SECTIONS)
    assert {each["ended"] for each in found} == {"left out, as no time was left"}
    assert text.count("Left out") == len(SECTIONS)


def test_every_training_has_its_turn_and_one_that_fails_leaves_the_others(setup, monkeypatch):
    broken = training.Contender("ours: broken", {"peer": "ours", "task": "nothing"})
    rows = [*training._turns(setup, "100m", (broken, *training.OURS), None)]
    assert [row["what"] for row in rows] == ["ours: broken", *(c.words for c in training.OURS)]
    assert rows[0]["note"].startswith("KeyError")
    for row in rows[1:]:
        assert row["tokens/s"] > 0 and row["MFU"] > 0 and row["predicted MB"] > 0
        assert 5 < row["last loss"] < 8


def test_no_turn_begins_after_its_time(setup):
    late = replace(setup, until_s=time.time() - 1)
    assert [*training._turns(late, "100m", training.OURS, None)] == []


def test_losses_of_both_sides_are_compared_step_by_step(setup, monkeypatch):
    here = [{"trunk, fp32": [6.0, 5.5], "expert, bf16": [6.0, 5.5], "low_rank, fp32": "refused"}]
    there = [{"trunk, fp32": [6.0, 5.51], "expert, bf16": [6.02, 5.5], "low_rank, fp32": [1.0]}]
    sides = iter([*here, *there])
    monkeypatch.setattr(agree, "_start", lambda *_: None)
    monkeypatch.setattr(agree, "_losses", lambda _: next(sides))
    rows = {row["what"]: row for row in agree.agree(setup)}
    assert rows["trunk, fp32"]["verdict"].startswith("off")
    assert rows["expert, bf16"]["verdict"] == "agrees"
    assert rows["low_rank, fp32"]["verdict"] == "refused"


@pytest.mark.usefixtures("setup")
def test_a_forward_pass_of_one_expert_is_that_of_the_dense_network():
    case = forward.Case(16, 32, "even", 64, 8, 1, "cuda", "fp32")
    ways = forward._ways(case)
    names = [name for name in ways if name.startswith("1 of 8")]
    dense = ways[forward.DENSE]()
    # Deltas begin as nothing, so each rank-64 expert still computes what its base does
    assert (ways["1 of 8 rank-64 experts"]() - dense).abs().max() < 1e-5
    assert len(names) == 2 and (ways["1 of 8 full experts"]() - dense).abs().max() > 1e-3


def test_a_bundle_goes_on_with_every_batch(setup, monkeypatch):
    monkeypatch.setattr(generation, "BATCHES", (1, 3))
    rows = [*generation.generate(setup)]
    assert [row["what"] for row in rows] == [
        f"{dtype}, batch of {count}" for dtype in ("float32", "bfloat16") for count in (1, 3)
    ]
    assert all(row["tokens/s"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
    ],
)
def test_a_cards_published_rate_is_found_by_its_name(name, tflops):
    assert published(name).tflops == tflops
    assert published("NVIDIA GeForce RTX 5090") is None


def test_aims_are_held_against_medians():
    row = {"what": "ours: trunk, all weights", "MFU": 0.5, "predicted / measured": 1.2}
    told = [*verdicts([row, {"what": "Trainer: all weights", "MFU": 0.1}])]
    assert told == [
        "ours: trunk, all weights: MFU 0.50, aim >= 0.45: reached",
        "ours: trunk, all weights: predicted / measured 1.20, aim within 10 %: missed",
    ]


def test_rounds_of_a_row_become_one_with_their_median():
    rows = [{"what": "a", "ms": 1.0}, {"what": "b", "ms": 3.0}, {"what": "a", "ms": 200.0}]
    assert gpu.merged(rows)[0] == {"what": ["a", "a"], "ms": [1.0, 200.0]}
    assert "| a | 100 (1-200) |" in gpu._table(rows) and "| b | 3.00 |" in gpu._table(rows)


def test_packages_to_bring_have_the_versions_of_the_requirements():
    assert len(pinned()) == len(NEEDED)
    assert any(name.startswith("pydantic==") for name in pinned())
    assert gpu_parts.told(ValueError("a |\n b")) == "ValueError: a / b"
