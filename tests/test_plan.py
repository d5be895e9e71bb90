"""What a plan says before anything starts: whether a run can start at all, and how long it may take
by a figure that costs next to nothing.

Each thing that keeps a run from starting is made from a run that can: what it reads is moved away,
emptied, replaced by a folder, renamed; the store and the budget likewise. What `plan` refuses, the
stage itself must refuse too, in the same words where it gets that far.
"""

import io
import json
import os
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import WORDS, measured_rate, tiny_config
from rich.console import Console
from small_tasks import Source, picture, simple
from spent import is_done_in
from test_cloud_client import PRICES
from yaml_text import yaml_text

from pipeline import cloud, hardware
from pipeline.__main__ import main
from pipeline.errors import CannotStart, PipelineError
from pipeline.families.load import load
from pipeline.protocols import quiet
from pipeline.run import dry_run, speeds, stages
from pipeline.run.job import run_job
from pipeline.store import manifest as manifests
from pipeline.store.artifacts import Store
from tests import lora_small


def pictures_config(folder: Path, source: str = "jsonl") -> Path:
    """Write two tasks with pictures of their own, one of nobody's, and a run of them."""
    for name in ("one", "two", "none", "own"):
        task = Source(folder / name)
        task(simple())
    rows = {"source": "jsonl", "path": "one/rows.jsonl", "image_root": "one"}
    if source == "folder":
        for split in ("train", "valid", "test"):
            for i in range(3):
                place = folder / "two" / split / f"class{i}"
                place.mkdir(parents=True)
                picture(len(split) * 10 + i).save(place / "a.png")
        (folder / "two/rows.jsonl").unlink()
        shutil.rmtree(folder / "two/images")
    second = {"source": source, "path": "two", "image_root": "two"}
    if source == "jsonl":
        second |= {"path": "two/rows.jsonl"}
    raw = lora_small.SETTINGS | {"loras": dict(lora_small.SETTINGS["loras"])}
    raw["loras"]["experts"] = [
        {"name": "one", "label": "A", "dataset": rows},
        {"name": "two", "label": "B", "dataset": second},
    ]
    raw["loras"]["router"] = raw["loras"]["router"] | {"none_label": "Z"}
    raw["dataset"] = lora_small.SETTINGS["dataset"] | {
        "sources": [
            {"expert": "one", "from": "loras"},
            {"expert": "two", "from": "jsonl", "path": "own/rows.jsonl", "image_root": "own"},
            {"expert": "none", "from": "jsonl", "path": "none/rows.jsonl", "image_root": "none"},
        ]
    }
    path = folder / "run.yaml"
    path.write_text(yaml_text(raw), "utf-8")
    return path


def away(path):
    path.rename(path.with_name(f"not-{path.name}"))


def emptied(path):
    path.write_bytes(b"")


def a_folder(path):
    path.unlink()
    path.mkdir()


def hollow(path):
    shutil.rmtree(path)
    path.mkdir()


# what is done to which file or folder of a run, and a word of what is said of it
TEXT = [
    *[(away, f"{name}.jsonl", f"{name}.jsonl matches no file") for name in WORDS],
    (a_folder, "sea.jsonl", "is a folder"),
]
VLM = [
    (away, "one/rows.jsonl", "rows.jsonl does not exist"),
    (emptied, "one/rows.jsonl", "is empty"),
    (hollow, "one", "loras.experts.one.dataset"),
    (away, "one", "loras.experts.one.dataset"),
    (away, "none", "loras.experts.none.dataset"),
    (emptied, "none/rows.jsonl", "is empty"),
    (away, "own", "dataset.sources.1 (two)"),
    (away, "own/rows.jsonl", "there is no file"),
]
FOLDER = [(away, "two", "image_root"), (hollow, "two", "has no images")]


def planned(path, store, capsys, *overrides, flags=()):
    """Return the exit code of `plan`, its table and what it says of errors."""
    changes = [word for each in overrides for word in ("--override", each)]
    code = main(["plan", "--config", str(path), "--store", str(store), *flags, *changes])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{family: folder with a run that can start}."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_config(folder / "text").rename(folder / "text/run.yaml")
    for source in ("jsonl", "folder"):
        pictures_config(folder / source, source)
    return folder


