"""What a store knows of what lies outside it: what was looked at for each job, and what its result
was made of.

    sources/seen/<print>.json      the files, URLs and packages that have the print, with their sums
    sources/looked/<recipe>.json   the print of what a job reads, when a run last looked
    sources/made/<recipe>.json     the print of what its result in the store was made of
    sources/text/<key>.json        what documents a file has, and the sum of that file; beside it
                                   a row for each of them (data/text/records.py)

A recipe is a job under its settings, less what it reads. All of it may be lost: then it is looked
at anew, and nothing tells what it was before.
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


def keep(store: Store, when: When, recipe: str, looked: Looked) -> None:
    """Write down what a job reads. Raises DiskFull, OSError."""
    if print_of(store, when, recipe) == looked.print:
        return
    root = store.root / FOLDER
    seen = seen_path(store, looked.print)
    record = root / when / f"{recipe}.json"
    for path in (seen, record):
        path.parent.mkdir(parents=True, exist_ok=True)
    # First what the record names
    text = json.dumps({"seen": [asdict(each) for each in looked.seen]})
    write_text(seen, f"{text}\n")
    found = {"print": looked.print, "at": now()}
    write_text(record, f"{json.dumps(found)}\n")


def print_of(store: Store, when: When, recipe: str) -> str:
    """Return the print that is written down; "" where there is none that can be read."""
    with suppress(OSError, ValueError, KeyError):
        data = (store.root / FOLDER / when / f"{recipe}.json").read_bytes()
        return str(parse_object(data)["print"])
    return ""


def records(store: Store) -> dict[Path, str]:
    """Return the print by the record that has it, of all that are written down; "" for one that
    cannot be read."""
    found = {}
    for when in KINDS:
        for path in sorted((store.root / FOLDER / when).glob("*.json")):
            found[path] = print_of(store, when, path.stem)
    return found


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
