"""YAML files with `extends`, then `a.b=value` overrides, then one check that reports every problem at once."""

import re
from pathlib import Path

import yaml
from pydantic import ValidationError

from ..errors import ConfigError
from .sections import Config

DURATIONS = {"steps", "epochs", "tokens"}  # one of them replaces another


class _Loader(yaml.SafeLoader):
    """Safe YAML whose numbers are those of YAML 1.2: 3e-4 is a number, `on` and `no` are words."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    """Build a mapping; a key that is given twice would silently lose one of its values."""
    seen: set = set()
    for key, _ in node.value:
        if key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if not tag.endswith((":bool", ":float"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$", re.I), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|nan))$", re.I),
    list("-+.0123456789"),
)


def load(path: str | Path, overrides: tuple[str, ...] = ()) -> Config:
    """Read path over what it extends, apply `a.b=value` overrides and check the whole.

    Raises ConfigError that lists every problem with its dotted name and line.
    """
    path = Path(path)
    raw = _resolve(path, ())
    for item in overrides:
        raw = merge(raw, _anchored(_override(item), path.parent))
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_explain([*error.errors(), *_across(raw, error)], path, overrides)) from None


def merge(base: dict, over: dict) -> dict:
    """Return base with over's keys laid on it, section by section; neither is changed."""
    out = {k: v for k, v in base.items() if not (k in DURATIONS - over.keys() and DURATIONS & over.keys())}
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value) if both else value
    return out


def _resolve(path: Path, seen: tuple[Path, ...]) -> dict:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: extends itself, by way of {' -> '.join(p.name for p in seen)}")
    raw = _anchored(_read(path), path.parent)
    base = raw.pop("extends", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends must be the path of one file, not {base!r}")
    return merge(_resolve(path.parent / base, (*seen, path.resolve())), raw)


def _read(path: Path) -> dict:
    try:
        raw = yaml.load(path.read_text("utf-8"), _Loader)  # noqa: S506 (a SafeLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; configurations that ship with MoleForge are in config/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold sections (`trunk:` and so on), not a {type(raw).__name__}")
    return raw


def _override(item: str) -> dict:
    dotted, equals, text = item.partition("=")
    if not equals or not all(dotted.split(".")):
        raise ConfigError(f"--override {item}: write it as section.field=value, for example expert.steps=2000")
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--override {item}: the value is not YAML: {error}") from None
    for name in reversed(dotted.split(".")):
        value = {name: value}
    return value


def _anchored(raw: dict, here: Path) -> dict:
    """Make relative data.files paths start at the folder of the file that names them, whoever extends it."""
    data = raw.get("data")
    files = data.get("files") if isinstance(data, dict) else None
    if not isinstance(files, list):
        return raw
    return raw | {"data": data | {"files": [_anchored_entry(entry, here) for entry in files]}}


def _anchored_entry(entry, here: Path):
    paths = entry.get("paths") if isinstance(entry, dict) else None
    if not isinstance(paths, list):
        return entry
    return entry | {"paths": [str(here.resolve() / p) if isinstance(p, str) and "://" not in p else p for p in paths]}


def _across(raw: dict, error: ValidationError) -> list[dict]:
    """Return what is wrong between sections, which pydantic leaves unchecked while any one setting is wrong."""
    bad = [problem for problem in error.errors() if problem["loc"]]
    whole = [p for p in bad if len(p["loc"]) == 1 and p["type"] == "value_error"]
    if not bad or whole or any(p["loc"][0] == "partition" for p in bad):
        return []  # a section that contradicts itself says nothing about the others
    for problem in bad:
        raw = _without(raw, problem["loc"])
    try:
        Config.model_validate(raw)
    except ValidationError as second:
        return [problem for problem in second.errors() if not problem["loc"]]
    return []


def _without(raw: dict, loc: tuple) -> dict:
    """Return raw less the setting at loc, or less the list or value that holds it."""
    head, *rest = loc
    inner = raw.get(head)
    if rest and isinstance(inner, dict):
        return raw | {head: _without(inner, tuple(rest))}
    return {key: value for key, value in raw.items() if key != head}


def _explain(problems: list[dict], path: Path, overrides: tuple[str, ...]) -> str:
    lines = [line for problem in problems for line in _lines(problem, path, overrides)]
    return f"{path} does not describe a run ({len(lines)} problem{'s' * (len(lines) > 1)}):\n" + "\n".join(lines)


def _lines(problem: dict, path: Path, overrides: tuple[str, ...]) -> list[str]:
    dotted = ".".join(map(str, problem["loc"]))
    if not dotted:  # raised by a check over the whole: its text names the fields
        return [f"  {line}" for line in problem["msg"].removeprefix("Value error, ").splitlines()]
    found = "" if isinstance(problem["input"], dict) else f" (found {problem['input']!r})"
    text = "no such setting" if problem["type"] == "extra_forbidden" else problem["msg"].removeprefix("Value error, ")
    return [f"  {dotted}: {text}{found}{_where(dotted, path, overrides)}"]


def _where(dotted: str, path: Path, overrides: tuple[str, ...]) -> str:
    if any(item.partition("=")[0] == dotted for item in overrides):
        return " [--override]"
    line = _line_of(dotted.split("."), path)
    return f" [{path.name} line {line}]" if line else ""


def _line_of(names: list[str], path: Path) -> int | None:
    """Return the 1-based line of a key in the file itself; None when an extended file holds it."""
    node = yaml.compose(path.read_text("utf-8"), _Loader)
    line = None
    for name in names:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        hit = next(((k, v) for k, v in pairs if k.value == name), None)
        if hit is None:
            return line if isinstance(node, yaml.SequenceNode) else None
        line, node = hit[0].start_mark.line + 1, hit[1]
    return line
