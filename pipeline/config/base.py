"""What every section of the configuration is made of, and how one mapping is laid on another."""

import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ..errors import ConfigError

DURATIONS = {"steps", "epochs", "tokens"}  # one of them replaces another

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def _bytes(value):
    """Return the bytes that a text such as 172MB stands for; anything else is left for pydantic to
    judge."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*(\w+)\s*", value) if isinstance(value, str) else None
    if not found:
        return value
    if found[2] not in UNITS:
        raise ValueError(f"give a size such as 350MB or 8GB ({', '.join(UNITS)})")
    return int(float(found[1]) * UNITS[found[2]])


Bytes = Annotated[int, Field(gt=0), BeforeValidator(_bytes)]


def later(default, description: str, **rules):
    """Return a field that only later stages read (see the docstring of sections.py)."""
    return Field(default, description=description, json_schema_extra={"later": True}, **rules)


class Section(BaseModel):
    """One part of the configuration: frozen, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


def addressed(section: Section, leave_out: frozenset[str] = frozenset()) -> dict:
    """Return what an address holds of a section: everything but its `later` fields and those left
    out."""
    unread = {
        n for n, f in type(section).model_fields.items() if (f.json_schema_extra or {}).get("later")
    }
    return section.model_dump(mode="json", exclude=unread | leave_out)


def merge(base: dict, over: dict) -> dict:
    """Return base with over's keys laid on it, section by section; neither is changed.

    A mapping over a list lays its values on the entries that have its keys as `name`. Raises
    ConfigError when there is no such entry.
    """
    out = {
        k: v
        for k, v in base.items()
        if not (k in DURATIONS - over.keys() and DURATIONS & over.keys())
    }
    for key, value in over.items():
        under = out.get(key)
        if isinstance(value, dict) and isinstance(under, dict):
            out[key] = merge(under, value)
        elif isinstance(value, dict) and isinstance(under, list) and under:
            out[key] = _merge_entries(key, under, value)
        else:
            out[key] = value
    return out


def _merge_entries(key: str, under: list, over: dict) -> list:
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in under]
    strange = [name for name in over if name not in names]
    if strange:
        known = ", ".join(filter(None, names)) or "none with a name"
        raise ConfigError(f"{key}: no entry is named {', '.join(strange)}; there are {known}")
    return [
        merge(entry, over[name] or {}) if name in over else entry
        for name, entry in zip(names, under, strict=True)
    ]


NONE = "none"  # the expert of requests that are nobody's


COMMIT = re.compile(r"[0-9a-f]{40}")


def is_folder(path: str) -> bool:
    """Whether a base's name means a folder and not a model on the Hub."""
    return path.startswith(("/", "./", "../", "~"))


AdapterName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)]
