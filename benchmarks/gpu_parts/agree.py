"""Whether the device computes the losses that the processor computes.

Both train the same steps from the same weights, in processes of their own: which device a process
takes is decided by what it sees.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict

from benchmarks.gpu_parts import Row, Setup, told
from benchmarks.measuring import ROOT, Job, Sizes

TINY = Sizes(512, 64, 128, 4, 4, 344, 512, 8)
FORMS = ("trunk", "expert", "low_rank", "adapter")
STEPS = 5
# Nats of a training loss. Sums of another order differ by less in fp32; bf16 keeps 8 bits.
LIMITS = {"fp32": 2e-3, "bf16": 3e-2}


def agree(setup: Setup) -> Iterator[Row]:
    """Yield a row per form and dtype, with the largest difference of any step's loss."""
    processes = {}
    for device in ("cpu", setup.device):
        # On a processor alone the second one is the same again, which has to agree to the bit
        name = f"{device}-{len(processes)}"
        processes[name] = _start(setup, device, name)
    found = [_losses(process) for process in processes.values()]
    for key in found[0]:
        here, there = (each.get(key) for each in found)
        dtype = key.rpartition(", ")[2]
        if isinstance(here, str) or not isinstance(there, list):
            yield {"what": key, "verdict": str(there if isinstance(here, list) else here)}
            continue
        worst = max(abs(a - b) for a, b in zip(here, there, strict=True))
        yield {
            "what": key,
            "first loss": here[0],
            "last loss, processor": here[-1],
            "last loss, device": there[-1],
            "largest difference": f"{worst:.1e}",
            "verdict": "agrees" if worst <= LIMITS[dtype] else f"off, limit {LIMITS[dtype]:g}",
        }


def losses(setup: Setup) -> Iterator[Row]:
    """Yield the losses of every form and dtype on the device that this process sees."""
    from benchmarks.peers import ours
    from benchmarks.watching import Watch

    for dtype in LIMITS:
        # A folder for each, as a bf16 run keeps its trunk in bf16 beside the exact one
        work = str(setup.folder / dtype)
        base = Job("ours", "prepare", TINY, work, steps=STEPS, overrides=(f"dtype={dtype}",))
        base = Job(**vars(base) | {"device": setup.device})
        ours.prepare(base)
        for form in FORMS:
            key = f"{form}, {dtype}"
            watch = Watch(device=setup.device)
            try:
                ours.train(Job(**vars(base) | {"task": form}), watch)
            except Exception as error:
                # Told in the table: the other forms have to be seen all the same
                yield {"what": key, "error": told(error)}
                continue
            yield {"what": key, "nats": watch.nats}


def _start(setup: Setup, device: str, name: str) -> subprocess.Popen:
    given = asdict(setup) | {"device": device, "work": str(setup.folder / name)}
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "0") if device == "cuda" else ""
    command = [sys.executable, "-m", "benchmarks.gpu_parts", "agree.losses", json.dumps(given)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": seen, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def _losses(process: subprocess.Popen) -> dict[str, list[float] | str]:
    """Return nats by form and dtype, or what went wrong with it."""
    text, _ = process.communicate()
    rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return {row["what"]: row.get("nats", row.get("error")) for row in rows}
