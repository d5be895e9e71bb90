"""What is wrong with a configuration, as lines for people: dotted names, what was found, file and
line."""

from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError

from ..credentials import credential
from ..errors import ConfigError
from .files import NAMED_FILES
from .wording import nearest, sentence

Location = tuple[int | str, ...]  # keys and indices from the whole down to one setting
LONGEST = 80  # characters of a value that a message repeats


def explain(
    problems: Sequence[ErrorDetails],
    raw: dict,
    path: Path,
    kind: type[BaseModel],
    overrides: tuple[str, ...] = (),
    describes: str = "a run",
) -> str:
    """Return one text for all problems of a file, with the settings that kind has; a list's entries
    are called by their names where they have one. `describes`: what the file should."""
    overridden = {item.partition("=")[0] for item in overrides}
    lines = []
    for loc, each in _by_setting(problems, raw):
        if not loc:
            # Raised by a check over the whole: its text names the fields, one problem a line.
            for problem in each:
                lines += sentence(problem).splitlines()
            continue
        dotted = _dotted(loc, raw)
        where = " [--override]" if dotted in overridden else _where(loc, path)
        lines.append(f"{dotted}: {_text(each, kind)}{where}")
    plural = "s" if len(lines) > 1 else ""
    head = f"{path} does not describe {describes} ({len(lines)} problem{plural}):"
    return "\n  ".join([head, *lines])


def _by_setting(
    problems: Sequence[ErrorDetails], raw: dict
) -> list[tuple[Location, list[ErrorDetails]]]:
    """Return problems by the setting that they are of, in order: one that may be of several types
    has a problem with each of them."""
    found: dict[Location, list[ErrorDetails]] = {}
    for problem in problems:
        if problem["type"] == "too_short" and _is_above(problem["loc"], problems):
            # Pydantic counts the entries that are right
            continue
        loc = _stated(problem, raw)
        found.setdefault(loc, []).append(problem)
    return list(found.items())


def _is_above(loc: Location, problems: Sequence[ErrorDetails]) -> bool:
    """Whether an entry of what stands at a location has a problem of its own."""
    return any(len(each["loc"]) > len(loc) and each["loc"][: len(loc)] == loc for each in problems)


def _stated(problem: ErrorDetails, raw: Any) -> Location:
    """Return a problem's location as far as the file goes: pydantic adds the type that it tried."""
    loc = problem["loc"]
    # What is missing is no key of the file, and its name is no type.
    if problem["type"] == "missing":
        return loc
    for depth, part in enumerate(loc):
        has_key = isinstance(raw, dict) and part in raw
        has_entry = isinstance(raw, list) and isinstance(part, int) and part < len(raw)
        if has_key or has_entry:
            raw = raw[part]
        else:
            # An alias or a default: nothing is written there, and the first name says enough.
            return loc[: max(1, depth)]
    return loc


def _text(problems: list[ErrorDetails], kind: type[BaseModel]) -> str:
    """Return what is wrong with a setting, and what was found there."""
    texts = [sentence(problem) for problem in problems]
    # Once "must be", then what else the setting may be.
    first, *others = dict.fromkeys(texts)
    text = " or ".join([first, *(other.removeprefix("must be ") for other in others)])
    last = problems[-1]
    # A whole section would fill the screen; a value is what one looks for in the file.
    if not isinstance(last["input"], dict) and last["type"] != "missing":
        text += f" (found {_short(last['input'])})"
    return text + nearest(last, kind)


def _short(value: Any) -> str:
    """Return a value as it was found, its middle left out when it is longer than a line."""
    text = repr(value)
    if value is None or isinstance(value, bool):
        # As YAML calls them, not as Python does.
        text = {True: "true", False: "false", None: "null"}[value]
    elif isinstance(value, date):
        text = str(value)
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def refuse_credentials(raw: dict, path: Path) -> None:
    """Raise ConfigError for the settings of a file that hold a credential, without repeating it: a
    configuration is shown, and kept with what was made by it."""
    found = []
    for loc, text in _texts(raw):
        kind = credential(text)
        if kind:
            found.append(f"{_dotted(loc, raw)} holds {kind}")
    if found:
        raise ConfigError(
            f"{path}: {'; '.join(found)}. What a configuration says is shown and kept, so take it "
            "out: the environment holds it, as HF_TOKEN, AWS_SECRET_ACCESS_KEY or "
            "FSSPEC_<PROTOCOL>_PASSWORD, and on Modal a secret, which modal.*_secret names"
        )


