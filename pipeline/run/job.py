"""One job of a run: done in this process, or found done.

What a stage is for is its family's affair; that its inputs are there and belong together, that one
process makes it, and what is written down of it, is the same for all of them and stands here.
"""

import importlib.metadata
import json
import shutil
import time
from contextlib import suppress
from dataclasses import replace
from functools import cache

from rich.console import Console

from ..config.run import RunConfig
from ..errors import PipelineError
from ..hardware import (
    bound_kernel_caches,
    cpu_name,
    gpu_bytes,
    gpu_name,
    is_full,
    is_unknown_gpu,
    set_fastest_threads,
)
from ..protocols import Progress
from ..store.artifacts import (
    Manifest,
    Store,
    inventory,
    now,
    write_text,
)
from ..store.lineage import Lineage
from ..store.room import translate_disk_errors
from ..store.versions import Versions
from .context import JobContext, StoredParts
from .former import kept_settings
from .identity import check_unchanged, note_made
from .stages import Addresses, label

# Of the memory with which a GPU was full, for the next try
LESS = 0.8
ON_PROCESSOR = "run on the processor, with CUDA_VISIBLE_DEVICES= in front of the command"
# What decides bytes beside the configuration and the machine; written down with every artifact
PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "safetensors",
    "numpy",
    "peft",
    "pillow",
)


def run_job(
    stage: str,
    cfg: RunConfig,
    store: Store,
    item: str | None = None,
    *,
    progress: Progress,
    console: Console | None = None,
) -> Manifest:
    """Do one job, or return its manifest when its result is already there and current.

    Waits when another process is doing the same. Raises MissingArtifact when an input is not there,
    StaleArtifact when one is stale.
    """
    bound_kernel_caches()
    # Before any file of the store is open, and before parts remember what they have checked
    store.refresh()
    parts = StoredParts(cfg, store, progress)
    address = parts.addresses.of(stage, item)
    job = JobContext(stage, item, parts, address, progress, console)
    if parts.lineage.is_current(address):
        manifest = parts.reader.manifest(address)
    else:
        manifest = _make_once(job)
    # Not a part of making it: a bundle that was made before has to get there too
    if job.row.kind == "bundle" and cfg.deploy.upload:
        versions = Versions(cfg.deploy.upload)
        versions.publish(job.folder, job.address, cfg.deploy.keep, progress)
    return manifest


def done(addresses: Addresses, stage: str, item: str | None, lineage: Lineage) -> bool:
    """Whether a job has nothing left to do; a bundle is copied each time it is asked for. Raises
    DamagedArtifact."""
    cfg = addresses.cfg
    copies = cfg.stages[stage].kind == "bundle" and cfg.deploy.upload is not None
    return lineage.is_current(addresses.of(stage, item)) and not copies


def _make_once(job: JobContext) -> Manifest:
    """Make the artifact, unless another process makes it meanwhile."""
    # Before anybody waits for what cannot be made
    _inputs(job)
    waited = False

    def waiting() -> None:
        nonlocal waited
        waited = True
        text = f"{job.name}: another process is making {job.address}; waiting for it"
        job.progress(text, None)

    with translate_disk_errors(job.folder), job.store.lock(job.address, waiting):
        if waited:
            # What was read before may not be what is there now
            job = replace(job, parts=StoredParts(job.cfg, job.store, job.progress))
        # Asked again under the lock: whoever held it may have made the artifact
        lineage = Lineage(job.store)
        if lineage.is_current(job.address):
            return job.store.require(job.address)
        stale = lineage.told(job.address)
        if stale:
            job.progress(f"{job.name}: making it again, as {stale}", None)
        return _make(replace(job, inputs=_inputs(job)))


def _inputs(job: JobContext) -> dict[str, str]:
    """Return the digests of what a job reads. Raises MissingArtifact, DamagedArtifact,
    StaleArtifact."""
    digests = {}
    for need, item in job.cfg.needs(job.stage, job.item):
        address = job.parts.addresses.of(need, item)
        digests[address] = job.parts.reader.manifest(address).digest
    job.parts.lineage.check(*digests)
    return digests


@cache
def _versions(names: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of those packages that are here: a machine that only trains needs no
    `datasets`."""
    found = {}
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _make(job: JobContext) -> Manifest:
    started = time.monotonic()
    read = (job.cfg, job.store, job.stage, job.item)
    check_unchanged(*read)
    folder = job.store.begin(job.address)
    try:
        metrics = _done(job)
        # What has changed while it was read is neither what it was nor what it is now
        check_unchanged(*read)
    except PipelineError:
        # Refused: whoever mends a setting is at another address, and this would lie here for good
        shutil.rmtree(folder, ignore_errors=True)
        # A file that was cut off meanwhile is told as such, and not as torn
        check_unchanged(*read)
        raise
    write_text(folder / "run.json", json.dumps(kept_settings(job.cfg), indent=1, sort_keys=True))
    made = {
        "at": now(),
        "seconds": time.monotonic() - started,
        "packages": dict(_versions(PACKAGES)),
    }
    if job.row.kind == "bundle":
        # How fast this one writes
        made["machine"] = {"cpu": cpu_name(), "gpu": gpu_name()}
    # What a training says of the machine it ran on
    made |= metrics.pop("made", {})
    manifest = Manifest(
        job.address,
        job.stage,
        job.item,
        dict(job.inputs),
        inventory(folder),
        metrics,
        made,
    )
    # Before it is published
    note_made(*read)
    return job.store.finish(manifest)


def _done(job: JobContext) -> dict:
    """Do the job's work. Raises PipelineError that says what to set where a GPU is full, or is none
    that torch has code for."""
    try:
        return _work(job)
    except RuntimeError as error:
        name = label(job.stage, job.item)
        if is_unknown_gpu(error):
            text = f"{name}: torch has no code for {gpu_name()}; {ON_PROCESSOR}"
            raise PipelineError(text) from error
        if not is_full(error):
            raise
        told = str(error).partition(". ")[0]
        budget = job.cfg.runtime.memory_budget or gpu_bytes() or 0
        raise PipelineError(
            f"{name}: {told}: set runtime.memory_budget to {int(LESS * budget / 1e6)}MB, by which "
            f"it runs in smaller pieces, take a GPU with more memory, or {ON_PROCESSOR}"
        ) from error


def _work(job: JobContext) -> dict:
    """Write the artifact's files; return its metrics."""
    if job.row.kind == "training":
        # Only a training pays for the import of the loop
        from .training import train

        return train(job)
    if job.row.kind == "report":
        return _report(job)
    write = job.function()
    return write(job.cfg, job.parts, job.folder, job.progress)


def _report(job: JobContext) -> dict:
    """Measure the stack, and write the report as data and as a page."""
    from .. import report
    from ..families.report_files import histories

    # Before hours of measuring: one that cannot be read must not end them
    curves, missing = histories(job.cfg, job.parts)
    measure = job.function()
    if job.cfg.runtime.threads == "auto":
        set_fastest_threads()
    measured = measure(job.cfg, job.parts, job.progress)
    for name, words in missing.items():
        job.progress(f"history of {name}: {words}", None)
    write_text(job.folder / "report.json", measured.to_json())
    write_text(job.folder / "report.html", report.page(measured, curves, missing))
    passed = {each.name: each.passed for each in measured.criteria}
    return {"criteria": passed}
