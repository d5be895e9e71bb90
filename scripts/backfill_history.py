"""Brings histories of trainings that were made elsewhere into a store, where they are listed,
compared and shown beside its own.

Run again it writes nothing anew but what has grown since; what it leaves out it says, with why.
"""

import argparse
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Run by its path, so that the folder above is not where Python looks for modules.
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.errors import PipelineError
from pipeline.run.arguments import add_store
from pipeline.run.next_step import command, in_store
from pipeline.store.artifacts import Store
from pipeline.store.imported import keep
from scripts.foreign_histories import Found, Skipped, histories

ABOUT = """\
PATH is a folder, with all below it that is read: other stores of MoleForge,
trainer_state.json of Hugging Face's Trainer, offline runs of wandb, TensorBoard's event
files. Plain .jsonl, .csv and .tsv are read where they are named themselves.

Losses are taken as nats a token. --map says which column is what where names differ:

  python scripts/backfill_history.py runs/ old-store/ --store store
  python scripts/backfill_history.py log.csv --map step=batch --map train_nats=nll

docs/metrics.md has the names that columns come to have."""


def main(arguments: list[str] | None = None) -> int:
    """Import what was named; return 0, 1 where nobody reads what is told, or 2 where
    nothing of it could be read."""
    args = parser().parse_args(arguments)
    try:
        store = Store(args.store).open()
        return _import(args, store)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Nobody reads any more, as behind `| head`, nor would what is left be read
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _import(args: argparse.Namespace, store: Store) -> int:
    names = dict(args.map)
    read = 0
    last = ""
    skipped = 0
    for found in _all(args.paths, names, store):
        if isinstance(found, Skipped):
            skipped += 1
            print(f"skipped {found.path}: {found.why}")
            continue
        read += 1
        address = found.origin.address
        became = keep(store, found.origin, found.rows)
        print(f"{became} {address}: {len(found.rows)} steps of {found.origin.path}")
        for note in found.notes:
            print(f"  left out: {note}")
        last = address
    print(f"{read} read, {skipped} skipped")
    if not read:
        print("next: name a file or folder with histories; --help says which are read")
        return 2
    print(f"next: {command('metrics', last, *in_store(args))}")
    return 0


def _all(paths: list[Path], names: dict[str, str], store: Store) -> Iterator[Found | Skipped]:
    for path in paths:
        for found in histories(path, names):
            here = store.root.resolve()
            if isinstance(found, Found) and Path(found.origin.path).is_relative_to(here):
                yield Skipped(Path(found.origin.path), "is this store's own")
            else:
                yield found


def _pair(text: str) -> tuple[str, str]:
    """Return a column and what it is here."""
    here, _, theirs = text.partition("=")
    if not here or not theirs:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=COLUMN")
    return theirs, here


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    out = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0],
        epilog=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    out.add_argument(
        "--map",
        action="append",
        default=[],
        type=_pair,
        metavar="NAME=COLUMN",
        help="NAME here is COLUMN there, may be repeated",
    )
    add_store(out, "where they are to be")
    return out


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Files may be called by bytes that are no text, or by letters that a terminal has not
        sys.stdout.reconfigure(errors="replace")
    sys.exit(main())