CASES = [
    *[("text", *case) for case in TEXT],
    *[("jsonl", *case) for case in VLM],
    *[("folder", *case) for case in FOLDER],
]


@pytest.mark.parametrize(("kind", "change", "what", "told"), CASES)
def test_what_is_not_there_is_told(runs, tmp_path, capsys, kind, change, what, told):
    folder = shutil.copytree(runs / kind, tmp_path / kind)
    path = folder / "run.yaml"
    code, table, errors = planned(path, tmp_path / "store", capsys)
    assert (code, errors) == (0, "")
    change(folder / what)
    code, table, errors = planned(path, tmp_path / "store", capsys)
    assert code == 2 and told in errors and "cannot start" in errors
    cfg = load(path)
    jobs = [job for stage in stages.RUN for job in stages.jobs(cfg, stage)]
    assert all(address in table for _, _, address in jobs)
    # the jobs that it names are those that do fail, and no others are named
    refused = [job for job in jobs if f"{stages.label(*job[:2])}: " in errors]
    assert refused
    assert not (tmp_path / "store").exists()
    for stage, item, _ in jobs:
        row = cfg.stages[stage]
        if row.name != next(iter(cfg.stages)):
            continue
        if (stage, item) in [job[:2] for job in refused]:
            with pytest.raises(PipelineError):
                run_job(stage, cfg, Store(tmp_path / "made").open(), item, progress=quiet)
            # or prune would list it once the setting is mended
            assert list((tmp_path / "made").glob("artifacts/*")) == []


LACKING = {
    "a label that no document has": (
        ["partition.domains=[sea,moon]"],
        ["preprocess moon: partition.domains names moon, and no document has that label"],
    ),
    "no such column of labels": (
        ["data.label_field=kind"],
        ["preprocess sea, preprocess shop: no usable", "20 no label", "kind is None; the columns"],
    ),
    "no such column of text": (
        ["data.text_field=body"],
        ["preprocess sea, preprocess shop: no usable", "20 no text", "body is missing; the"],
    ),
}


@pytest.mark.parametrize(("changes", "told"), LACKING.values(), ids=LACKING)
def test_a_domain_without_a_document_is_told_before_any_stage(tmp_path, capsys, changes, told):
    """Also by `run`: else other domains' tokens, and a tokenizer, would be made first."""
    path = tiny_config(tmp_path / "text")
    rows = []
    for name in ("sea", "shop"):
        for line in (path.parent / f"{name}.jsonl").read_text("utf-8").splitlines():
            rows.append(json.dumps(json.loads(line) | {"domain": name}))
    (path.parent / "all.jsonl").write_text("\n".join(rows), "utf-8")
    labelled = ["data.files=[{paths: [all.jsonl]}]", "partition.domains=[sea,shop]"]
    assert planned(path, tmp_path / "store", capsys, *labelled)[0] == 0
    code, _, errors = planned(path, tmp_path / "store", capsys, *labelled, *changes)
    assert code == 2 and "cannot start" in errors and all(each in errors for each in told)
    typed = [word for each in (*labelled, *changes) for word in ("--override", each)]
    store = tmp_path / "made"
    assert main(["run", "--config", str(path), "--store", str(store), *typed]) == 2
    errors = capsys.readouterr().err
    assert "cannot start" in errors and all(each in errors for each in told)
    assert list(store.glob("artifacts/*")) == []


def test_what_is_done_reads_nothing_any_more(finished, tmp_path, capsys):
    path, store = finished
    texts = [path.parent / f"{name}.jsonl" for name in WORDS]
    # for a moment, as others read the same run
    for text in texts:
        text.rename(tmp_path / text.name)
    try:
        assert planned(path, store, capsys, flags=["--frozen"])[0] == 0
        # of what is not done, all of it is needed
        code, _, errors = planned(path, store, capsys, "data.max_document_bytes=4096")
        assert code == 2 and "tokenizer, preprocess sea" in errors
    finally:
        for text in texts:
            (tmp_path / text.name).rename(text)


