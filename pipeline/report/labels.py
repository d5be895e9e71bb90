"""Domains under the names that their data has for them, where those are no names for files."""

from collections.abc import Mapping
from typing import TypeVar

from .schema.base import ReportPart
from .schema.language import LanguageReport

# Words of the report's own, whatever a domain is called
_OWN_WORDS = frozenset({"run", "family", "kind", "verdict", "axis", "labels", "machine"})
# Texts, which may be no longer than a label
_TEXTS = frozenset({"prompt", "held_out", "written", "text"})
Part = TypeVar("Part", bound=ReportPart)


def with_labels(report: LanguageReport) -> LanguageReport:
    """Return a report as people read it: every domain and its expert by the domain's label."""
    return _part(report, report.labels) if report.labels else report


def _part(part: Part, labels: Mapping[str, str]) -> Part:
    changed = {}
    for field, value in part:
        if field not in _OWN_WORDS | _TEXTS:
            changed[field] = _renamed(value, labels)
    return part.model_copy(update=changed)


def _renamed(value: object, labels: Mapping[str, str]) -> object:
    if isinstance(value, str):
        return labels.get(value, value)
    if isinstance(value, ReportPart):
        return _part(value, labels)
    if isinstance(value, dict):
        return {labels.get(key, key): _renamed(each, labels) for key, each in value.items()}
    if isinstance(value, tuple):
        found = tuple(_renamed(each, labels) for each in value)
        # One with names for its places is made again of what is in them
        make = getattr(value, "_make", tuple)
        return make(found)
    return value
