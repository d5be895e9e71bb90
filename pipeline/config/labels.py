"""Labels as data has them, and names as folders and settings need them.

A label may be a number or any text (`C++`, `Family law`); a domain's name is part of addresses and
file names. Which name a label gets depends on the label alone, so that every section of a
configuration and every row comes to the same one.
"""

import hashlib
import re
import unicodedata
from typing import Annotated

from pydantic import BeforeValidator

from .base import NAME, Name

_NAME = re.compile(NAME)
_SPOKEN = {"+": "plus", "#": "sharp", "&": "and"}  # else C, C++ and C# would be one
_MOST_CHARACTERS = 40  # of a label in its name, before what tells it from others
_DIGEST_CHARACTERS = 6


def label_text(value: object) -> str | None:
    """Return a label as text: whole numbers as such however they are stored, letters with marks in
    one form, no blanks around it; none for what is no label."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            return None
    if isinstance(value, bool):
        return str(value).lower()
    # A column of whole numbers with gaps is often stored as floats
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        return None
    return unicodedata.normalize("NFC", value).strip() or None


def domain_name(label: str) -> str:
    """Return the name of a label's domain: the label itself where it is a name."""
    if _NAME.fullmatch(label):
        return label
    spoken = "".join(_SPOKEN.get(letter, letter) for letter in label)
    # é is e and a mark; the mark is left out
    plain = unicodedata.normalize("NFKD", spoken)
    kept = "".join(letter for letter in plain if not unicodedata.combining(letter))
    words = re.split(r"[\s/_-]+", kept.strip())
    name = "-".join(words)
    if _NAME.fullmatch(name) and len(name) <= _MOST_CHARACTERS:
        return name
    # Something else had to be left out, and another label may differ in just that
    digest = hashlib.sha256(label.encode("utf-8", "surrogatepass")).hexdigest()
    readable = re.sub(r"[^A-Za-z0-9.-]+", "", name)[:_MOST_CHARACTERS].strip(".-")
    return f"{readable or 'label'}-{digest[:_DIGEST_CHARACTERS]}"


def _named(value: object) -> object:
    label = label_text(value)
    return value if label is None else domain_name(label)


# A domain, by its name or by its label
DomainName = Annotated[Name, BeforeValidator(_named)]
