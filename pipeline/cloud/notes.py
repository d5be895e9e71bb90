"""Notes beside the bundles on a volume, which deployments of older and of newer code read too.

Invariant: who reads a note of a later format passes over what it does not know. Of the first format
a note says nothing, as what was deployed before there were others refuses a field more.
"""

import json
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from ..store.artifacts import write_text
from ..store.reading import parse_object

FIRST = 1
# Raised when a note comes to have a field that code of the format before does not know
FORMAT = 1
Note = TypeVar("Note", bound=BaseModel)


def parse_note(kind: type[Note], content: bytes) -> Note:
    """Return what a note says. Raises ValueError, for an unknown field too where it is of no later
    format."""
    said = parse_object(content)
    found = said.pop("format", FIRST)
    is_later = isinstance(found, int) and found > FORMAT
    # Of all sections in it too
    return kind.model_validate(said, extra="ignore" if is_later else "forbid")


def write_note(path: Path, note: BaseModel) -> None:
    """Write a note in the format of this code."""
    fields = note.model_dump(mode="json")
    said = fields if FORMAT == FIRST else {"format": FORMAT, **fields}
    write_text(path, json.dumps(said))
