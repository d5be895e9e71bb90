"""One job: what it opens, and the errors that it sends to whoever typed a command."""

import gc
import pickle
import shutil
import weakref
from collections import Counter
from pathlib import Path

import pytest
from fakes import told

from pipeline import errors
from pipeline.__main__ import main
from pipeline.cloud import ModalEdge
from pipeline.config.run import RunConfig
from pipeline.families.load import load
from pipeline.protocols import quiet
from pipeline.run import job, stages
from pipeline.run.advice import sentence
from pipeline.run.context import StoredParts
from pipeline.run.job import run_job
from pipeline.store import artifacts
from pipeline.store.artifacts import Manifest, Store, inventory
from tests import small_stack


@pytest.fixture(scope="module")
def runs(bundled, tmp_path_factory):
    """{family: (configuration, store)} with everything up to the report, and the report too."""
    path, store_path, _ = bundled
    copy = shutil.copytree(store_path, tmp_path_factory.mktemp("ffn") / "store")
    adapters = stored(tmp_path_factory.mktemp("lora"))
    run_job("evaluate", *adapters, progress=quiet)
    return {"ffn_moe": (load(path), Store(copy)), "lora_vlm": adapters}


def stored(folder):
    """Return (configuration, store) of a small run of adapters, put into a store by hand."""
    cfg, parts = small_stack.run(folder / "parts")
    store, addresses = Store(folder / "store").open(), stages.Addresses(cfg)
    for stage in stages.RUN:
        for _, item, address in addresses.jobs(stage) if stage != "evaluate" else ():
            shutil.copytree(parts.folder(stage, item), store.folder(address))
            needs = [addresses.of(*need) for need in cfg.needs(stage, item)]
            inputs = {need: store.manifest(need).digest for need in needs}
            files = inventory(store.folder(address))
            metrics = {"seconds": 1.5}
            if cfg.stages[stage].kind == "training":
                metrics |= {"planned_steps": 8, "steps": 8}
            store.finish(Manifest(address, stage, item, inputs, files, metrics))
    return cfg, store


class Counted:
    """How often a job reads a manifest, hashes a file, opens tensors and computes an address."""

    def __init__(self, patch):
        self.manifests, self.hashed, self.opened, self.addresses = (Counter() for _ in range(4))
        self._count(patch, Store, "manifest", self.manifests, lambda _store, address: address)
        self._count(patch, artifacts, "sha256", self.hashed, lambda path: path)
        self._count(patch, artifacts, "load_tensors", self.opened, lambda path: path)
        self._count(patch, RunConfig, "content", self.addresses, lambda _cfg, *job: job)

    @staticmethod
    def _count(patch, owner, name, counter, key):
        real = getattr(owner, name)

        def counted(*args):
            counter[key(*args)] += 1
            return real(*args)

        patch.setattr(owner, name, counted)


@pytest.mark.parametrize("stage", ["evaluate", "deploy"])
@pytest.mark.parametrize("family", ["ffn_moe", "lora_vlm"])
def test_a_job_reads_and_hashes_each_input_once(runs, monkeypatch, family, stage):
    cfg, store = runs[family]
    address = stages.address(cfg, stage)
    shutil.rmtree(store.folder(address), ignore_errors=True)
    counted = Counted(monkeypatch)
    run_job(stage, cfg, store, progress=quiet)
    inputs = {need: cfg.items(need) for need in cfg.stages[stage].needs}
    jobs = {(need, item) for need, items in inputs.items() for item in items}
    assert jobs | {(stage, None)} <= counted.addresses.keys()
    assert set(counted.addresses.values()) == {1}
    assert set(counted.manifests.values()) == {1}
    # What the job writes itself is hashed once too, in its inventory
    assert counted.hashed and set(counted.hashed.values()) == {1}


@pytest.mark.parametrize("family", ["ffn_moe", "lora_vlm"])
def test_histories_are_read_before_anything_is_measured_and_done_without(runs, family):
    cfg, store = runs[family]
    trained = [name for name, stage in cfg.stages.items() if stage.kind == "training"]
    jobs = [job for name in trained for job in stages.Addresses(cfg).jobs(name)]
    folder = store.folder(stages.address(cfg, "evaluate"))
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(store.root / "history", ignore_errors=True)
    *_, (_, _, last) = jobs
    store.history(last).mkdir(parents=True)
    said = []
    with pytest.raises(errors.StoreError, match="history"):
        run_job("evaluate", cfg, store, progress=lambda text, _: said.append(text))
    assert said == []
    store.history(last).rmdir()
    run_job("evaluate", cfg, store, progress=lambda text, _: said.append(text))
    told = [text for text in said if text.startswith("history of ")]
    names = [f"{stage} {item}" if item else stage for stage, item, _ in jobs]
    assert told == [f"history of {name}: the file is gone" for name in names]
    assert len(told) < len(said)
    page = (folder / "report.html").read_text()
    assert page.count("is not whole: the file is gone") == len(names)


def test_the_trunk_is_opened_once_by_the_evaluation(runs, monkeypatch):
    cfg, store = runs["ffn_moe"]
    shutil.rmtree(store.folder(stages.address(cfg, "evaluate")))
    counted = Counted(monkeypatch)
    run_job("evaluate", cfg, store, progress=quiet)
    opened = Counter({path.name: count for path, count in counted.opened.items()})
    assert opened["trunk.safetensors"] == opened["dummy.safetensors"] == 1
    assert opened["router.safetensors"] == opened["expert.safetensors"] == 1


