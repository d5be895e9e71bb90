"""Who may import whom, read from the syntax trees of the whole program.

The rule: errors < config, store, budget, history < data, model, means, moments < optimizer < checkpoint < train,
evaluate, report, bundle < families < stages < backend, serve < experiments < __main__. A module imports only lower
layers; files of one folder may import each other. Some packages are confined to the one place that knows them.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = (
    ("errors",),
    ("config", "store", "budget", "history"),
    ("data", "model", "means", "moments"),
    ("optimizer",),
    ("checkpoint",),
    ("train", "evaluate", "measures", "answers", "report", "bundle"),
    ("families",),
    ("stages",),
    ("backend", "serve", "plan"),
    ("experiments", "cloud"),
    ("__main__",),
)
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
CONFINED = {
    "modal": ("modal_app.py",),
    "wandb": ("pipeline/history.py",),
    "datasets": ("pipeline/data/", "benchmarks/"),  # benchmarks measure us against it
    "peft": ("pipeline/families/lora_", "pipeline/serve/"),
}
OUTSIDE = ("modal_app", "scripts", "benchmarks", "tests")  # the pipeline does not know who uses it
FOLDERS = ("pipeline", "scripts", "benchmarks", "routing-generator")
LIGHT = ("config", "store", "budget", "history")  # quick to import: no command waits for what it does not need
HEAVY = {"torch", "transformers", "datasets", "wandb", "modal", "sklearn", "matplotlib", "pandas", "peft", "PIL"}


def imported(tree: ast.AST, file: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import, also inside functions; relative ones made absolute."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                above = file.parent.parts[: len(file.parent.parts) - level + 1] if level else ()
                base = ".".join([*above, *([module] if module else [])])
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in names)
            case ast.Call(func=ast.Name(id="__import__"), args=[ast.Constant(value=str() as name), *_]):
                yield node.lineno, name
            case ast.Call(func=ast.Name() | ast.Attribute() as called, args=[ast.Constant(value=str() as name), *_]):
                if ast.unparse(called).endswith("import_module"):
                    yield node.lineno, name.lstrip(".") if not name.startswith(".") else f"pipeline{name}"


def violations(root: Path) -> list[str]:
    """Return `file:line: what is wrong` for every import below root that breaks the rule."""
    files = [*root.glob("*.py"), *(file for folder in FOLDERS for file in (root / folder).rglob("*.py"))]
    found = []
    for file in sorted(path.relative_to(root) for path in files):
        names = list(imported(ast.parse((root / file).read_text("utf-8")), file))
        broken = {problem for line, name in names for problem in _confinement(file, line, name)}
        if file.parts[0] == "pipeline":
            broken |= {problem for line, name in names for problem in _layers(file, line, name)}
            broken |= {(1, f"{_part(file)} has no layer; give it one in LAYERS")} if _part(file) not in RANK else set()
        found += [f"{file}:{line}: {problem}" for line, problem in sorted(broken)]
    return found


def _part(file: Path) -> str:
    """Return the module or folder of pipeline/ that file belongs to."""
    part = file.with_suffix("").parts[1]
    return "errors" if part == "__init__" else part  # the package itself stands at the bottom


def _confinement(file: Path, line: int, name: str) -> Iterator[tuple[int, str]]:
    package = name.partition(".")[0]
    if package in CONFINED and not file.as_posix().startswith(CONFINED[package]):
        yield line, f"imports {package}, which only {' and '.join(CONFINED[package])} may"


def _layers(file: Path, line: int, name: str) -> Iterator[tuple[int, str]]:
    package, _, rest = name.partition(".")
    here, there = _part(file), rest.partition(".")[0]
    if package in OUTSIDE:
        yield line, f"imports {package}, which stands above the pipeline"
    elif package == "pipeline" and there in RANK and there != here and RANK[there] >= RANK.get(here, 0):
        yield line, f"imports {there}, which is not below {here}"
    elif package == "pipeline" and here == "model" and there in RANK and there not in ("model", "errors"):
        yield line, f"imports {there}: model/ knows torch, and nothing of ours but errors"


def test_every_import_keeps_the_rule():
    assert violations(ROOT) == []


SMALL = {
    "pipeline/__init__.py": "",
    "pipeline/errors.py": "",
    "pipeline/store.py": "from .errors import StoreError\n",
    "pipeline/history.py": "def f():\n    import wandb\n",
    "pipeline/data/__init__.py": "from . import corpus\n",
    "pipeline/data/corpus.py": "import datasets\nfrom ..config import Config\nfrom . import shards\n",
    "pipeline/data/shards.py": "import pipeline.errors\n",
    "pipeline/model/trunk.py": "import torch\nfrom ..errors import PipelineError\nfrom .experts import Expert\n",
    "pipeline/__main__.py": "from . import __version__, stages\nfrom .data import corpus\n",
    "modal_app.py": "import modal\nfrom pipeline import stages\n",
    "benchmarks/preprocess.py": "import datasets\nfrom pipeline.data import corpus\n",
    "scripts/look.py": "from pipeline.history import read\n",
}
MUTATIONS = {
    "upward": ("pipeline/store.py", "from .data import corpus", "imports data, which is not below store"),
    "upward, absolute": ("pipeline/store.py", "import pipeline.train", "imports train, which is not below store"),
    "upward, from package": ("pipeline/store.py", "from pipeline import train", "imports train, which is not below"),
    "upward, from dot": ("pipeline/store.py", "from . import errors, train", "imports train, which is not below"),
    "upward, two dots": ("pipeline/data/corpus.py", "from ..families.ffn_moe import x", "imports families, which is"),
    "upward, two dots, module": ("pipeline/data/corpus.py", "from .. import stages", "imports stages, which is not"),
    "upward, lazy": ("pipeline/store.py", "def f():\n    from .data import corpus", "imports data, which is not"),
    "upward, importlib": ("pipeline/store.py", "importlib.import_module('pipeline.data')", "imports data, which is"),
    "upward, relative importlib": ("pipeline/store.py", "import_module('.data', __package__)", "imports data, which"),
    "sibling": ("pipeline/history.py", "from .store import Store", "imports store, which is not below history"),
    "sibling folder": (
        "pipeline/model/trunk.py",
        "from ..data import corpus",
        "imports data, which is not below model",
    ),
    "package init": ("pipeline/__init__.py", "from .store import Store", "imports store, which is not below errors"),
    "model on config": ("pipeline/model/trunk.py", "from ..config import Config", "imports config: model/ knows torch"),
    "above": ("pipeline/data/shards.py", "import benchmarks.preprocess", "imports benchmarks, which stands above"),
    "unknown module": ("pipeline/helpers.py", "", "helpers has no layer"),
    "modal": ("pipeline/store.py", "import modal", "imports modal, which only modal_app.py may"),
    "modal, part": ("scripts/look.py", "from modal.volume import Volume", "imports modal, which only modal_app.py may"),
    "modal, __import__": ("pipeline/store.py", "x = __import__('modal')", "imports modal, which only modal_app.py may"),
    "wandb": (
        "pipeline/data/corpus.py",
        "def f():\n    import wandb as w",
        "imports wandb, which only pipeline/history",
    ),
    "datasets": (
        "pipeline/store.py",
        "from datasets import load_dataset",
        "imports datasets, which only pipeline/data/",
    ),
    "peft": (
        "pipeline/model/trunk.py",
        "if x:\n    import peft",
        "imports peft, which only pipeline/families/lora_ and",
    ),
}


@pytest.fixture
def tree(tmp_path):
    for name, source in SMALL.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    return tmp_path


def test_a_tree_that_keeps_the_rule_passes(tree):
    assert violations(tree) == []


@pytest.mark.parametrize(("name", "line", "expected"), MUTATIONS.values(), ids=MUTATIONS)
def test_a_broken_rule_is_found_where_it_stands(tree, name, line, expected):
    before = SMALL.get(name, "")
    (tree / name).write_text(f"{before}{line}\n")
    (found,) = violations(tree)
    number = before.count("\n") + line.count("\n") + 1
    assert found.startswith(f"{name}:{number}: {expected}")


def loaded(program: str) -> set[str]:
    """Return the heavy packages that a fresh process has in memory after program."""
    ending = "; import sys, json; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", program + ending], cwd=ROOT, capture_output=True, check=True, text=True)
    return HEAVY & set(json.loads(run.stdout.splitlines()[-1]))


@pytest.mark.parametrize("names", [LIGHT, ("__main__",)], ids=["light modules", "command line"])
def test_importing_what_every_command_needs_loads_nothing_heavy(names):
    assert loaded("import " + ", ".join(f"pipeline.{name}" for name in names)) == set()


def test_what_is_loaded_is_seen():
    assert loaded("import email, matplotlib") == {"matplotlib", "PIL"}  # which it brings


OF_OTHERS = ("error", "hook")  # what getattr with a default may be asked of


def test_nothing_is_read_of_settings_that_they_do_not_have():
    """getattr with a default hides a setting that nobody can set; of others' objects it is fine."""
    found = []
    for folder in ("data", "families", "config"):
        for file in (ROOT / "pipeline" / folder).glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and len(node.args) == 3:
                    asked, name = node.args[:2]
                    if isinstance(name, ast.Constant) and ast.unparse(asked) not in OF_OTHERS:
                        found.append(f"{file.name}: {ast.unparse(node)}")
    assert not found
