"""How a run of FFN experts says that a domain comes, goes, or has another text.

Invariant: what is not of that domain keeps its addresses. What follows from the domains where it is
not stated (the trunk's, the dense baselines') is written out before they change.
"""

import json
from pathlib import Path
from typing import Any

from ...config.base import DURATIONS
from ...config.domain_wish import DomainWish
from ...config.labels import domain_name, label_text
from ...config.paths import ENTRIES, located
from ...config.stated import Stated
from ...config.text_data import INSTALLED_DOMAINS
from ...errors import ConfigError
from .config import FfnMoeConfig

_IMPORTED = ("expert", "imported", ENTRIES)


def change_domains(cfg: FfnMoeConfig, wish: DomainWish, stated: Stated) -> list[str]:
    """Change what a run's files state; return what a person should know. Raises ConfigError."""
    if cfg.partition.by != "labels":
        raise ConfigError(
            f"partition.by is {cfg.partition.by}, so domains have no names of their own; they come "
            "and go where it is labels"
        )
    change = {"add": _add, "remove": _remove, "replace": _replace}[wish.what]
    return change(cfg, wish, stated)


def given_text(domain: str, paths: list[str]) -> str:
    """Return the override that has a domain's text read from paths, relative ones from here on."""
    here = [located(path, "glob", Path.cwd()) for path in paths]
    files = json.dumps([{"paths": here, "domain": domain}])
    return f"data.files={files}"


def _add(cfg: FfnMoeConfig, wish: DomainWish, stated: Stated) -> list[str]:
    name = wish.name
    has_text = name in cfg.partition.names
    if name in cfg.experts:
        raise ConfigError(
            f"{name} has an expert already; replace it, or give this one another name"
        )
    entry = _entry(cfg, wish, stated)
    if entry is not None:
        if has_text:
            raise ConfigError(f"{name} is a domain already, whose text can be replaced")
        _put_entries(cfg, stated, [*_entries(cfg, stated), entry])
    elif not (has_text or wish.expert or _may_have(cfg, name)):
        raise ConfigError(f"{name}: nothing names its text; give its files or its data set")
    told = []
    if not has_text and (entry or not wish.expert):
        told += _write_out(cfg, stated, "trunk", cfg.trunk.domains, cfg.partition.names)
        domains = stated.entries("partition", "domains") or list(cfg.partition.domains)
        stated.put("partition", "domains", value=[*domains, wish.domain])
        has_text = True
    if has_text:
        told += _write_out_rivals(cfg, stated)
    if wish.expert:
        _put(cfg, stated, "expert", "imported", name, value=stated.typed(wish.expert, *_IMPORTED))
    if cfg.expert.domains is not None:
        stated.put("expert", "domains", value=[*stated.entries("expert", "domains"), name])
    return told


def _remove(cfg: FfnMoeConfig, wish: DomainWish, stated: Stated) -> list[str]:
    name = wish.name
    _refuse_unknown(cfg, name)
    if cfg.experts == (name,):
        raise ConfigError(f"{name} is the last domain with an expert, and a stack needs one")
    stated.drop("expert", "imported", name)
    stated.drop("expert", "imported_text", name)
    if name in cfg.trunk_domains:
        return _remove_expert(cfg, name, stated)
    others = [entry for entry in _entries(cfg, stated) if _domain(entry) != name]
    if len(others) < len(_entries(cfg, stated)):
        _put_entries(cfg, stated, others)
    if name in cfg.partition.names:
        # Where none is stated they are those of the source, which has it
        names = stated.entries("partition", "domains") or list(cfg.partition.domains)
        stated.put("partition", "domains", value=_without(names, name))
    for section in ("expert", "dense", "joint"):
        domains = stated.entries(section, "domains")
        left = _without(domains, name)
        if domains and not left:
            raise ConfigError(
                f"{section}.domains names {name} alone, and none would mean all of the experts'; "
                "name others there first"
            )
        if len(left) < len(domains):
            stated.put(section, "domains", value=left)
    stated.drop("partition", "labels", name)
    return []


def _remove_expert(cfg: FfnMoeConfig, name: str, stated: Stated) -> list[str]:
    """Take the expert of a domain that the trunk has learned from, and leave its text."""
    if name not in cfg.experts:
        raise ConfigError(
            f"{name} has no expert, and its text is the trunk's (trunk.domains); a trunk without "
            "it is another one, with a configuration of its own"
        )
    told = _write_out_rivals(cfg, stated)
    _put(cfg, stated, "expert", "domains", value=_without(list(cfg.experts), name))
    return [
        f"{name} is one of trunk.domains: its expert goes, but {_have_text(cfg)} its text and stay "
        "as they are, and reports go on measuring that text",
        *told,
    ]


