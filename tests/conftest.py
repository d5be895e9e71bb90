"""What every test starts from: one thread, no network, no account, a store of its own.

The variables are set before any test module is imported, because libraries read them once, at
import.
"""

import gc
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

for name in [name for name in os.environ if name.startswith(("WANDB_", "MODAL_", "HF_TOKEN"))]:
    del os.environ[name]  # the tests' own account, or none, never the developer's
for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "PYTHON_COLORS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)  # what is printed here is compared
os.umask(0o022)  # so are the modes of files
# Else each process that a test starts compiles all of the program that it imports, for 0.3 s
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.environ |= {
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # sums of files that tests made have no place among the developer's
    "XDG_CACHE_HOME": f"{tempfile.gettempdir()}/moleforge-tests-{os.getuid()}",
}

import pytest  # noqa: E402
from rich.console import Console  # noqa: E402
from yaml_text import yaml_text  # noqa: E402

from pipeline import hardware  # noqa: E402
from pipeline.train import memory_meter  # noqa: E402

LONGEST = (
    "test_modal_loopback",
    "test_readme_commands",
    "test_backend",
    "test_modal_vlm",
    "test_full_disk",
    "test_modal_qwen3",
    "test_robustness",
    "test_modal_endpoint",
    "test_stages",
    "test_versions",
)


def pytest_collection_modifyitems(items):
    """Start the files that take minutes first, so that no worker is left alone with one of them at
    the end."""
    items.sort(
        key=lambda item: (
            LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)
        )
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Look for no garbage among what is imported, which goes on growing: that took seconds."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish():
    """Leave what was imported out of every later collection of garbage: jobs that run in this
    process collect when they end, and looked through the modules of all tests each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread():
    """Keep torch on one thread, in tests that have imported it."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


measured_rate = hardware._best_rate  # for a test of the measuring itself
_status = memory_meter._status


def quick_status(key: str, file: str = "status") -> int:
    """Return what the system tells of this process's memory, without how much of it is shared: for
    that it looks at every page, 16 ms where there are 1.2 GB, two or three times a training."""
    return 0 if file == "smaps_rollup" else _status(key, file)


