"""What to type next: the line that commands end with."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from ..config.run import RunConfig
from ..store.artifacts import Store, default_root
from ..store.roots import Root
from .stages import RUN, Addresses


def command(name: str, *words: object) -> str:
    """Return a command as it is typed."""
    return shlex.join(["python", "-m", "pipeline", name, *map(str, words)])


def in_store(args: argparse.Namespace) -> list[str]:
    """Return what names the store that a command was typed for, nothing where it is the default."""
    return [] if args.store == default_root() else ["--store", str(args.store)]


def same(args: argparse.Namespace, name: str) -> str:
    """Return another command on the run that a command was typed for."""
    words: list[object] = ["--config", args.config]
    for override in args.override:
        words += ["--override", override]
    if getattr(args, "frozen", False):
        words.append("--frozen")
    return command(name, *words, *in_store(args))


def page(args: argparse.Namespace, run: str) -> str:
    """Return the command that opens the newest report of a run."""
    return command("open", run, "--browser", *in_store(args))


def after_stage(args: argparse.Namespace, cfg: RunConfig, store: Store) -> str:
    """Return what follows a stage, or a whole run: what is not made yet, else a look at it."""
    if args.command == "run":
        return page(args, cfg.name)
    row = cfg.stages[args.command]
    if row.kind == "bundle":
        return same(args, "chat")
    missing = first_missing(cfg, store)
    return same(args, missing) if missing else page(args, cfg.name)


def after_plan(args: argparse.Namespace, cfg: RunConfig, store: Store) -> str:
    """Return what follows a plan: the run, or where all of it is done a look at it."""
    return same(args, "run") if first_missing(cfg, store) else page(args, cfg.name)


def first_missing(cfg: RunConfig, store: Store) -> str:
    """Return the first stage of a run that has a job which is not made, "" for none."""
    addresses = Addresses(cfg)
    for stage in RUN:
        for _, _, address in addresses.jobs(stage):
            if not store.has(address):
                return stage
    return ""


def after_export(args: argparse.Namespace) -> str:
    """Return what follows an export: a bundle speaks, of everything else its card says how."""
    target = args.to
    # Rounded it is a model for other tools, and no bundle
    is_bundle = getattr(args, "format", "") == "hf" and args.dtype is None
    if "://" not in target and is_bundle:
        return command("chat", "--bundle", target)
    return f"read {target.rstrip('/')}/README.md, which has an example"


def after_kit(args: argparse.Namespace) -> str:
    """Return what follows a kit, where its text is, and a package, where its run is."""
    if args.pack:
        return command("add", "DOMAIN", "--config", "FILE", "--expert", args.to)
    return command("kit", "--pack", args.to, "--paths", "FILES", "--to", "PACKAGE")


def after_listing(args: argparse.Namespace, may_go: bool) -> str:
    """Return what follows `prune` and `rm`: the same with --yes, where something may go."""
    if not may_go or args.yes:
        return command("runs", *in_store(args))
    words: list[object] = list(args.run) if args.command == "rm" else []
    for path in args.config or ():
        words += ["--config", path]
    for override in args.override:
        words += ["--override", override]
    for flag in ("damaged", "orphans"):
        if getattr(args, flag, False):
            words.append(f"--{flag}")
    return command(args.command, *words, "--yes", *in_store(args))


def after_runs(args: argparse.Namespace, latest: Root | None, has_report: bool) -> str:
    """Return what follows the list of runs, of which `latest` was begun last."""
    if latest is None:
        return command("run", "--config", "config/demo.yaml", *in_store(args))
    if has_report:
        return page(args, latest.name)
    return command("metrics", latest.name, *in_store(args))


def after_metrics(args: argparse.Namespace, shown: Sequence[str]) -> str:
    """Return what follows the metrics of the trainings at some addresses, none where they are for a
    program."""
    if not shown:
        return ""
    if len(shown) > 1:
        return command("metrics", shown[-1], *in_store(args))
    return command("history", "show", shown[0], *in_store(args))


def after_open(args: argparse.Namespace) -> str:
    """Return what follows the place of a report."""
    if args.browser:
        return command("metrics", *args.run, *in_store(args))
    return command("open", *args.run, "--browser", *in_store(args))


def history(args: argparse.Namespace, *words: object) -> str:
    """Return another action of `history` on the store that a command was typed for."""
    return command("history", *words, *in_store(args))


def after_history_list(args: argparse.Namespace, runs: Sequence[str]) -> str:
    """Return what follows the list of histories: a look at the run that was begun last."""
    return history(args, "show", runs[0]) if runs else after_runs(args, None, False)


def after_history_export(args: argparse.Namespace) -> str:
    """Return what follows rows that were written for other programs: what draws them."""
    if args.format == "tensorboard":
        return shlex.join(["tensorboard", "--logdir", str(args.to)])
    return history(args, "report")


def opened_page(page: Path) -> str:
    """Return the command that opens a page, as a path of a terminal is seldom a link."""
    return shlex.join(["python3", "-m", "webbrowser", page.resolve().as_uri()])


def after_watch(args: argparse.Namespace, run: str, done: bool, in_progress: bool) -> str:
    """Return what follows a look at a run; "" for one that stopped half way, as only whoever began
    it knows how."""
    if done:
        return history(args, "show", run)
    return command("watch", run, *in_store(args)) if in_progress else ""


def after_versions(args: argparse.Namespace, versions: int) -> str:
    """Return what follows `versions` and `rollback`: the way back, else what serves it."""
    if args.command == "versions" and versions > 1:
        return command("rollback", args.target)
    if "://" in args.target or not versions:
        return command("versions", args.target)
    return command("serve", "--bundle", args.target)
