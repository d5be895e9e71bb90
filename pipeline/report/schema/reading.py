"""A report read from report.json, whichever kind it is."""

import json
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from ...errors import NewerStore, StoreError
from .base import SCHEMA_VERSION
from .language import LanguageReport
from .requests import RequestReport

Report = LanguageReport | RequestReport
# by kind and not by family: a further family of adapters writes the same report
_READER: TypeAdapter[Report] = TypeAdapter(Annotated[Report, Field(discriminator="kind")])


def read(text: str | bytes) -> Report:
    """Return the report that a report.json holds.

    Raises StoreError for a text that is no report of this schema, NewerStore for a later schema.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise StoreError(f"report.json cannot be read: {error}") from None
    except RecursionError:
        raise StoreError("report.json cannot be read: it is nested too deep") from None
    # the version comes first: what an unknown schema holds cannot be judged by this one
    version = values.get("schema_version") if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise StoreError(
            "this report.json has no schema version, so an older version of MoleForge wrote it: "
            "evaluate again, or look at the report.html beside it"
        )
    if version > SCHEMA_VERSION:
        raise NewerStore(
            f"this report.json has schema version {version}, this program knows {SCHEMA_VERSION}: "
            "update MoleForge to read it"
        )
    try:
        return _READER.validate_python(values)
    except ValidationError as error:
        # one sentence: the first mistake tells enough of a file that nobody writes by hand
        first = error.errors()[0]
        # the first place in the location is the kind that the union was resolved to
        where = ".".join(str(place) for place in first["loc"][1:])
        raise StoreError(f"report.json is not as written: {where}: {first['msg']}") from None
