"""What every section of the configuration is made of, and how one mapping is laid on another."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo
from pydantic_core import PydanticKnownError

from ..errors import ConfigError

NONE = "none"  # the expert of requests that are nobody's
DURATIONS = {"steps", "epochs", "tokens"}  # one of them replaces another
# Decimal units mean powers of ten, as on disks and in prices; those with an i powers of two.
UNITS = {
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
}
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(\w+)\s*")
# How models are named: in an installed package, and by the ending of llama.cpp's files.
PACKAGE = "package:"
GGUF = ".gguf"
COMMIT = re.compile(r"[0-9a-f]{40}")

Share = Annotated[float, Field(ge=0.0, le=1.0)]
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
ADAPTER_NAME = r"^[a-z][a-z0-9_]*$"
Name = Annotated[str, Field(pattern=NAME)]
AdapterName = Annotated[str, Field(pattern=ADAPTER_NAME, max_length=64)]


def parse_bytes(value: object) -> object:
    """Return the bytes that a text such as 172MB stands for, anything else unchanged."""
    # What is not a number with a unit is left for pydantic to judge, so that its message is shown.
    if not isinstance(value, str):
        if isinstance(value, int) and 0 < value < UNITS["MB"]:
            raise ValueError(f"{value} would be bytes; write the unit, as {value}GB")
        return value
    found = SIZE.fullmatch(value)
    unit = found[2] if found else ""
    if found is None or unit not in UNITS:
        known = ", ".join(UNITS)
        raise ValueError(f"must be a size such as 350MB or 8GB ({known})")
    number = found[1]
    return int(float(number) * UNITS[unit])


Bytes = Annotated[int, Field(gt=0), BeforeValidator(parse_bytes)]


class Section(BaseModel):
    """One part of the configuration: frozen, unknown keys refused."""

    # validate_default: a default of a subclass is held against the rules of the field as well.
    # allow_inf_nan: YAML can write .inf and .nan, which no setting has a use for.
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: object, about: ValidationInfo) -> object:
        """Refuse `steps: true`, which Python would take for 1."""
        entries = value if isinstance(value, list | tuple) else (value,)
        if about.field_name is None or not any(isinstance(each, bool) for each in entries):
            return value
        types = set(types_of(cls.model_fields[about.field_name].annotation))
        if types & {int, float} and bool not in types:
            raise PydanticKnownError("float_type" if float in types else "int_type")
        return value


def types_of(annotation: Any) -> Iterator[Any]:
    """Yield what a field's annotation is made of: int of `Annotated[int, ...] | None`."""
    yield annotation
    for inner in get_args(annotation):
        yield from types_of(inner)


def not_hashed(default: Any, description: str, **rules: Any) -> Any:
    """Return a field that its own stage does not read, or that cannot change its result, so that
    its addresses leave it out.

    Other stages that read it put it into theirs by name (`content` of a run's configuration).
    """
    extra: JsonDict = {"not_hashed": True}
    return Field(default, description=description, json_schema_extra=extra, **rules)


def hidden(default: Any) -> Any:
    """Return a field that is no setting: files cannot give it, and no reference lists it."""
    extra: JsonDict = {"hidden": True}
    return Field(default, json_schema_extra=extra)


def is_hidden(field: FieldInfo) -> bool:
    """Whether a field is no setting."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("hidden"))


def is_hashed(field: FieldInfo) -> bool:
    """Whether the addresses of a section's own stage hold a field."""
    extra = field.json_schema_extra
    if not isinstance(extra, dict):
        return True
    return not extra.get("not_hashed")


def hashed_fields(section: Section, leave_out: frozenset[str] = frozenset()) -> dict:
    """Return what an address holds of a section, as JSON: all but `not_hashed` and `leave_out`."""
    left_out = set(leave_out)
    fields = type(section).model_fields
    for name, field in fields.items():
        if not is_hashed(field):
            left_out.add(name)
    return section.model_dump(mode="json", exclude=left_out)


def merge(base: dict, over: dict) -> dict:
    """Return base with over's keys laid on it, section by section; neither is changed.

    A mapping over a list lays its values on the entries that have its keys as `name`. Raises
    ConfigError when there is no such entry.
    """
    merged = dict(base)
    # A section has one duration: steps over a base with epochs must not leave both.
    if DURATIONS & over.keys():
        for key in DURATIONS - over.keys():
            merged.pop(key, None)
    for key, value in over.items():
        merged[key] = value
        if not isinstance(value, dict):
            continue
        under = base.get(key)
        if isinstance(under, dict):
            merged[key] = merge(under, value)
        elif isinstance(under, list) and under:
            merged[key] = _merge_entries(key, under, value)
    return merged


def _merge_entries(key: str, under: list, over: dict) -> list:
    """Return a list's entries, those that over names with its values laid on them."""
    names = [_name(entry) for entry in under]
    strange = [name for name in over if name not in names]
    if strange:
        unknown = ", ".join(strange)
        known = ", ".join(filter(None, names)) or "none with a name"
        raise ConfigError(f"{key}: no entry is named {unknown}; there are {known}")
    merged = []
    for name, entry in zip(names, under, strict=True):
        if name in over:
            # A name without a value (`NAME:` alone) is None in YAML and changes nothing.
            entry = merge(entry, over[name] or {})
        merged.append(entry)
    return merged


def _name(entry: object) -> str | None:
    if not isinstance(entry, dict):
        return None
    return entry.get("name")


def is_folder(path: str) -> bool:
    """Whether a model's name means a folder or a .gguf file, and no package or model on the Hub."""
    if path.startswith(PACKAGE):
        return False
    return path.startswith(("/", "./", "../", "~")) or path.endswith(GGUF)
