"""What preprocess leaves out is named in its last lines and in dropped.json: how many for each
reason and the first few of them, whether or not it is anybody's fault, in both families.

The reasons and how often each happens are drawn; what is left out is made for them.
"""

import io
import json
import random
from dataclasses import replace

import pytest
from conftest import documents, tiny_config
from rich.console import Console
from small_tasks import Source, simple
from test_plan import pictures_config

from pipeline import __main__, cloud
from pipeline.data.drop_stats import EXAMPLES
from pipeline.families.load import load
from pipeline.run.job import run_job
from pipeline.run.stages import jobs
from pipeline.store.artifacts import Store

# a row that is left out, by its reason
TEXT = {
    "too short": lambda draw: {"text": "short"},
    "empty": lambda draw: {"text": ""},
    "text is int": lambda draw: {"text": draw.randrange(1000)},
}
TASK = {
    "no picture": {"image": None},
    "duplicate": {"image": "images/0.png", "prompt": "what is 0?", "answer": "it is 0"},
    "picture cannot be read": {"image": "images/torn.png"},
}


def last_lines(manifests, capsys):
    """Return what a command prints at its end, here and on Modal."""
    __main__._show_jobs(manifests)
    far = Console(file=io.StringIO(), width=10_000)
    done = []
    for each in manifests:
        result = cloud.JobResult(each.stage, each.item, each.address, "made")
        done.append(replace(result, metrics=each.metrics))
    cloud.show_results(done, far)
    return capsys.readouterr().out, far.file.getvalue()


def told(text, folder):
    """Check that each reason in dropped.json is told with its count and its first few."""
    about = json.loads((folder / "dropped.json").read_text())
    for reason, count in about["dropped"].items():
        shown = about["examples"][reason]
        assert len(shown) == min(count, EXAMPLES)
        assert f"{count} {reason} ({', '.join(shown)})" in text
    return about["dropped"]


@pytest.mark.parametrize("seed", range(3))
def test_documents_that_are_left_out_are_named(tmp_path, capsys, seed):
    draw = random.Random(seed)
    path = tiny_config(tmp_path / "tiny", data={"max_bad_share": 0.5})
    wanted = {}
    rows = [{"text": text} for text in documents("sea")]
    for reason, make in TEXT.items():
        wanted[reason] = draw.randrange(1, 9)
        for _ in range(wanted[reason]):
            rows.insert(draw.randrange(len(rows)), make(draw))
    lines = [json.dumps(row) + "\n" for row in rows]
    (path.parent / "sea.jsonl").write_text("".join(lines))
    store = Store(tmp_path / "store").open()
    cfg = load(path)
    run_job("tokenizer", cfg, store, progress=lambda *_: None)
    manifest = run_job("preprocess", cfg, store, "sea", progress=lambda *_: None)
    for text in last_lines([manifest], capsys):
        found = told(text, store.folder(manifest.address))
        assert sum(found.values()) == sum(wanted.values()) and len(found) >= 2


@pytest.mark.parametrize("seed", range(3))
def test_rows_and_pictures_that_are_left_out_are_named(tmp_path, capsys, seed):
    draw = random.Random(seed)
    path = pictures_config(tmp_path / "run")
    rows = simple(24)
    wanted = {}
    for reason, change in TASK.items():
        wanted[reason] = draw.randrange(1, 6)
        for i in range(wanted[reason]):
            name = f"{reason.split()[0]}{i}"
            rows.append({"id": name, "prompt": name, "answer": "x", "split": "train"} | change)
    (tmp_path / "run/one/images/torn.png").write_bytes(b"\x89PNG\r\n torn")
    source = Source.__new__(Source)
    source.folder = tmp_path / "run/one"
    source(rows)
    cfg = load(path, ("loras.experts.one.dataset.max_bad_share=0.9", "runtime.threads=1"))
    store = Store(tmp_path / "store").open()
    manifest = run_job("preprocess", cfg, store, "one", progress=lambda *_: None)
    for text in last_lines([manifest], capsys):
        found = told(text, store.folder(manifest.address))
        assert sum(found.values()) == sum(wanted.values()) and len(found) >= 3


def test_what_nothing_is_left_out_of_says_nothing(tmp_path, capsys):
    cfg = load(pictures_config(tmp_path / "run"), ("runtime.threads=1",))
    store = Store(tmp_path / "store").open()
    made = []
    for stage, item, _ in jobs(cfg, "preprocess"):
        made.append(run_job(stage, cfg, store, item, progress=lambda *_: None))
    for text in last_lines(made, capsys):
        assert "left out" not in text
