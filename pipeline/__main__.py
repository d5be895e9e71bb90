"""The command line: `python -m pipeline STAGE --config FILE [--override a.b=value]... [--store
DIR]`."""

import os
import sys

from . import interrupts

if __name__ == "__main__":
    # First of all: what is imported below takes a second, in which there is nothing to be saved
    interrupts.end_at_once(interrupts.STOPPED, "stopped\n")

import argparse
import contextlib
import ipaddress
import multiprocessing
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .config.run import RunConfig
from .errors import ConfigError, Interrupted, PipelineError
from .families import DTYPES, FORMATS, ExportWish
from .families.load import describes_run, load
from .report.narrow import output, print_table
from .run import kits
from .run.advice import CommandLine, sentence
from .run.domain_words import ABOUT, add_arguments
from .run.stages import (
    RUN,
    STAGES,
    about,
    address,
    has_several_jobs,
    is_report,
    without_jobs,
)
from .store.artifacts import Manifest, Reader, Store
from .store.in_use import using
from .store.lineage import Lineage
from .store.reading import read_bytes

if TYPE_CHECKING:
    from .run.backend import Local

KEY = "MOLEFORGE_API_KEY"
# What is no stage, or not one alone
OTHER_COMMANDS = {
    "export": "bring the stack, or a part of it, to a folder or URL in a format of other programs",
    "kit": "hand out one expert to be trained where its text lies (DOMAIN), or train and pack one",
    "compress": "write full experts as PEFT adapters of low rank, the nearest there are",
    "serve": "serve a bundle on this machine: /v1/completions, /v1/route, /healthz",
    "run": "all stages in order up to evaluate; what is already in the store is not done again",
    "plan": "show what would run, what is already there, and an estimate of time and memory",
    "runs": "list the runs that a store knows: name, date, size, configuration, report",
    "prune": "list what was left half done and what no run reaches; --yes removes it",
    "rm": "list what a store has of a run and of no other; --yes removes it",
}
EXAMPLES = """examples:
  python -m pipeline run --config config/demo.yaml
  python -m pipeline plan --config config/wikitext103.yaml
  python -m pipeline train_experts --config config/demo.yaml --parallel 2
  python -m pipeline train_router --config config/demo.yaml --override router.top_k=1 \\
      --override router.steps=0

Results live under addresses computed from the configuration, so a stage that is already done is
skipped, changing router.* keeps trunk and experts, and an interrupted command goes on when typed
again."""


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    top = argparse.ArgumentParser(
        prog="python -m pipeline",
        description="Train a mixture of experts in parts and put it together as one model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # Whatever the family: which one a run is of is known when its file is read
    for name in STAGES:
        sub = _add_command(commands, name, about(name))
        _add_common(sub, several_configs=False)
        if is_report(name):
            _add_smoke(sub)
        if has_several_jobs(name):
            _add_parallel(sub)
    _add_export(_add_command(commands, "export", OTHER_COMMANDS["export"]))
    _add_compress(_add_command(commands, "compress", OTHER_COMMANDS["compress"]))
    kit = _add_command(commands, "kit", OTHER_COMMANDS["kit"])
    kits.add_arguments(kit)
    _add_override(kit)
    _add_store(kit)
    _add_serve(_add_command(commands, "serve", OTHER_COMMANDS["serve"]))
    run = _add_command(commands, "run", OTHER_COMMANDS["run"])
    _add_common(run, several_configs=False)
    _add_smoke(run)
    _add_parallel(run)
    _add_common(_add_command(commands, "plan", OTHER_COMMANDS["plan"]), several_configs=False)
    _add_store(_add_command(commands, "runs", OTHER_COMMANDS["runs"]))
    for name, text in ABOUT.items():
        domains = _add_command(commands, name, text)
        add_arguments(domains, name)
        _add_common(domains, several_configs=False)
        _add_parallel(domains)
    prune = _add_command(commands, "prune", OTHER_COMMANDS["prune"])
    prune.add_argument(
        "--orphans", action="store_true", help="remove what no run and no configuration reaches too"
    )
    prune.add_argument(
        "--damaged", action="store_true", help="what was found damaged and kept aside, too"
    )
    rm = _add_command(commands, "rm", OTHER_COMMANDS["rm"])
    rm.add_argument("run", nargs="+", metavar="RUN", help="name or id, as `runs` lists them")
    for removing in (prune, rm):
        removing.add_argument("--yes", action="store_true", help="remove what is listed")
        _add_common(removing, several_configs=True)
    return top


def _add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, text: str
) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")


def _add_smoke(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--smoke", action="store_true", help="evaluate a few rows of everything: does it work"
    )


