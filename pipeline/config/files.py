"""Files that describe runs, as mappings: YAML with `extends`, the JSON and YAML files it names,
overrides.

Invariant: a relative path starts at the folder of the file that states it, whoever extends or names
that file.
"""

import json
from os.path import normpath
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import YAMLError

from ..errors import ConfigError
from .base import is_folder, merge

# Settings that may be the path of a file with what belongs there.
NAMED_FILES = ("loras", "dataset")
PATHS = ("path", "image_root")


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
        return parser.load(text)
    except TypeError as error:
        # A key that is a list with a mapping in it: ruamel checks for less before it looks it up.
        raise YAMLError(f"a key must be a name: {error}") from None


def resolve(path: Path, seen: tuple[Path, ...] = ()) -> dict:
    """Return what a file says over what it extends, named files read and paths resolved.

    Raises ConfigError.
    """
    if path.resolve() in seen:
        way = " -> ".join(each.name for each in seen)
        raise ConfigError(f"{path}: extends itself, by way of {way}")
    own = read(path)
    base = own.pop("extends", None)
    raw = resolve_paths(own, path.parent)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends must be the path of one file, not {base!r}")
    way_here = (*seen, path.resolve())
    under = resolve(path.parent / base, way_here)
    return overlay(under, own, raw)


def override(item: str, here: Path) -> tuple[dict, dict]:
    """Return an `a.b=value` as typed, and with named files read and paths resolved against here.

    Raises ConfigError.
    """
    dotted, equals, text = item.partition("=")
    if not equals or not all(dotted.split(".")):
        raise ConfigError(
            f"--override {item}: write it as section.field=value, for example expert.steps=2000"
        )
    try:
        value = parse_yaml(text)
    except (YAMLError, ValueError) as error:
        raise ConfigError(f"--override {item}: the value is not YAML: {error}") from None
    # From the innermost name outwards: each mapping holds the one before it.
    for name in reversed(dotted.split(".")):
        value = {name: value}
    return value, resolve_paths(value, here)


def overlay(under: dict, own: dict, raw: dict) -> dict:
    """Return raw merged over under; own is raw before the files it names were read.

    Where own names a file, only that file counts: nothing of under's experts stays beside it.
    """
    kept = dict(under)
    for key in NAMED_FILES:
        if isinstance(own.get(key), str):
            kept.pop(key, None)
    return merge(kept, raw)


def resolve_paths(raw: dict, here: Path) -> dict:
    """Return raw with the files it names read, and its relative paths made to start at here.

    Raises ConfigError.
    """
    # Nothing is validated yet: what has another form than expected is left for pydantic to name.
    raw = dict(raw)
    if isinstance(raw.get("data"), dict):
        raw["data"] = _resolve_documents(raw["data"], here)
    for key in NAMED_FILES:
        if key in raw:
            raw[key] = _resolve_named(key, raw[key], here)
    return raw


def _resolve_documents(data: dict, here: Path) -> dict:
    """Return the section data with the paths of its files resolved."""
    files = data.get("files")
    if not isinstance(files, list):
        return data
    entries = [_resolve_text_files(entry, here) for entry in files]
    return data | {"files": entries}


def _resolve_text_files(entry: Any, here: Path) -> Any:
    """Return an entry of data.files with its paths resolved."""
    if not isinstance(entry, dict) or not isinstance(entry.get("paths"), list):
        return entry
    paths = [_from(here, path) for path in entry["paths"]]
    return entry | {"paths": paths}


def _resolve_named(key: str, value: Any, here: Path) -> Any:
    """Return loras or dataset, read from its file if value is a path, with its paths resolved."""
    if isinstance(value, str):
        path = here / value
        return _resolve_named(key, read(path), path.parent)
    if not isinstance(value, dict):
        return value
    if key == "loras":
        return _resolve_adapters(value, here)
    return resolve_routing_paths(value, here)


def _resolve_adapters(loras: dict, here: Path) -> dict:
    """Return what loras.json says with the paths of its base and experts resolved."""
    resolved = dict(loras)
    if isinstance(loras.get("base"), dict):
        resolved["base"] = _resolve_base(loras["base"], here)
    experts = loras.get("experts")
    if isinstance(experts, list):
        resolved["experts"] = [_resolve_expert(entry, here) for entry in experts]
    elif isinstance(experts, dict):
        # An override of some entries, by name.
        resolved["experts"] = {
            name: _resolve_expert(entry, here) for name, entry in experts.items()
        }
    return resolved


def _resolve_base(base: dict, here: Path) -> dict:
    model = base.get("model")
    if not isinstance(model, str) or not is_folder(model):
        return base
    # An absolute or a ~ path replaces here, as Path's division has it.
    folder = here.resolve() / Path(model).expanduser()
    return base | {"model": str(folder.resolve())}


def _resolve_expert(entry: Any, here: Path) -> Any:
    if not isinstance(entry, dict) or "dataset" not in entry:
        return entry
    dataset = _resolve_task_data(entry["dataset"], here)
    return entry | {"dataset": dataset}


def resolve_routing_paths(dataset: dict, here: Path) -> dict:
    """Return a routing set's settings with paraphrases read, if they are a path, and the paths of
    its sources resolved against here. Raises ConfigError."""
    resolved = dict(dataset)
    paraphrases = dataset.get("paraphrases")
    if isinstance(paraphrases, str):
        resolved["paraphrases"] = read(here / paraphrases)
    sources = dataset.get("sources")
    if isinstance(sources, list):
        resolved["sources"] = [_resolve_task_data(source, here) for source in sources]
    return resolved


def _resolve_task_data(data: Any, here: Path) -> Any:
    """Return where rows come from, with the folder or file of it resolved."""
    if not isinstance(data, dict):
        return data
    resolved = dict(data)
    for key in PATHS:
        path = data.get(key)
        if isinstance(path, str) and "://" not in path:
            # An address holds these paths: a/../b and b must not be two data sets.
            resolved[key] = normpath(_from(here, path))
    return resolved


def _from(here: Path, path: Any) -> Any:
    """Return a path that starts at here, unless it is absolute or a URL."""
    if not isinstance(path, str) or "://" in path:
        return path
    # No Path.resolve() of the whole: it would follow links, and globs are no paths.
    return str(here.resolve() / path)


def read(path: Path) -> dict:
    """Return what a JSON or YAML file holds, as it stands there. Raises ConfigError."""
    is_json = path.suffix == ".json"
    language = "JSON" if is_json else "YAML"
    try:
        text = path.read_text("utf-8")
        # Not all JSON is YAML: "\ud83d\ude00", one character in JSON, would be two halves.
        raw = json.loads(text, object_pairs_hook=_object) if is_json else parse_yaml(text)
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist; configurations that ship with MoleForge are in config/"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except (YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not {language}: {error}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path} must hold sections (`trunk:` and so on), not a {type(raw).__name__}"
        )
    return raw


def _object(pairs: list[tuple[str, Any]]) -> dict:
    """Return an object of JSON; like in YAML, a key may be given once."""
    keys = [key for key, _ in pairs]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        names = ", ".join(sorted(twice))
        raise ValueError(f"{names} is given twice")
    return dict(pairs)
