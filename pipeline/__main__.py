"""The command line: `python -m pipeline STAGE --config FILE [--override a.b=value]... [--store
DIR]`."""

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .config.run import RunConfig
from .errors import Interrupted, PipelineError
from .families.load import describes_run, load
from .run.stages import RUN, STAGES, address, without_jobs
from .store.artifacts import Manifest, Store

KEY = "MOLEFORGE_API_KEY"
ABOUT = {
    "preprocess": "read the data: documents to tokenizer, domains and token shards, or each task to rows and pictures",
    "train_shared": "train the shared trunk with its temporary feed-forward network, the dummy; or pin the base",
    "train_experts": "train each expert on its own domain over the frozen trunk, or task over the frozen base",
    "routing": "make the routing set: requests from the tasks' own rows, with the expert each belongs to",
    "train_router": "join the experts: train the router alone (gates start from a closed form)",
    "train_dense": "train the dense baselines the stack is compared with",
    "evaluate": "measure the stack, write report.json and report.html, print the tables",
    "deploy": "write the stack as a bundle: a folder that stock tools load; upload it where deploy.upload says",
    "serve": "serve a bundle on this machine: /v1/completions, /v1/route, /healthz",
    "run": "all stages in order up to evaluate; what is already in the store is not done again",
    "plan": "show what would run, what is already there, and an estimate of time and memory",
    "prune": "list artifacts that no configuration reaches; --yes removes them",
}
EXAMPLES = """examples:
  python -m pipeline run --config config/demo.yaml
  python -m pipeline plan --config config/wikitext103.yaml
  python -m pipeline train_experts --config config/demo.yaml --parallel 2
  python -m pipeline train_router --config config/demo.yaml --override router.top_k=1 --override router.steps=0

Results live under addresses computed from the configuration, so a stage that is already done is
skipped, changing router.* keeps trunk and experts, and an interrupted command goes on when typed again."""


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    top = argparse.ArgumentParser(
        prog="python -m pipeline",
        description="Train a mixture of experts in parts and put it together as one model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, about in ABOUT.items():
        sub = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        _add_serve(sub) if name == "serve" else _add_common(sub, several=name == "prune")
        if name in ("run", "evaluate"):
            sub.add_argument(
                "--smoke",
                action="store_true",
                help="evaluate a few rows of everything: does it work",
            )
        if name in ("run", "preprocess", "train_experts", "train_dense"):
            sub.add_argument(
                "--parallel",
                type=_positive,
                default=1,
                metavar="N",
                help="jobs side by side, cores shared (default 1)",
            )
        if name == "prune":
            sub.add_argument("--yes", action="store_true", help="remove what is listed")
    return top


def runs(folder: Path) -> list[Path]:
    """Return the files of a folder that describe runs; prices and what runs refer to do not."""
    return sorted(filter(describes_run, folder.glob("*.yaml")))


def _add_common(sub: argparse.ArgumentParser, several: bool) -> None:
    if several:
        sub.add_argument(
            "--config",
            nargs="+",
            type=Path,
            default=runs(Path("config")),
            metavar="FILE",
            help="configurations whose artifacts are kept (default: all in config/)",
        )
    else:
        sub.add_argument(
            "--config", required=True, type=Path, metavar="FILE", help="YAML file, see config/"
        )
    _add_store(sub)


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
    sub.epilog = f"With ${KEY} set, /v1 wants it as a bearer token."
    _add_store(sub)


def _add_store(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="a.b=value",
        help="change one setting, may be repeated; the README lists them all",
    )
    default = os.environ.get("MOLEFORGE_STORE", "store")
    sub.add_argument(
        "--store",
        type=Path,
        default=Path(default),
        metavar="DIR",
        help="where results are kept (default: $MOLEFORGE_STORE, else ./store)",
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**16:
        raise argparse.ArgumentTypeError(f"{text} is not a port")
    return number


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit code: 0 done, 2 a person has to mend something, 130 stopped."""
    args = parser().parse_args(arguments)
    errors = Console(stderr=True, soft_wrap=True)
    before = signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # jobs save at either, so stop at either
    try:
        _dispatch(args)
    except PipelineError as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        return 2
    except (Interrupted, KeyboardInterrupt) as stopped:
        errors.print(escape(str(stopped) or "stopped"), highlight=False)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _dispatch(args: argparse.Namespace) -> None:
    if args.command == "prune":
        from .run.dry_run import prune

        prune(
            [load(path, tuple(args.override)) for path in args.config],
            Store(args.store).open(),
            args.yes,
            _out(),
        )
        return
    if args.command == "serve":
        _serve(args)
        return
    overrides = (
        *args.override,
        *(["evaluate.smoke=true"] if getattr(args, "smoke", False) else []),
    )
    cfg, store = load(args.config, overrides), Store(args.store)
    if args.command == "plan":
        from .run.dry_run import show_plan

        show_plan(cfg, store, _out())
        return
    _run(args, cfg, store.open())


def _run(args: argparse.Namespace, cfg: RunConfig, store: Store) -> None:
    from .run.backend import Local, run_stage

    command = f"python -m pipeline {shlex.join(sys.argv[1:])}"
    backend = Local(store, parallel=getattr(args, "parallel", 1), command=command)
    if args.command in STAGES and not cfg.items(args.command):
        _out().print(without_jobs(args.command, cfg), highlight=False)
        return
    for stage in [s for s in RUN if cfg.items(s)] if args.command == "run" else [args.command]:
        manifests = run_stage(stage, cfg, backend)
        if stage == "evaluate":
            _show_report(store, address(cfg, "evaluate"))
        else:
            _show_jobs(manifests)
        if stage == "deploy":
            _out().print(
                f"bundle: {store.folder(manifests[0].address)}", highlight=False, soft_wrap=True
            )


def _serve(args: argparse.Namespace) -> None:
    folder = args.bundle
    if args.config:
        cfg, store = load(args.config, tuple(args.override)), Store(args.store)
        folder = store.folder(store.require(address(cfg, "deploy"), "deploy").address)
    errors = Console(stderr=True, soft_wrap=True)
    key = os.environ.get(KEY) or None
    if key is None and args.host not in ("127.0.0.1", "localhost", "::1"):
        errors.print(
            f"without a key: whoever reaches {args.host} can use it; set {KEY} to change that",
            highlight=False,
        )
    from .serve.app import create, listen

    listen(
        create(folder, key), args.host, args.port, lambda text: errors.print(text, highlight=False)
    )


def _out() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=120)


def _show_jobs(manifests: list[Manifest]) -> None:
    """Print what a stage left: one row per job."""
    table = Table(title=manifests[0].stage, title_justify="left", title_style="bold")
    for name, style in (("artifact", "cyan"), ("MB", ""), ("seconds", ""), ("what came out", "")):
        table.add_column(
            name, style=style, justify="left" if name[0] in "aw" else "right", overflow="fold"
        )
    for m in manifests:
        table.add_row(
            m.address, f"{m.bytes / 1e6:.1f}", f"{m.made['seconds']:.0f}", _outcome(m.metrics)
        )
    _out().print(table)


def _outcome(metrics: dict) -> str:
    from .run.dry_run import figures

    if {"files", "experts", "parameters"} <= metrics.keys():
        return f"{metrics['experts']} experts, {metrics['parameters']:,} parameters, {metrics['files']} files"
    return _text_outcome(metrics) if "vocab_size" in metrics else figures(metrics)


def _text_outcome(metrics: dict) -> str:
    domains = ", ".join(f"{d} {n:,}" for d, n in metrics["tokens"]["train"].items())
    dropped = ", ".join(f"{n:,} {reason}" for reason, n in metrics["dropped"].items())
    text = f"training tokens: {domains}; vocabulary {metrics['vocab_size']:,}"
    return f"{text}; dropped: {dropped}" if dropped else text


def _show_report(store: Store, here: str) -> None:
    from . import report

    folder = store.folder(here)
    console = _out()
    report.show(report.read((folder / "report.json").read_text("utf-8")), console)
    console.print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
