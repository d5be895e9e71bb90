"""What pydantic found wrong with a setting, in words for who wrote the file: no type of Python's,
and the name that was meant where one is near."""

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from .base import ADAPTER_NAME, NAME, is_hidden, types_of

# By pydantic's own names of its checks; a brace is filled from the problem's context.
SENTENCES = {
    "extra_forbidden": "no such setting",
    "missing": "must be given",
    "literal_error": "must be {expected}",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number of fewer digits",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be a text",
    "string_pattern_mismatch": "must have the form {pattern}",
    "string_too_short": "must have at least {min_length} character(s)",
    "string_too_long": "must have at most {max_length} characters",
    "tuple_type": "must be a list, as [a, b]",
    "list_type": "must be a list, as [a, b]",
    "too_short": "must have at least {min_length} entry(ies), not {actual_length}",
    "too_long": "must have at most {max_length} entries, not {actual_length}",
    "dict_type": "must be a section of its own, as name: value",
    "model_type": "must be a section of its own, as name: value",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
}
# What a name of a run, a domain or an expert may be, for people who read no patterns.
PATTERNS = {
    NAME: "be a name of at most 64 letters, digits, dots, dashes "
    "and underscores that begins with a letter or digit",
    r"^\S+$": "be one word",
    r"^last:[1-9]\d*$": "be last:N, with a number of layers",
    ADAPTER_NAME: "be a name of lower-case letters, digits and underscores that begins "
    "with a letter",
}


def sentence(problem: ErrorDetails) -> str:
    """Return what is wrong with a setting, without what was found there."""
    kind = problem["type"]
    context = problem.get("ctx", {})
    if kind == "string_pattern_mismatch" and context["pattern"] in PATTERNS:
        return f"must {PATTERNS[context['pattern']]}"
    if kind in SENTENCES:
        # 0 and not 0.0: a bound is written as the file would write it.
        bounds = {name: _plain(value) for name, value in context.items()}
        return SENTENCES[kind].format(**bounds)
    # Pydantic's own introduction of what our validators raise.
    return problem["msg"].removeprefix("Value error, ")


def _plain(value: object) -> object:
    return f"{value:g}" if isinstance(value, float) else value


def nearest(problem: ErrorDetails, kind: type[BaseModel]) -> str:
    """Return the setting or value that was probably meant, as a clause; "" when none is near."""
    if problem["type"] == "literal_error":
        return _nearest_value(problem)
    if problem["type"] != "extra_forbidden":
        return ""
    *above, name = problem["loc"]
    section = _section(above, kind)
    if section is None or not isinstance(name, str):
        return ""
    known = [each for each, field in section.model_fields.items() if not is_hidden(field)]
    close = get_close_matches(name, known, n=1, cutoff=0.7)
    if close:
        return f"; did you mean {close[0]}?"
    # A right setting in the wrong place: told where there are few places for it.
    places = sorted({place for place in _places(kind) if place.rpartition(".")[2] == name})
    if len(places) == 1:
        return f"; there is {places[0]}"
    return f"; there are {places[0]} and {places[1]}" if len(places) == 2 else ""


def _nearest_value(problem: ErrorDetails) -> str:
    found = problem["input"]
    if not isinstance(found, str):
        return ""
    # 'a', 'b' or 'c', as pydantic writes them
    allowed = problem["ctx"]["expected"].replace(" or ", ", ").split(", ")
    values = [value.strip("'") for value in allowed]
    close = get_close_matches(found.lower(), values, n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


def _section(above: Sequence[int | str], kind: type[BaseModel]) -> type[BaseModel] | None:
    """Return the class of the section that a location's names lead to; None for a mapping's own
    keys."""
    section: type[BaseModel] | None = kind
    for name in above:
        if isinstance(name, int):
            continue  # an entry of a list has the class that the list is of
        if section is None or name not in section.model_fields:
            return None
        section = section_class(section.model_fields[name].annotation)
    return section


def section_class(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field holds, alone, optional or in a list; None for a value."""
    for each in types_of(annotation):
        if isinstance(each, type) and issubclass(each, BaseModel):
            return each
    return None


def _places(kind: type[BaseModel], above: str = "") -> Iterator[str]:
    """Yield the dotted name of every setting of a run."""
    for name, field in kind.model_fields.items():
        section = section_class(field.annotation)
        yield above + name
        if section is not None:
            yield from _places(section, f"{above}{name}.")


def holder(raw: Mapping[str, Any], kinds: Sequence[type[BaseModel]]) -> str | None:
    """Return the setting of a run whose section has all of raw's keys; None when raw describes a
    run, or nothing that is known."""
    if not raw:
        return None
    for kind in kinds:
        for place, section in _sections(kind):
            if raw.keys() <= section.model_fields.keys():
                return place
    return None


def _sections(kind: type[BaseModel], above: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield every section of a run with its dotted name, outer ones first."""
    below = []
    for name, field in kind.model_fields.items():
        section = section_class(field.annotation)
        if section is None:
            continue
        yield above + name, section
        below.append((name, section))
    for name, section in below:
        yield from _sections(section, f"{above}{name}.")
