"""The far side of a run: jobs in containers, and the one that hands them out.

A container refreshes its view of the store once, before any file is open. What a person has to mend
comes back as an Outcome and is not tried again; a crash, a timeout or a preemption is, from the
last published checkpoint.
"""

import gc
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from ..config.run import RunConfig
from ..errors import Interrupted, MissingArtifact, PipelineError
from ..families import family
from ..families.load import parse
from ..run import stages
from ..run.backend import printed_progress
from ..store.artifacts import Manifest, Store, translate_disk_errors, write_text
from ..train.memory_meter import trim_heap

SERVED = "served.json"
SCAN, ENCODE = STEPS = (
    "preprocess_scan",
    "preprocess_encode",
)  # before preprocess, when several containers share it
Items = list[str | None]
Do = Callable[[str, Items], "Iterable[tuple[Items, list[JobResult] | BaseException]]"]


@dataclass(frozen=True)
class JobResult:
    """How a job ended; small enough to travel."""

    stage: str
    item: str | None
    address: str
    state: str  # made, found, failed
    error: str = ""
    bytes: int = 0
    seconds: float = 0.0
    metrics: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The stage and the item, for people."""
        return stages.label(self.stage, self.item)

    @classmethod
    def of(cls, manifest: Manifest, state: str) -> "JobResult":
        """Return the outcome of a job whose artifact is whole."""
        m = manifest
        return cls(m.stage, m.item, m.address, state, "", m.bytes, m.made["seconds"], m.metrics)


def work(
    stage: str,
    raw: dict,
    items: Items,
    root: Path,
    publish: Callable[[], None],
    refresh: Callable[[], None],
) -> list[JobResult]:
    """Do jobs of a stage, or steps before it, in this container, one after another; return how each
    ended.

    Raises KeyboardInterrupt when asked to stop, which is how Modal knows that the input has to run
    again.
    """
    import torch

    cfg = parse(raw)
    machine, do = (
        (cfg.modal.preprocess, _step) if stage in STEPS else (getattr(cfg.modal, stage), _one)
    )
    torch.set_num_threads(cfg.runtime.most_threads(int(machine.cpu)))
    refresh()
    store, console = Store(root, publish=publish).open(), Console(stderr=True)
    return [_alone(do, stage, cfg, store, item, console) for item in items]


def _alone(
    do, stage: str, cfg: RunConfig, store: Store, item: str | None, console: Console
) -> JobResult:
    """Do one of several jobs of this container and give its memory back before the next."""
    try:
        return do(stage, cfg, store, item, console)
    finally:
        gc.collect()
        trim_heap()


def _one(stage: str, cfg: RunConfig, store: Store, item: str | None, console: Console) -> JobResult:
    address = stages.address(cfg, stage, item)
    try:
        return JobResult.of(
            stages.run(
                stage, cfg, store, item, progress=printed_progress(console), console=console
            ),
            "made",
        )
    except PipelineError as error:
        store.publish()  # checkpoints and history up to here
        return JobResult(stage, item, address, "failed", _told(error, root=store.root))
    except Interrupted as stopped:
        store.publish()
        raise KeyboardInterrupt(str(stopped)) from None


def _step(step: str, cfg: RunConfig, store: Store, item: str | None, console: Console) -> JobResult:
    """Scan the documents, which says how many jobs there are to encode them, or do the job whose
    number is item."""
    address, metrics = stages.address(cfg, "preprocess"), {}
    jobs_folder = store.jobs_folder(address)
    kind, progress = family(cfg.family), printed_progress(console)
    try:
        with translate_disk_errors(jobs_folder):
            if step == SCAN:
                jobs = cfg.modal.preprocess_jobs
                metrics["jobs"] = kind.scan(cfg, jobs_folder, jobs, progress)
            else:
                kind.encode(cfg, jobs_folder, int(item), progress)
    except PipelineError as error:
        return JobResult(step, item, address, "failed", _told(error, root=store.root))
    store.publish()
    return JobResult(step, item, address, "made", metrics=metrics)


def serve_next(outcomes: list[JobResult], root: Path, publish: Callable[[], None]) -> None:
    """Note a bundle among the outcomes, new or found, as the one to serve, and publish the note."""
    made = [each.address for each in outcomes if each.stage == "deploy" and not each.error]
    if made:
        write_text(root / SERVED, json.dumps({"address": made[-1]}))
        publish()


def served(root: Path) -> Path:
    """Return the folder of the bundle to serve. Raises MissingArtifact when none was made."""
    try:
        return Store(root).folder(json.loads((root / SERVED).read_text("utf-8"))["address"])
    except FileNotFoundError:
        raise MissingArtifact(
            "there is no bundle to serve yet: run `modal run modal_app.py::deploy --config FILE` first"
        ) from None


def orchestrate(
    cfg: RunConfig,
    wanted: tuple[str, ...],
    store: Store,
    do: Do,
    command: str,
    progress: Callable[[str], None] = print,
) -> list[JobResult]:
    """Do stages in order, each job that has something left to do; stop after a stage with a
    failure.

    `do` hands items of a stage out and gives back, container by container, the items with their
    outcomes or the exception that took the container; `command` is what finishes the rest.
    """
    outcomes: list[JobResult] = []
    for stage in wanted:
        store.refresh()
        items = cfg.items(stage)
        if not items and len(wanted) == 1:
            progress(stages.without_jobs(stage, cfg))
        missing = [item for item in items if not stages.done(cfg, stage, item, store)]
        if stage == "preprocess" and missing == [None] and cfg.modal.preprocess_jobs > 1:
            failed = _divided(cfg, do, command, progress)
            if failed:
                return outcomes + failed
        made: dict[str | None, JobResult] = {}
        for outcome in _handed_out(cfg, stage, missing, store, do):
            made[outcome.item] = outcome
            progress(f"{outcome.name}: {outcome.error or outcome.state}")
        made |= {
            item: _whole(cfg, stage, item, store, "found") for item in items if item not in made
        }
        outcomes += [made[item] for item in items]
        failed = [each for each in made.values() if each.error]
        if failed:
            progress(_account(stage, list(items), failed, command))
            return outcomes
    return outcomes


def _divided(
    cfg: RunConfig, do: Do, command: str, progress: Callable[[str], None]
) -> list[JobResult]:
    """Have the documents scanned, then encoded by jobs side by side, for preprocess to merge;
    return what failed."""
    address, count = stages.address(cfg, "preprocess"), 0
    for step in STEPS:
        items = [None] if step == SCAN else [str(number) for number in range(count)]
        failed = []
        for given, result in do(step, items):
            if isinstance(result, BaseException):
                lost = f"{type(result).__name__}: {result}"
                result = [JobResult(step, item, address, "failed", lost) for item in given]
            for outcome in result:
                progress(f"{outcome.name}: {outcome.error or outcome.state}")
                count = outcome.metrics.get("jobs", count)
            failed += [outcome for outcome in result if outcome.error]
        if failed:
            progress(_account(step, items, failed, command))
            return failed
    return []


def _handed_out(
    cfg: RunConfig, stage: str, missing: Items, store: Store, do: Do
) -> Iterable[JobResult]:
    for items, result in do(stage, missing) if missing else ():
        if isinstance(result, BaseException):
            store.refresh()
            yield from (_left_by(cfg, stage, item, store, result) for item in items)
        else:
            yield from result


def _left_by(
    cfg: RunConfig, stage: str, item: str | None, store: Store, error: BaseException
) -> JobResult:
    """Return what a container that was lost for good had made of a job before."""
    if stages.done(cfg, stage, item, store):
        return _whole(cfg, stage, item, store, "made")
    return JobResult(
        stage, item, stages.address(cfg, stage, item), "failed", f"{type(error).__name__}: {error}"
    )


def _whole(cfg: RunConfig, stage: str, item: str | None, store: Store, state: str) -> JobResult:
    """Return the outcome of a job whose artifact is there; it has failed when the artifact is
    damaged."""
    address = stages.address(cfg, stage, item)
    try:
        return JobResult.of(store.require(address, stage), state)
    except PipelineError as error:
        return JobResult(stage, item, address, "failed", _told(error, root=store.root))


def _told(error: PipelineError, root: Path) -> str:
    """Return an error in commands that mend a run elsewhere: other entrypoints, and files on the
    volume at root."""
    text = re.sub(
        rf"python -m pipeline ({'|'.join(stages.STAGES)})\b",
        r"modal run modal_app.py::\1",
        str(error),
    )
    return re.sub(
        rf"remove {re.escape(str(root))}/(\S+)", r"type `modal volume rm -r moleforge \1`", text
    )


def _account(stage: str, items: Items, failed: list[JobResult], command: str) -> str:
    lines = [f"{len(items) - len(failed)} of {len(items)} jobs of {stage} are finished and kept:"]
    errors = {each.item: each.error for each in failed}
    lines += [f"  {stages.label(stage, item)}: {errors.get(item, 'finished')}" for item in items]
    return "\n".join([*lines, f"To do the missing ones, mend the cause and run again: {command}"])
