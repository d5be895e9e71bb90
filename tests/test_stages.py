"""Addresses, what is reused, and inputs that do not belong together. Runs in this process on the
tiny configuration."""

import io
import re
import shutil
from dataclasses import replace
from typing import get_args

import pytest
from conftest import make_all
from fakes import contents, flip, killed_at, told, traces
from rich.console import Console

from pipeline.config.machines import ModalConfig
from pipeline.errors import DamagedArtifact, MismatchError, MissingArtifact, PipelineError
from pipeline.families import PRELOAD
from pipeline.families.adapters.sections import AdapterExpertConfig
from pipeline.families.load import RUN_CONFIGS, load
from pipeline.metrics.answers import METRICS
from pipeline.protocols import quiet
from pipeline.run import context, stages
from pipeline.run.job import run_job
from pipeline.store.artifacts import Store
from pipeline.train import loop


@pytest.fixture
def copied(finished, tmp_path):
    """Configuration, and a copy of the finished store to change."""
    path, store_path = finished
    shutil.copytree(store_path, tmp_path / "copy")
    return path, tmp_path / "copy"


def run(stage, cfg, store, item=None):
    return run_job(stage, cfg, store, item, progress=quiet, console=Console(file=io.StringIO()))


def addresses(path, *overrides):
    cfg = load(path, overrides)
    return {
        stages.label(s, i): here for stage in stages.RUN for s, i, here in stages.jobs(cfg, stage)
    }


def changed(path, *overrides):
    """Return the jobs whose address an override changes."""
    before, after = addresses(path), addresses(path, *overrides)
    return {job for job in before if before[job] != after.get(job)}


TEXT = {"tokenizer", "preprocess sea", "preprocess shop", "preprocess hall"}
EXPERTS = {"train_experts sea", "train_experts shop", "train_experts hall"}
DENSE = {"train_dense total", "train_dense path"}
END = {"train_router", "evaluate"}


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("runtime.threads=7", set()),
        ("runtime.save_every_s=9", set()),
        ("runtime.wandb=offline", set()),
        ("evaluate.bootstrap=11", {"evaluate"}),
        ("router.top_k=1", END),
        ("router.balance=aux", END),
        ("router.steps=17", {*END, "train_dense total"}),
        ("expert.lr=1e-2", {*EXPERTS, *END, *DENSE}),
        ("expert.init=fresh", {*EXPERTS, *END}),
        ("expert.checkpointing=true", set()),
        ("partition.overlap=0.2", {*EXPERTS, *END}),
        ("trunk.lr=1e-2", {"train_shared", *EXPERTS, *END, *DENSE}),
        ("trunk.anchor=keep", END),
        ("seed=1", {"train_shared", *EXPERTS, *END, *DENSE}),
        ("tokenizer.vocab_size=310", {*TEXT, "train_shared", *EXPERTS, *END, *DENSE}),
    ],
)
def test_a_setting_changes_the_addresses_of_what_reads_it(finished, override, wanted):
    assert changed(finished[0], override) == wanted


def test_a_name_does_not_make_a_training_another(finished):
    assert changed(finished[0], "name=other") <= {"evaluate"}


def test_addresses_tell_stage_and_item(finished):
    found = addresses(finished[0])
    assert list(found) == [
        *(
            "tokenizer",
            "preprocess sea",
            "preprocess shop",
            "preprocess hall",
            "train_shared",
            "train_experts sea",
            "train_experts shop",
            "train_experts hall",
        ),
        *("train_router", "train_dense total", "train_dense path", "evaluate"),
    ]
    for job, here in found.items():
        assert re.fullmatch(job.replace(" ", "-") + "-[0-9a-f]{12}", here)
    assert len(set(found.values())) == len(found) and found == addresses(finished[0])
    assert sorted(found.values()) == Store(finished[1]).addresses()


def test_manifests_tie_every_artifact_to_its_inputs(finished):
    path, store_path = finished
    cfg, store = load(path), Store(store_path)
    for stage in stages.RUN:
        for _, item, here in stages.jobs(cfg, stage):
            needed = [stages.address(cfg, *need) for need in cfg.needs(stage, item)]
            wanted = {a: store.manifest(a).digest for a in needed}
            assert store.manifest(here).inputs == wanted


def test_a_second_run_changes_no_file(finished):
    before = traces(finished[1])
    make_all(*finished)
    assert traces(finished[1]) == before


def test_two_runs_leave_the_same_bytes(finished, tmp_path):
    make_all(finished[0], tmp_path / "again")
    assert contents(tmp_path / "again") == contents(finished[1])


def test_only_the_router_is_trained_again(copied):
    path, store_path = copied
    before = traces(store_path)
    make_all(path, store_path, "router.top_k=1")
    after = traces(store_path)
    assert {f: after[f] for f in before if "/locks/" not in f} == {
        f: m for f, m in before.items() if "/locks/" not in f
    }
    fresh = {
        f.split("/artifacts/")[1].split("-")[0]
        for f in after.keys() - before.keys()
        if "/artifacts/" in f
    }
    assert fresh == {"train_router", "evaluate"}


def test_a_missing_input_names_the_command(tmp_path, finished):
    cfg, store = load(finished[0]), Store(tmp_path / "empty").open()
    with pytest.raises(MissingArtifact) as error:
        run("train_shared", cfg, store)
    assert str(error.value) == f"{error.value.address} is not in {store.root}"
    assert "run `python -m pipeline tokenizer`" in told(error.value)


