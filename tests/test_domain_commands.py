"""What `add`, `remove` and `replace` do before anything is made, where that fails, and of tasks
with pictures; of text test_domain_docs.py carries them out.
"""

import json
import re
import threading
from dataclasses import replace
from types import SimpleNamespace

import local_jobs
import pytest
from conftest import tiny_config
from yaml_text import yaml_text

from pipeline.__main__ import main
from pipeline.config.base import merge
from pipeline.config.files import read
from pipeline.errors import DataError, Interrupted, JobsFailed
from pipeline.families.load import load
from pipeline.run import domains, predecessor
from pipeline.run.reach import root_of
from pipeline.run.stages import RUN, jobs
from pipeline.store.artifacts import Store, inventory
from pipeline.store.removed import removed
from pipeline.store.roots import leave
from tests import lora_small

quick = local_jobs.quick  # a fixture
# As a name it stands nowhere else: not in a text, a word or a setting
GUEST = "quokka"
# Too little, as the first job that reads it finds
FEW_TEXT = '{"text": "the one document that there is"}\n'
FEW = {"eval_every_steps": 0, "warmup_steps": 1, "eval_tokens": 256}
SMALL = {
    "partition": {"domains": ["sea", "shop"]},
    "trunk": FEW | {"steps": 6, "layers": 1, "statistics_tokens": 1024},
    "expert": FEW | {"steps": 4, "statistics_tokens": 1024},
    "router": {"steps": 0},
    "dense": {"baselines": ["path"]},
    "evaluate": {"rivals": "few", "continuation_tokens": 0, "tokens_per_domain": 256},
}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A run of two domains and the text of a third: its file, its store, and what carries out a
    command on it."""
    files = [{"paths": [f"{name}.jsonl"], "domain": name} for name in ("sea", "shop")]
    path = tiny_config(tmp_path / "tiny", **SMALL, data={"files": files})
    monkeypatch.chdir(tmp_path)

    def command(*words: str, code: int = 0) -> str:
        where = ("--config", "tiny/tiny.yaml", "--store", "store")
        assert main([*words, *where]) == code
        told = capsys.readouterr()
        return told.out + told.err

    return SimpleNamespace(command=command, path=path, store=Store(tmp_path / "store"))


def there(run) -> dict[str, bytes]:
    """Return the manifests of a run's jobs that are in the store, by address."""
    found = {}
    for stage in RUN:
        for _, _, address in jobs(load(run.path), stage):
            if run.store.has(address):
                found[address] = (run.store.folder(address) / "manifest.json").read_bytes()
    return found


def row(text: str, name: str) -> list[str]:
    """Return the words of the line of a table that begins with a name."""
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [name])


def test_nothing_is_changed_before_a_person_agrees_or_where_it_cannot_be_made(run, monkeypatch):
    text = run.path.read_text("utf-8")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda *_: "n")
    told = run.command("add", GUEST, "--paths", "tiny/hall.jsonl")
    assert "go on? [y/N] " in told and "nothing was changed" in told
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


def test_text_that_cannot_be_read_leaves_the_file_as_it_was(run):
    text = run.path.read_text("utf-8")
    few = run.path.parent / "few.jsonl"
    few.write_text('{"text": "one"}\n', "utf-8")
    told = run.command("add", GUEST, "--paths", "tiny/few.jsonl", code=2)
    # A look tells already that it has no document
    assert "cannot start as it is" in told and "no usable document in data.files" in told
    assert run.path.read_text("utf-8") == text
    few.write_text(FEW_TEXT, "utf-8")
    told = run.command("add", GUEST, "--paths", "tiny/few.jsonl", code=2)
    assert f"preprocess {GUEST}: failed" in told
    assert "tiny/tiny.yaml is what it was" in told and "is changed already" not in told
    assert run.path.read_text("utf-8") == text


def test_text_that_cannot_be_read_is_told_where_the_file_was_changed_meanwhile_too(
    run, monkeypatch
):
    (run.path.parent / "few.jsonl").write_text(FEW_TEXT, "utf-8")

    def edited(*words):
        run.path.write_text(f"{run.path.read_text('utf-8')}# mine\n", "utf-8")
        return domains_make(*words)

    domains_make = domains.make
    monkeypatch.setattr(domains, "make", edited)
    told = run.command("add", GUEST, "--paths", "tiny/few.jsonl", code=2)
    assert "1 distinct documents" in told and f"{GUEST} is still in it" in told
    assert "is changed already" in told
    assert run.path.read_text("utf-8").endswith("# mine\n")


