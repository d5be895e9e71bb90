"""Who may import whom, read from the syntax trees of the whole program.

The rule: credentials < errors < hardware, config, model, metrics, report < store < data, train <
families < run, serve < cloud < __main__. A module imports only lower layers, families only what
lies below them (`adapters`), and no files import each other in a circle, also inside a folder. Some
packages are confined to the one place that knows them.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = (
    ("credentials",),
    ("errors", "protocols", "interrupts", "garbage"),
    ("hardware", "config", "model", "metrics", "report"),
    ("store",),
    ("data", "train"),
    ("families",),
    ("run", "serve"),
    ("cloud",),
    ("__main__",),
)
FAMILIES = (
    ("__init__",),
    ("report_files", "searches", "kit_files"),
    ("adapters",),
    ("ffn_moe", "lora_vlm"),
    ("load",),
)
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
FAMILY_RANK = {part: rank for rank, layer in enumerate(FAMILIES) for part in layer}
CONFINED = {
    "modal": ("modal_app.py", "modal_laptop.py"),
    "wandb": ("pipeline/store/history.py",),
    "tensorboard": ("pipeline/run/history/tensorboard.py", "scripts/foreign_histories.py"),
    "datasets": ("pipeline/data/", "benchmarks/"),  # benchmarks measure us against it
    "peft": ("pipeline/families/adapters/", "pipeline/families/lora_", "benchmarks/"),
    "ruamel": ("pipeline/config/",),
    "prometheus_client": ("pipeline/serve/metrics.py",),
    "optuna": ("pipeline/run/experiments/search.py",),
    "gguf": ("pipeline/families/ffn_moe/export/", "pipeline/model/gguf_reading.py"),
    "pillow_heif": ("pipeline/data/images/",),
    "imagehash": ("pipeline/data/images/",),
}
# What the package offers to whoever imports it: in functions, as every module of ours runs it first
FRONT = "pipeline/__init__.py"
OFFERED = ("metrics_of",)
# The pipeline does not know who uses it
OUTSIDE = ("modal_app", "modal_laptop", "scripts", "benchmarks", "tests")
FOLDERS = ("pipeline", "scripts", "benchmarks", "routing-generator")
# Quick to import: no command waits for what it does not need
LIGHT = (
    "config",
    "families.load",
    "store.artifacts",
    "store.history",
    "hardware",
    "run.trainings",
)
HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "wandb",
    "tensorboard",
    "modal",
    "sklearn",
    "matplotlib",
    "pandas",
    "peft",
    "PIL",
}


def imported(tree: ast.AST, file: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import, also inside functions; relative ones made
    absolute."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                above = file.parent.parts[: len(file.parent.parts) - level + 1] if level else ()
                base = ".".join([*above, *([module] if module else [])])
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Name(id="__import__"), args=[ast.Constant(value=str() as name), *_]
            ):
                yield node.lineno, name
            case ast.Call(
                func=ast.Name() | ast.Attribute() as called,
                args=[ast.Constant(value=str() as name), *_],
            ):
                if ast.unparse(called).endswith("import_module"):
                    yield (
                        node.lineno,
                        name.lstrip(".") if not name.startswith(".") else f"pipeline{name}",
                    )


def violations(root: Path) -> list[str]:
    """Return `file:line: what is wrong` for every import below root that breaks the rule."""
    files = [
        *root.glob("*.py"),
        *(file for folder in FOLDERS for file in (root / folder).rglob("*.py")),
    ]
    found, uses = [], {}
    for file in sorted(path.relative_to(root) for path in files):
        tree = ast.parse((root / file).read_text("utf-8"))
        if file.as_posix() == FRONT:
            at_once = [each for each in tree.body if not isinstance(each, ast.FunctionDef | ast.If)]
            tree.body = at_once
        names = list(imported(tree, file))
        if file.parts[0] == "pipeline":
            uses[_module(file)] = {name for _, name in names}
        broken = {problem for line, name in names for problem in _confinement(file, line, name)}
        if file.parts[0] == "pipeline":
            broken |= {problem for line, name in names for problem in _layers(file, line, name)}
            broken |= (
                {(1, f"{_part(file)} has no layer; give it one in LAYERS")}
                if _part(file) not in RANK
                else set()
            )
        found += [f"{file}:{line}: {problem}" for line, problem in sorted(broken)]
    return found + _circles(uses)


def _module(file: Path) -> str:
    """Return a file's dotted name; a package's __init__ has the package's."""
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


