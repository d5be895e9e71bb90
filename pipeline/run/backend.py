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
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Protocol

from rich.console import Console

from ..config.run import RunConfig
from ..errors import Interrupted, JobsFailed, PipelineError
from ..families import PRELOAD
from ..families.load import parse
from ..hardware import cores
from ..protocols import Progress
from ..store.artifacts import Manifest, Store
from . import stages

STOPPED = 130


class Backend(Protocol):
    """Where stages run."""

    def one(self, stage: str, cfg: RunConfig) -> Manifest:
        """Do a stage that is one job."""

    def each(self, stage: str, cfg: RunConfig, items: list[str]) -> list[Manifest]:
        """Do the jobs of a stage that has several. Raises JobsFailed after all of them have had
        their turn."""


@dataclass
class Local:
    """This machine: `parallel` processes at once, each with its share of the cores."""

    store: Store
    parallel: int = 1
    command: str = ""  # what to type to finish what is missing
    console: Console = field(default_factory=lambda: Console(stderr=True))

    def one(self, stage: str, cfg: RunConfig) -> Manifest:
        """Do a stage that is one job, in a process of its own. Raises its error."""
        if not self._done(stage, cfg, None):
            failed = self._work(stage, cfg, [None])
            if failed:
                raise failed[None]
        return self.store.require(stages.address(cfg, stage), stage)

    def each(self, stage: str, cfg: RunConfig, items: list[str]) -> list[Manifest]:
        """Do the missing jobs, `parallel` at a time. Raises JobsFailed with a line per failure."""
        missing = [item for item in items if not self._done(stage, cfg, item)]
        failed = self._work(stage, cfg, missing) if missing else {}
        if failed:
            raise JobsFailed(self._account(stage, items, failed))
        return [self.store.require(stages.address(cfg, stage, item), stage) for item in items]

    def _done(self, stage: str, cfg: RunConfig, item: str | None) -> bool:
        return stages.done(cfg, stage, item, self.store)

    def _work(self, stage: str, cfg: RunConfig, items: list) -> dict:
        """Run items in processes; return the error of each that failed."""
        waiting, running, failed = list(items), {}, {}
        threads = cfg.runtime.most_threads(cores() // min(self.parallel, len(items)))
        try:
            while waiting or running:
                while waiting and len(running) < self.parallel:
                    process, pipe = _start(
                        stage, cfg, self.store, waiting[0], threads, self.parallel > 1
                    )
                    running[pipe] = (process, waiting.pop(0))
                for pipe in wait(list(running)):
                    process, item = running.pop(pipe)
                    error = _result(process, pipe, stages.label(stage, item))
                    if isinstance(error, Interrupted):
                        raise error
                    if error:
                        failed[item] = error
        except (KeyboardInterrupt, Interrupted) as stopped:
            for process in multiprocessing.active_children():
                process.terminate()
            texts = [
                str(stopped),
                *(_stop(process, pipe) for pipe, (process, _) in running.items()),
            ]
            text = "\n".join(filter(None, texts)) or f"{stage} stopped"
            raise Interrupted(f"{text}; the same command goes on from there") from None
        return failed

    def _account(self, stage: str, items: list, failed: dict) -> str:
        lines = [
            f"{len(items) - len(failed)} of {len(items)} jobs of {stage} are finished and kept:"
        ]
        for item in items:
            lines.append(f"  {item}: {f'failed: {failed[item]}' if item in failed else 'finished'}")
        return "\n".join(
            [*lines, f"To do the missing ones, mend the cause and run again: {self.command}"]
        )


def run_all(cfg: RunConfig, backend: Backend) -> Manifest:
    """Do every stage of a run in order; return the last one's manifest."""
    last = None
    for stage in stages.RUN:
        last = run_stage(stage, cfg, backend)[-1:] or last
    return last[0]


def run_stage(stage: str, cfg: RunConfig, backend: Backend) -> list[Manifest]:
    """Do one stage, however many jobs it has."""
    items = cfg.items(stage)
    return [backend.one(stage, cfg)] if items == (None,) else backend.each(stage, cfg, list(items))


def _start(stage, cfg, store, item, threads, plain):
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload(PRELOAD[cfg.family])
    receive, send = context.Pipe(duplex=False)
    args = (send, stage, cfg.model_dump(mode="json"), str(store.root), item, threads, plain)
    process = context.Process(target=job, args=args, name=stages.label(stage, item))
    process.start()
    send.close()
    return process, receive


def _result(process, pipe, name: str) -> BaseException | None:
    """Wait for a process; return the error it sent, None when it went well, or one that tells how
    it died."""
    try:
        error = pipe.recv()
        process.join()
        return error
    except EOFError:  # it ended without a word
        process.join()
    if process.exitcode < 0:
        hint = " (out of memory?)" if process.exitcode == -signal.SIGKILL else ""
        return PipelineError(f"{name} was killed by {signal.Signals(-process.exitcode).name}{hint}")
    return PipelineError(f"{name} ended with exit code {process.exitcode}; its error is above")


def _stop(process, pipe) -> str:
    """Wait until a process that was asked to stop has saved and ended; return where it stopped, if
    it told."""
    error = _result(process, pipe, process.name)
    return str(error) if isinstance(error, Interrupted) else ""


def job(
    pipe, stage: str, raw: dict, root: str, item: str | None, threads: int, plain: bool
) -> None:
    """Run one job in this fresh process and send its error, if any, up the pipe."""
    from pathlib import Path

    import torch

    torch.set_num_threads(threads)
    for number in (signal.SIGINT, signal.SIGTERM):  # what fit does not catch ends the job here
        signal.signal(number, signal.default_int_handler)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    console = Console(stderr=True, force_terminal=False if plain else None)
    store = Store(Path(root))
    try:
        stages.run(
            stage, parse(raw), store, item, progress=printed_progress(console), console=console
        )
        _tell(pipe, None)
    except (PipelineError, Interrupted) as error:
        _tell(pipe, error)
        sys.exit(STOPPED if isinstance(error, Interrupted) else 2)
    except KeyboardInterrupt:
        _tell(pipe, Interrupted(f"{stages.label(stage, item)}: stopped"))
        sys.exit(STOPPED)


def _tell(pipe, error: BaseException | None) -> None:
    """Send how the job went, once, undisturbed; nobody may be there any more to hear it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(BrokenPipeError):
        pipe.send(error)


def _end_with_parent() -> None:
    """Ask this process to save and end when the one that started the run is gone, reaped or not."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


def printed_progress(console: Console) -> Progress:
    """Return a `say` that prints each new text once, and its share done at most every few seconds."""
    last = {"text": "", "at": 0.0}

    def progress(text: str, share: float | None) -> None:
        if text == last["text"] and time.monotonic() - last["at"] < 5:
            return
        last.update(text=text, at=time.monotonic())
        console.print(
            text if share is None else f"{text} {share:4.0%}", highlight=False, markup=False
        )

    return progress