@pytest.fixture(scope="session", autouse=True)
def _quick():
    """Leave out of this process what costs time and decides nothing here: the machine's rate, which
    takes 0.2 s after each training and at each plan, waiting for the disk, and what memory is
    shared. Commands that are processes of their own do all of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "_best_rate", lambda *_: 1e9)
        patch.setattr(os, "fsync", lambda _handle: None)
        patch.setattr(memory_meter, "_status", quick_status)
        yield


@pytest.fixture
def store_path(tmp_path):
    """Path of a store that does not exist yet."""
    return tmp_path / "store"


WORDS = {
    "sea": [
        "tide",
        "reef",
        "gull",
        "mast",
        "kelp",
        "brine",
        "swell",
        "anchor",
        "heave",
        "salt",
        "drift",
        "shoal",
    ],
    "shop": [
        "lathe",
        "gear",
        "bolt",
        "chuck",
        "vise",
        "rivet",
        "clamp",
        "bench",
        "shim",
        "torque",
        "gauge",
        "file",
    ],
    "hall": [
        "oboe",
        "chord",
        "waltz",
        "reed",
        "fugue",
        "tempo",
        "viola",
        "score",
        "cadence",
        "bass",
        "trill",
        "rest",
    ],
}


def documents(domain: str, count: int = 120) -> list[str]:
    """Return short texts of one domain: its own words in its own order, with a few that all domains
    share."""
    draw, words = random.Random(domain), WORDS[domain]
    out = []
    for i in range(count):
        at, said = draw.randrange(len(words)), [f"{i}:"]
        for _ in range(draw.randrange(24, 48)):
            at = (at + draw.choice((1, 1, 1, 2, 5))) % len(words)
            said.append(draw.choice(("the", "and", "of")) if draw.random() < 0.2 else words[at])
        out.append(" ".join(said))
    return out


def tiny_config(folder: Path, **sections) -> Path:
    """Write three small domains and a configuration whose whole run takes seconds; return the
    configuration's path.

    Keywords replace fields: tiny_config(folder, trunk={"lr": 1e-3}, dtype="bf16").
    """
    base = {
        "name": "tiny",
        "dtype": "fp32",
        "data": {
            "source": "files",
            "files": [{"paths": [f"{domain}.jsonl"], "domain": domain} for domain in WORDS],
            "valid_share": 0.1,
            "test_share": 0.1,
        },
        "partition": {"domains": list(WORDS), "min_tokens": 100},
        "tokenizer": {"vocab_size": 300, "sample_megabytes": 0.1},
        "trunk": {
            "steps": 40,
            "layers": 2,
            "d_model": 32,
            "heads": 2,
            "d_ff": 64,
            "context_tokens": 32,
            "lr": 3e-3,
            "batch_sequences": 8,
            "warmup_steps": 5,
            "eval_every_steps": 10,
            "eval_tokens": 768,
        },
        "expert": {
            "steps": 20,
            "batch_sequences": 8,
            "warmup_steps": 3,
            "eval_every_steps": 5,
            "eval_tokens": 768,
            "lr": 3e-3,
            "statistics_tokens": 2048,
        },
        "router": {
            "steps": 16,
            "batch_sequences": 8,
            "warmup_steps": 2,
            "eval_every_steps": 5,
            "eval_tokens": 768,
        },
        "dense": {"baselines": ["total", "path"]},
        "evaluate": {"tokens_per_domain": 512, "bootstrap": 20},
        "runtime": {"threads": 1, "save_every_s": 0.05, "log_every_steps": 5},
    }
    folder.mkdir(parents=True, exist_ok=True)
    for domain in WORDS:
        rows = (json.dumps({"text": text}) + "\n" for text in documents(domain))
        (folder / f"{domain}.jsonl").write_text("".join(rows), "utf-8")
    for key, value in sections.items():
        base[key] = base.get(key, {}) | value if isinstance(value, dict) else value
    path = folder / "tiny.yaml"
    path.write_text(yaml_text(base), "utf-8")
    return path


def make_all(path: Path, store_path: Path, *overrides: str) -> None:
    """Do every stage of a configuration in this process, without what the command line prints."""
    from pipeline.families.load import load
    from pipeline.run import stages
    from pipeline.run.job import run_job
    from pipeline.store.artifacts import Store

    cfg, store = load(path, overrides), Store(store_path).open()
    with open(os.devnull, "w") as nowhere:
        for stage in stages.RUN:
            for _, item, _ in stages.jobs(cfg, stage):
                run_job(
                    stage,
                    cfg,
                    store,
                    item,
                    progress=lambda _text, _share: None,
                    console=Console(file=nowhere),
                )


def make_text(cfg, store) -> None:
    """Make a run's tokenizer and the tokens of all its domains, without what is printed."""
    from pipeline.run.job import run_job

    for stage in ("tokenizer", "preprocess"):
        for item in cfg.items(stage):
            run_job(stage, cfg, store, item, progress=lambda _text, _share: None)


@pytest.fixture
def tiny(tmp_path):
    """Path of a tiny configuration of this test's own."""
    return tiny_config(tmp_path / "tiny")


@pytest.fixture(scope="session")
def bundled(finished, tmp_path_factory):
    """(configuration, store, bundle) paths of that run deployed, in a store of its own; read it,
    never change it."""
    from pipeline.families.load import load
    from pipeline.run.job import run_job
    from pipeline.store.artifacts import Store

    path, store_path = finished
    copy = shutil.copytree(store_path, tmp_path_factory.mktemp("bundled") / "store")
    with pytest.MonkeyPatch.context() as environment:
        for name, value in PLANTED.items():
            environment.setenv(name, value)
        store = Store(copy).open()
        made = run_job("deploy", load(path), store, progress=lambda _text, _share: None)
    return path, copy, copy / "artifacts" / made.address


@pytest.fixture(scope="session")
def tasks_bundle(tmp_path_factory):
    """The bundle of a small run of adapters over a model that sees; read it, never change it."""
    import small_stack
    import torch

    torch.set_num_threads(1)
    return small_stack.bundle(tmp_path_factory.mktemp("tasks"))


# What the run that most tests read is made beside, and no file of it may hold
PLANTED = {
    "HF_TOKEN": "hf_PlantedPlantedPlantedPlanted0",
    "AWS_SECRET_ACCESS_KEY": "planted/Planted+Planted/planted0",
    "MOLEFORGE_API_KEY": "planted-sesame",
}


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """(configuration, store) paths of one complete run; read it, never change it."""
    folder = tmp_path_factory.mktemp("finished")
    path = tiny_config(folder / "tiny")
    with pytest.MonkeyPatch.context() as environment:
        for name, value in PLANTED.items():
            environment.setenv(name, value)
        make_all(path, folder / "store")
    return path, folder / "store"
