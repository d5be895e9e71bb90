"""Tokens/s, MFU and memory of every training, ours and the peers', by turns.

The contenders of a size share this process, as starting one costs as long as a turn: before each
turn everything of the last one is freed, and the peak starts anew.
"""

import gc
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.gpu_parts import Row, Setup, told
from benchmarks.gpu_parts.peak import flops_per_s
from benchmarks.measuring import SIZES, Job, progress
from benchmarks.peers.__main__ import work

MEMORY_DISK = Path("/dev/shm")  # noqa: S108 (a mount, not a file of ours)


@dataclass(frozen=True)
class Contender:
    """One training, and about how long a turn of it takes on a GPU."""

    words: str
    job: dict
    turn_s: float = 6.0


OURS = (
    Contender("ours: trunk, all weights", {"peer": "ours", "task": "trunk"}, 12),
    Contender("ours: full expert", {"peer": "ours", "task": "expert"}, 10),
    Contender("ours: low-rank expert", {"peer": "ours", "task": "low_rank"}),
    Contender("ours: adapter", {"peer": "ours", "task": "adapter"}),
)
COMPILED = Contender(
    "ours: trunk, all weights, compiled",
    {"peer": "ours", "task": "trunk", "overrides": ("trunk.compile=true",)},
    45,
)
PEERS = (
    Contender(
        "nanoGPT's settings: all weights, compiled",
        {"peer": "nanogpt", "task": "trunk", "compiled": True},
        30,
    ),
    Contender("Trainer: all weights", {"peer": "trainer", "task": "trunk"}, 8),
    Contender("Trainer: FFN alone", {"peer": "trainer", "task": "expert"}, 8),
    Contender("Trainer and PEFT: LoRA on all", {"peer": "trainer", "task": "adapter"}, 8),
)


def of_100m(setup: Setup) -> Iterator[Row]:
    """Yield the turns at 100 M parameters."""
    yield from _turns(setup, "100m", (*OURS, *PEERS), micro=None)


def of_350m(setup: Setup) -> Iterator[Row]:
    """Yield the turns at 350 M parameters, of our compiled training too."""
    yield from _turns(setup, "350m", (*OURS, *PEERS, COMPILED), micro=8)


def of_1b(setup: Setup) -> Iterator[Row]:
    """Yield the turns at 1 B parameters."""
    yield from _turns(setup, "1b", (*OURS, *PEERS), micro=4)


def _turns(
    setup: Setup, size: str, contenders: tuple[Contender, ...], micro: int | None
) -> Iterator[Row]:
    """Yield a row for each turn; `micro` is what the peers' whole logits leave room for."""
    # What is large here is written for minutes alone: in memory it is not the disk that is timed
    in_memory = setup.device == "cuda" and shutil.disk_usage(MEMORY_DISK).free > 40e9
    root = MEMORY_DISK if in_memory else setup.folder
    folder = root / f"moleforge-gpu-{size}"
    try:
        yield from _all_turns(setup, size, contenders, micro, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _all_turns(
    setup: Setup, size: str, contenders: tuple[Contender, ...], micro: int | None, folder: Path
) -> Iterator[Row]:
    sizes = SIZES["toy" if setup.small else size]
    steps, skip = (4, 2) if setup.small else (8, 3)
    base = Job(
        "ours",
        "prepare",
        sizes,
        str(folder),
        steps=steps,
        skip=skip,
        experts=1,
        threads=torch.get_num_threads(),
        device=setup.device,
    )
    work(import_module("benchmarks.peers.ours"), base)
    peak = flops_per_s(setup.device)
    for number in range(setup.rounds):
        for contender in contenders:
            # The first turn pays for compiling and is measured by the last steps alone
            if not setup.has_time_for(contender.turn_s if setup.device == "cuda" else 2):
                progress(f"{size}: no time left for {contender.words}, round {number + 1}")
                continue
            job = replace(base, **contender.job)
            if setup.small:
                # Compilers take their minute however small the network is
                job = replace(job, compiled=False, overrides=())
            if job.peer != "ours":
                job = replace(job, micro=micro and min(micro, sizes.batch_sequences))
            yield {"what": contender.words} | _turn(job, peak)


def _turn(job: Job, peak_flops_per_s: float) -> Row:
    """Return what a turn measured, or why there was none."""
    gc.collect()
    if job.device == "cuda":
        torch.cuda.empty_cache()
    try:
        found = work(import_module(f"benchmarks.peers.{job.peer}"), job)
    except Exception as error:
        # One that runs out of memory, or cannot be compiled, must not take the others along
        return {"note": told(error)}
    if "refused" in found:
        return {"note": told(found["refused"])}
    needed = job.sizes.flops_per_token(job.task)
    mfu = found["tokens_per_s"] * needed / peak_flops_per_s
    row: Row = {
        "tokens/s": found["tokens_per_s"],
        "MFU": mfu,
        "s per step": found["step_s"],
        "first step, s": found["first_step_s"],
        "peak MB": found["peak_mb"],
        "last loss": found["nats"],
    }
    if "predicted_mb" in found:
        row["predicted MB"] = found["predicted_mb"]
        row["predicted / measured"] = found["predicted_mb"] / max(1.0, found["fit_mb"])
    return row
