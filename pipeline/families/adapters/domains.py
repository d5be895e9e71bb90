"""How a run of adapters says that a task comes, goes, or has other rows.

Invariant: what is said of one expert is in no other expert's address (config.py); with it comes and
goes a source of the routing set and a label of the router.
"""

import json
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from ...config.base import merge
from ...config.domain_wish import DomainWish
from ...config.paths import ENTRIES, located
from ...config.stated import Stated
from ...errors import ConfigError
from .config import AdapterRunConfig

EXPERTS = ("loras", "experts")
SOURCES = ("dataset", "sources")
_SPLITS = ("train", "valid", "test")


def change_domains(cfg: AdapterRunConfig, wish: DomainWish, stated: Stated) -> list[str]:
    """Change what a run's files state; return what a person should know. Raises ConfigError."""
    if wish.what == "add":
        _add(cfg, wish, stated)
        return []
    if wish.domain not in cfg.experts:
        known = ", ".join(cfg.experts)
        raise ConfigError(f"no such expert {wish.domain}; the run has {known}")
    if wish.what == "remove":
        _remove(cfg, wish, stated)
        return []
    return _replace(wish, stated)


def given_rows(name: str, paths: list[str]) -> str:
    """Return the override that has an expert's rows read from a path, a relative one from here on.
    Raises ConfigError for several."""
    here = tuple(located(path, "path", Path.cwd()) for path in paths)
    data = _data(DomainWish("add", name, here))
    return f"loras.experts.{name}.dataset={json.dumps(data)}"


def _add(cfg: AdapterRunConfig, wish: DomainWish, stated: Stated) -> None:
    name = wish.domain
    if name in cfg.experts:
        raise ConfigError(
            f"{name} has an expert already; replace it, or give this one another name"
        )
    _refuse_shares(cfg)
    given = _given(wish)
    label = given.pop("label", None) or _free_label(cfg)
    entry = {"name": name, "label": label} | _typed(stated, given)
    if "dataset" not in entry and wish.expert:
        raise ConfigError(
            f"{name}: the router is taught by requests, so a finished expert comes with rows of "
            "its task; give their files (--paths) or a data set"
        )
    if "dataset" not in entry:
        raise ConfigError(f"{name}: nothing names its rows; give their files or a data set")
    stated.put(*EXPERTS, value=[*stated.entries(*EXPERTS), entry])
    source = {"expert": name, "from": "loras"}
    stated.put(*SOURCES, value=[*stated.entries(*SOURCES), source])


def _replace(wish: DomainWish, stated: Stated) -> list[str]:
    """Change an expert's entry; return what a person should know."""
    given = _given(wish)
    if not given:
        raise ConfigError(f"{wish.domain}: nothing names what replaces its rows; give their files")
    entries = stated.entries(*EXPERTS)
    at = [entry.get("name") for entry in entries].index(wish.domain)
    # Other rows come with all that is said of them; settings come one by one
    kept = entries[at] | ({"dataset": {}} if wish.paths or wish.hub else {})
    # Of what stays no path was typed
    entries[at] = merge(kept, _typed(stated, given))
    told = []
    # Settings come one by one, and leave a finished adapter where it is
    if (wish.paths or wish.hub) and not wish.expert and entries[at].pop("imported", None):
        told.append(f"{wish.domain} was imported, and is trained here on these rows now")
    stated.put(*EXPERTS, value=entries)
    return told


def _remove(cfg: AdapterRunConfig, wish: DomainWish, stated: Stated) -> None:
    name = wish.domain
    if cfg.experts == (name,):
        raise ConfigError(f"{name} is the last expert, and a stack needs one")
    _refuse_shares(cfg)
    entries = stated.entries(*EXPERTS)
    stated.put(*EXPERTS, value=[entry for entry in entries if entry.get("name") != name])
    sources = stated.entries(*SOURCES)
    stated.put(*SOURCES, value=[each for each in sources if each.get("expert") != name])
    stated.drop("dataset", "paraphrases", name)


def _refuse_shares(cfg: AdapterRunConfig) -> None:
    if isinstance(cfg.dataset.balance, dict):
        raise ConfigError(
            "dataset.balance gives each expert a share, and only you know what the others' become; "
            "set it to equal or natural, or change it by hand together with the expert"
        )


def _free_label(cfg: AdapterRunConfig) -> str:
    """Return the first letter that no expert has."""
    taken = {*cfg.loras.labels.values()}
    free = [letter for letter in ascii_uppercase if letter not in taken]
    if not free:
        raise ConfigError("every letter is an expert's label; give the new one with label")
    return free[0]


def _typed(stated: Stated, given: dict[str, Any]) -> dict[str, Any]:
    """Return settings of an entry with their paths as its file would state them."""
    return stated.typed(given, *EXPERTS, ENTRIES)


def _given(wish: DomainWish) -> dict[str, Any]:
    """Return the settings of an entry that a wish asks for."""
    data = _data(wish)
    given: dict[str, Any] = {"dataset": data} if data else {}
    if wish.expert:
        given["imported"] = wish.expert
    return merge(given, dict(wish.options))


def _data(wish: DomainWish) -> dict[str, Any]:
    """Return the settings of a task's rows that a wish asks for; none where it names no rows."""
    if wish.hub:
        data = {"source": "hub", "id": wish.hub.dataset, "revision": wish.hub.revision}
        return data | ({"subset": wish.hub.subset} if wish.hub.subset else {})
    if not wish.paths:
        return {}
    if len(wish.paths) > 1:
        raise ConfigError(
            f"{wish.domain}: {len(wish.paths)} paths, and a task's rows are in one file or folder"
        )
    data = {"source": "jsonl", "path": wish.paths[0]}
    # A folder with a file of each split is read as that
    for split in _SPLITS:
        if (Path(wish.paths[0]) / f"{split}.jsonl").is_file():
            data[split] = f"{split}.jsonl"
    return data
