"""Histories of trainings that were made elsewhere, kept among the store's own.

An imported one has an address like any other, `imported-NAME-HASH`, and no artifact. The line that
begins it says where it came from. It is written whole, once more when its source has grown.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..errors import UnreadableFile
from .artifacts import Store, write_text
from .history import VALIDATION, Row
from .reading import as_kind, reading

STAGE = "imported"
MOST_BYTES = 180  # of a name in an address, which locks and parts have endings after
Kept = Literal["imported", "there already", "there already, with more rows,"]
# Of a validation's row, beside its step, tokens and time
_OF_VALIDATION = re.compile(r"valid_\w+|train_(total|ce|aux)|epoch|experts")


@dataclass(frozen=True)
class Origin:
    """Where an imported history came from."""

    kind: str  # the program or format that wrote it
    path: str  # the file or folder it was read from
    name: str  # for people
    id: str  # what tells it from all others of its kind
    made: str = ""  # when it began, ISO 8601, where the source says
    metrics: dict[str, Any] = field(default_factory=dict)  # of the whole, by the manifests' names
    settings: dict[str, Any] = field(default_factory=dict)  # as the source has them

    @property
    def address(self) -> str:
        """Where its history is: the same for the same training, however often it is imported."""
        digest = hashlib.sha256(
            f"{self.kind}\n{self.id}".encode(errors="surrogatepass")
        ).hexdigest()[:12]
        # a name may hold anything, and this is a file's
        slug = re.sub(r"[^\w.]+", "-", self.name).strip("-.")[:60]
        # Systems count its bytes, and a letter may have four
        slug = slug.encode()[:MOST_BYTES].decode(errors="ignore") or self.kind
        return f"{STAGE}-{slug}-{digest}"


def keep(store: Store, origin: Origin, rows: Iterable[Row]) -> Kept:
    """Write a history, unless the same one is there, or one with more rows, as of a torn copy;
    return what became of it. Its numbers are finite.

    Raises DiskFull, OSError, UnreadableFile.
    """
    ordered = sorted(_as_written(rows), key=lambda row: row["step"])
    begun: Row = {"start": 0, "origin": asdict(origin)}
    lines = []
    for entry in (begun, *ordered):
        lines.append(json.dumps(entry, separators=(",", ":"), allow_nan=False))
    text = "\n".join(lines) + "\n"
    path = store.history(origin.address)
    with store.lock(origin.address):
        with suppress(FileNotFoundError), reading(path):
            former = path.read_text("utf-8")
            if former == text:
                return "there already"
            if former.count("\n") > len(lines):
                return "there already, with more rows,"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    store.publish()
    return "imported"


def is_imported(address: str) -> bool:
    """Whether an address is that of an imported history."""
    return address.startswith(f"{STAGE}-")


def origin_of(store: Store, address: str) -> Origin | None:
    """Return where a history came from; None for one of our own, or whose first line is damaged.
    Raises UnreadableFile."""
    if not is_imported(address):
        return None
    try:
        with reading(store.history(address)), store.history(address).open("rb") as file:
            first = json.loads(file.readline())
        return as_kind(Origin, first["origin"])
    except UnreadableFile:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        return None


def imported(store: Store) -> Iterator[tuple[str, Origin]]:
    """Yield the addresses of all imported histories in order, with where each came from. Raises
    UnreadableFile."""
    for path in sorted((store.root / "history").glob(f"{STAGE}-*.jsonl")):
        origin = origin_of(store, path.stem)
        if origin is not None:
            yield path.stem, origin


def _as_written(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield rows as our own trainings write them: a validation is a row of its own."""
    for row in rows:
        of_step, of_validation = {}, {}
        for key, value in row.items():
            shared = key in ("step", "tokens", "time")
            if shared or not _OF_VALIDATION.fullmatch(key):
                of_step[key] = value
            if shared or _OF_VALIDATION.fullmatch(key):
                of_validation[key] = value
        if VALIDATION not in row:
            yield dict(row)
            continue
        if of_step.keys() - {"step", "tokens", "time"}:
            yield of_step
        yield of_validation