def test_a_part_that_is_given_is_written_without_training(tmp_path, finished, monkeypatch):
    def write(folder):
        (folder / "pin.json").write_text("{}")
        return {"files": 1}

    def shared(_cfg, _parts):
        return loop.NoTraining(write)

    monkeypatch.setattr(context, "stage_function", lambda _family, _name: shared)
    cfg, store = load(finished[0]), Store(tmp_path / "copy").open()
    for need in cfg.needs("train_shared", None):
        read = stages.address(cfg, *need)
        shutil.copytree(Store(finished[1]).folder(read), store.folder(read))
    manifest = run("train_shared", cfg, store)
    # what it took is told of any job
    told = {key: value for key, value in manifest.metrics.items() if not key.endswith("_mb")}
    assert told == {"files": 1}
    assert "pin.json" in manifest.files
    assert not store.history(manifest.address).exists()


def test_a_stage_without_jobs_has_no_address_and_says_so(finished):
    cfg = load(finished[0])
    assert stages.jobs(cfg, "routing") == [] and "routing" in stages.RUN
    assert stages.without_jobs("routing", cfg).startswith(
        "routing: nothing to do, a run of ffn_moe"
    )


def forget(cfg, store, stage, item=None):
    """Remove an artifact, so that the stage is done again."""
    here = stages.address(cfg, stage, item)
    shutil.rmtree(store.folder(here))
    return here


def test_an_expert_of_another_trunk_is_refused(copied):
    path, store_path = copied
    cfg, store = load(path), Store(store_path)
    here = stages.address(cfg, "train_experts", "sea")
    trunk = stages.address(cfg, "train_shared")
    manifest = store.manifest(here)
    store.finish(replace(manifest, inputs=manifest.inputs | {trunk: "f" * 64}))
    forget(cfg, store, "train_router")
    with pytest.raises(MismatchError) as error:
        run("train_router", cfg, store)
    text = told(error.value)
    assert text.startswith(
        f"{here} is stale: it was made on another {trunk} than the one there (digest ffffffffffff, "
    )
    assert text.endswith("; run `python -m pipeline train_experts` again")


@pytest.mark.parametrize(
    ("stage", "item", "name", "user"),
    [
        ("train_shared", None, "trunk.safetensors", ("train_experts", "sea")),
        ("train_experts", "hall", "expert.safetensors", ("evaluate", None)),
        ("train_experts", "hall", "statistics.safetensors", ("train_router", None)),
        ("train_router", None, "router.safetensors", ("evaluate", None)),
    ],
)
@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_a_damaged_input_is_named_with_the_way_out(copied, stage, item, name, user, how):
    path, store_path = copied
    cfg, store = load(path), Store(store_path)
    forget(cfg, store, *user)
    file = store.folder(stages.address(cfg, stage, item)) / name
    {
        "flip": lambda: flip(file, -9),
        "truncate": lambda: file.write_bytes(b""),
        "remove": file.unlink,
    }[how]()
    with pytest.raises(DamagedArtifact) as error:
        run(*user[:1], cfg, store, user[1])
    assert str(file) in str(error.value)
    assert f"remove {file.parent} and run `python -m pipeline {stage}` again" in told(error.value)
    if how != "remove":
        return
    # The way out is the same whatever had happened to it
    shutil.rmtree(file.parent)
    wanted = contents(path.parent.parent / "store")
    make_all(path, store_path)
    assert contents(store_path) == wanted


def test_a_run_that_diverges_says_what_to_try(copied):
    path, store_path = copied
    cfg = load(path, ("trunk.lr=1e30", "trunk.warmup_steps=0", "trunk.clip_norm=0"))
    with pytest.raises(PipelineError) as error:
        run("train_shared", cfg, Store(store_path))
    for word in ("train_shared", "loss at step", "checkpoint", "trunk.lr", "trunk.warmup_steps"):
        assert word in str(error.value)
    assert not Store(store_path).has(stages.address(cfg, "train_shared"))


NOISY = ("router.noise=0.5", "router.balance=bias", "router.temperature.start=2")


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def noisy(request, finished, tmp_path_factory):
    """Path, settings and store of a run up to a router that draws random numbers, in both
    arithmetics."""
    settings = (*NOISY, f"dtype={request.param}", "runtime.save_every_s=1e-9")
    cfg, store = (
        load(finished[0], settings),
        Store(tmp_path_factory.mktemp("noisy") / "store").open(),
    )
    for need in cfg.needs("train_shared", None):
        read = stages.address(cfg, *need)
        shutil.copytree(Store(finished[1]).folder(read), store.folder(read))
    for stage in ("train_shared", "train_experts", "train_router"):
        for _, item, _ in stages.jobs(cfg, stage):
            run(stage, cfg, store, item)
    return cfg, store


@pytest.mark.parametrize(
    ("stage", "item"), [("train_shared", None), ("train_experts", "sea"), ("train_router", None)]
)
def test_stopped_and_resumed_is_undisturbed(noisy, tmp_path, stage, item):
    cfg, whole = noisy
    shutil.copytree(whole.root, tmp_path / "copy")
    store = Store(tmp_path / "copy")
    forget(cfg, store, stage, item)
    for step in (3, 7, 11):
        with killed_at(step):
            run(stage, cfg, store, item)
    run(stage, cfg, store, item)
    assert contents(store.root) == contents(whole.root)


def test_what_settings_allow_has_what_they_name():
    """A name in a Literal that nobody implements would fail after the training that it was for."""
    assert set(PRELOAD) == set(RUN_CONFIGS)
    for kind in RUN_CONFIGS.values():
        for row in kind.stages.values():
            assert (row.machine or row.name) in ModalConfig.model_fields, row.name
    allowed = get_args(AdapterExpertConfig.model_fields["metric"].annotation)
    assert set(allowed) == METRICS.keys()