def _circles(uses: dict[str, set[str]]) -> list[str]:
    """Return one line if modules import each other in a circle; a package and what is in it do not
    count."""
    graph = {}
    for module, names in uses.items():
        # `from .shards import Shards` names a module and something in it, `from . import shards` a
        # module
        found = {name if name in uses else name.rpartition(".")[0] for name in names}
        inner = {name for name in found if f"{name}.".startswith(f"{module}.")}
        outer = {name for name in found if f"{module}.".startswith(f"{name}.")}
        graph[module] = (found & uses.keys()) - inner - outer
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [f"a circle: {' > '.join(error.args[1])}"]
    return []


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
    elif package == "pipeline" and there in OFFERED:
        yield line, f"imports {there}, which the package offers to others"
    elif (
        package == "pipeline"
        and there in RANK
        and there != here
        and RANK[there] >= RANK.get(here, 0)
    ):
        yield line, f"imports {there}, which is not below {here}"
    elif (
        package == "pipeline"
        and here == "model"
        and there in RANK
        and there not in ("model", "errors")
    ):
        yield line, f"imports {there}: model/ knows torch, and nothing of ours but errors"
    elif package == "pipeline" and here == there == "families":
        yield from _between_families(file, line, rest.split("."))


def _between_families(file: Path, line: int, names: list[str]) -> Iterator[tuple[int, str]]:
    """Families know `adapters` and nothing of each other; only `load` knows them all."""
    here = file.with_suffix("").parts[2]
    there = names[1] if len(names) > 1 and names[1] in FAMILY_RANK else "__init__"
    if here not in FAMILY_RANK:
        yield line, f"{here} has no layer; give it one in FAMILIES"
    elif there != here and FAMILY_RANK[there] >= FAMILY_RANK[here]:
        yield line, f"imports {there}, which is not below {here}"


def test_the_documents_state_the_order_that_is_enforced():
    order = " < ".join(" ".join(layer) for layer in LAYERS)
    for name in ("docs/architecture.md", "CONTRIBUTING.md"):
        assert f"\n{order}\n" in (ROOT / name).read_text("utf-8")


def test_every_import_keeps_the_rule():
    assert violations(ROOT) == []


