"""Files that describe runs, as mappings: YAML with `extends`, the JSON and YAML files it names,
overrides.

Invariant: a relative path starts at the folder of the file that states it, whoever extends or names
that file.
"""

import json
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import YAMLError

from ..errors import ConfigError
from .base import merge
from .paths import Tree, located, resolved, tree_of
from .routing_set import RoutingSetConfig

# Settings that may be the path of a file with what belongs there.
NAMED_FILES = ("loras", "dataset")

_COLUMN = re.compile(r"\{[A-Za-z_][\w.]*\}")


class _Constructor(SafeConstructor):
    """Builds plain values; a key that is given twice would silently lose one of them."""

    # In place of ruamel's own check, whose message tells how to switch the check off.
    def check_mapping_key(
        self, node: Any, key_node: Any, mapping: Any, key: Any, value: Any
    ) -> bool:
        if key in mapping:
            raise ConstructorError(None, None, f"{key} is given twice", key_node.start_mark)
        return True


def parse_yaml(text: str) -> Any:
    """Return what a YAML 1.2 text says: 3e-4 is a number, `on` and `no` are words. Raises
    YAMLError, or ValueError for a date that there is not."""
    # pure: the C parser reads YAML 1.1, where `no` is false and 3e-4 a word.
    # A new one each time: it keeps what a %YAML line said for the texts that follow.
    parser = YAML(typ="safe", pure=True)
    parser.Constructor = _Constructor
    try:
        found = parser.load(text)
    except TypeError as error:
        # A key that is a list with a mapping in it: ruamel checks for less before it looks it up.
        raise YAMLError(f"a key must be a name: {error}") from None
    except RecursionError:
        raise YAMLError("it is nested too deep") from None
    if _holds_itself(found, (), set()):
        raise YAMLError("an alias (*name) stands within what it names")
    return found


def _holds_itself(value: Any, above: tuple[int, ...], clear: set[int]) -> bool:
    """Whether a value has itself among what it holds. `above`: the ids of what it lies in; `clear`:
    of what was looked through, as aliases of aliases may stand for it a million times."""
    if not isinstance(value, dict | list) or id(value) in clear:
        return False
    if id(value) in above:
        return True
    entries = value.values() if isinstance(value, dict) else value
    if any(_holds_itself(each, (*above, id(value)), clear) for each in entries):
        return True
    clear.add(id(value))
    return False


def resolve(path: Path, paths: Tree, seen: tuple[Path, ...] = ()) -> dict:
    """Return what a file says over what it extends, named files read and paths resolved.

    Raises ConfigError.
    """
    own, under = with_extended(path, paths, seen)
    return overlay(under, own, resolve_paths(own, path.parent, paths))


def with_extended(path: Path, paths: Tree, seen: tuple[Path, ...] = ()) -> tuple[dict, dict]:
    """Return what a file says itself, less `extends`, and what the file says that it extends,
    named files read and paths resolved. Raises ConfigError."""
    if path.resolve() in seen:
        way = " -> ".join(each.name for each in seen)
        raise ConfigError(f"{path}: extends itself, by way of {way}")
    own = read(path)
    base = own.pop("extends", None)
    if base is None:
        return own, {}
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends must be the path of one file, not {base!r}")
    way_here = (*seen, path.resolve())
    below = Path(located(base, "path", path.parent))
    if not below.exists():
        raise ConfigError(
            f"{path}: extends {base}, but {below} does not exist. What it names starts at the "
            f"folder of {path.name}; a configuration that ships with MoleForge lies in its config/"
        )
    return own, resolve(below, paths, way_here)


def override(item: str, here: Path, paths: Tree) -> tuple[dict, dict]:
    """Return an `a.b=value` as typed, and with named files read and paths resolved against here.

    Raises ConfigError.
    """
    value = assigned(item, "--override")
    return value, resolve_paths(value, here, paths)


def assigned(item: str, flag: str) -> dict:
    """Return an `a.b=value` that was typed after a flag as mappings in each other. Raises
    ConfigError."""
    dotted, equals, text = item.partition("=")
    if not equals or not all(dotted.split(".")):
        raise ConfigError(
            f"{flag} {item}: write it as section.field=value, for example expert.steps=2000"
        )
    try:
        # A template of one column, which is YAML for an object that nothing takes.
        value: Any = text if _COLUMN.fullmatch(text) else parse_yaml(text)
    except (YAMLError, ValueError) as error:
        raise ConfigError(f"{flag} {item}: the value is not YAML: {error}") from None
    # From the innermost name outwards: each mapping holds the one before it.
    for name in reversed(dotted.split(".")):
        value = {name: value}
    return value


def overlay(under: dict, own: dict, raw: dict) -> dict:
    """Return raw merged over under; own is raw before the files it names were read.

    Where own names a file, only that file counts: nothing of under's experts stays beside it.
    """
    kept = dict(under)
    for key in NAMED_FILES:
        if isinstance(own.get(key), str):
            kept.pop(key, None)
    return merge(kept, raw)


def resolve_paths(raw: dict, here: Path, paths: Tree) -> dict:
    """Return raw with the files it names read, and its relative paths made to start at here;
    `paths` says which settings are paths.

    Raises ConfigError.
    """
    named = {}
    for key in NAMED_FILES:
        if isinstance(raw.get(key), str):
            file = Path(located(raw[key], "path", here))
            named[key] = resolve_paths({key: read(file)}, file.parent, paths)[key]
    rest = {key: value for key, value in raw.items() if key not in named}
    if isinstance(rest.get("dataset"), dict):
        rest["dataset"] = _with_paraphrases(rest["dataset"], here)
    # In the order of the file, which messages follow
    out = resolved(rest, paths, here) | named
    return {key: out[key] for key in raw}


def resolve_routing_paths(dataset: dict, here: Path) -> dict:
    """Return a routing set's settings with paraphrases read, if they are a path, and the paths of
    its sources resolved against here. Raises ConfigError."""
    return resolved(_with_paraphrases(dataset, here), tree_of(RoutingSetConfig), here)


def _with_paraphrases(dataset: dict, here: Path) -> dict:
    paraphrases = dataset.get("paraphrases")
    if not isinstance(paraphrases, str):
        return dataset
    return dataset | {"paraphrases": read(Path(located(paraphrases, "path", here)))}


def read(path: Path) -> dict:
    """Return what a JSON or YAML file holds, as it stands there. Raises ConfigError."""
    is_json = path.suffix == ".json"
    language = "JSON" if is_json else "YAML"
    try:
        raw = parse_text(path.read_text("utf-8"), is_json)
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist; configurations that ship with MoleForge are in config/"
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; name the file in it") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path} is not {language}: it is nested too deep") from None
    except (YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not {language}: {error}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path} must hold sections (`trunk:` and so on), not a {type(raw).__name__}"
        )
    return raw


def parse_text(text: str, is_json: bool) -> Any:
    """Return what a text says. Raises YAMLError or ValueError."""
    # Not all JSON is YAML: "\ud83d\ude00", one character in JSON, would be two halves.
    return json.loads(text, object_pairs_hook=_object) if is_json else parse_yaml(text)


def _object(pairs: list[tuple[str, Any]]) -> dict:
    """Return an object of JSON; like in YAML, a key may be given once."""
    keys = [key for key, _ in pairs]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        names = ", ".join(sorted(twice))
        raise ValueError(f"{names} is given twice")
    return dict(pairs)
