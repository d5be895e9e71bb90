"""An experiments file, read: the base whole, and what each trial changes of it.

Invariant: a relative path starts at the folder of the file that states it, whichever file extends
that one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ...config.base import NAME, merge
from ...config.experiments import DIGEST, KINDS, LONGEST_NAME, ExperimentsConfig
from ...config.files import assigned, overlay, read, resolve, resolve_paths
from ...config.paths import located
from ...config.problems import explain
from ...config.run import RunConfig
from ...errors import ConfigError
from ...families.load import PATHS, checked


@dataclass(frozen=True)
class Experiments:
    """An experiments file: its name is that of the file."""

    name: str
    file: Path
    settings: ExperimentsConfig


# Of the file: the names of its trials' runs begin with it, and say in their last letters which
LONGEST_FILE = LONGEST_NAME - DIGEST - 2


def read_experiments(path: Path, overrides: tuple[str, ...] = ()) -> Experiments:
    """Return what an experiments file says, with `a.b=value` laid on it. Raises ConfigError."""
    raw = _read(path)
    for item in overrides:
        raw = _laid_on(raw, _located(assigned(item, "--override"), path.parent))
    for kind in KINDS:
        entries = raw.get(kind)
        if isinstance(entries, dict):
            # Null takes away what an extended file has
            raw[kind] = {name: each for name, each in entries.items() if each is not None}
    known = ExperimentsConfig.model_fields
    if raw.keys().isdisjoint(known):
        # Each of a run's settings would be told of by itself
        raise ConfigError(
            f"{path} describes no experiments, as it has none of {', '.join(known)}: where it is a "
            f"run's file, name it in another one, as base: {path.name}, beside trials"
        )
    try:
        settings = ExperimentsConfig.model_validate(raw)
    except ValidationError as error:
        text = explain(
            error.errors(), raw, path, ExperimentsConfig, overrides, describes="experiments"
        )
        raise ConfigError(text) from None
    if not re.fullmatch(NAME, path.stem) or len(path.stem) > LONGEST_FILE:
        raise ConfigError(
            f"{path}: experiments are called by their file, so rename it: letters, digits, dots, "
            f"dashes and underscores, {LONGEST_FILE} at most before its ending, the first a letter "
            "or digit"
        )
    return Experiments(path.stem, path, settings)


def base_of(experiments: Experiments) -> RunConfig:
    """Return the run that all trials start from. Raises ConfigError."""
    return checked(dict(experiments.settings.base), experiments.file)


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: extends itself")
    own = read(path)
    extended = own.pop("extends", None)
    own = _located(own, path.parent)
    if extended is None:
        return _laid_on({}, own)
    if not isinstance(extended, str):
        raise ConfigError(f"{path}: extends must be the path of one file, not {extended!r}")
    below = Path(located(extended, "path", path.parent))
    return _laid_on(_read(below, (*seen, path.resolve())), own)


def _laid_on(under: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    for kind in KINDS:
        known = under.get(kind)
        entries = own.get(kind)
        for name, entry in entries.items() if isinstance(entries, dict) else ():
            if entry is None and not (isinstance(known, dict) and name in known):
                raise ConfigError(
                    f"{kind}.{name} is null, which takes away what an extended file has, and none "
                    f"has it: write {name}: {{}} for one that changes nothing"
                )
    base = own.get("base")
    if not isinstance(base, _Whole):
        return merge(under, own)
    # A file that is named, or extended, stands in place of the base and not on it
    return merge({name: each for name, each in under.items() if name != "base"}, own)


class _Whole(dict):
    """A base that is a run's file, whatever base an extended file has."""


def _located(own: dict[str, Any], here: Path) -> dict[str, Any]:
    """Return what a file says, with the base that it names read, names of settings taken apart and
    paths made to start at its folder. Raises ConfigError."""
    found = dict(own)
    if "base" in own:
        found["base"] = _base(own["base"], here)
    for kind in KINDS:
        entries = own.get(kind)
        if not isinstance(entries, dict):
            continue
        placed = {}
        for name, entry in entries.items():
            placed[name] = entry
            if isinstance(entry, dict) and isinstance(entry.get("change"), dict):
                changed = resolve_paths(nested(entry["change"]), here, PATHS)
                placed[name] = entry | {"change": changed}
        found[kind] = placed
    return found


def _base(base: object, here: Path) -> object:
    if isinstance(base, str):
        return _Whole(resolve(Path(located(base, "path", here)), PATHS))
    if not isinstance(base, dict):
        return base
    own = dict(base)
    extended = own.pop("extends", None)
    own = nested(own)
    placed = resolve_paths(own, here, PATHS)
    if extended is None:
        return placed
    if not isinstance(extended, str):
        raise ConfigError(f"base.extends must be the path of one file, not {extended!r}")
    under = resolve(Path(located(extended, "path", here)), PATHS)
    return _Whole(overlay(under, own, placed))


def nested(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted names as sections in each other. Raises ConfigError for a name that
    is not one."""
    found: dict[str, Any] = {}
    for dotted, value in changes.items():
        names = str(dotted).split(".")
        if not all(names):
            raise ConfigError(f"{dotted} is no setting: write it as section.field")
        # From the innermost name outwards: each mapping holds the one before it
        for name in reversed(names):
            value = {name: value}
        found = _joined(found, value, "")
    return found


def _joined(under: dict[str, Any], own: Mapping[str, Any], above: str) -> dict[str, Any]:
    """Return two mappings as one; by other names one setting may stand in both. Raises
    ConfigError."""
    found = dict(under)
    for name, value in own.items():
        if name not in found:
            found[name] = value
        elif isinstance(found[name], dict) and isinstance(value, dict):
            found[name] = _joined(found[name], value, f"{above}{name}.")
        elif isinstance(found[name], list) and isinstance(value, dict):
            # What it says of the entries that it names
            found = merge(found, {name: value})
        else:
            raise ConfigError(f"{above}{name} is given twice, by other names; keep one of them")
    return found
