"""What a new stage takes, tried in a throw-away copy of the program: one row and one function.

The row gives it a command, help, a line of the plan, an address, a container and an entrypoint.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fakes import contents
from rehearsal import LINUX, ROOT, rehearsal

from pipeline.families.load import load
from pipeline.protocols import quiet
from pipeline.run.job import run_job
from pipeline.store.artifacts import Store

ROW = """    Stage(
        "count",
        "count the parameters of every expert",
        "stack.count",
        needs=("train_experts",),
        machine="evaluate",
    ),
"""
FUNCTION = '''

def count(cfg, parts, folder, progress):
    """Write how many parameters each expert has."""
    import json

    found = {}
    for name in cfg.experts:
        tensors = parts.tensors("train_experts", "expert.safetensors", name)
        found[name] = sum(tensor.numel() for tensor in tensors.values())
    (folder / "count.json").write_text(json.dumps(found))
    return {"parameters": sum(found.values())}
'''


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of what is shipped, with one more row and one more function."""
    folder = tmp_path_factory.mktemp("copy") / "program"
    folder.mkdir()
    for name in ("pipeline", "config"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("modal_app.py", "modal_laptop.py", "requirements.lock"):
        shutil.copy(ROOT / name, folder)
    table = folder / "pipeline/families/ffn_moe/stages.py"
    before, report, after = table.read_text("utf-8").partition('    Stage(\n        "evaluate",\n')
    assert report
    table.write_text(before + ROW + report + after, "utf-8")
    with (folder / "pipeline/families/ffn_moe/stack.py").open("a", encoding="utf-8") as file:
        file.write(FUNCTION)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(configuration, store) of a run up to its experts; no path in it is of this machine alone."""
    from test_modal_loopback import TINY

    folder = tmp_path_factory.mktemp("trained")
    settings = TINY | {"trunk": TINY["trunk"] | {"steps": 3}, "modal": {}}
    settings["data"] = {"source": "installed", "megabytes_per_domain": 0.2}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings), "utf-8")
    cfg, store = load(path), Store(folder / "store").open()
    for stage in ("tokenizer", "preprocess", "train_shared", "train_experts"):
        for item in cfg.items(stage):
            run_job(stage, cfg, store, item, progress=quiet)
    return path, store.root


@pytest.fixture(scope="module")
def counted(copy, trained, tmp_path_factory):
    """(what its command printed, the store): done on this machine."""
    path, store_path = trained
    store = shutil.copytree(store_path, tmp_path_factory.mktemp("counted") / "store")
    return typed(copy, "count", "--config", path, "--store", store), store


def typed(copy: Path, *arguments) -> str:
    """Do a command of the copy; return what it printed on one line."""
    command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return " ".join((done.stdout + done.stderr).split())


def test_it_has_a_command_with_help_and_a_line_of_the_plan(copy, counted, trained):
    assert "count the parameters of every expert (ffn_moe)" in typed(copy, "--help")
    assert "Count the parameters of every expert" in typed(copy, "count", "--help")
    shown = typed(copy, "plan", "--config", trained[0], "--store", counted[1])
    assert "count-" in shown


def test_it_is_done_on_this_machine_and_nothing_else_is_done_again(counted, trained):
    said, store = counted
    assert "parameters" in said
    [folder] = (store / "artifacts").glob("count-*")
    assert set(json.loads((folder / "count.json").read_text())) == {"headers", "manual"}
    others = {name: sha for name, sha in contents(store).items() if not name.startswith("count-")}
    assert others == contents(trained[1])


@LINUX
def test_it_is_done_on_modal_with_the_same_bytes(copy, counted, trained, tmp_path):
    place = {"MOLEFORGE_VOLUME_PATH": str(tmp_path / "store"), "PYTHONPATH": str(copy)}
    with rehearsal(tmp_path, copy, **place) as client:
        assert "--config" in client("run", "modal_app.py::count", "--help")
        client("volume", "create", "--version", "2", "moleforge")
        shutil.copytree(trained[1], client.volume("moleforge"), dirs_exist_ok=True)
        said = client("run", "modal_app.py::count", "--config", str(trained[0]))
        assert "count: made" in said
        assert contents(client.volume("moleforge")) == contents(counted[1])
