"""The lora_vlm benchmarks at a toy size: they measure what they say, and refuse what makes no
sense."""

import argparse
import json
import random
from types import SimpleNamespace

import pytest
import small_stack
from PIL import Image

from benchmarks import routing_text, vlm_2b, vlm_mixed, vlm_real
from pipeline.families.adapters.base import count_parameters
from pipeline.families.load import parse
from pipeline.protocols import quiet

WORDS = {"travel": "flight hotel visa trip", "work": "meeting report payday boss"}


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """A stack of random adapters."""
    return small_stack.stack(small_stack.mixed(small_stack.built(tmp_path_factory.mktemp("stack"))))


@pytest.fixture
def asked():
    """Six requests for three experts in turn."""
    return [
        (small_stack.EXPERTS[i % 3], request) for i, request in enumerate(small_stack.requests(6))
    ]


def test_a_mixed_batch_is_timed_against_one_by_one(stack, asked):
    text, reached = vlm_mixed.measured(stack, asked, rounds=1)
    assert (
        reached > 0 and "one mixed batch" in text and "6 requests, each of one of 3 experts" in text
    )


def test_grouping_by_expert_keeps_the_order_of_the_requests(stack, asked):
    texts = {way: run() for way, run in vlm_mixed.ways(stack, asked).items()}
    assert texts[vlm_mixed.GROUPED] == texts[vlm_mixed.MIXED] == texts[vlm_mixed.ALONE]
    assert len(set(texts[vlm_mixed.MIXED])) > 1


def test_a_text_that_differs_fails_the_benchmark(capsys):
    ways = {vlm_mixed.MIXED: lambda: ["a", "b"], vlm_mixed.ALONE: lambda: ["a", "c"]}
    with pytest.raises(SystemExit, match="request 1 is answered 'c', otherwise 'b'"):
        vlm_mixed._rounds("given", ways, 1)


def test_text_is_routed_beside_tf_idf(tmp_path, capsys):
    draw, rows = random.Random(0), []
    for i in range(120):
        domain = draw.choice(sorted(WORDS))
        text = f"{i} " + " ".join(draw.choices(WORDS[domain].split(), k=3))
        rows.append({"text": text, "domain": domain, "split": "train" if i < 80 else "valid"})
    rows.append({"text": "what is love", "domain": routing_text.OUTSIDE, "split": "train"})
    data, out = tmp_path / "rows.jsonl", tmp_path / "out.md"
    data.write_text("\n".join(map(json.dumps, rows)))
    size = ["--steps", "3", "--hidden", "64", "--vocab", "320"]
    assert routing_text.main(["--data", str(data), "--out", str(out), *size]) == 0
    found = out.read_text()
    assert (
        "40 test requests of 2 domains" in found
        and "| TF-IDF, logistic regression | 1.000" in found
    )
    assert "Requests of no domain (1 of them" in found and str(tmp_path) not in found
    with pytest.raises(SystemExit, match="cannot be read"):
        routing_text.main(["--data", str(tmp_path / "none.jsonl")])
    capsys.readouterr()


def test_the_large_model_is_the_published_one(tmp_path):
    """Sizes are those that the plan has for the Hub's model, and a model of such a file opens."""
    from pipeline.families.lora_vlm.cost import PUBLISHED, VlmSizes

    folder = tmp_path / "model"
    parameters = vlm_2b.write_model(folder, vlm_2b.SIZES["toy"])
    assert count_parameters(folder) == parameters
    raw = json.loads((folder / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        raw[part] |= vlm_2b.SIZES["real"][part]
    assert VlmSizes.of_config(raw) == PUBLISHED["Qwen/Qwen3-VL-2B-Instruct"]


def test_a_step_and_an_answer_are_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(vlm_2b, "PICTURE_PX", 64)
    args = argparse.Namespace(threads=1, tokens=2)
    vlm_2b.write_model(tmp_path / "model", vlm_2b.SIZES["toy"])
    vlm_2b._write_rows(tmp_path / "data")
    assert vlm_2b._measured("prepare", tmp_path, args) == {}
    found = {task: vlm_2b._measured(task, tmp_path, args) for task in vlm_2b.TASKS}
    step, answer = found[vlm_2b.TASKS[1]], found[vlm_2b.TASKS[2]]
    assert step["predicted_mb"] > 60 and step["tokens"] > 4 and 1 <= answer["new_tokens"] <= 2
    assert 0 < answer["pss_mb"] <= answer["rss_mb"]
    text = vlm_2b._report(found, [answer] * 2, {"parameters": 7, "file_bytes": 14})
    assert "| process 2 |" in text and "| together |" in text
    capsys.readouterr()


@pytest.fixture
def pictured(tmp_path):
    """A folder with the five tasks, four pictures each."""
    for name in vlm_real.TASKS:
        (tmp_path / name).mkdir()
        lines = []
        for i in range(12):
            Image.frombytes(
                "RGB", (64, 64), random.Random(f"{name}{i}").randbytes(3 * 64 * 64)
            ).save(tmp_path / name / f"{i}.png")
            lines.append(
                json.dumps(
                    {"id": f"{name}{i}", "image": f"{i}.png", "prompt": name, "answer": str(i % 3)}
                )
            )
        (tmp_path / name / "annotations.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_the_run_on_real_pictures_is_a_valid_configuration(pictured):
    args = vlm_real._arguments(["--data", str(pictured), "--steps", "2"])
    cfg = parse(vlm_real.settings(args))
    assert cfg.experts == tuple(vlm_real.TASKS) and cfg.loras.router.steps == 4
    with pytest.raises(SystemExit, match="has no ocr_receipts"):
        vlm_real.main(["--data", str(pictured / "caption")])


def test_the_constant_answer_is_the_commonest_for_its_prompt(pictured, tmp_path):
    from pipeline.families.lora_vlm import family

    args = vlm_real._arguments(["--data", str(pictured)])
    cfg, folder = parse(vlm_real.settings(args)), tmp_path / "made"
    folder.mkdir()
    family.prepare(cfg, None, folder, quiet, "blood_cells")
    score, count = vlm_real._constant(cfg, SimpleNamespace(folder=lambda *_: folder), "blood_cells")
    from pipeline.data.tasks.prepare import TaskRows

    rows = TaskRows(folder)
    loop = [row.answer for row in rows.rows("train")]
    best = max(dict.fromkeys(loop), key=loop.count)
    wanted = [row.answer == best for row in rows.rows("test")]
    assert (score, count) == (pytest.approx(sum(wanted) / len(wanted)), len(wanted))


@pytest.mark.parametrize(
    ("program", "command", "said"),
    [
        (vlm_mixed, ["--rounds", "0"], "at least 1"),
        (routing_text, ["--data", "x", "--hidden", "100"], "multiple of 64"),
        (vlm_real, ["--data", "x", "--hidden", "100"], "multiple of 64"),
    ],
)
def test_options_that_make_no_sense_are_refused(program, command, said, capsys):
    with pytest.raises(SystemExit):
        program.main(command)
    assert said in capsys.readouterr().err
