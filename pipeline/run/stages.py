"""The stages, how each is done, and where its result lives.

An address is a hash of the configuration a job reads and of its inputs' addresses, so runs that
share a prefix of work share its artifacts. Jobs, inputs and what is read are the run's to say;
stages know no family.
"""

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..config.run import RunConfig
from ..errors import MismatchError
from ..families import family
from ..protocols import Progress
from ..store import bundle
from ..store.artifacts import (
    Manifest,
    Store,
    inventory,
    now,
    save_tensors,
    translate_disk_errors,
    write_text,
)
from ..store.history import Recorder, read

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


@dataclass(frozen=True)
class Stage:
    """A row of the table: how a stage is done."""

    make: Callable[["JobContext"], dict]  # writes files into work.folder, returns metrics
    version: int = 1  # raised when the stage comes to mean something else
    in_run: bool = True  # False: only when asked for by name
    # each time it is asked for, also when the artifact was there
    after: Callable[["JobContext"], None] | None = None


@dataclass(frozen=True)
class StoredParts:
    """What earlier stages of this run left behind, loaded on asking and checked to belong together."""

    cfg: RunConfig
    store: Store

    def folder(self, stage: str, item: str | None = None) -> Path:
        """Where an artifact is, its files checked. Raises MissingArtifact, DamagedArtifact,
        MismatchError."""
        self.manifest(stage, item)
        return self.store.verified(address(self.cfg, stage, item), stage)

    def manifest(self, stage: str, item: str | None = None) -> Manifest:
        """An artifact's manifest, its own inputs checked. Raises MissingArtifact, DamagedArtifact,
        MismatchError."""
        manifest = self.store.require(address(self.cfg, stage, item), stage)
        for source, digest in manifest.inputs.items():
            found = self.store.require(source, source.split("-")[0]).digest
            if found != digest:
                raise MismatchError(
                    f"{manifest.address} was made on another {source} than the one in {self.store.root} "
                    f"(digest {digest[:12]}, found {found[:12]}): remove {self.store.folder(manifest.address)} "
                    f"and run `python -m pipeline {stage}` again"
                )
        return manifest

    def tensors(self, stage: str, name: str, item: str | None = None) -> dict:
        """A file's tensors. Raises MissingArtifact, DamagedArtifact, MismatchError."""
        self.manifest(stage, item)
        return self.store.tensors(address(self.cfg, stage, item), name, stage)

    def history(self, stage: str, item: str | None = None) -> list[dict]:
        """The history rows of a training job."""
        return read(self.store.history(address(self.cfg, stage, item)))


@dataclass(frozen=True)
class JobContext:
    """One stage of one run, about to be done."""

    stage: str
    item: str | None
    cfg: RunConfig
    store: Store
    address: str
    progress: Progress
    console: object = None

    @property
    def folder(self) -> Path:
        """The artifact's folder."""
        return self.store.folder(self.address)

    @property
    def name(self) -> str:
        """The stage and the item, for people."""
        return label(self.stage, self.item)

    @property
    def parts(self) -> StoredParts:
        """The inputs."""
        return StoredParts(self.cfg, self.store)


def label(stage: str, item: str | None) -> str:
    """Return a job's name for people."""
    return stage if item is None else f"{stage} {item}"


def address(cfg: RunConfig, stage: str, item: str | None = None) -> str:
    """Return where the result of a stage lives; the same configuration always gives the same
    address."""
    needs = [address(cfg, *need) for need in cfg.needs(stage, item)]
    content = [stage, item, STAGES[stage].version, cfg.content(stage, item), needs]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return "-".join(x for x in (stage, item, digest[:12]) if x)


def jobs(cfg: RunConfig, stage: str) -> list[tuple[str, str | None, str]]:
    """Return (stage, item, address) of every job of a stage."""
    return [(stage, item, address(cfg, stage, item)) for item in cfg.items(stage)]


def without_jobs(stage: str, cfg: RunConfig) -> str:
    """Return what to tell somebody who asks for a stage that has no jobs in this run."""
    return f"{stage}: nothing to do, a run of {cfg.family} with this configuration has no such jobs"


def reachable(cfg: RunConfig) -> Iterator[str]:
    """Yield every address a configuration can lead to."""
    for stage in STAGES:
        yield from (here for _, _, here in jobs(cfg, stage))


def run(
    stage: str,
    cfg: RunConfig,
    store: Store,
    item: str | None = None,
    *,
    progress: Progress,
    console=None,
) -> Manifest:
    """Do one stage, or return its manifest when its result is already there.

    Raises MissingArtifact when an input is not there; waits when another process is doing the same.
    """
    store.refresh()
    here = address(cfg, stage, item)
    work = JobContext(stage, item, cfg, store, here, progress, console)
    manifest = store.require(here, stage) if store.has(here) else _made(work)
    if STAGES[stage].after:
        STAGES[stage].after(work)
    return manifest


def done(cfg: RunConfig, stage: str, item: str | None, store: Store) -> bool:
    """Whether a job has nothing left to do."""
    return store.has(address(cfg, stage, item)) and not (STAGES[stage].after and cfg.deploy.upload)


def _made(work: JobContext) -> Manifest:
    """Make the artifact, unless another process makes it meanwhile."""
    store, stage, here, progress = work.store, work.stage, work.address, work.progress
    needs = [
        (need, address(work.cfg, need, item)) for need, item in work.cfg.needs(stage, work.item)
    ]
    inputs = {there: store.require(there, need).digest for need, there in needs}
    waiting = f"{work.name}: another process is making {here}; waiting for it"
    with translate_disk_errors(work.folder), store.lock(here, lambda: progress(waiting, None)):
        return store.require(here, stage) if store.has(here) else _make(work, inputs)


