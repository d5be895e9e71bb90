"""What a store knows of what lies outside it: what was looked at for each job, and what its result
was made of.

    sources/seen/<print>.json      the files, URLs and packages that have the print, with their sums
    sources/looked/<recipe>.json   the print of what a job reads, when a run last looked, and by run
    sources/made/<recipe>.json     the same of what its result in the store was made of
    sources/text/<key>.json        what documents a file has, and the sum of that file; beside it
                                   a row for each of them (data/text/records.py)

A recipe is a job under its settings, less what it reads: runs of the same settings and other files
share one. All of it may be lost: then it is looked at anew, and nothing tells what it was before.
"""

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from ..protocols import Looked, Seen
from .artifacts import Store, now, write_text
from .looking import FOLDER
from .reading import as_kind, parse_object

# When: the last look of a command that makes something, or what the result there is was made of
When = Literal["looked", "made"]
KINDS: tuple[When, ...] = ("looked", "made")
SEEN = "seen"
TEXT = "text"
OF = "of"  # the sum of the file whose documents a record has


def keep(store: Store, when: When, recipe: str, looked: Looked, run: str) -> None:
    """Write down what a job of a run reads. Raises DiskFull, OSError."""
    if is_kept(store, when, recipe, looked.print, run):
        return
    record = record_path(store, when, recipe)
    runs = _record(record)[1]
    seen = seen_path(store, looked.print)
    for path in (seen, record):
        path.parent.mkdir(parents=True, exist_ok=True)
    # First what the record names
    text = json.dumps({"seen": [asdict(each) for each in looked.seen]})
    write_text(seen, f"{text}\n")
    found = {"print": looked.print, "at": now(), "runs": runs | {run: looked.print}}
    write_text(record, f"{json.dumps(found)}\n")


def is_kept(store: Store, when: When, recipe: str, print_: str, run: str) -> bool:
    """Whether a print is written down as the last one, and as this run's."""
    last, runs = _record(record_path(store, when, recipe))
    return last == runs.get(run) == print_


def _record(path: Path) -> tuple[str, dict[str, str]]:
    """Return the last print of a record and those by run; "" and none where it cannot be read, no
    runs of an older one."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = parse_object(path.read_bytes())
        runs = dict(known.get("runs", {}))
        return str(known["print"]), {str(name): str(print_) for name, print_ in runs.items()}
    return "", {}


def print_of(store: Store, when: When, recipe: str, run: str) -> str:
    """Return the print that is written down for a run; "" where there is none that can be read."""
    with suppress(OSError):
        return print_in(record_path(store, when, recipe).read_bytes(), run)
    return ""


def print_in(record: bytes, run: str) -> str:
    """Return the print that a record has for a run; of an older one, which says no run, the print
    that it has."""
    with suppress(ValueError, KeyError, TypeError):
        known = parse_object(record)
        runs = known.get("runs")
        return str(known["print"] if runs is None else dict(runs).get(run, ""))
    return ""


def records(store: Store) -> dict[Path, set[str]]:
    """Return the prints by the record that has them, of all that are written down; none of one
    that cannot be read."""
    found: dict[Path, set[str]] = {}
    for when in KINDS:
        for path in sorted((store.root / FOLDER / when).glob("*.json")):
            last, runs = _record(path)
            found[path] = {last, *runs.values()} - {""}
    return found


def record_path(store: Store, when: When, recipe: str) -> Path:
    """Where the print of a recipe is."""
    return store.root / FOLDER / when / f"{recipe}.json"


def seen_path(store: Store, print_: str) -> Path:
    """Where the files of a print are."""
    return store.root / FOLDER / SEEN / f"{print_}.json"


def text_records(store: Store) -> dict[Path, str]:
    """Return the sum of the file that it is of by the record, of all records of documents that are
    written down; "" for one that does not say it."""
    found = {}
    for path in sorted((store.root / FOLDER / TEXT).glob("*.json")):
        found[path] = ""
        with suppress(OSError, ValueError):
            found[path] = str(parse_object(path.read_bytes()).get(OF, ""))
    return found


def looked_at(store: Store, print_: str) -> Looked | None:
    """Return what has a print; None where it is not written down, or cannot be read."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        data = seen_path(store, print_).read_bytes()
        seen = parse_object(data)["seen"]
        return Looked(print_, tuple(as_kind(Seen, each) for each in seen))
    return None