def _replace(cfg: FfnMoeConfig, wish: DomainWish, stated: Stated) -> list[str]:
    name = wish.name
    _refuse_unknown(cfg, name)
    if wish.expert:
        if name not in cfg.experts:
            raise ConfigError(f"{name} has no expert that could be replaced; add one")
        _put(cfg, stated, "expert", "imported", name, value=stated.typed(wish.expert, *_IMPORTED))
    entry = _entry(cfg, wish, stated)
    if entry is None:
        if wish.expert:
            return []
        raise ConfigError(f"{name}: nothing names what replaces it; give files or a data set")
    entries = _entries(cfg, stated)
    own = [at for at, each in enumerate(entries) if _domain(each) == name]
    if not own:
        raise ConfigError(
            f"{name} has no entry of its own in data.{cfg.data.source}, but is told by "
            "data.label_field; change its rows where they lie, and they are read again"
        )
    kept = [each for at, each in enumerate(entries) if at not in own[1:]]
    kept[own[0]] = entry
    _put_entries(cfg, stated, kept)
    told = []
    if not wish.expert and name in cfg.expert.imported:
        stated.drop("expert", "imported", name)
        stated.drop("expert", "imported_text", name)
        told.append(f"{name} was imported from a package, and is trained here on this text now")
    if name in cfg.trunk_domains:
        told.append(
            f"{name} is one of trunk.domains: {_have_text(cfg)} its text, so that they and all "
            "that stands on them are made again"
        )
    return told


def _refuse_unknown(cfg: FfnMoeConfig, name: str) -> None:
    known = dict.fromkeys((*cfg.partition.names, *cfg.experts))
    if name not in known:
        raise ConfigError(f"no such domain {name}; the run has {', '.join(known)}")


def _have_text(cfg: FfnMoeConfig) -> str:
    """Return in words who has the text of a domain of the trunk beside its own expert."""
    who = "the trunk's statistics" if cfg.trunk.is_pinned else "the trunk and its statistics"
    general = " and the other experts' general text (partition.overlap)"
    return f"{who}{general if cfg.partition.overlap else ''} have"


def _write_out(
    cfg: FfnMoeConfig,
    stated: Stated,
    section: str,
    said: tuple[str, ...] | None,
    meant: tuple[str, ...],
) -> list[str]:
    """State the domains of a section that are meant where none are said, so that it stays as it is
    when the others change; return a sentence about it."""
    if said is not None:
        return []
    _put(cfg, stated, section, "domains", value=list(meant))
    return [f"{section}.domains now names {', '.join(meant)}, so that nothing of it is made again"]


def _write_out_rivals(cfg: FfnMoeConfig, stated: Stated) -> list[str]:
    told = []
    if cfg.dense.baselines:
        told += _write_out(cfg, stated, "dense", cfg.dense.domains, cfg.dense_domains)
    if cfg.joint.models:
        told += _write_out(cfg, stated, "joint", cfg.joint.domains, cfg.joint_domains)
    return told


def _put(cfg: FfnMoeConfig, stated: Stated, section: str, *place: str, value: Any) -> None:
    """State a setting; of a section that was stated nowhere its length too, which it has only
    where it is left out as a whole."""
    if not stated.states(section):
        lengths = getattr(cfg, section).model_dump(include=DURATIONS, exclude_none=True)
        for name, length in lengths.items():
            stated.put(section, name, value=length)
    stated.put(section, *place, value=value)


def _without(domains: list, name: str) -> list:
    return [domain for domain in domains if _named(domain) != name]


def _may_have(cfg: FfnMoeConfig, name: str) -> bool:
    """Whether the text of a domain may be in what is read already."""
    if cfg.data.source == "installed":
        return name in INSTALLED_DOMAINS
    return any(entry.domain is None for entry in getattr(cfg.data, cfg.data.source))


def _entry(cfg: FfnMoeConfig, wish: DomainWish, stated: Stated) -> dict[str, Any] | None:
    """Return the entry of data that a wish asks for; None where it names no text."""
    if wish.paths:
        _refuse_other_source(cfg, "files")
        given: dict[str, Any] = {"paths": list(wish.paths)} | dict(wish.options)
        return stated.typed(given, "data", "files", ENTRIES) | {"domain": wish.domain}
    if wish.hub:
        _refuse_other_source(cfg, "hub")
        given = {"dataset": wish.hub.dataset, "revision": wish.hub.revision}
        if wish.hub.subset:
            given["subset"] = wish.hub.subset
        return given | dict(wish.options) | {"domain": wish.domain}
    if wish.options:
        raise ConfigError(
            f"{', '.join(wish.options)}: of an entry of data, and no text is named for one; give "
            "its files or its data set as well"
        )
    return None


def _refuse_other_source(cfg: FfnMoeConfig, wanted: str) -> None:
    if cfg.data.source != wanted:
        raise ConfigError(
            f"data.source is {cfg.data.source}, and a run reads one kind of source; only where it "
            f"is {wanted} can a domain come from there"
        )


def _entries(cfg: FfnMoeConfig, stated: Stated) -> list:
    if cfg.data.source == "installed":
        return []
    return stated.entries("data", cfg.data.source)


def _put_entries(cfg: FfnMoeConfig, stated: Stated, entries: list) -> None:
    stated.put("data", cfg.data.source, value=entries)


def _domain(entry: Any) -> str | None:
    return _named(entry.get("domain")) if isinstance(entry, dict) else None


def _named(domain: Any) -> str | None:
    label = label_text(domain)
    return None if label is None else domain_name(label)