@pytest.mark.parametrize("budget", ["1MB", "5MB", "20MB"])
@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_a_budget_that_nothing_fits_into_is_refused_here_and_on_modal(
    runs, tmp_path, capsys, kind, budget
):
    path = runs / kind / "run.yaml"
    code, table, errors = planned(path, tmp_path, capsys, f"runtime.memory_budget={budget}")
    assert code == 2 and f"runtime.memory_budget {budget}: the smallest that works" in errors
    assert "train_experts" in table
    # one setting, one line: the least that works for all, and the jobs
    lines = [line for line in errors.splitlines() if "memory_budget" in line]
    assert len(lines) == 1 and "train_experts" in lines[0]
    least = re.search(r"that works is (\d+MB)", lines[0])[1]
    assert planned(path, tmp_path, capsys, f"runtime.memory_budget={least}")[0] == 0
    cfg = load(path, (f"runtime.memory_budget={budget}",))
    text = load(path, (f"runtime.memory_budget={budget}", "modal.train_experts.gpu=[]"))
    for each, here in ((cfg, False), (text, True)):
        lines = cloud.estimate(each, ("train_experts",), Store(tmp_path / "none"), PRICES)
        cloud.show_estimate(each, lines, PRICES, False, Console(file=io.StringIO()))
        # a GPU's memory is none of the budget's
        if here:
            with pytest.raises(CannotStart) as error:
                cloud.refuse_what_cannot_start(each, lines, "/store", lambda _folder: [])
            assert all("runtime.memory_budget" in str(cause) for cause, _ in error.value.causes)
        else:
            cloud.refuse_what_cannot_start(each, lines, "/store", lambda _folder: [])


def volume(*files):
    """Return what lists the folders of a volume with these files."""

    def names(folder):
        below = {Path(file).relative_to(folder).parts[0] for file in files if inside(file, folder)}
        return sorted(below)

    def inside(file, folder):
        return Path(file).is_relative_to(folder) and Path(file) != Path(folder)

    return names


@pytest.mark.parametrize(
    ("pattern", "there", "found"),
    [
        ("/store/inputs/a.txt", "inputs/a.txt", True),
        ("/store/inputs/a.txt", "inputs/b.txt", False),
        ("/store/inputs/*.txt", "inputs/b.txt", True),
        ("/store/inputs/*.txt", "inputs/b.md", False),
        ("/store/inputs/*/x-?.jsonl", "inputs/law/x-3.jsonl", True),
        ("/store/inputs/*/x-?.jsonl", "inputs/law/x-33.jsonl", False),
        ("/store/inputs/**/*.md", "inputs/deep/er/b.md", True),
        ("/store/inputs/**/*.md", "other/b.md", False),
        ("/store/in[1]/a.txt", "in[1]/a.txt", True),
        ("s3://bucket/nothing", "", True),
    ],
)
def test_what_is_not_on_the_volume_is_said_before_anything_is_rented(
    tmp_path, pattern, there, found
):
    # the two others lie elsewhere, which is nobody's to ask here
    paths = dict(zip(WORDS, (pattern, "s3://bucket/x.txt", "gs://bucket/y.txt"), strict=True))
    files = [{"paths": [paths[name]], "domain": name} for name in WORDS]
    cfg = load(tiny_config(tmp_path / "tiny", data={"files": files}))
    lines = cloud.estimate(cfg, ("preprocess",), Store(tmp_path / "none"), PRICES)
    names = volume(*filter(None, [there]))
    if found:
        cloud.refuse_what_cannot_start(cfg, lines, "/store", names)
    else:
        with pytest.raises(CannotStart) as error:
            cloud.refuse_what_cannot_start(cfg, lines, "/store", names)
        [(cause, jobs)] = error.value.causes
        assert f"data.files: {pattern}" in str(cause) and jobs == ["preprocess sea"]


