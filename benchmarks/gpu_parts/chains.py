"""The whole chains on the smallest settings, by the command that a user types, and killed in it."""

import json
import os
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from benchmarks import kill
from benchmarks.gpu_parts import Row, Setup
from benchmarks.measuring import ROOT

FIT = ("batch_sequences=4", "warmup_steps=2", "eval_every_steps=20", "eval_tokens=256")
TEXT = (
    "data.megabytes_per_domain=0.3",
    "partition.domains=[manual,licences]",
    "tokenizer.vocab_size=512",
    "tokenizer.sample_megabytes=0.3",
    "trunk.tokens=null",
    "trunk.steps=30",
    "trunk.layers=2",
    "trunk.d_model=64",
    "trunk.d_ff=128",
    "trunk.context_tokens=64",
    "expert.tokens=null",
    "expert.steps=20",
    "expert.statistics_tokens=1024",
    "router.tokens=null",
    "router.steps=10",
    "dense.baselines=[path]",
    "evaluate.tokens_per_domain=1024",
    "evaluate.bootstrap=20",
    *(f"{section}.{setting}" for section in ("trunk", "expert", "router") for setting in FIT),
)
FORMS = {
    "full experts": (),
    "low-rank experts": ("expert.form=low_rank", "expert.rank=8"),
    "adapters": ("expert.form=adapter", "expert.rank=8", "router.steps=0", "router.top_k=1"),
}
VLM_FILES = ("tiny_vlm.yaml", "tiny_loras.json", "tiny_dataset.yaml", "paraphrases.yaml")


def text(setup: Setup) -> Iterator[Row]:
    """Yield a row per form of expert; trunk and text are made once."""
    config = ROOT / "config" / "demo_from_zero.yaml"
    for words, overrides in FORMS.items():
        yield _run(setup, words, config, (*TEXT, *overrides))


def vision(setup: Setup) -> Iterator[Row]:
    """Yield the row of the tiny vision-language run, cut to a few steps of every training."""
    for name in VLM_FILES:
        shutil.copyfile(ROOT / "config" / name, setup.folder / name)
    loras = json.loads((setup.folder / "tiny_loras.json").read_text("utf-8"))
    loras["defaults"]["steps"] = loras["router"]["steps"] = 8
    for expert in loras["experts"]:
        expert.pop("overrides", None)
        expert["dataset"]["synthetic"] |= {"train": 80, "valid": 20, "test": 20}
    (setup.folder / "tiny_loras.json").write_text(json.dumps(loras), "utf-8")
    small = (setup.folder / "tiny_dataset.yaml").read_text("utf-8")
    small = small.replace("{train: 600, valid: 75, test: 100}", "{train: 40, valid: 10, test: 10}")
    small = small.replace("train: 600, valid: 75, test: 200", "train: 60, valid: 20, test: 20")
    (setup.folder / "tiny_dataset.yaml").write_text(small, "utf-8")
    yield _run(setup, "four adapters, router, report", setup.folder / "tiny_vlm.yaml", ())


def killed(setup: Setup) -> Iterator[Row]:
    """Yield whether a run that is killed in each of its trainings ends in the same bytes."""
    threads = ("runtime.threads=1", "runtime.save_every_s=0.2", "runtime.log_every_steps=5")
    # Long enough that a kill falls between two checkpoints
    longer = ("trunk.steps=60", "expert.steps=60", "dense.baselines=[]")
    args = Namespace(
        config=ROOT / "config" / "demo_from_zero.yaml",
        override=[*TEXT, *threads, *longer],
        kills=2,
        seed=0,
    )
    whole, again = setup.folder / "whole", setup.folder / "killed"
    kill.finish(kill.start(args, whole))
    aims = []
    for address, seconds in kill.aim(whole, 99):
        # Each training once; the other jobs are there for it
        if address.startswith(("train_shared", "train_experts")) and address not in dict(aims):
            aims.append((address, seconds))
    fell = kill.kill(args, again, aims[:2])
    kill.finish(kill.start(args, again))
    differ, files = kill.compare(whole, again)
    yield {
        "what": f"killed in {', '.join(fell)}",
        "files compared": files,
        "verdict": f"{len(differ)} differ: {differ[0]}" if differ else "the same bytes",
    }


def _run(setup: Setup, words: str, config: Path, overrides: tuple[str, ...]) -> Row:
    """Return how a run to its report went."""
    given = [part for override in overrides for part in ("--override", override)]
    command = [sys.executable, "-m", "pipeline", "run", "--config", str(config)]
    start_s = time.perf_counter()
    done = subprocess.run(
        [*command, "--store", str(setup.folder / "store"), *given],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    reports = list((setup.folder / "store" / "artifacts").glob("evaluate*/report.json"))
    ended = "report written" if reports and not done.returncode else _last_line(done)
    return {"what": words, "seconds": time.perf_counter() - start_s, "verdict": ended}


def _last_line(done: subprocess.CompletedProcess) -> str:
    """Return the end of what a failed command said."""
    said = (done.stdout + done.stderr).strip().splitlines()
    return f"exit {done.returncode}: {' '.join(said[-3:])}"[:300]