def test_a_finished_expert_that_is_refused_leaves_the_file_as_it_was(run, monkeypatch):
    """No run could make what it says, and the next one would end in the same words."""
    text = run.path.read_text("utf-8")
    monkeypatch.setattr(domains, "show", lambda *_: [])
    monkeypatch.setattr(domains, "not_there", lambda *_: [])
    refused = DataError(f"{GUEST} was trained on another trunk")
    for others, is_back in (({}, True), ({"sea": DataError("no room")}, False)):

        def fail(_stage, cfg, _local, failed=others | {GUEST: refused}):
            raise JobsFailed("train_experts", cfg.experts, failed)

        run.path.write_text(text, "utf-8")
        monkeypatch.setattr(domains, "run_stage", fail)
        told = run.command("add", GUEST, "--expert", "package", code=2)
        assert "was trained on another trunk" in told
        assert (run.path.read_text("utf-8") == text) == is_back
        assert ("tiny/tiny.yaml is what it was" in told) == is_back
        assert ("is changed already" in told) != is_back


def test_what_went_without_a_note_gets_it_from_the_next_run_and_once(run, monkeypatch):
    """Killed between the change of the file and the note, or taken out with an editor."""

    def killed(*_):
        raise Interrupted("killed")

    # As one expert is left
    alone = merge(read(run.path), {"router": {"top_k": 1}})
    run.path.write_text(yaml_text(alone), "utf-8")
    begun(run)
    with monkeypatch.context() as patch:
        patch.setattr(domains, "note_gone", killed)
        run.command("remove", "shop", code=130)
    assert not (run.store.root / "removed").exists()
    # Changed once more before it could be noted: its last run is not the one before
    other = merge(read(run.path), {"trunk": {"steps": 7}})
    run.path.write_text(yaml_text(other), "utf-8")
    assert "removed: shop at " in run.command("run")
    assert "removed: " not in run.command("run")
    (note,) = removed(run.store)[0]
    assert (note.domain, note.run, note.file) == ("shop", "tiny", "tiny/tiny.yaml")


def test_of_two_runs_at_once_one_notes_what_is_gone(run, monkeypatch):
    begun(run)
    cfg = load(run.path, ("partition.domains=[sea]", "router.top_k=1"))
    notes = []

    def second() -> None:
        notes.extend(predecessor.note_since(cfg, "tiny/tiny.yaml", (), run.store))

    beside = threading.Thread(target=second)
    found = predecessor.removed

    def looked_at(store):
        known = found(store)
        if beside.ident is None:
            beside.start()
            # Long enough to note it, were it let
            beside.join(timeout=0.5)
        return known

    monkeypatch.setattr(predecessor, "removed", looked_at)
    notes.extend(predecessor.note_since(cfg, "tiny/tiny.yaml", (), run.store))
    beside.join()
    assert [note.domain for note in notes] == ["shop"]


def begun(run) -> None:
    """Leave the root of a run as it is now, with its experts begun."""
    leave(run.store.open(), root_of(load(run.path), "tiny/tiny.yaml"))
    for _, _, address in jobs(load(run.path), "train_experts"):
        run.store.resume(address).mkdir(parents=True)


def test_what_never_was_there_leaves_no_note_that_it_is_gone(run):
    """Its text was refused, so it had no expert; a note of it would say that one was removed."""
    (run.path.parent / "few.jsonl").write_text(FEW_TEXT, "utf-8")
    run.command("run")
    roots = inventory(run.store.root / "roots")
    told = run.command("add", GUEST, "--paths", "tiny/few.jsonl", code=2)
    assert f"preprocess {GUEST}: failed" in told and "is what it was" in told
    # Nor a run that will never be, which would be the latest of its name
    assert inventory(run.store.root / "roots") == roots
    # As a killed command leaves it
    root = root_of(load(run.path), "tiny/tiny.yaml")
    never = (*root.addresses, f"train_experts-{GUEST}-0123456789ab")
    leave(run.store, replace(root, addresses=never))
    assert "removed: " not in run.command("run")
    assert not (run.store.root / "removed").exists()


