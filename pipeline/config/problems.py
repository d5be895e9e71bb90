"""What is wrong with a configuration, as lines for people: dotted names, what was found, file and
line."""

from pathlib import Path

import yaml
from pydantic import ValidationError

from .files import NAMED, Loader


def explain(problems: list[dict], raw: dict, path: Path, overrides: tuple[str, ...] = ()) -> str:
    """Return one text for all problems of a file; a list's entries are called by their names where
    they have one."""
    lines = [line for problem in problems for line in _lines(problem, raw, path, overrides)]
    return (
        f"{path} does not describe a run ({len(lines)} problem{'s' * (len(lines) > 1)}):\n"
        + "\n".join(lines)
    )


def cross_section_problems(kind: type, raw: dict, error: ValidationError) -> list[dict]:
    """Return what is wrong between sections, which pydantic leaves unchecked while any one setting
    is wrong."""
    bad = [problem for problem in error.errors() if problem["loc"]]
    whole = [p for p in bad if len(p["loc"]) == 1 and p["type"] == "value_error"]
    if not bad or whole or any(p["loc"][0] == "partition" for p in bad):
        return []  # a section that contradicts itself says nothing about the others
    for problem in bad:
        raw = _without(raw, problem["loc"])
    try:
        kind.model_validate(raw)
    except ValidationError as second:
        return [problem for problem in second.errors() if not problem["loc"]]
    return []


def _without(raw: dict, loc: tuple) -> dict:
    """Return raw less the setting at loc, or less the list or value that holds it."""
    head, *rest = loc
    inner = raw.get(head)
    if rest and isinstance(inner, dict):
        return raw | {head: _without(inner, tuple(rest))}
    if len(rest) > 1 and isinstance(inner, list) and isinstance(inner[rest[0]], dict):
        entries = [
            _without(entry, tuple(rest[1:])) if i == rest[0] else entry
            for i, entry in enumerate(inner)
        ]
        return raw | {head: entries}
    return {key: value for key, value in raw.items() if key != head}


def _lines(problem: dict, raw: dict, path: Path, overrides: tuple[str, ...]) -> list[str]:
    if not problem["loc"]:  # raised by a check over the whole: its text names the fields
        return [f"  {line}" for line in problem["msg"].removeprefix("Value error, ").splitlines()]
    dotted = _dotted(problem["loc"], raw)
    found = "" if isinstance(problem["input"], dict) else f" (found {problem['input']!r})"
    text = (
        "no such setting"
        if problem["type"] == "extra_forbidden"
        else problem["msg"].removeprefix("Value error, ")
    )
    return [f"  {dotted}: {text}{found}{_where(dotted, problem['loc'], path, overrides)}"]


def _dotted(loc: tuple, raw) -> str:
    """Return a setting's name as one would type it: an entry of a list by its name, if it has one."""
    names = []
    for part in loc:
        inner = raw[part] if _holds(raw, part) else None
        named = (
            isinstance(raw, list) and isinstance(inner, dict) and isinstance(inner.get("name"), str)
        )
        names.append(inner["name"] if named else str(part))
        raw = inner
    return ".".join(names)


def _holds(raw, part) -> bool:
    if isinstance(raw, dict):
        return part in raw
    return isinstance(raw, list) and isinstance(part, int) and part < len(raw)


def _where(dotted: str, loc: tuple, path: Path, overrides: tuple[str, ...]) -> str:
    if any(item.partition("=")[0] == dotted for item in overrides):
        return " [--override]"
    found = _line_of([*loc], path)
    return f" [{found[0].name} line {found[1]}]" if found else ""


def _line_of(loc: list, path: Path) -> tuple[Path, int] | None:
    """Return file and 1-based line of a key, in path or in a file that it names; None when an
    extended one has it."""
    try:
        node = yaml.compose(path.read_text("utf-8"), Loader)
    except (OSError, yaml.YAMLError):  # JSON that is no YAML, by its tabs
        return None
    line, in_list = None, False
    while loc:
        part = loc.pop(0)
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node, in_list = node.value[part], True
            continue
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        hit = next(((k, v) for k, v in pairs if k.value == part), None)
        if hit is None:
            return (path, line) if in_list else None
        line, node = hit[0].start_mark.line + 1, hit[1]
        if part in NAMED and isinstance(node, yaml.ScalarNode) and loc:
            return _line_of(loc, path.parent / node.value)
    return (path, line)