def _add_parallel(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--parallel",
        type=_positive,
        default=1,
        metavar="N",
        help="jobs side by side, cores shared (default 1)",
    )


def runs(folder: Path) -> list[Path]:
    """Return the files of a folder that describe runs; prices and what runs refer to do not."""
    return sorted(filter(describes_run, folder.glob("*.yaml")))


def _add_common(sub: argparse.ArgumentParser, several_configs: bool) -> None:
    if several_configs:
        sub.add_argument(
            "--config",
            action="extend",
            nargs="+",
            type=Path,
            metavar="FILE",
            help="configurations whose results are kept beside those of the runs that a store "
            "knows, may be repeated (default: all in config/)",
        )
    else:
        sub.add_argument(
            "--config", required=True, type=Path, metavar="FILE", help="YAML file, see config/"
        )
        _add_frozen(sub)
    _add_override(sub)
    _add_store(sub)


def _add_export(sub: argparse.ArgumentParser) -> None:
    formats = "; ".join(f"{name}: {text}" for name, text in FORMATS.items())
    sub.add_argument("--format", required=True, choices=FORMATS, help=formats)
    _add_target(sub)
    sub.add_argument(
        "--expert", metavar="NAME", help="this expert alone; anchor: the trunk with its own network"
    )
    sub.add_argument(
        "--dense", action="store_true", help="gguf: the mean of the experts as a dense model"
    )
    sub.add_argument(
        "--dtype",
        choices=DTYPES,
        help="what weights are rounded to (default: as stored); q8_0 is for gguf",
    )
    _add_common(sub, several_configs=False)


def _add_compress(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--rank", required=True, type=_positive, metavar="N", help="rank of each matrix's change"
    )
    sub.add_argument("--expert", metavar="NAME", help="this expert alone (default: all)")
    _add_target(sub)
    _add_common(sub, several_configs=False)


def _add_target(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--to", required=True, metavar="DIR|URL", help="a new folder, or s3://bucket/path and such"
    )


def _add_serve(sub: argparse.ArgumentParser) -> None:
    which = sub.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="serve the bundle that deploy made of this YAML file",
    )
    which.add_argument("--bundle", type=Path, metavar="DIR", help="serve this folder")
    sub.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="NAME",
        help="address to listen on (default 127.0.0.1)",
    )
    sub.add_argument(
        "--port", type=_port, default=8000, metavar="N", help="port; 0: any free one (default 8000)"
    )
    sub.add_argument(
        "--public",
        action="store_true",
        help="serve other machines without a key, which else is refused",
    )
    sub.epilog = f"With ${KEY} set, /v1 wants it as a bearer token."
    _add_frozen(sub)
    _add_override(sub)
    _add_store(sub)


def _add_frozen(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--frozen",
        action="store_true",
        help="go on with the data that was read before, whatever has changed or is gone since",
    )


def _add_override(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="a.b=value",
        help="change one setting, may be repeated; the README lists them all",
    )


def _add_store(sub: argparse.ArgumentParser) -> None:
    default = os.environ.get("MOLEFORGE_STORE", "store")
    sub.add_argument(
        "--store",
        type=Path,
        default=Path(default),
        metavar="DIR",
        help="where results are kept (default: $MOLEFORGE_STORE, else ./store)",
    )