def test_a_command_that_lost_to_another_leaves_no_run(run, monkeypatch):
    run.command("run")
    roots = inventory(run.store.root / "roots")

    def edited(*words):
        run.path.write_text(f"{run.path.read_text('utf-8')}# mine\n", "utf-8")
        return write(*words)

    write = domains.write
    monkeypatch.setattr(domains, "write", edited)
    told = run.command("add", GUEST, "--paths", "tiny/hall.jsonl", code=2)
    assert "was changed meanwhile" in told and "is changed already" not in told
    assert inventory(run.store.root / "roots") == roots


def test_a_note_names_what_was_made_of_former_text_and_what_is_begun(run):
    """Or who removes what it names leaves an expert of the former text, or checkpoints, behind."""
    run.command("add", GUEST, "--paths", "tiny/hall.jsonl")
    former = there(run).keys()
    rows = (run.path.parent / "hall.jsonl").read_text("utf-8").splitlines(keepends=True)
    (run.path.parent / "less.jsonl").write_text("".join(rows[:-9]), "utf-8")
    path = run.path
    path.write_text(path.read_text("utf-8").replace("hall.jsonl", "less.jsonl"), "utf-8")
    begun(run)
    under_way = {address for address in addresses(run) if GUEST in address} - former
    told = run.command("remove", GUEST)
    (note,) = removed(run.store)[0]
    made = {address for address in former if GUEST in address}
    assert len(made) == 2 and set(note.addresses) == made | under_way
    assert all(address in told for address in note.addresses)


def addresses(run) -> set[str]:
    return {address for _, _, address in jobs(load(run.path), "train_experts")}


def test_on_modal_the_file_is_changed_here_and_the_rest_made_there(run):
    told = run.command("add", GUEST, "--paths", "tiny/hall.jsonl", "--modal")
    assert "made on Modal by: modal run modal_app.py::run_all --config tiny/tiny.yaml" in told
    assert load(run.path).experts == ("sea", "shop", GUEST)
    assert not run.store.root.exists()


def test_what_lies_behind_a_url_is_asked_for_before_the_file_changes(run):
    text = run.path.read_text("utf-8")
    told = run.command("add", GUEST, "--paths", "memory://absent/*.jsonl", code=2)
    assert "data.files: *.jsonl is gone, so nothing was changed" in told
    told = run.command("add", GUEST, "--paths", "https://me:hunter2@host/x.jsonl", code=2)
    assert "holds a password in a URL" in told and "hunter2" not in told
    assert run.path.read_text("utf-8") == text


def test_a_task_comes_and_goes_and_no_other_adapter_is_made_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    raw = merge(lora_small.SETTINGS, {"loras": {"defaults": {"steps": 1, "eval_every_steps": 0}}})
    raw |= {"evaluate": {"smoke": True, "smoke_rows": 2, "bootstrap": 10, "consistency_rows": 0}}
    (tmp_path / "loras.json").write_text(json.dumps(raw["loras"], indent=1), "utf-8")
    path = tmp_path / "run.yaml"
    path.write_text(yaml_text(raw | {"loras": "loras.json"}), "utf-8")
    before = {file.name: file.read_text("utf-8") for file in tmp_path.iterdir()}
    where = ("--config", "run.yaml", "--store", "store")
    assert main(["run", *where]) == 0
    run = SimpleNamespace(path=path, store=Store(tmp_path / "store"))
    made = there(run)
    capsys.readouterr()
    synthetic = (
        "dataset={source: synthetic, synthetic: {kind: shape, train: 24, valid: 8, test: 8}}"
    )
    assert main(["add", GUEST, "--option", synthetic, "--option", "max_new_tokens=4", *where]) == 0
    told = capsys.readouterr().out
    assert row(told.partition("Score of each expert")[2], GUEST)[1] == "–"
    jobs_made = re.findall(r"^made: (.*);", told, re.M)
    assert jobs_made == [
        f"preprocess {GUEST}, routing, train_experts {GUEST}, train_router, evaluate"
    ]
    assert main(["remove", GUEST, *where]) == 0
    assert "made: nothing" in capsys.readouterr().out
    assert there(run) == made
    assert {name: (tmp_path / name).read_text("utf-8") for name in before} == before
    assert main(["deploy", *where]) == 0
    (bundle,) = (tmp_path / "store/artifacts").glob("deploy-*")
    assert not [file for file in bundle.rglob("*") if GUEST.encode() in contents(file)]


def contents(path) -> bytes:
    return path.name.encode() + (path.read_bytes().lower() if path.is_file() else b"")
