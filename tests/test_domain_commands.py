"""`add`, `remove` and `replace` from the file to the report, on two domains and a third one.

Jobs are done in the tests' own process; that they end as well in processes of their own is shown
for every stage elsewhere.
"""

import json
import shutil
from types import SimpleNamespace

import pytest
from conftest import tiny_config

from pipeline.__main__ import main
from pipeline.errors import DataError, Interrupted
from pipeline.families.load import load
from pipeline.protocols import quiet
from pipeline.run import domains
from pipeline.run.backend import Local
from pipeline.run.job import run_job
from pipeline.run.stages import RUN, jobs
from pipeline.store.artifacts import Store
from pipeline.train import loop

# As a name it stands nowhere else: not in a text, a word or a setting
GUEST = "quokka"
FEW = {"eval_every_steps": 0, "warmup_steps": 1, "eval_tokens": 256}
SMALL = {
    "partition": {"domains": ["sea", "shop"]},
    "trunk": FEW | {"steps": 6, "layers": 1, "statistics_tokens": 1024},
    "expert": FEW | {"steps": 4, "statistics_tokens": 1024},
    "router": {"steps": 0},
    "dense": {"baselines": ["path"]},
    "evaluate": {"rivals": "few", "continuation_tokens": 0, "tokens_per_domain": 256},
}


def in_this_process(local, stage, cfg, items):
    """Do jobs as Local does, in no processes of their own."""
    for item in items:
        run_job(stage, cfg, local.store, item, progress=quiet)
    return {}


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Local, "run_jobs", in_this_process)
        patch.setattr(loop, "product_flops_per_s", lambda _bf16: 1e9)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of two domains that is done, and the text of a third; copy it, never change it."""
    folder = tmp_path_factory.mktemp("domains")
    # Whole paths, as the copies that tests make of this read the same files
    files = [{"paths": [f"{folder}/tiny/{name}.jsonl"], "domain": name} for name in ("sea", "shop")]
    path = tiny_config(folder / "tiny", **SMALL, data={"files": files})
    path.write_text("# by hand\n" + path.read_text("utf-8"), "utf-8")
    assert main(["run", "--config", str(path), "--store", str(folder / "store")]) == 0
    return folder


@pytest.fixture
def run(made, tmp_path, monkeypatch, capsys):
    """A copy of that run: its file, its store, and what carries out a command on it."""
    folder = shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(folder)

    def command(*words: str, code: int = 0) -> str:
        where = ("--config", "tiny/tiny.yaml", "--store", "store")
        assert main([*words, *where]) == code
        return told()

    def told() -> str:
        found = capsys.readouterr()
        return found.out + found.err

    store = Store(folder / "store")
    return SimpleNamespace(command=command, told=told, path=folder / "tiny/tiny.yaml", store=store)


def there(run) -> dict[str, bytes]:
    """Return the manifests of a run's jobs that are in the store, by address."""
    found = {}
    for stage in RUN:
        for _, _, address in jobs(load(run.path), stage):
            if run.store.has(address):
                found[address] = (run.store.folder(address) / "manifest.json").read_bytes()
    return found


def test_a_domain_comes_and_goes_and_leaves_a_note_alone(run):
    text = run.path.read_text("utf-8")
    told = run.command("add", GUEST, "--paths", "tiny/hall.jsonl")
    assert "+  - paths: [hall.jsonl]" in told.replace("    ", "  ")
    assert f"train_experts {GUEST}" in told.partition("to be made")[2]
    assert "trunk.domains now names sea, shop" in told
    assert "made: preprocess" in told and "training tokens" in told
    figures = told.partition("Bits per byte of the stack")[2]
    # before, after and their difference of what was there; of the new one what it has now
    assert len(row(figures, "sea")) == 4
    assert row(figures, GUEST)[1] == row(figures, GUEST)[3] == "–"
    assert "made: nothing" in run.command("replace", GUEST, "--paths", "tiny/hall.jsonl")
    with_guest = there(run)
    told = run.command("remove", GUEST)
    assert row(told.partition("Bits per byte of the stack")[2], GUEST)[2] == "–"
    assert run.path.read_text("utf-8") == text.replace("trunk:\n", "trunk:\n", 1).replace(
        "statistics_tokens: 1024\nexpert:",
        "statistics_tokens: 1024\n  domains: [sea, shop]\nexpert:",
    )
    (note,) = (run.store.root / "removed").iterdir()
    gone = json.loads(note.read_text())
    assert (gone["domain"], gone["run"], gone["file"]) == (GUEST, "tiny", "tiny/tiny.yaml")
    assert gone["addresses"] and set(gone["addresses"]) <= with_guest.keys() - there(run).keys()
    noted = f"removed: {GUEST} at {gone['at']} from tiny (tiny/tiny.yaml); still in store: train_"
    assert noted in told and noted in run.command("plan")
    assert main(["runs", "--store", "store"]) == 0
    assert noted in run.told()
    # Nothing that is given away knows of it any more
    run.command("deploy")
    (bundle,) = (run.store.root / "artifacts").glob("deploy-*")
    for file in bundle.rglob("*"):
        if file.is_file():
            assert GUEST.encode() not in file.read_bytes().lower(), file.name
    assert len(json.loads((bundle / "experts.json").read_text())["experts"]) == 2
    # Once it is back, it is not among what was taken out
    run.command("add", GUEST, "--paths", "tiny/hall.jsonl")
    assert f"removed: {GUEST}" not in run.command("plan")


def row(text: str, name: str) -> list[str]:
    """Return the words of the line of a table that begins with a name."""
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [name])


def test_nothing_is_changed_before_a_person_agrees_or_where_it_cannot_be_made(run, monkeypatch):
    text = run.path.read_text("utf-8")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True, readline=lambda: "n\n"))
    monkeypatch.setattr("builtins.input", lambda *_: "n")
    assert "nothing was changed" in run.command("add", GUEST, "--paths", "tiny/hall.jsonl")
    assert run.path.read_text("utf-8") == text
    told = run.command("add", GUEST, "--paths", "nowhere/*.jsonl", "--yes", code=2)
    assert "nowhere" in told
    assert run.path.read_text("utf-8") == text
    assert not (run.store.root / "removed").exists()


def test_what_is_missing_after_a_failure_is_made_by_run(run, monkeypatch):
    text = run.path.read_text("utf-8")
    failing = {DataError("too little text"): 2, Interrupted("stopped at step 3"): 130}
    for failure, code in failing.items():

        def fail(_stage, _cfg, _local, failure=failure):
            raise failure

        run.path.write_text(text, "utf-8")
        monkeypatch.setattr(domains, "run_stage", fail)
        told = run.command("add", GUEST, "--paths", "tiny/hall.jsonl", code=code)
        assert "made by: python -m pipeline run --config tiny/tiny.yaml" in told
        assert load(run.path).experts == ("sea", "shop", GUEST)


def test_on_modal_the_file_is_changed_here_and_the_rest_made_there(run):
    before = there(run)
    told = run.command("add", GUEST, "--paths", "tiny/hall.jsonl", "--modal")
    assert "made on Modal by: modal run modal_app.py::run_all --config tiny/tiny.yaml" in told
    assert load(run.path).experts == ("sea", "shop", GUEST)
    assert there(run).keys() <= before.keys()
