"""What the documents say is true: references, commands, links and configurations."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.__main__ import runs
from pipeline.families.load import load
from pipeline.run.arguments import OTHER_COMMANDS, parser
from pipeline.run.domain_words import ABOUT
from pipeline.run.experiments.reading import read_experiments
from pipeline.run.experiments.trials import listed_trials
from pipeline.run.stages import STAGES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = re.findall(r"^\s*(?:\.venv/bin/)?python -m pipeline ([^#\n]+)", README, re.M)


def test_the_configuration_reference_is_what_the_code_says():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/config_reference.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_the_check_sees_a_stale_reference(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import config_reference

    assert config_reference.with_reference(README) == README
    assert config_reference.with_reference(README.replace("`seed: 0`", "`seed: 1`")) == README


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_parses_and_its_configuration_loads(command):
    args = parser().parse_args(shlex.split(command))
    # Those about domains are of a file of one's own, which test_domain_docs.py has
    if args.command == "runs" or args.command in ABOUT:
        return
    if args.command == "experiments":
        assert listed_trials(read_experiments(ROOT / args.config, tuple(args.override)))
        return
    # prune reads all of a folder where none is named
    named = args.config or runs(ROOT / "config")
    configs = named if isinstance(named, list) else [named]
    for path in configs:
        assert load(ROOT / path, tuple(args.override)).experts


def test_the_readme_shows_the_commands_people_need():
    shown = {command.split()[0] for command in COMMANDS}
    assert (
        {"run", "plan", "train_router", "evaluate", "prune"}
        <= shown
        <= {*STAGES, *OTHER_COMMANDS, *ABOUT}
    )


def test_the_readme_is_short_enough_to_read():
    assert len(README.splitlines()) < 250


@pytest.mark.parametrize("form", ["low_rank, rank: 16", "adapter", "full, rank: null"])
def test_a_configuration_of_ones_own_loads_as_the_readme_has_it(tmp_path, form):
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", README, re.M | re.S)
    shown = "form: low_rank, rank: 16"
    assert shown in text
    shutil.copytree(ROOT / "config", tmp_path / "config")
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace(shown, f"form: {form}"), "utf-8")
    cfg = load(path)
    assert cfg.experts == ("law", "code", "recipes")
    assert cfg.trunk.is_pinned and cfg.tokenizer.pretrained == cfg.trunk.init
    assert cfg.expert.form == form.partition(",")[0] and cfg.searches_experts
    # What the stack is set beside gets as good a rate: the demo's is of the demo's model
    assert cfg.dense.lr is None and cfg.searches_dense == ("all",)
    assert cfg.expert.tokens == 16_000 and cfg.data.megabytes_per_domain == 2


@pytest.mark.parametrize("path", runs(ROOT / "config"), ids=lambda p: p.name)
def test_every_shipped_configuration_loads(path):
    assert load(path).experts


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_to_files_that_exist(path):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text("utf-8"))
    assert [t for t in targets if not (path.parent / t).exists()] == []


def test_every_module_is_in_the_readme_or_its_folder_is():
    modules = {
        p.relative_to(ROOT / "pipeline").parts[0] for p in (ROOT / "pipeline").rglob("*.py")
    } - {"__init__.py"}
    missing = [m for m in modules if m not in README and f"{m}/" not in README]
    assert missing == []


def test_the_makefile_has_the_two_commands_of_the_readme():
    targets = (ROOT / "Makefile").read_text("utf-8")
    assert "\ndemo:" in targets
    assert "\ntest:" in targets


def test_no_document_names_this_machine_or_a_registry():
    for path in DOCUMENTS:
        assert not re.search(r"/(home|root|work|opt|Users)/\w", path.read_text("utf-8")), path
