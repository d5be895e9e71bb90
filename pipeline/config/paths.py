"""Which settings are paths, said where they are defined, and where a path as typed leads.

Invariant: `~`, a relative path, `..` and a name with brackets mean the same in every one of them.
"""

import glob
from collections.abc import Callable, Iterator, Mapping
from os.path import commonpath, normpath, relpath, sep
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, Field
from pydantic.config import JsonDict

from .base import is_folder

# path: a file or folder; glob: several, or URLs; model: a folder, or a name on the Hub; target: a
# folder, or a URL that is written to
Kind = Literal["path", "glob", "model", "target"]
# By the names of settings; [] stands for the entries of a list or a mapping
Tree = Mapping[str, Any]
ENTRIES = "[]"


def path_field(
    kind: Kind,
    default: Any = ...,
    *,
    description: str,
    not_hashed: bool = False,
    **rules: Any,
) -> Any:
    """Return a field whose value is a path of some kind, or several of them; not_hashed as
    `base.not_hashed` has it."""
    extra: JsonDict = {"path": kind, "not_hashed": not_hashed}
    return Field(default, description=description, json_schema_extra=extra, **rules)


def tree_of(*sections: type[BaseModel]) -> Tree:
    """Return the paths among the settings of some sections, together, as kinds by name."""
    tree: dict[str, Any] = {}
    for section in sections:
        for name, field in section.model_fields.items():
            extra = field.json_schema_extra
            kind = extra.get("path") if isinstance(extra, dict) else None
            below = _below(field.annotation, kind if isinstance(kind, str) else None)
            if below:
                tree[name] = _joined(tree.get(name), below)
    return tree


def settings(tree: Tree, above: str = "") -> Iterator[tuple[str, Kind]]:
    """Yield (dotted name, kind) of every path in a tree."""
    for name, below in tree.items():
        dotted = f"{above}.{name}" if above else name
        if isinstance(below, str):
            yield dotted, below  # type: ignore[misc]  # a str of a tree is one of the kinds
        else:
            yield from settings(below, dotted)


def resolved(value: Any, tree: Tree | Kind, here: Path) -> Any:
    """Return settings as they were read with the paths among them made to start at here; what has
    another form than expected is left for the check of the whole to name."""
    return mapped(value, tree, lambda text, kind: located(text, kind, here))


def relative(value: Any, tree: Tree | Kind, here: Path) -> Any:
    """Return settings with the paths among them written as a file in a folder would state them."""

    def stated(text: str, kind: Kind) -> str:
        if not Path(text).is_absolute():
            return text
        base = str(here.resolve())
        base = glob.escape(base) if kind == "glob" else base
        # Of nothing in common a person would write the whole path too
        return text if commonpath([text, base]) == sep else relpath(text, base)

    return mapped(value, tree, stated)


def mapped(value: Any, tree: Tree | Kind, change: Callable[[str, Kind], str]) -> Any:
    """Return settings with each path among them changed."""
    if isinstance(tree, str):
        return change(value, tree) if isinstance(value, str) else value
    if isinstance(value, list):
        return [mapped(each, tree.get(ENTRIES, {}), change) for each in value]
    if not isinstance(value, dict):
        return value
    out = {}
    for key, each in value.items():
        # An override of a list names its entries
        below = tree.get(key, tree.get(ENTRIES))
        out[key] = each if below is None else mapped(each, below, change)
    return out


def located(text: str, kind: Kind, here: Path) -> str:
    """Return a path that starts at here unless it is absolute, a URL, or a name on the Hub."""
    if "://" in text:
        return text
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        # ~someone who is nobody here: it is told as a path that is not there
        path = Path(text)
    if kind == "model" and not is_folder(text) and not (here / path).exists():
        return text
    base = here.resolve()
    if kind == "glob":
        # Brackets of the folder that states it are of its name
        base = Path(glob.escape(str(base)))
    # An address holds these paths: a/../b and b must not be two
    return normpath(base / path)


def _below(annotation: Any, kind: str | None) -> Any:
    """Return the kind or the tree of what a field holds; None for what holds no path."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return tree_of(annotation)
    several = get_origin(annotation) in (tuple, list, dict)
    found = None
    for each in get_args(annotation):
        found = _joined(found, _below(each, kind))
    if several:
        return {ENTRIES: found} if found else None
    if found:
        return found
    return kind if annotation is str else None


def _joined(one: Any, other: Any) -> Any:
    if not isinstance(one, dict) or not isinstance(other, dict):
        return one or other
    out = dict(one)
    for name, below in other.items():
        out[name] = _joined(out.get(name), below)
    return out