def test_parts_keep_no_tensors_alive(runs):
    cfg, store = runs["ffn_moe"]
    parts = StoredParts(cfg, store)
    tensors = parts.tensors("train_shared", "trunk.safetensors")
    kept = [weakref.ref(tensor) for tensor in tensors.values()]
    del tensors
    gc.collect()
    assert [ref for ref in kept if ref() is not None] == []


ERRORS = [
    errors.MissingArtifact("a is not here", address="a", stages=("preprocess",)),
    errors.DamagedArtifact("b is torn", remove=Path("/store/artifacts/b")),
    errors.DamagedArtifact(
        "f is torn", remove=Path("/copies/f"), stage="deploy", remedy="copy it again"
    ),
    errors.MismatchError("c is of d", remove=Path("/store/artifacts/c"), stage="train_experts"),
    errors.DiskFull("no room for e", in_store=True),
    errors.UnreadableFile("/store/f cannot be read: Input/output error", path=Path("/store/f")),
    errors.OtherCheckpoint("g is in bf16", remove=Path("/store/resume/g"), setting="dtype: bf16"),
    errors.BudgetError("h", "does not fit", smallest_bytes=9),
    errors.OldStore("/store is old", root=Path("/store")),
    errors.NewerStore("/store is new", root=Path("/store"), remedy="update MoleForge"),
    errors.JobsFailed("evaluate", (None,), {None: errors.DataError("no rows")}),
]
# What the command line and Modal say of each
SENTENCES = {
    "a is not here": (
        "a is not here: run `python -m pipeline preprocess` with this configuration first",
        "a is not here: run `modal run modal_app.py::preprocess` with this configuration first",
    ),
    "b is torn": (
        "b is torn; remove /store/artifacts/b and run the same command to make it again",
        "b is torn; type `modal volume rm -r moleforge artifacts/b` and run the same command to "
        "make it again",
    ),
    "f is torn": (
        "f is torn; remove /copies/f and run `python -m pipeline deploy` again, or copy it again",
        "f is torn; remove /copies/f and run `modal run modal_app.py::deploy` again, or copy it "
        "again",
    ),
    "c is of d": (
        "c is of d: remove /store/artifacts/c and run `python -m pipeline train_experts` again",
        "c is of d: type `modal volume rm -r moleforge artifacts/c` and run "
        "`modal run modal_app.py::train_experts` again",
    ),
    "no room for e": (
        "no room for e. What was finished is kept: make room (`python -m pipeline runs` lists "
        "what each run takes, `rm` removes one, `prune` what none needs) or choose another "
        "directory with --store, then run the same command again",
        "no room for e. What was finished is kept: make room (`modal run modal_app.py::runs` "
        "lists what each run takes, `::rm --run NAME` removes one, `::prune` what none needs), "
        "then run the same command again",
    ),
    "/store/f cannot be read: Input/output error": (
        "/store/f cannot be read: Input/output error; nothing was changed: mend the cause and run "
        "the same command again",
        "/store/f cannot be read: Input/output error; nothing was changed: mend the cause and run "
        "the same command again",
    ),
    "g is in bf16": (
        "g is in bf16; set dtype: bf16 to go on from it, or remove /store/resume/g to start over "
        "at step 0",
        "g is in bf16; set dtype: bf16 to go on from it, or type `modal volume rm -r moleforge "
        "resume/g` to start over at step 0",
    ),
    "h does not fit": ("h does not fit", "h does not fit"),
    "/store is old": (
        "/store is old; choose another directory with --store",
        "/store is old; type `modal volume rename moleforge NAME`, and the next command makes a "
        "new one",
    ),
    "/store is new": (
        "/store is new; update MoleForge, or choose another directory with --store",
        "/store is new; update MoleForge, or type `modal volume rename moleforge NAME`, and the "
        "next command makes a new one",
    ),
}


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_an_error_travels_between_processes_with_its_fields(error):
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert told(again) == told(error)
    assert again.__dict__.keys() == error.__dict__.keys()


@pytest.mark.parametrize("error", ERRORS[:-1], ids=str)
def test_each_edge_says_what_to_type_there(error):
    here, far = SENTENCES[str(error)]
    assert told(error) == here
    assert sentence(error, ModalEdge(Path("/store"))) == far
    assert "`" not in str(error)


def test_no_command_takes_what_an_older_version_left_for_done(tmp_path, capsys):
    (tmp_path / "store.json").write_text('{"format": 1}')
    config = Path(__file__).parent.parent / "config/demo_from_zero.yaml"
    for command in ("plan", "preprocess", "prune"):
        assert main([command, "--config", str(config), "--store", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert "has store format 1" in said and "choose another directory with --store" in said
    assert [path.name for path in tmp_path.iterdir()] == ["store.json"]


def test_a_stage_of_another_family_is_nothing(runs):
    cfg, _ = runs["lora_vlm"]
    assert cfg.items("train_dense") == cfg.items("tokenizer") == ()


def test_a_package_that_is_not_here_is_left_out_of_what_a_job_was_made_with():
    assert list(job._versions(("torch", "no-such-package"))) == ["torch"]
