"""Templates of prompts and answers: text with columns of a row in braces, and how a column's value
is written."""

import json
import string
from collections.abc import Mapping
from functools import lru_cache

from ...errors import ConfigError
from ..sources.columns import is_missing


def as_text(value: object) -> str:
    """Return a column's value as it is written into a text: numbers and words as they are, lists
    and objects as JSON. Raises UnicodeDecodeError for bytes that are no text."""
    # A bool is an int too, and reads as in JSON, where it most likely comes from.
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        return str(value).replace("\r\n", "\n")
    if isinstance(value, bytes):
        return as_text(value.decode())
    if isinstance(value, dict | list | tuple):
        # str: dates and decimals, which tables have and JSON has not.
        return json.dumps(_finite(value), ensure_ascii=False, default=str)
    return str(value)


def _finite(value: object) -> object:
    """Return lists and objects with null where NaN is, which is no JSON."""
    if isinstance(value, Mapping):
        return {key: _finite(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if is_missing(value) else value


@lru_cache
def template_parts(template: str, what: str) -> tuple[tuple[str, str | None], ...]:
    """Return (literal, field or None) pairs of a template; doubled braces are literal ones. Raises
    ConfigError."""
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"the {what} template {template!r} cannot be read: {error}; write {{{{ for a brace"
        ) from None
    parts = []
    for literal, name, spec, conversion in fields:
        # `{a:>9}`, `{a!r}`, `{a.b}` and `{a[0]}` are Python's: a template names columns only.
        if spec or conversion or not _is_column_name(name):
            raise ConfigError(
                f"the {what} template {template!r} may hold columns in braces, as in {{prompt}}, "
                "and nothing else there; write {{ and }} for braces that are meant"
            )
        parts.append((literal, name))
    return tuple(parts)


def _is_column_name(name: str | None) -> bool:
    if name is None:
        return True  # text behind the last field
    return name.replace("_", "a").replace("-", "a").isalnum()