def test_each_task_of_pictures_is_sought_on_the_volume(tmp_path):
    path = pictures_config(tmp_path / "run")
    raw = path.read_text().replace(str(tmp_path / "run"), "/store/in")
    path.write_text(raw)
    cfg = load(path)
    moved = json.loads(cfg.model_dump_json().replace(str(tmp_path / "run"), "/store/in"))
    cfg = type(cfg).model_validate(moved)
    assert all(place.startswith("/store/in/") for _, place in cfg.paths())
    files = [f"in/{name}/rows.jsonl" for name in ("one", "two", "none", "own")]
    lines = cloud.estimate(cfg, ("preprocess", "routing"), Store(tmp_path / "none"), PRICES)
    cloud.refuse_what_cannot_start(cfg, lines, "/store", volume(*files))
    jobs = ("preprocess one", "preprocess two", "preprocess none", "routing")
    for gone, job in zip(files, jobs, strict=True):
        left = [file for file in files if file != gone]
        with pytest.raises(CannotStart) as error:
            cloud.refuse_what_cannot_start(cfg, lines, "/store", volume(*left))
        assert [names for _, names in error.value.causes] == [[job]]


def test_a_store_that_cannot_be_written_is_said(tmp_path, capsys, monkeypatch):
    path = tiny_config(tmp_path / "tiny")
    real = os.access

    def access(place, mode):
        return real(place, mode) and not (mode == os.W_OK and Path(place) == tmp_path)

    monkeypatch.setattr(os, "access", access)
    code, _, errors = planned(path, tmp_path / "new/store", capsys)
    assert code == 2 and f"{tmp_path} cannot be written to" in errors and "--store" in errors


def test_a_run_told_online_without_a_key_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    path = tiny_config(tmp_path / "tiny")
    code, _, errors = planned(path, tmp_path / "store", capsys, "runtime.wandb=online")
    assert code == 2 and "no Weights & Biases key was found" in errors
    assert "train_shared, train_experts" in errors


def test_what_takes_a_stack_out_of_its_store_stands_below_its_jobs(
    finished, bundled, runs, tmp_path, capsys
):
    path, store = finished
    wanted = ["--export", "gguf", "--dtype", "q8_0", "--expert", "sea"]
    code, table, _ = planned(path, store, capsys, flags=wanted)
    deploy, export = [line for line in table.splitlines() if "writes" in line]
    assert code == 0 and " MB" in export and " s " in export
    assert re.search(r"deploy-[0-9a-f]{12}", deploy) and "to do" in deploy
    assert "export gguf --expert sea --dtype q8_0" in export
    # it is made already: nothing is left that takes time
    _, table, _ = planned(path, bundled[1], capsys)
    (deploy,) = [line for line in table.splitlines() if "writes" in line]
    assert "done" in deploy and " s " not in deploy
    # what the run has nothing for is refused as the export refuses it
    code, _, errors = planned(path, store, capsys, flags=["--export", "adapters"])
    assert code == 2 and "--format adapters: the experts of this run are whole networks" in errors
    # and what would say how, where none is wished for, is not passed over
    for flags in (["--dtype", "q8_0"], ["--expert", "sea"], ["--dense"]):
        code, _, errors = planned(path, store, capsys, flags=flags)
        assert code == 2 and "add --export FORMAT" in errors
    tasks = runs / "jsonl" / "run.yaml"
    code, table, _ = planned(tasks, tmp_path, capsys, flags=["--export", "adapters"])
    assert code == 0 and table.count("writes") == 2


def test_a_bundle_tells_how_fast_others_are_written(bundled, monkeypatch):
    store = Store(bundled[1])
    manifest = store.manifest(bundled[2].name)
    # so small a one is all set-up, however long that took on a machine that was busy
    manifest.made["seconds"] = 60.0
    monkeypatch.setattr(speeds, "_finished", lambda *_: iter([manifest]))
    assert speeds.bundle_rates(store) == []
    monkeypatch.setattr(speeds, "LEAST_WRITTEN_BYTES", 0)
    (rate,) = speeds.bundle_rates(store)
    assert rate == manifest.metrics["bytes"] / manifest.made["seconds"]
    # What was summed and computed while they were made is in that: only a sum of all is not
    monkeypatch.setattr(dry_run, "summed_bytes_per_s", lambda: 2e6)
    cfg = load(bundled[0])
    (entry,) = dry_run.writings(cfg, store)
    job = entry.job
    assert entry.state == "done" and job.summed_bytes == 3 * job.written_bytes
    entry = replace(entry, state="to do")
    (told,) = dry_run.times(cfg, store, [entry]).values()
    assert told == pytest.approx(job.written_bytes * (1 / rate + 1 / 2e6))
    monkeypatch.setattr(speeds, "cpu_name", lambda: "another")
    assert speeds.bundle_rates(store) == []
    # Nobody knows this disk: all sums, and what goes through the system's memory
    (told,) = dry_run.times(cfg, store, [entry]).values()
    assert told == pytest.approx(job.written_bytes * (3 / 2e6 + 1 / 1e9))


