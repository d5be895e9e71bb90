"""What can be typed behind `history` and `watch`."""

import argparse
from collections.abc import Callable
from pathlib import Path

from ..typed_numbers import positive
from .exporting import FORMATS

ABOUT = {
    "list": "list runs, the latest first: jobs, last training, score, time",
    "show": "show a run and its trainings, or all series of one training",
    "compare": "put runs side by side with the settings they differ in; many are ranked",
    "export": "write rows for other programs: csv, jsonl, tensorboard",
    "report": "write a page with interactive curves of runs, complete in itself",
}
_RUNS = "names, ids, or patterns such as 'sweep-*' (default: all)"
LISTED = 30
DRAWN = 8
WATCH_EVERY_S = 2
REPORT = Path("history.html")


def add_history(
    sub: argparse.ArgumentParser, add_store: Callable[[argparse.ArgumentParser], None]
) -> None:
    """Add what `history` takes."""
    actions = sub.add_subparsers(dest="action", required=True, metavar="ACTION")
    made = {}
    for name, text in ABOUT.items():
        made[name] = actions.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}."
        )
        add_store(made[name])
    made["list"].add_argument(
        "--last",
        type=_number,
        default=LISTED,
        metavar="N",
        help=f"how many (default {LISTED}; 0: all)",
    )
    made["show"].add_argument(
        "what",
        metavar="RUN|TRAINING",
        help="a run by name or id, a training as RUN/STAGE/ITEM or by its address or hash",
    )
    made["compare"].add_argument("runs", nargs="*", metavar="RUN", help=_RUNS)
    made["compare"].add_argument(
        "--job",
        metavar="NAME",
        help='rank by this training, "train_experts medicine" say (default, of more than a few '
        "runs: the one that tells most of them apart)",
    )
    export = made["export"]
    export.add_argument(
        "what", nargs="*", metavar="RUN|TRAINING", help="runs, patterns or trainings (default: all)"
    )
    formats = "; ".join(f"{name}: {text}" for name, text in FORMATS.items())
    export.add_argument("--format", required=True, choices=FORMATS, help=formats)
    export.add_argument(
        "--to", required=True, type=Path, metavar="FILE|DIR", help="what is not there yet"
    )
    report = made["report"]
    report.add_argument("runs", nargs="*", metavar="RUN", help=_RUNS)
    report.add_argument(
        "--last",
        type=_number,
        default=DRAWN,
        metavar="N",
        help=f"without RUN: how many of the latest runs (default {DRAWN}; 0: all)",
    )
    report.add_argument(
        "--to",
        type=Path,
        default=REPORT,
        metavar="FILE",
        help=f"the page, written over (default {REPORT})",
    )
    report.add_argument(
        "--no-png", action="store_true", help="do not draw the losses of each stage beside it"
    )


def add_watch(sub: argparse.ArgumentParser) -> None:
    """Add what `watch` takes."""
    sub.add_argument(
        "run",
        nargs="?",
        metavar="RUN",
        help="name or id (default: the run in progress, else the one that was begun last)",
    )
    sub.add_argument("--once", action="store_true", help="look once and end")
    sub.add_argument(
        "--every",
        type=positive,
        default=WATCH_EVERY_S,
        metavar="SECONDS",
        help=f"between two looks (default {WATCH_EVERY_S})",
    )


def _number(text: str) -> int:
    try:
        return 0 if text == "0" else positive(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text} is no number from 0 on") from None