SMALL = {
    "pipeline/__init__.py": "def metrics_of():\n    from .run.trainings import metrics_of\n",
    "pipeline/errors.py": "",
    "pipeline/config/run.py": "from ..errors import ConfigError\n",
    "pipeline/store/artifacts.py": "from ..errors import StoreError\n",
    "pipeline/store/history.py": "def f():\n    import wandb\n",
    "pipeline/data/__init__.py": "",
    "pipeline/data/corpus.py": "import datasets\nfrom ..config.run import RunConfig\n"
    "from . import shards\n",
    "pipeline/data/shards.py": "import pipeline.errors\n",
    "pipeline/model/trunk.py": "import torch\nfrom ..errors import PipelineError\n",
    "pipeline/model/experts.py": "from .trunk import Trunk\n",
    "pipeline/families/__init__.py": "from ..train.loop import Task\n",
    "pipeline/families/adapters/base.py": "import peft\nfrom .. import family\n",
    "pipeline/families/lora_vlm/family.py": "from ..adapters.base import LoadedBase\n",
    "pipeline/families/ffn_moe/family.py": "from ...data import shards\n",
    "pipeline/families/load.py": "from .lora_vlm.family import expert\n",
    "pipeline/train/loop.py": "from ..store.artifacts import Store\n",
    "pipeline/__main__.py": "from . import __version__\nfrom .data import corpus\n",
    "modal_app.py": "import modal\nfrom pipeline.run import stages\n",
    "benchmarks/preprocess.py": "import datasets\nfrom pipeline.data import corpus\n",
    "scripts/look.py": "from pipeline.store.history import read\n",
}
STORE, CORPUS, TRUNK = (
    "pipeline/store/artifacts.py",
    "pipeline/data/corpus.py",
    "pipeline/model/trunk.py",
)
BASE = "pipeline/families/adapters/base.py"
MUTATIONS = {
    "upward": (STORE, "from ..data import corpus", "imports data, which is not below store"),
    "upward, absolute": (STORE, "import pipeline.train", "imports train, which is not below"),
    "upward, from package": (STORE, "from pipeline import train", "imports train, which is not"),
    "upward, from dots": (STORE, "from .. import errors, train", "imports train, which is not"),
    "upward, three dots": (BASE, "from ...run import stages", "imports run, which is not below"),
    "upward, lazy": (
        STORE,
        "def f():\n    from ..data import corpus",
        "imports data, which is not",
    ),
    "upward, importlib": (STORE, "importlib.import_module('pipeline.data')", "imports data, which"),
    "upward, relative importlib": (
        STORE,
        "import_module('.data', 'pipeline')",
        "imports data, which",
    ),
    "sibling layer": (CORPUS, "from ..train import loop", "imports train, which is not below data"),
    "sibling, lowest": (
        TRUNK,
        "from ..config import run",
        "imports config, which is not below model",
    ),
    "package init": (
        "pipeline/__init__.py",
        "from .store import x",
        "imports store, which is not below",
    ),
    "package init, what it offers": (
        STORE,
        "def f():\n    from .. import metrics_of",
        "imports metrics_of, which the package offers to others",
    ),
    "families, up": (
        BASE,
        "from ..lora_vlm import family",
        "imports lora_vlm, which is not below adapters",
    ),
    "families, each other": (
        "pipeline/families/ffn_moe/family.py",
        "from ..lora_vlm.family import expert",
        "imports lora_vlm, which is not below ffn_moe",
    ),
    "families, load": (
        BASE,
        "from ..load import load",
        "imports load, which is not below adapters",
    ),
    "unknown family": (
        "pipeline/families/lora_audio/family.py",
        "from ..adapters import base",
        "lora_audio has no layer",
    ),
    "above": (
        "pipeline/data/shards.py",
        "import benchmarks.preprocess",
        "imports benchmarks, which",
    ),
    "unknown module": ("pipeline/helpers.py", "", "helpers has no layer"),
    "modal": (STORE, "import modal", "imports modal, which only modal_app.py and"),
    "modal, part": (
        "scripts/look.py",
        "from modal.volume import Volume",
        "imports modal, which only",
    ),
    "modal, __import__": (
        STORE,
        "x = __import__('modal')",
        "imports modal, which only modal_app.py",
    ),
    "wandb": (
        CORPUS,
        "def f():\n    import wandb as w",
        "imports wandb, which only pipeline/store/",
    ),
    "datasets": (STORE, "from datasets import load_dataset", "imports datasets, which only"),
    "ruamel": (
        STORE,
        "from ruamel.yaml import YAML",
        "imports ruamel, which only pipeline/config/",
    ),
    "peft": (
        TRUNK,
        "if x:\n    import peft",
        "imports peft, which only pipeline/families/adapters/",
    ),
}
CIRCLES = {
    "two files": ("pipeline/data/shards.py", "from . import corpus"),
    "by a name": ("pipeline/data/shards.py", "from .corpus import Stream"),
    "lazy": (TRUNK, "def f():\n    from .experts import Expert"),
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
    (tree / name).parent.mkdir(parents=True, exist_ok=True)
    (tree / name).write_text(f"{before}{line}\n")
    (found,) = [problem for problem in violations(tree) if not problem.startswith("a circle")]
    number = before.count("\n") + line.count("\n") + 1
    assert found.startswith(f"{name}:{number}: {expected}")


@pytest.mark.parametrize(("name", "line"), CIRCLES.values(), ids=CIRCLES)
def test_a_circle_is_found_also_inside_a_folder(tree, name, line):
    (tree / name).write_text(f"{SMALL[name]}{line}\n")
    (found,) = violations(tree)
    assert found.startswith("a circle: ") and name.removesuffix(".py").replace("/", ".") in found


def loaded(program: str) -> set[str]:
    """Return the heavy packages that a fresh process has in memory after program."""
    ending = "; import sys, json; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", program + ending],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
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
        for file in (ROOT / "pipeline" / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if (
                    isinstance(node, ast.Call)
                    and ast.unparse(node.func) == "getattr"
                    and len(node.args) == 3
                ):
                    asked, name = node.args[:2]
                    if isinstance(name, ast.Constant) and ast.unparse(asked) not in OF_OTHERS:
                        found.append(f"{file.name}: {ast.unparse(node)}")
    assert not found