def _make(work: JobContext, inputs: dict[str, str]) -> Manifest:
    started = time.monotonic()
    folder = work.store.begin(work.address)
    metrics = STAGES[work.stage].make(work)
    write_text(folder / "run.json", json.dumps(_kept(work), indent=1, sort_keys=True))
    made = {
        "at": now(),
        "seconds": time.monotonic() - started,
        "packages": _packages(),
        **metrics.pop("made", {}),
    }
    manifest = Manifest(
        work.address, work.stage, work.item, inputs, inventory(folder), metrics, made
    )
    return work.store.finish(manifest)


def _preprocess(work: JobContext) -> dict:
    jobs_folder = work.store.jobs_folder(work.address)
    kind = family(work.cfg.family)
    return kind.prepare(work.cfg, work.folder, work.progress, jobs_folder, work.item)


def _route(work: JobContext) -> dict:
    return family(work.cfg.family).route_data(work.cfg, work.parts, work.folder, work.progress)


def _train(work: JobContext) -> dict:
    """Make the family's task for this stage and fit it, or write what needs no training."""
    from ..train.loop import NoTraining
    from ..train.memory_meter import Peak, lower_mmap_threshold
    from ..train.optimizer_state import import_int8

    kind = family(work.cfg.family)
    if work.cfg.may_keep_int8:
        import_int8()  # as much an import as the rest
    peak = Peak()  # after imports, before anything is loaded
    lower_mmap_threshold()
    _settle_threads(work)
    make = {
        "train_shared": "shared",
        "train_experts": "expert",
        "train_router": "router",
        "train_dense": "dense",
    }
    args = () if work.item is None else (work.item,)
    task = getattr(kind, make[work.stage])(work.cfg, work.parts, *args)
    return task.write(work.folder) if isinstance(task, NoTraining) else _fit(work, task, peak)


def _settle_threads(work: JobContext) -> None:
    """Choose the threads of a job when they are to be measured; a job that goes on keeps those it
    began with."""
    import torch

    from ..hardware import fastest_threads

    if work.cfg.runtime.threads != "auto":
        return
    note = work.store.resume(work.address) / "threads.json"
    threads = (
        json.loads(note.read_text("utf-8"))
        if note.exists()
        else fastest_threads(torch.get_num_threads())
    )
    if not note.exists():
        note.parent.mkdir(parents=True, exist_ok=True)
        write_text(note, json.dumps(threads))
    torch.set_num_threads(threads)


def _fit(work: JobContext, task, peak) -> dict:
    import torch

    from ..hardware import machine
    from ..train.loop import TrainIO, fit

    runtime, section = work.cfg.runtime, work.cfg.section(work.stage, work.item)
    recorder = _recorder(work, task.steps)
    place = TrainIO(
        work.store.resume(work.address),
        recorder,
        work.store.publish,
        work.name,
        section,
        runtime.save_every_s,
        runtime.log_every_steps,
        peak,
    )
    try:
        metrics = fit(task, place)
    except BaseException:
        recorder.close(ok=False)
        raise
    recorder.close()
    for name, content in task.export(metrics["kept_step"]).items():
        _write(work.folder / name, content)
    metrics |= peak.report()  # the export needs memory too
    return metrics | {"made": {"machine": machine(torch.get_num_threads(), task.bf16)}}


def _recorder(work: JobContext, steps: int) -> Recorder:
    return Recorder(
        work.store.history(work.address),
        job=work.name,
        total_steps=steps,
        wandb_mode=work.cfg.runtime.wandb,
        project=work.cfg.runtime.wandb_project,
        run_id=work.address,
        folder=work.store.root / "wandb",
        settings=work.cfg.model_dump(mode="json"),
        console=work.console,
    )


def _evaluate(work: JobContext) -> dict:
    from .. import report

    tables = family(work.cfg.family).measure(work.cfg, work.parts, work.progress)
    done_jobs = [(s, i) for s in TRAINING for i in work.cfg.items(s)]
    fitted = [job for job in done_jobs if "planned_steps" in work.parts.manifest(*job).metrics]
    rows = {label(*job): work.parts.history(*job) for job in fitted}
    write_text(work.folder / "report.json", tables.to_json())
    write_text(work.folder / "report.html", report.page(tables, rows))
    return {"criteria": {each.name: each.passed for each in tables.criteria}}


def _bundle(work: JobContext) -> dict:
    return family(work.cfg.family).bundle(work.cfg, work.parts, work.folder, work.progress)


def _upload(work: JobContext) -> None:
    if work.cfg.deploy.upload:
        bundle.upload(work.folder, work.cfg.deploy.upload, work.progress)


def _write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_tensors(path, content)
    else:
        write_text(path, json.dumps(content, indent=1, sort_keys=True))


def _kept(work: JobContext) -> dict:
    """Return the resolved configuration less what no result depends on, so equal runs leave equal
    bytes."""
    return work.cfg.model_dump(mode="json", exclude={"runtime", "modal", "deploy", "name"})


def _packages() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


TRAINING = ("train_shared", "train_experts", "train_router", "train_dense")
STAGES = {
    "preprocess": Stage(_preprocess),
    "routing": Stage(_route),  # before hours of training: what it may find missing is found now
    "train_shared": Stage(_train),
    "train_experts": Stage(_train),
    "train_router": Stage(_train),
    "train_dense": Stage(_train),
    "evaluate": Stage(_evaluate),
    "deploy": Stage(_bundle, in_run=False, after=_upload),
}
RUN = tuple(name for name, row in STAGES.items() if row.in_run)
