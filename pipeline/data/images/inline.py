"""Pictures that stand in a row as text: data: URIs and bare base64; paths that are written as
file: URIs; and addresses, which nothing here fetches."""

import base64
import binascii
import re
from urllib.parse import unquote, unquote_to_bytes

from .formats import begins_as_picture

# A path this long is none, and shorter text in base64 is no picture.
_LEAST_CHARACTERS = 40
_HEAD_CHARACTERS = 64

# In either alphabet, in lines or not.
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]+={0,2}\s*")
# Of this machine: what names another is an address.
_FILE = re.compile(r"file://(?:localhost)?(?=/)", re.I)
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+:(//|\\\\)")


def bytes_in(text: str) -> bytes | None:
    """Return the bytes of a picture that a text spells; None where it spells none, as a path.

    Raises ValueError for a data: URI that is damaged.
    """
    if text[:5].lower() == "data:":
        return _of_data_uri(text)
    head = text[:_HEAD_CHARACTERS]
    if len(text) < _LEAST_CHARACTERS or not _BASE64.fullmatch(head):
        return None
    # Of a text that only begins like one the whole need not be looked at.
    if not begins_as_picture(_decoded(head[: len(head) // 4 * 4]) or b""):
        return None
    return _decoded(text)


def is_address(text: str) -> bool:
    """Tell whether a text names a place on a network or of a scheme of its own."""
    return _ADDRESS.match(text) is not None


def path_in(text: str) -> str:
    """Return the path that a file: URI names (RFC 8089), as chats of Qwen-VL have it; any other
    text as it is."""
    found = _FILE.match(text)
    return unquote(text[found.end() :]) if found else text


def _of_data_uri(text: str) -> bytes:
    about, comma, content = text[5:].partition(",")
    if not comma:
        raise ValueError("a data: URI without a comma, so without a picture")
    if not about.lower().rstrip().endswith(";base64"):
        return unquote_to_bytes(content)
    found = _decoded(content)
    if found is None:
        raise ValueError(f"a data: URI of {len(text)} characters that is no base64")
    return found


def _decoded(text: str) -> bytes | None:
    packed = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except binascii.Error:
        return None
