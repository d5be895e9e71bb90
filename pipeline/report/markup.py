"""HTML by construction: text is escaped unless it is Markup, and only `tag` makes Markup out of
text.

Attribute values are escaped as well; characters that no HTML file may hold are replaced.
"""

import re
from html import escape

FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
VOID = {"meta", "br"}


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes) -> Markup:
    """Return one element; `class_` becomes class, `aria_label` aria-label; None or "" leaves an
    attribute out."""
    pairs = [
        f' {key.rstrip("_").replace("_", "-")}="{safe(str(value))}"'
        for key, value in attributes.items()
        if value is not None and value != ""
    ]
    head = f"<{name}{''.join(pairs)}>"
    return (
        Markup(head)
        if name in VOID and not children
        else Markup(f"{head}{join(*children)}</{name}>")
    )


def join(*children: str) -> Markup:
    """Return the children one after the other, escaped where they are plain text."""
    return Markup(
        "".join(child if isinstance(child, Markup) else safe(child) for child in children)
    )


def small(text: str) -> Markup:
    """Return text in a small element; nothing for an empty text."""
    return tag("small", text) if text else Markup("")


def safe(text: str) -> str:
    """Return text as it may stand in HTML, quotes included."""
    return escape(FORBIDDEN.sub("\ufffd", str(text)), quote=True)
