"""The commands of docs/domains.md, which has those of the README too, typed as they stand there,
one after another, on a small run whose trunk is trained from zero."""

import json
import re
import shlex
import shutil
from pathlib import Path

import local_jobs
import pytest
from conftest import documents
from test_domain_commands import FEW, contents, row
from yaml_text import yaml_text

from pipeline.__main__ import main
from pipeline.config.files import parse_yaml
from pipeline.families.load import load
from pipeline.run.domain_words import ABOUT
from pipeline.store.artifacts import inventory
from pipeline.store.roots import read_root

quick = local_jobs.quick  # a fixture
ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/domains.md").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")
# config/demo_from_zero.yaml, as a test can afford it
FROM_ZERO = {
    "data": {"megabytes_per_domain": 0.05, "valid_share": 0.1, "test_share": 0.1},
    "partition": {"min_tokens": 100},
    "tokenizer": {"vocab_size": 300, "sample_megabytes": 0.05},
    "trunk": FEW
    | {"steps": 4, "layers": 1, "d_model": 32, "heads": 2, "d_ff": 64, "context_tokens": 32},
    "expert": FEW | {"steps": 2, "statistics_tokens": 512},
    "router": {"steps": 0},
    "dense": {"baselines": ["path"]},
    "evaluate": {"tokens_per_domain": 256, "rivals": "few", "continuation_tokens": 0},
    "runtime": {"threads": 1},
}

# What a domain that has come and gone leaves in the file
WRITTEN_OUT = "trunk:\n  domains: [wiki, code]\ndense:\n  domains: [wiki, code]\n"


def commands(text: str) -> list[str]:
    """Return the commands of a page that have a line of their own."""
    return re.findall(r"^python -m pipeline (.+)$", text, re.M)


def typed(command: str) -> None:
    """Carry out a command as it stands, a run of experts on this machine."""
    assert main(shlex.split(command)) == 0


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder as the page has it: configurations, its own file, text."""
    shutil.copytree(ROOT / "config", tmp_path / "config")
    (tmp_path / "config/demo_from_zero.yaml").write_text(yaml_text(FROM_ZERO), "utf-8")
    for name, text in re.findall(r"^```yaml\n# (\S+)\n(.*?)^```$", PAGE, re.M | re.S):
        assert parse_yaml(text)
        (tmp_path / name).write_text(f"# {name}\n{text}", "utf-8")
    texts = {"wiki": "sea", "code": "shop", "medicine/a": "hall", "corrected": "hall"}
    for name, domain in texts.items():
        file = tmp_path / f"texts/{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = documents(domain) if name != "corrected" else documents(domain)[::-1]
        file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOLEFORGE_STORE", str(tmp_path / "store"))
    return tmp_path


def test_the_commands_of_the_page_in_its_order(place, capsys):
    found = commands(PAGE)
    assert [command.split()[0] for command in found[:6]] == [
        *("run", "add", "replace", "remove", "plan", "runs")
    ]
    file = place / "mine.yaml"
    text = file.read_text("utf-8")
    pictures = (place / "config/tiny_loras.json").read_bytes()
    told = []
    experts = []
    run = {}
    for command in found:
        typed(command)
        told.append(capsys.readouterr().out)
        experts.append(len(load(file).experts))
        if not run:
            run = inventory(place / "store/artifacts")
    assert experts == [2, 3, 3, 2, 2, 2, 2, 2]
    # What has come and gone leaves the trunk's domains written out, and a note
    assert file.read_text("utf-8") == text + WRITTEN_OUT
    assert (place / "config/tiny_loras.json").read_bytes() == pictures
    _, add, replace, remove, plan, runs, *modal = told
    assert "+    - {paths: [texts/medicine/*.jsonl], domain: medicine}" in add
    assert "train_experts medicine" in add.partition("to be made")[2]
    assert len(row(add, "wiki")) == 4 and row(add, "medicine")[1::2] == ["–", "–"]
    assert "–" not in row(replace, "medicine") and row(remove, "medicine")[2:] == ["–", "–"]
    # What there was is what it was, and is found again once the guest has left
    (made, again, left) = (made_jobs(each) for each in (add, replace, remove))
    assert made == [
        *("preprocess medicine", "train_experts medicine"),
        *("train_router", "evaluate"),
    ]
    assert again == made and left == ["nothing"]
    now = inventory(place / "store/artifacts")
    assert {name: now.get(name) for name in run} == run
    assert all("modal run modal_app.py::run_all" in each for each in modal)
    (note,) = (place / "store/removed").iterdir()
    gone = json.loads(note.read_text("utf-8"))
    noted = f"removed: medicine at {gone['at']} from mine (mine.yaml); still in "
    assert noted in remove and noted in plan and noted in runs
    # Nothing that is given away knows of it any more
    typed("deploy --config mine.yaml")
    (bundle,) = (place / "store/artifacts").glob("deploy-*")
    assert not [path for path in bundle.rglob("*") if b"medicine" in contents(path)]
    # As the page says, its files go with the run that made them
    (rm,) = re.findall(r"`python -m pipeline (rm RUN)`", PAGE)
    for path in sorted((place / "store/roots").iterdir()):
        if set(gone["addresses"]) & set(read_root(path).addresses):
            typed(f"{rm.replace('RUN', path.stem)} --yes")
    left = {path.name for path in (place / "store/artifacts").iterdir()}
    assert gone["addresses"] and left.isdisjoint(gone["addresses"])
    # Once it is back, it is not among what was taken out
    capsys.readouterr()
    typed("add medicine --config mine.yaml --paths texts/corrected.jsonl --modal")
    typed("plan --config mine.yaml")
    assert "removed:" not in capsys.readouterr().out


def made_jobs(told: str) -> list[str]:
    """Return the jobs that a command says it has made."""
    (made,) = re.findall(r"^made: (.*);", told, re.M)
    return made.split(", ")


def test_the_commands_of_the_readme_are_the_pages():
    shown = [command for command in commands(README) if command.split()[0] in ABOUT]
    assert set(shown) <= set(commands(PAGE))
