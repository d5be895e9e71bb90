"""`experiments` as it is typed: read, made on this machine, shown and written."""

import argparse

from ... import report
from ...report.narrow import output, plain_console
from ...report.schema.experiments import RESULTS, TABLES
from ...store.artifacts import Store
from ...store.room import writing_to
from .. import next_step
from ..advice import CommandLine, sentence
from ..backend import Local, printed_progress
from .conduct import (
    PAGE,
    conduct,
    local_hand_out,
    refuse_others,
    replaced,
    results_folder,
    write_results,
)
from .failures import refuse_failed
from .reading import read_experiments


def run_experiments(args: argparse.Namespace) -> None:
    """Do a sweep on this machine; print its tables, and where its results are. Raises ConfigError
    before anything starts, StoreError, Interrupted; in the end TrialsFailed."""
    experiments = read_experiments(args.config, tuple(args.override))
    errors = plain_console(stderr=True, soft_wrap=True)
    progress = printed_progress(errors)
    store = Store(args.store).open()
    if args.to:
        # Before hours are spent on what could not be written then
        with writing_to(args.to, "folder"):
            args.to.mkdir(parents=True, exist_ok=True)
        refuse_others(args.to, experiments)
    folder = args.to or results_folder(store, experiments)

    def tell(text: str) -> None:
        errors.print(text, highlight=False, markup=False)

    lost = replaced(folder, experiments)
    if lost:
        tell(lost)
    hand_out = local_hand_out(
        Local(store, args.parallel),
        lambda error: sentence(error, CommandLine()),
        experiments.name,
    )
    results, trials = conduct(
        experiments,
        store,
        hand_out,
        tell,
        progress,
        frozen=args.frozen,
        parallel=args.parallel,
    )
    results = write_results(results, trials, store, folder, progress)
    console = output()
    report.show_experiments(results, console)
    console.print(f"results: {folder / RESULTS}", highlight=False, soft_wrap=True)
    if results.dense_weights:
        places = ", ".join(str(folder / place) for place in results.dense_weights.values())
        console.print(f"dense weights: {places}", highlight=False, soft_wrap=True)
    console.print(f"tables: {folder / TABLES}", highlight=False, soft_wrap=True)
    page = folder / PAGE
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    args.next = next_step.opened_page(page)
    # Last, as the others are what was asked for
    refuse_failed(results)
