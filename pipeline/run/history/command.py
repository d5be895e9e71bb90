"""The command `history`."""

import argparse

from rich.console import Console

from ...protocols import Progress
from ...store.artifacts import Store
from ...store.history_db import history_db
from .. import next_step
from ..prune import opened, said
from .chosen import one_of, runs_of, trainings_of
from .comparing import compare
from .exporting import export
from .lines import PastRun, known
from .listing import list_runs
from .showing import show_run, show_training


def history(args: argparse.Namespace, store: Store, console: Console, progress: Progress) -> None:
    """Do an action of `history`; `args.next` is what to type then. Raises StoreError where there is
    no store, ConfigError, UnreadableFile, DiskFull."""
    opened(store)
    say = said(console)
    with history_db(store, progress) as index:
        everything = known(index, store.root)
        if args.action == "list":
            list_runs(everything, args.last, console)
            args.next = next_step.after_history_list(args, [run.id for run in everything.runs])
        elif args.action == "show":
            found = one_of(args.what, everything)
            if isinstance(found, PastRun):
                show_run(found, everything, index, store, console)
                words = ["show", found.last.address] if found.last else ["list"]
            else:
                show_training(found, index, store, console)
                words = ["export", found.address, "--format", "csv", "--to", "rows.csv"]
            args.next = next_step.history(args, *words)
        elif args.action == "compare":
            best = compare(runs_of(args.runs, everything), args.job, store, console)
            args.next = next_step.history(args, "report", *[run.id for run in best])
        elif args.action == "export":
            chosen = trainings_of(args.what, everything)
            rows = export(chosen, everything, index, store, args.to, args.format)
            say(f"{rows:,} rows of {len(chosen):,} trainings: {args.to}")
            args.next = next_step.after_history_export(args)
        else:
            # with its templates and the library
            from .reporting import report

            drawn = runs_of(args.runs, everything)
            if not args.runs and args.last:
                drawn = drawn[: args.last]
            report(drawn, everything, index, store, args.to, not args.no_png, say)
            args.next = next_step.opened_page(args.to)
