"""The command line: `python -m pipeline STAGE --config FILE [--override a.b=value]... [--store
DIR]`."""

import os
import sys

from . import garbage, interrupts

if __name__ == "__main__":
    # First of all: what is imported below takes a second, in which there is nothing to be saved
    interrupts.end_at_once(interrupts.STOPPED, "stopped\n")
    garbage.seldom()

import argparse
import contextlib
import ipaddress
import multiprocessing
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .config.run import RunConfig
from .config.serving import ServeConfig
from .credentials import masked
from .errors import ConfigError, Interrupted, PipelineError
from .families import ExportWish
from .families.load import describes_run, load
from .report.narrow import output, plain_console, print_table
from .run import kits, next_step, speak_flags
from .run.advice import CommandLine, sentence
from .run.arguments import parser
from .run.domain_words import ABOUT
from .run.find import bundle_of
from .run.serve_flags import KEY
from .run.stages import RUN, Addresses, address, without_jobs
from .store.artifacts import Manifest, Reader, Store
from .store.in_use import using
from .store.lineage import Lineage
from .store.reading import read_bytes
from .store.room import NO_ROOM

if TYPE_CHECKING:
    from .run.backend import Local


def runs(folder: Path) -> list[Path]:
    """Return the files of a folder that describe runs; prices and what runs refer to do not."""
    return sorted(filter(describes_run, folder.glob("*.yaml")))


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit code: 0 done, 2 a person has to mend something, 130
    stopped."""
    args = parser().parse_args(arguments)
    # Told to whoever has to run it again
    typed = sys.argv[1:] if arguments is None else arguments
    try:
        # These make nothing, and what they import would swallow a KeyboardInterrupt
        if args.command in ("plan", "serve", "watch", *speak_flags.ABOUT):
            return _done(args, typed)
        # Jobs save and end at either signal, so the command treats both as Ctrl-C
        with interrupts.raised_once(_give_up):
            return _done(args, typed)
    except KeyboardInterrupt:
        # While how it ended was being told
        return interrupts.STOPPED


def _give_up() -> None:
    """End without waiting for jobs: what they have saved is there, and the rest is done again."""
    for job in multiprocessing.active_children():
        job.kill()
    os.write(2, b"ended without waiting; what was saved before is kept\n")
    os._exit(interrupts.STOPPED)


def _done(args: argparse.Namespace, typed: list[str]) -> int:
    """Do a command and tell how it ended; return the exit code."""
    errors = plain_console(stderr=True, soft_wrap=True)
    # A command that has changed its configuration says itself what goes on from there
    args.again = None
    # What to type next, which each command knows for itself
    args.next = ""
    try:
        _dispatch(args)
        if args.next:
            text = f"next: {masked(args.next)}"
            output().print(text, highlight=False, markup=False, soft_wrap=True)
    except PipelineError as error:
        again = args.again or f"python -m pipeline {masked(shlex.join(typed))}"
        text = sentence(error, CommandLine(), again=again)
        errors.print(_error(text), highlight=False)
        _tell_how_to_go_on(args, errors)
        return 2
    except (Interrupted, KeyboardInterrupt) as stopped:
        errors.print(str(stopped) or "stopped", highlight=False)
        _tell_how_to_go_on(args, errors)
        return interrupts.STOPPED
    except OSError as error:
        # Of every other file it is told by name: this is what is shown
        if error.errno not in NO_ROOM:
            raise
        # What is left of it would be tried again as the process ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        errors.print(_error(f"standard output: {error.strerror}"), highlight=False)
        return 2
    return 0


def _error(text: str) -> Text:
    return Text.assemble(("error:", "bold red"), f" {text}")


def _tell_how_to_go_on(args: argparse.Namespace, console: Console) -> None:
    if args.again:
        text = f"{args.config} is changed already; what is missing is made by: {args.again}"
        console.print(text, highlight=False, markup=False)


def _dispatch(args: argparse.Namespace) -> None:
    if args.command in ("prune", "rm", "runs"):
        _tend(args, Store(args.store))
        return
    if args.command == "metrics":
        from .run.show_trainings import show_metrics

        shown = show_metrics(args.name, Store(args.store), output(), args.json)
        args.next = next_step.after_metrics(args, [each.address for each in shown])
        return
    if args.command == "open":
        from .run.open_report import open_report

        open_report(args.run, Store(args.store), output(), args.browser)
        args.next = next_step.after_open(args)
        return
    if args.command == "history":
        from .run.backend import printed_progress
        from .run.history.command import history

        history(
            args,
            Store(args.store),
            output(),
            printed_progress(plain_console(stderr=True)),
        )
        return
    if args.command == "watch":
        from .run.history.watching import watch

        seen = watch(args.run, Store(args.store), output(), args.every, args.once)
        is_done = seen.done == len(seen.positions)
        args.next = next_step.after_watch(args, seen.run, is_done, seen.in_progress)
        return
    if args.command == "serve":
        _serve(args)
        return
    if args.command in ("versions", "rollback"):
        from .run.versions import tend_versions

        there = tend_versions(args.target, output(), args.command, getattr(args, "to", None))
        args.next = next_step.after_versions(args, there)
        return
    if args.command in speak_flags.ABOUT:
        _speak(args)
        return
    if args.command in ABOUT:
        from .run.domains import come_and_go

        come_and_go(args, output())
        return
    if args.command == "experiments":
        from .run.experiments.command import run_experiments

        run_experiments(args)
        return
    if args.command == "kit":
        from .run.backend import printed_progress

        output().print(
            kits.kit(args, printed_progress(plain_console(stderr=True))),
            highlight=False,
        )
        args.next = next_step.after_kit(args)
        return
    cfg = load(args.config, _overrides(args))
    store = Store(args.store)
    if args.command == "plan":
        from .run.dry_run import show_plan

        # A plan makes no store, but it must not show as done what another version left
        store.open(create=False)
        cfg = _looked_at(args, cfg, store)
        how = args.dense or args.dtype or (args.expert and not args.rank)
        if how and not args.export:
            raise ConfigError("--expert, --dense, --dtype tell how to export: add --export FORMAT")
        wishes = [ExportWish(each, args.expert, args.dense, args.dtype) for each in args.export]
        if args.rank:
            wishes.append(ExportWish("adapters", args.expert, rank=args.rank))
        show_plan(cfg, store, output(), wishes=wishes)
        args.next = next_step.after_plan(args, cfg, store)
        return
    if args.command == "export":
        wish = ExportWish(args.format, args.expert, args.dense, args.dtype)
        _export(args, wish, _looked_at(args, cfg, store.open()), store)
        args.next = next_step.after_export(args)
        return
    if args.command == "compress":
        wish = ExportWish("adapters", args.expert, rank=args.rank)
        _export(args, wish, _looked_at(args, cfg, store.open()), store)
        args.next = next_step.after_export(args)
        return
    _run(args, cfg, store.open())


def _overrides(args: argparse.Namespace) -> tuple[str, ...]:
    """Return what a command changes of its configuration."""
    smoke = ["evaluate.smoke=true"] if getattr(args, "smoke", False) else []
    return (*args.override, *smoke)


def _tend(args: argparse.Namespace, store: Store) -> None:
    """Show or remove what a store has."""
    from .run.backend import printed_progress
    from .run.identity import begin
    from .run.open_report import report_of_run
    from .run.prune import opened, prune, read_configs
    from .run.remove_run import remove_runs
    from .run.show_runs import show_runs

    if args.command == "runs":
        latest = show_runs(store, output())
        has_report = latest is not None and report_of_run(store, latest) is not None
        args.next = next_step.after_runs(args, latest, has_report)
        return
    # before its lists are read, which are nowhere below a file
    opened(store)
    paths = args.config or runs(Path("config"))
    progress = printed_progress(plain_console(stderr=True))

    def read(path: Path) -> RunConfig:
        # looked at with the sums that the store has
        return begin(load(path, tuple(args.override)), store, progress)[0]

    configs = read_configs(paths, read, store)
    if args.command == "rm":
        left = remove_runs(args.run, configs, store, output(), remove=args.yes)
    else:
        also = {"damaged": args.damaged, "orphans": args.orphans}
        left = prune(configs, store, output(), remove=args.yes, **also)
    args.next = next_step.after_listing(args, left)


def _looked_at(
    args: argparse.Namespace, cfg: RunConfig, store: Store, makes: bool = False
) -> RunConfig:
    """Return the run of a command, with what it reads outside the store looked at; tells of it."""
    from .run.backend import printed_progress
    from .run.identity import begin, changed

    errors = plain_console(stderr=True, soft_wrap=True)
    progress = printed_progress(errors)
    cfg, notes = begin(cfg, store, progress, frozen=args.frozen, makes=makes)
    if args.command != "plan":
        # Whose table says so, job by job
        notes += changed(cfg, store, Addresses(cfg).of)
    for note in notes:
        errors.print(note, highlight=False, markup=False)
    return cfg


def _export(args: argparse.Namespace, wish: ExportWish, cfg: RunConfig, store: Store) -> None:
    from .run.backend import printed_progress
    from .run.export import export
    from .run.reach import working

    progress = printed_progress(plain_console(stderr=True))
    with working(store, cfg, args.config, tuple(args.override)):
        export(cfg, store, wish, args.to, progress)


def _run(args: argparse.Namespace, cfg: RunConfig, store: Store) -> None:
    from .run.backend import Local
    from .run.dry_run import refuse_lacking
    from .run.reach import working

    if args.command == "run":
        wanted = [stage for stage in RUN if cfg.items(stage)]
    elif cfg.items(args.command):
        wanted = [args.command]
    else:
        output().print(without_jobs(args.command, cfg), highlight=False)
        args.next = next_step.same(args, "plan")
        return
    cfg = _looked_at(args, cfg, store, makes=True)
    refuse_lacking(cfg, store, wanted)
    backend = Local(store, parallel=getattr(args, "parallel", 1))
    # Between two of its jobs nothing else says that what is there is needed
    with working(store, cfg, args.config, _overrides(args)):
        _run_stages(wanted, cfg, backend)
        if args.command == "run":
            _note_gone(args, cfg, store)
    args.next = next_step.after_stage(args, cfg, store)


def _note_gone(args: argparse.Namespace, cfg: RunConfig, store: Store) -> None:
    """Leave a note of the experts that a run has no more: a command that was killed between its
    change of the file and its note, or a person with an editor, has left none."""
    from .run.predecessor import note_since
    from .store.removed import told_removed

    for gone in note_since(cfg, args.config, _overrides(args), store):
        output().print(told_removed(gone, store), highlight=False, markup=False, soft_wrap=True)


def _run_stages(wanted: list[str], cfg: RunConfig, backend: "Local") -> None:
    from .run.backend import run_stage

    store = backend.store
    for stage in wanted:
        manifests = run_stage(stage, cfg, backend)
        kind = cfg.stages[stage].kind
        if kind == "report":
            _show_report(Reader(store).folder(manifests[0].address))
        else:
            _show_jobs(manifests)
        if kind == "bundle":
            folder = store.folder(manifests[0].address)
            output().print(f"bundle: {folder}", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _bundle(args: argparse.Namespace) -> Iterator[Path]:
    """Give the folder of the bundle that a command names; until it is done with, nothing removes it
    from its store."""
    folder = args.bundle
    if folder:
        from .store.versions import is_served_from, served_folder

        if not is_served_from(folder):
            # A run's name, unless it is one that nobody has
            folder = bundle_of(Store(args.store), str(folder)) or folder
        folder = served_folder(folder)
    in_store: contextlib.AbstractContextManager = contextlib.nullcontext()
    store = None
    # Twice the parent and not parents[1]: a folder right below / has no second one
    if folder and (folder.resolve().parent.parent / "store.json").exists():
        # One in its store, whichever way it was named; a copy of it stands for itself
        folder = folder.resolve()
        store = Store(folder.parent.parent)
    if args.config:
        cfg = load(args.config, tuple(args.override))
        store = Store(args.store)
        cfg = _looked_at(args, cfg, store)
        folder = store.folder(store.require(address(cfg, "deploy")).address)
    if store:
        Lineage(store).check(folder.name)
        in_store = using(store, [folder.name])
    with in_store:
        yield folder


def _serve(args: argparse.Namespace) -> None:
    errors = plain_console(stderr=True, soft_wrap=True)
    # Only this command needs the server's packages
    from .serve import logs
    from .serve.command import serve
    from .serve.keys import Keys

    if args.log_format == "json":
        # Before the keys: what there is to say of them has that form too
        logs.configure(args.log_format)
    keys = Keys(os.environ.get(KEY) or None, args.api_key_file)
    # To be asked for, as a server behind a proxy that wants a key needs none itself
    if not keys.wanted and not args.public and not _only_this_machine(args.host):
        raise ConfigError(
            f"without a key whoever reaches {args.host} can use it: set {KEY}, or add --public "
            "to serve everybody"
        )

    def progress(text: str) -> None:
        errors.print(text, highlight=False)

    with _bundle(args) as folder:
        serve(folder, args, keys, _served(args), progress)


def _served(args: argparse.Namespace) -> ServeConfig:
    """Return what the configuration that a command names says of serving, if it names one."""
    return load(args.config, tuple(args.override)).serve if args.config else ServeConfig()


def _speak(args: argparse.Namespace) -> None:
    """Have a bundle go on with a text, or talk with it."""
    sampling = speak_flags.sampling(args)
    dtype = args.dtype or _served(args).dtype
    if args.command == "chat":
        with _bundle(args) as folder:
            # Only these commands and the server need the packages of both
            from .serve.terminal.command import chat_with

            chat_with(
                folder,
                sampling,
                _give_up,
                reader=args.expert,
                pictures=args.image,
                dtype=dtype,
                experts=args.experts,
            )
        return
    # What comes in is read before anything is opened, which takes longer
    text = speak_flags.prompt(args)
    with _bundle(args) as folder:
        from .serve.terminal.command import generate_from

        generate_from(
            folder,
            text,
            sampling,
            _give_up,
            readers=speak_flags.readers(args),
            pictures=args.image,
            dtype=dtype,
            experts=args.experts,
            as_json=args.json,
        )


def _only_this_machine(host: str) -> bool:
    """Whether a server that listens there is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        # A name, which may be anywhere, or nothing, which is everywhere
        return False


def _show_jobs(manifests: list[Manifest]) -> None:
    """Print what a stage left: one row per job."""
    from .run.outcome import outcome

    table = Table(title=manifests[0].stage, title_justify="left", title_style="bold")
    table.add_column("artifact", style="cyan", overflow="fold")
    table.add_column("MB", justify="right", overflow="fold")
    table.add_column("seconds", justify="right", overflow="fold")
    table.add_column("what came out", overflow="fold")
    for made in manifests:
        seconds = f"{made.made['seconds']:.0f}"
        table.add_row(made.address, f"{made.bytes / 1e6:.1f}", seconds, outcome(made.metrics))
    print_table(output(), table)


def _show_report(folder: Path) -> None:
    from . import report

    console = output()
    report.show(report.read(read_bytes(folder / "report.json")), console)
    page = folder / "report.html"
    console.print(f"report: {page}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    status = main()
    # Python gives the signals back to the system while modules take their leave, unless ignored
    interrupts.ignore()
    sys.exit(status)
