"""Where stages run. Local is this machine, one fresh process per job; modal_app.py holds the other.

A job's memory goes back to the system when its process ends, by construction.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console

from .. import interrupts
from ..config.run import RunConfig
from ..credentials import masked
from ..errors import GivenUp, Interrupted, JobsFailed, PipelineError
from ..families import OPENS_GPU, PRELOAD
from ..families.load import parse
from ..hardware import cores, gpus, has_driver, use_gpu
from ..protocols import Progress
from ..report.narrow import plain_console
from ..store.artifacts import Manifest, Reader, Store
from ..store.lineage import Lineage
from .identity import note_made
from .job import done, run_job
from .stages import Addresses, label

# What the process that jobs are forked from imports first, and last
FORKED = f"{__package__}.forked"
IMPORTED = f"{__package__}.imported"
PACKAGE_ROOT = Path(__file__).resolve().parents[2]
SEARCHED = "PYTHONPATH"
FORKS = sys.platform == "linux"
Failures = dict[str | None, PipelineError]  # by item
Running = dict[Connection, tuple[BaseProcess, int]]
# Jobs of a stage, of one run or of several that share what they can
Jobs = Sequence[tuple[RunConfig, str | None]]
LOOK_EVERY_S = 1.0  # at what running jobs have come to, where somebody may give one up


@dataclass
class Local:
    """This machine: `parallel` processes at once, each with its share of the cores and, of several
    GPUs, on the one that the fewest others are on."""

    store: Store
    parallel: int = 1

    def run_jobs(self, stage: str, cfg: RunConfig, items: Sequence[str | None]) -> Failures:
        """Run jobs in processes; return the error of each that failed. Raises Interrupted."""
        failed: Failures = {}

        def ended(at: int, error: PipelineError | None) -> None:
            if error is not None:
                failed[items[at]] = error

        self.run_several(stage, [(cfg, item) for item in items], ended)
        return failed

    def run_several(
        self,
        stage: str,
        jobs: Jobs,
        ended: Callable[[int, PipelineError | None], None],
        gives_up: Callable[[int], bool] | None = None,
        names: Sequence[str] = (),
    ) -> None:
        """Run jobs of a stage in processes, whichever runs they are of; `ended` is told the
        position of each that has, and its error where it failed. Raises Interrupted.

        `gives_up` is asked now and then whether a job that runs is to save and end: a GivenUp.
        `names` say which run each is of, where that is to be told.
        """
        if not jobs:
            return
        waiting = deque(range(len(jobs)))
        running: Running = {}
        given_up: set[int] = set()
        share = cores() // min(self.parallel, len(jobs))
        beside = self.parallel > 1
        several = gpus() if beside else []
        taken: dict[Connection, str | None] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.parallel:
                    at = waiting.popleft()
                    cfg, item = jobs[at]
                    threads = cfg.runtime.most_threads(share)
                    said = JobLines(beside, names[at] if names else "")
                    gpu = _emptiest(several, taken.values())
                    process, pipe = _start(stage, cfg, self.store, item, threads, said, gpu)
                    running[pipe] = (process, at)
                    taken[pipe] = gpu
                for ready in wait(list(running), LOOK_EVERY_S if gives_up else None):
                    pipe = cast(Connection, ready)
                    process, at = running[pipe]
                    name = label(stage, jobs[at][1])
                    error = _result(process, pipe, name)
                    # Only now: who is stopped before has it among those to wait for
                    del running[pipe]
                    del taken[pipe]
                    if isinstance(error, Interrupted) and at in given_up:
                        error = GivenUp(f"{name} was given up")
                    if isinstance(error, Interrupted):
                        raise error
                    ended(at, error)
                for process, at in running.values():
                    if gives_up and at not in given_up and gives_up(at):
                        given_up.add(at)
                        process.terminate()
        except (KeyboardInterrupt, Interrupted) as stopped:
            raise _stop_all(stage, running, stopped) from None


def _emptiest(several: Sequence[str], taken: Iterable[str | None]) -> str | None:
    """Return which of several GPUs the fewest jobs are on; None where there is no choice."""
    if len(several) < 2:
        return None
    jobs = Counter(taken)
    return min(several, key=lambda name: jobs[name])


def _stop_all(
    stage: str,
    running: Running,
    stopped: KeyboardInterrupt | Interrupted,
) -> Interrupted:
    """Have every job save and end; return what tells where each of them stopped."""
    # Also those that were started and are not in `running` yet
    for child in multiprocessing.active_children():
        child.terminate()
    texts = [str(stopped)]
    for pipe, (process, _) in running.items():
        error = _result(process, pipe, process.name)
        if isinstance(error, Interrupted):
            texts.append(str(error))
    text = "\n".join(filter(None, texts)) or f"{stage} stopped"
    return Interrupted(f"{text}; the same command goes on from there")


def run_stage(stage: str, cfg: RunConfig, local: Local) -> list[Manifest]:
    """Do the jobs of a stage that are not done yet or stale; return the manifest of each.

    Raises the error of a stage that is one job, else JobsFailed with the error of each, after all
    jobs have had their turn; StaleArtifact when an input was made again meanwhile.
    """
    addresses = Addresses(cfg)
    jobs = addresses.jobs(stage)
    lineage = Lineage(local.store)
    missing = []
    for _, item, _ in jobs:
        if done(addresses, stage, item, lineage):
            note_made(addresses.cfg, local.store, stage, item)
        else:
            missing.append(item)
    failed = local.run_jobs(stage, addresses.cfg, missing)
    if None in failed:
        raise failed[None]
    if failed:
        raise JobsFailed(stage, cfg.items(stage), failed)
    # Read again: what is shown is what is there now, and no other process may have changed it
    reader = Reader(local.store)
    made = [reader.manifest(address) for _, _, address in jobs]
    Lineage(local.store, reader.recorded).check(*(manifest.address for manifest in made))
    return made


@dataclass(frozen=True)
class JobLines:
    """How a job in its process tells people what it does."""

    plain: bool  # lines alone, as others tell of theirs beside it
    of: str = ""  # which run it is of

    def console(self) -> Console:
        """Return where it tells it."""
        console = plain_console(stderr=True, force_terminal=False if self.plain else None)
        if self.of and not console.is_terminal:
            named = cast(IO[str], _Named(console.file, f"{self.of}: "))
            return plain_console(file=named, force_terminal=False)
        return console


@dataclass(frozen=True)
class _Named:
    """A stream whose lines begin with a name; what is written are whole lines."""

    file: IO[str]
    name: str

    def write(self, text: str) -> int:
        return self.file.write("".join(self.name + line for line in text.splitlines(True)))

    def flush(self) -> None:
        self.file.flush()


def _start(
    stage: str,
    cfg: RunConfig,
    store: Store,
    item: str | None,
    threads: int,
    said: JobLines,
    gpu: str | None = None,
) -> tuple[BaseProcess, Connection]:
    """Start a job in a process of its own; return that and the end of the pipe to listen to."""
    context: Any = multiprocessing.get_context("forkserver" if FORKS else "spawn")
    receive, send = context.Pipe(duplex=False)
    raw = cfg.model_dump(mode="json")
    args = (send, stage, raw, str(store.root), item, threads, said, gpu)
    process = context.Process(target=job, args=args, name=label(stage, item))
    # First, as its launch lets through what is held back here
    resource_tracker.ensure_running()
    if FORKS:
        _have_forked_from(cfg.family)
        # Not held back: it takes as long as those imports
        process.start()
    else:
        with interrupts.held_back():
            process.start()
    # Only the child's end may be left, or the death of the child would never be seen here
    send.close()
    return process, receive


def _have_forked_from(name: str) -> None:
    """Have the process run that jobs are forked from, which imports what a family needs, as far as
    that leaves a GPU alone."""
    needed = PRELOAD[name]
    if has_driver():
        needed = [module for module in needed if module not in OPENS_GPU]
    forkserver.set_forkserver_preload([FORKED, *needed, IMPORTED])
    with interrupts.held_back(), _importable():
        forkserver.ensure_running()


@contextlib.contextmanager
def _importable() -> Iterator[None]:
    """Have processes that are started inside find this package, in whatever folder they are."""
    # Python 3.11 gives the process that jobs are forked from its starter's places of modules, which
    # that never takes, and what it does not find it passes over without a word
    before = os.environ.get(SEARCHED)
    places = [str(PACKAGE_ROOT), *([before] if before else [])]
    os.environ[SEARCHED] = os.pathsep.join(places)
    try:
        yield
    finally:
        if before is None:
            del os.environ[SEARCHED]
        else:
            os.environ[SEARCHED] = before


def _result(
    process: BaseProcess, pipe: Connection, name: str
) -> PipelineError | Interrupted | None:
    """Wait for a process; return the error it sent, None when it went well, or one that tells how
    it died."""
    try:
        error = pipe.recv()
        process.join()
        return error
    except EOFError:
        # It ended without a word
        process.join()
    code = process.exitcode or 0
    if code < 0:
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        return PipelineError(f"{name} was killed by {signal.Signals(-code).name}{hint}")
    return PipelineError(f"{name} ended with exit code {code}; its error is above")


def job(
    pipe: Connection,
    stage: str,
    raw: dict,
    root: str,
    item: str | None,
    threads: int,
    said: JobLines,
    gpu: str | None = None,
) -> None:
    """Run one job in this fresh process, on one of several GPUs where it is named, and send its
    error, if any, up the pipe."""
    import torch

    if gpu is not None:
        use_gpu(gpu)

    torch.set_num_threads(threads)
    interrupts.raise_once(again_s=interrupts.SWALLOWED_S)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    console = said.console()
    if said.of and console.is_terminal:
        # Its bar has no room for that
        console.print(f"{said.of}: {label(stage, item)}", markup=False, highlight=False)
    progress = printed_progress(console)
    store = Store(Path(root))
    error: PipelineError | Interrupted | None = None
    try:
        # What a person can act on is told by the parent, without a traceback from here
        try:
            run_job(stage, parse(raw), store, item, progress=progress, console=console)
        except (PipelineError, Interrupted) as raised:
            error = raised
        # From here on the job has ended as it has; a signal now would make it end otherwise
        interrupts.ignore()
    except KeyboardInterrupt as stopped:
        interrupts.ignore()
        error = _interrupted(stopped, label(stage, item))
    # Nobody may be there any more to hear it
    with contextlib.suppress(BrokenPipeError):
        pipe.send(error)
    if error is not None:
        sys.exit(interrupts.STOPPED if isinstance(error, Interrupted) else 2)


def _interrupted(stopped: BaseException | None, name: str) -> Interrupted:
    """Return what tells where a job stopped: what it was just saying when a second signal came,
    else that it did."""
    while stopped is not None:
        if isinstance(stopped, Interrupted):
            return stopped
        stopped = stopped.__context__
    return Interrupted(f"{name}: stopped")


def _end_with_parent() -> None:
    """Ask this process to save and end when the one that started the run is gone, reaped or not."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def printed_progress(console: Console) -> Progress:
    """Return a Progress that prints each new text once, and its share at most every few seconds."""
    last_text = ""
    last_at = 0.0

    def progress(text: str, share: float | None) -> None:
        nonlocal last_text, last_at
        if text == last_text and time.monotonic() - last_at < 5:
            return
        last_text = text
        last_at = time.monotonic()
        shown = text if share is None else f"{text} {share:4.0%}"
        console.print(masked(shown), highlight=False, markup=False, soft_wrap=True)

    return progress