def _positive(text: str) -> int:
    # int() would also take -1 and 1_000, and argparse would name this function.
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit code: 0 done, 2 a person has to mend something, 130
    stopped."""
    args = parser().parse_args(arguments)
    # Told to whoever has to run it again
    typed = sys.argv[1:] if arguments is None else arguments
    try:
        # These make nothing, and what they import would swallow a KeyboardInterrupt
        if args.command in ("plan", "serve"):
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
    errors = Console(stderr=True, soft_wrap=True)
    # A command that has changed its configuration says itself what goes on from there
    args.again = None
    try:
        _dispatch(args)
    except PipelineError as error:
        again = args.again or f"python -m pipeline {shlex.join(typed)}"
        text = sentence(error, CommandLine(), again=again)
        errors.print(f"[bold red]error:[/] {escape(text)}", highlight=False)
        _tell_how_to_go_on(args, errors)
        return 2
    except (Interrupted, KeyboardInterrupt) as stopped:
        errors.print(escape(str(stopped) or "stopped"), highlight=False)
        _tell_how_to_go_on(args, errors)
        return interrupts.STOPPED
    return 0


def _tell_how_to_go_on(args: argparse.Namespace, console: Console) -> None:
    if args.again:
        text = f"{args.config} is changed already; what is missing is made by: {args.again}"
        console.print(text, highlight=False, markup=False)


def _dispatch(args: argparse.Namespace) -> None:
    if args.command in ("prune", "rm", "runs"):
        _tend(args, Store(args.store))
        return
    if args.command == "serve":
        _serve(args)
        return
    if args.command in ABOUT:
        from .run.domains import come_and_go

        come_and_go(args, output())
        return
    if args.command == "kit":
        from .run.backend import printed_progress

        output().print(kits.kit(args, printed_progress(Console(stderr=True))), highlight=False)
        return
    cfg = load(args.config, _overrides(args))
    store = Store(args.store)
    if args.command == "plan":
        from .run.dry_run import show_plan

        # A plan makes no store, but it must not show as done what another version left
        store.open(create=False)
        show_plan(_looked_at(args, cfg, store), store, output())
        return
    if args.command == "export":
        wish = ExportWish(args.format, args.expert, args.dense, args.dtype)
        _export(args, wish, _looked_at(args, cfg, store.open()), store)
        return
    if args.command == "compress":
        wish = ExportWish("adapters", args.expert, rank=args.rank)
        _export(args, wish, _looked_at(args, cfg, store.open()), store)
        return
    _run(args, cfg, store.open())


def _overrides(args: argparse.Namespace) -> tuple[str, ...]:
    """Return what a command changes of its configuration."""
    smoke = ["evaluate.smoke=true"] if getattr(args, "smoke", False) else []
    return (*args.override, *smoke)


def _tend(args: argparse.Namespace, store: Store) -> None:
    """Show or remove what a store has."""
    from .run.identity import begin
    from .run.prune import prune, read_configs
    from .run.remove_run import remove_runs
    from .run.show_runs import show_runs

    if args.command == "runs":
        show_runs(store, output())
        return
    paths = args.config or runs(Path("config"))

    def read(path: Path) -> RunConfig:
        # looked at with the sums that the store has
        return begin(load(path, tuple(args.override)), store)[0]

    configs = read_configs(paths, read, store)
    if args.command == "rm":
        remove_runs(args.run, configs, store, output(), remove=args.yes)
        return
    prune(configs, store, output(), remove=args.yes, damaged=args.damaged, orphans=args.orphans)


def _looked_at(
    args: argparse.Namespace, cfg: RunConfig, store: Store, makes: bool = False
) -> RunConfig:
    """Return the run of a command, with what it reads outside the store looked at; tells of it."""
    from .run.backend import printed_progress
    from .run.identity import begin

    errors = Console(stderr=True, soft_wrap=True)
    progress = printed_progress(errors)
    cfg, notes = begin(cfg, store, progress, frozen=args.frozen, makes=makes)
    for note in notes:
        errors.print(note, highlight=False, markup=False)
    return cfg


def _export(args: argparse.Namespace, wish: ExportWish, cfg: RunConfig, store: Store) -> None:
    from .run.backend import printed_progress
    from .run.export import export
    from .run.reach import working

    progress = printed_progress(Console(stderr=True))
    with working(store, cfg, args.config, tuple(args.override)):
        export(cfg, store, wish, args.to, progress)


def _run(args: argparse.Namespace, cfg: RunConfig, store: Store) -> None:
    from .run.backend import Local
    from .run.reach import working

    if args.command == "run":
        wanted = [stage for stage in RUN if cfg.items(stage)]
    elif cfg.items(args.command):
        wanted = [args.command]
    else:
        output().print(without_jobs(args.command, cfg), highlight=False)
        return
    cfg = _looked_at(args, cfg, store, makes=True)
    backend = Local(store, parallel=getattr(args, "parallel", 1))
    # Between two of its jobs nothing else says that what is there is needed
    with working(store, cfg, args.config, _overrides(args)):
        _run_stages(wanted, cfg, backend)


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


def _serve(args: argparse.Namespace) -> None:
    folder = args.bundle
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
    errors = Console(stderr=True, soft_wrap=True)
    key = os.environ.get(KEY) or None
    # To be asked for, as a server behind a proxy that wants a key needs none itself
    if key is None and not args.public and not _only_this_machine(args.host):
        raise ConfigError(
            f"without a key whoever reaches {args.host} can use it: set {KEY}, or add --public "
            "to serve everybody"
        )

    def progress(text: str) -> None:
        errors.print(text, highlight=False)

    # Only this command needs the server's packages, and not before there is a bundle
    from .serve.app import create, listen

    with in_store:
        listen(create(folder, key), args.host, args.port, progress)


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
    # a command, as a path of a terminal is seldom a link
    command = shlex.join(["python3", "-m", "webbrowser", page.resolve().as_uri()])
    console.print(f"open it: {command}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    status = main()
    # Python gives the signals back to the system while modules take their leave, unless ignored
    interrupts.ignore()
    sys.exit(status)
