"""A report read from report.json, whichever kind it is, and the results of experiments."""

import json
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from ...errors import NewerStore, StoreError
from .base import SCHEMA_VERSION
from .experiments import RESULTS, ExperimentResults
from .language import LanguageReport
from .requests import RequestReport

Report = LanguageReport | RequestReport
# by kind and not by family: a further family of adapters writes the same report
_READER: TypeAdapter[Report] = TypeAdapter(Annotated[Report, Field(discriminator="kind")])


def read(text: str | bytes) -> Report:
    """Return the report that a report.json holds.

    Raises StoreError for a text that is no report of this schema, NewerStore for a later schema.
    """
    values = _of_this_schema(text, "report.json", "evaluate again")
    try:
        return _READER.validate_python(values)
    except ValidationError as error:
        # the first place in the location is the kind that the union was resolved to
        raise _not_as_written("report.json", error, 1) from None


def read_results(text: str | bytes) -> ExperimentResults:
    """Return what an experiment_results.json holds. Raises what `read` does."""
    values = _of_this_schema(text, RESULTS, "do the experiments again")
    try:
        return ExperimentResults.model_validate(values)
    except ValidationError as error:
        raise _not_as_written(RESULTS, error) from None


def _of_this_schema(text: str | bytes, name: str, again: str) -> Any:
    """Return the values of a file of a schema that is known here. Raises StoreError, NewerStore."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise StoreError(f"{name} cannot be read: {error}") from None
    except RecursionError:
        raise StoreError(f"{name} cannot be read: it is nested too deep") from None
    # the version comes first: what an unknown schema holds cannot be judged by this one
    version = values.get("schema_version") if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise StoreError(
            f"this {name} has no schema version, so an older version of MoleForge wrote it: "
            f"{again}, or look at the report.html beside it"
        )
    if version > SCHEMA_VERSION:
        raise NewerStore(
            f"this {name} has schema version {version}, this program knows {SCHEMA_VERSION}: "
            "update MoleForge to read it"
        )
    return values


def _not_as_written(name: str, error: ValidationError, inside: int = 0) -> StoreError:
    # one sentence: the first mistake tells enough of a file that nobody writes by hand
    first = error.errors()[0]
    where = ".".join(str(place) for place in first["loc"][inside:])
    return StoreError(f"{name} is not as written: {where}: {first['msg']}")
