"""One job in this fresh process: `python -m benchmarks.peers JSON` prints what it measured as one
line of JSON."""

import json
import sys
from importlib import import_module

import torch
import torch._dynamo

from benchmarks.measuring import Job, Sizes
from benchmarks.watching import Watch
from pipeline.errors import PipelineError
from pipeline.hardware import has_bf16, product_flops_per_s


def main(text: str) -> None:
    """Do the job and print its result."""
    raw = json.loads(text)
    job = Job(**raw | {"sizes": Sizes(**raw["sizes"]), "overrides": tuple(raw["overrides"])})
    torch.set_num_threads(job.threads)
    if job.peer == "modularforge":
        sys.path.insert(0, job.modularforge)
    module = import_module(f"benchmarks.peers.{job.peer}")
    print(json.dumps(work(module, job)))


def work(module, job: Job) -> dict:
    """Do a job with the module of its peer; return what was measured."""
    if job.task == "prepare":
        return {"made": module.prepare(job)}
    if job.task == "product":
        return {"flops_per_s": product_flops_per_s(has_bf16())}
    does = {"bundle": "bundle", "open": "open_bundle"}.get(job.task, "train")
    try:
        if hasattr(module, "ready"):
            module.ready(job)
        watch = Watch(job.skip, job.device)
        getattr(module, does)(job, watch)
    except PipelineError as error:  # ours declines what it cannot do within its budget
        return {"refused": str(error)}
    return watch.result(job.sizes.step_tokens)


if __name__ == "__main__":
    main(sys.argv[1])