def test_a_plan_reads_each_manifest_once(bundled, capsys, monkeypatch):
    asked = Counter()
    real = manifests.read
    monkeypatch.setattr(
        manifests, "read", lambda folder: asked.update([folder.name]) or real(folder)
    )
    assert planned(bundled[0], bundled[1], capsys)[0] == 0
    assert asked == {folder.name: 1 for folder in (bundled[1] / "artifacts").iterdir()}
    # with a job to do whose time the speed of others tells
    asked.clear()
    assert planned(bundled[0], bundled[1], capsys, "router.steps=9999")[0] == 0
    assert len(asked) > 5 and set(asked.values()) == {1}


def test_what_compress_takes_is_planned(finished, capsys):
    path, store = finished
    code, table, _ = planned(path, store, capsys, flags=["--rank", "2", "--expert", "sea"])
    (line,) = [line for line in table.splitlines() if "compress --expert sea --rank 2" in line]
    assert code == 0 and "writes" in line and " s " in line
    small = ("expert.form=low_rank", "expert.rank=4")
    code, _, errors = planned(path, store, capsys, *small, flags=["--rank", "2"])
    assert code == 2 and "export them with --format adapters" in errors


# ---------------------------------------------------------------- how long it takes to say so


def test_a_rate_is_measured_with_one_thread_whatever_others_do(monkeypatch):
    set_to, real, before = [], torch.set_num_threads, torch.get_num_threads()
    monkeypatch.setattr(torch, "set_num_threads", lambda count: set_to.append(count) or real(count))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    seen = []
    monkeypatch.setattr(
        hardware, "_best_rate", lambda size, bf16, wait: seen.append((size, bf16)) or 5.0
    )
    monkeypatch.setattr(hardware, "device", lambda: "cpu")
    try:
        assert hardware.product_flops_per_s(False) == 30.0
    finally:
        real(before)
    assert set_to == [1, 6] and seen == [(512, False)]


@pytest.mark.parametrize("bf16", [False, True])
def test_a_measured_rate_is_one_of_products(bf16, monkeypatch):
    monkeypatch.setattr(hardware, "_best_rate", measured_rate)
    rates = []
    assert is_done_in(1.0, lambda: rates.append(hardware.product_flops_per_s(bf16)))
    assert min(rates) > 1e6


def test_a_plan_measures_nothing_that_nobody_needs(finished, tmp_path, capsys, monkeypatch):
    path, store = finished
    asked = []
    monkeypatch.setattr(dry_run, "product_flops_per_s", lambda bf16: asked.append(bf16) or 1e12)
    # a few steps are all set-up: they tell no rate, however slow this machine is just now
    monkeypatch.setattr(speeds, "LEAST_TRAINED_S", 1e6)
    assert planned(path, store, capsys, "router.steps=9999")[0] == 0 and len(asked) == 1
    asked.clear()
    monkeypatch.setattr(speeds, "LEAST_TRAINED_S", 0.001)
    # all is done; then a part is to do, on a machine that has finished some
    assert planned(path, store, capsys)[0] == 0 and asked == []
    assert planned(path, store, capsys, "router.steps=9999")[0] == 0 and asked == []
    # on Modal this machine's rate is nobody's
    cfg = load(path, ("trunk.steps=7",))
    cloud.estimate(cfg, stages.RUN, Store(tmp_path / "none"), PRICES)
    assert asked == []
    # a machine that has finished none is measured, once
    assert planned(path, tmp_path / "none", capsys)[0] == 0 and len(asked) == 1


def test_a_plan_of_the_demo_from_zero_takes_under_two_seconds_of_processor(tmp_path, capsys):
    path = Path(__file__).parent.parent / "config/demo_from_zero.yaml"
    # what it imports is counted apart
    command = (path, tmp_path / "none", capsys)
    assert planned(*command)[0] == 0
    assert is_done_in(2.0, lambda: planned(*command))
