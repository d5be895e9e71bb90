"""The command `history`."""

import argparse
import sqlite3

from rich.console import Console

from ...protocols import Progress
from ...store.artifacts import Store
from ...store.history_db import history_db
from .. import next_step
from ..find import taken_for_experiments
from ..prune import opened, said
from .chosen import one_of, runs_of, trainings_of
from .comparing import compare
from .experiments import compare_experiments, list_experiments, show_experiments
from .exporting import export
from .lines import Known, PastRun, known
from .listing import list_runs
from .showing import show_run, show_training


def history(args: argparse.Namespace, store: Store, console: Console, progress: Progress) -> None:
    """Do an action of `history`; `args.next` is what to type then. Raises StoreError where there is
    no store, ConfigError, UnreadableFile, DiskFull."""
    opened(store)
    say = said(console)
    with history_db(store, progress) as index:
        everything = known(index, store.root)
        for name in _typed(args):
            if run := everything.run_beside(name):
                say(taken_for_experiments(name, run.id))
        if args.action == "list":
            list_runs(everything, args.last, console)
            list_experiments(everything, args.last, console)
            args.next = next_step.after_history_list(args, [run.id for run in everything.runs])
        elif args.action == "show":
            words = _show(args.what, everything, index, store, console)
            args.next = next_step.history(args, *words)
        elif args.action == "compare":
            drawn = _compare(args, everything, store, console)
            args.next = next_step.history(args, "report", *drawn)
        elif args.action == "export":
            chosen = trainings_of(args.what, everything)
            rows = export(chosen, everything, index, store, args.to, args.format)
            say(f"{rows:,} rows of {len(chosen):,} trainings: {args.to}")
            args.next = next_step.after_history_export(args)
        else:
            # with its templates and the library
            from .reporting import report

            runs = runs_of(args.runs, everything)
            if not args.runs and args.last:
                runs = runs[: args.last]
            report(runs, everything, index, store, args.to, not args.no_png, say)
            args.next = next_step.opened_page(args.to)


def _typed(args: argparse.Namespace) -> list[str]:
    """Return the names that an action was given."""
    if args.action == "list":
        return []
    if args.action == "show":
        return [args.what]
    names: list[str] = args.what if args.action == "export" else args.runs
    return names


def _show(
    name: str, everything: Known, index: sqlite3.Connection, store: Store, console: Console
) -> list[str]:
    """Show experiments, a run or a training by its name; return the action that follows."""
    experiments = everything.experiments_called(name)
    if experiments is not None:
        show_experiments(experiments, store, console)
        return ["compare", name]
    found = one_of(name, everything)
    if isinstance(found, PastRun):
        show_run(found, everything, index, store, console)
        return ["show", found.last.address] if found.last else ["list"]
    show_training(found, index, store, console)
    return ["export", found.address, "--format", "csv", "--to", "rows.csv"]


def _compare(
    args: argparse.Namespace, everything: Known, store: Store, console: Console
) -> list[str]:
    """Put experiments, or runs, side by side; return the names of what may be drawn together."""
    called = [everything.experiments_called(name) for name in args.runs]
    experiments = [each for each in called if each is not None]
    # Beside runs, or where a training is named, their trials are meant
    if experiments and len(experiments) == len(called) and not args.job:
        compare_experiments(experiments, console)
        return [each.name for each in experiments]
    best = compare(runs_of(args.runs, everything), args.job, store, console)
    return [run.id for run in best]