def _texts(raw: Any, above: Location = ()) -> Iterator[tuple[Location, str]]:
    """Yield the texts in settings as they were read, with where they stand."""
    if isinstance(raw, str):
        yield above, raw
    elif isinstance(raw, dict):
        for key, value in raw.items():
            yield from _texts(value, (*above, key))
    elif isinstance(raw, list):
        for index, value in enumerate(raw):
            yield from _texts(value, (*above, index))


def cross_section_problems(
    kind: type[BaseModel], raw: dict, error: ValidationError
) -> list[ErrorDetails]:
    """Return what is wrong between sections, which pydantic leaves unchecked while any one setting
    is wrong."""
    locations = []
    for problem in error.errors():
        loc = problem["loc"]
        # Checks between sections have run, and their problems are among the others.
        if not loc:
            continue
        # A section that contradicts itself says nothing about the others, and without a
        # partition there are no experts to hold the other sections against.
        contradicts = len(loc) == 1 and problem["type"] == "value_error"
        if contradicts or loc[0] == "partition":
            return []
        locations.append(loc)
    if not locations:
        return []
    # Checked again without the wrong settings, whose defaults are right by themselves.
    for loc in locations:
        raw = _without(raw, loc)
    try:
        kind.model_validate(raw)
    except ValidationError as second:
        return [problem for problem in second.errors() if not problem["loc"]]
    return []


def _without(raw: dict, loc: Location) -> dict:
    """Return raw less the setting at loc, or less the list or value that holds it."""
    head, *rest = loc
    inner = raw.get(head)
    if rest and isinstance(inner, dict):
        return raw | {head: _without(inner, tuple(rest))}
    # An entry of a list loses its wrong setting; a wrong entry takes the whole list with it,
    # because a shorter list would be another problem.
    if len(rest) > 1 and isinstance(inner, list):
        index, *below = rest
        entries = list(inner)
        if isinstance(index, int) and isinstance(inner[index], dict):
            entries[index] = _without(inner[index], tuple(below))
            return raw | {head: entries}
    smaller = dict(raw)
    smaller.pop(head, None)
    return smaller


def _dotted(loc: Location, raw: Any) -> str:
    """Return a setting's name as one would type it: a list's entry by its name, if it has one."""
    names = []
    for part in loc:
        name = str(part)
        # A setting that is missing, or an alias, leads nowhere; its name is then the part itself.
        if isinstance(raw, dict):
            raw = raw.get(part)
        elif isinstance(raw, list) and isinstance(part, int):
            raw = raw[part] if part < len(raw) else None
            if isinstance(raw, dict) and isinstance(raw.get("name"), str):
                name = raw["name"]
        else:
            raw = None
        names.append(name)
    return ".".join(names)


def _where(loc: Location, path: Path) -> str:
    """Return the file and line where a setting is stated, in brackets, as far as it can be told."""
    found = _find(loc, path)
    if found is None:
        return ""
    file, line = found
    return f" [{file.name} line {line}]"


def _find(loc: Location, path: Path) -> tuple[Path, int] | None:
    """Return file and 1-based line of a key, in path or in a file that it names; None when an
    extended one has it."""
    try:
        # The round-trip loader is the one that keeps lines. JSON is read as the YAML that it is.
        text = path.read_text("utf-8")
        node = YAML(typ="rt", pure=True).load(text)
    except (OSError, YAMLError, ValueError):
        return None
    line = 0
    in_list = False
    for depth, part in enumerate(loc):
        if isinstance(node, CommentedSeq) and part in range(len(node)):
            node = node[part]
            in_list = True
            continue
        if part not in _written(node):
            # What an entry of a list lacks is missing there, not in an extended file.
            return (path, line) if in_list else None
        line = node.lc.key(part)[0] + 1
        node = node[part]
        rest = loc[depth + 1 :]
        if part in NAMED_FILES and rest and isinstance(node, str):
            return _find(rest, path.parent / node)
    return path, line


def _written(node: Any) -> dict:
    """Return the keys that a mapping itself states, without those that `<<` merges into it."""
    if not isinstance(node, CommentedMap):
        return {}
    # None for an empty mapping.
    return node.lc.data or {}
