"""Files that describe runs, as mappings: YAML with `extends`, the JSON and YAML files it names,
overrides.

Invariant: a relative path starts at the folder of the file that states it, whoever extends or names
that file.
"""

import json
import re
from os.path import normpath
from pathlib import Path

import yaml

from ..errors import ConfigError
from .base import is_folder, merge

NAMED = ("loras", "dataset")  # settings that may be the path of a file with what belongs there
PATHS = ("path", "image_root")


class Loader(yaml.SafeLoader):
    """Safe YAML whose numbers are those of YAML 1.2: 3e-4 is a number, `on` and `no` are words."""


def _mapping(loader: Loader, node: yaml.MappingNode) -> dict:
    """Build a mapping; a key that is given twice would silently lose one of its values."""
    seen: set = set()
    for key, _ in node.value:
        if key.value in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"{key.value} is given twice", key.start_mark
            )
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if not tag.endswith((":bool", ":float"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|false)$", re.I), list("tTfF")
)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d+\.\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|nan))$", re.I
    ),
    list("-+.0123456789"),
)


def resolve(path: Path, seen: tuple[Path, ...] = ()) -> dict:
    """Return what a file says over what it extends, named files read and paths resolved. Raises
    ConfigError."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: extends itself, by way of {' -> '.join(p.name for p in seen)}")
    own = read(path)
    base = own.pop("extends", None)
    raw = resolve_paths(own, path.parent)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends must be the path of one file, not {base!r}")
    return overlay(resolve(path.parent / base, (*seen, path.resolve())), own, raw)


def override(item: str, here: Path) -> tuple[dict, dict]:
    """Return an `a.b=value` as typed, and with named files read and paths resolved against here. Raises
    ConfigError."""
    dotted, equals, text = item.partition("=")
    if not equals or not all(dotted.split(".")):
        raise ConfigError(
            f"--override {item}: write it as section.field=value, for example expert.steps=2000"
        )
    try:
        value = yaml.load(text, Loader)  # noqa: S506
    except yaml.YAMLError as error:
        raise ConfigError(f"--override {item}: the value is not YAML: {error}") from None
    for name in reversed(dotted.split(".")):
        value = {name: value}
    return value, resolve_paths(value, here)


def overlay(under: dict, own: dict, raw: dict) -> dict:
    """Return raw merged over under; where own, the same before files were read, names a file, only
    that file counts."""
    named = {key for key in NAMED if isinstance(own.get(key), str)}
    return merge({key: value for key, value in under.items() if key not in named}, raw)


def resolve_paths(raw: dict, here: Path) -> dict:
    """Return raw with the files it names read, and its relative paths made to start at here. Raises
    ConfigError."""
    raw = dict(raw)
    data = raw.get("data")
    if isinstance(data, dict) and isinstance(data.get("files"), list):
        raw["data"] = data | {"files": [_entry_anchored(entry, here) for entry in data["files"]]}
    for key in NAMED:
        if key in raw:
            raw[key] = _named(key, raw[key], here)
    return raw


def _entry_anchored(entry, here: Path):
    paths = entry.get("paths") if isinstance(entry, dict) else None
    if not isinstance(paths, list):
        return entry
    return entry | {"paths": [_from(here, path) for path in paths]}


def _named(key: str, value, here: Path):
    """Return loras or dataset, read from its file if value is a path, with the paths in it
    resolved."""
    if isinstance(value, str):
        path = here / value
        return _named(key, read(path), path.parent)
    if not isinstance(value, dict):
        return value
    return (_loras_anchored if key == "loras" else resolve_routing_paths)(value, here)


def _loras_anchored(loras: dict, here: Path) -> dict:
    base, experts = loras.get("base"), loras.get("experts")
    out = dict(loras)
    if isinstance(base, dict) and isinstance(base.get("model"), str) and is_folder(base["model"]):
        out["base"] = base | {
            "model": str((here.resolve() / Path(base["model"]).expanduser()).resolve())
        }
    if isinstance(experts, dict):  # an override of some entries, by name
        out["experts"] = {name: _expert_anchored(entry, here) for name, entry in experts.items()}
    if isinstance(experts, list):
        out["experts"] = [_expert_anchored(entry, here) for entry in experts]
    return out


def _expert_anchored(entry, here: Path):
    inner = entry.get("dataset") if isinstance(entry, dict) else None
    return entry | {"dataset": _data_anchored(inner, here)} if isinstance(inner, dict) else entry


def resolve_routing_paths(dataset: dict, here: Path) -> dict:
    """Return a routing set's settings with paraphrases read, if they are a path, and sources
    resolved against here."""
    out, paraphrases = dict(dataset), dataset.get("paraphrases")
    if isinstance(paraphrases, str):
        out["paraphrases"] = read(here / paraphrases)
    if isinstance(dataset.get("sources"), list):
        out["sources"] = [_data_anchored(source, here) for source in dataset["sources"]]
    return out


def _data_anchored(data, here: Path):
    if not isinstance(data, dict):
        return data
    placed = {key: _from(here, data[key]) for key in PATHS if isinstance(data.get(key), str)}
    return data | {key: path if "://" in path else normpath(path) for key, path in placed.items()}


def _from(here: Path, path):
    return str(here.resolve() / path) if isinstance(path, str) and "://" not in path else path


def read(path: Path) -> dict:
    """Return what a JSON or YAML file holds, as it stands there. Raises ConfigError."""
    try:
        text = path.read_text("utf-8")
        raw = (
            json.loads(text, object_pairs_hook=_object)
            if path.suffix == ".json"
            else yaml.load(text, Loader)  # noqa: S506
        )
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist; configurations that ship with MoleForge are in config/"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(
            f"{path} is not {'JSON' if path.suffix == '.json' else 'YAML'}: {error}"
        ) from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path} must hold sections (`trunk:` and so on), not a {type(raw).__name__}"
        )
    return raw


def _object(pairs: list[tuple[str, object]]) -> dict:
    twice = sorted({key for key, _ in pairs if [k for k, _ in pairs].count(key) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} is given twice")
    return dict(pairs)
