"""The interface's own description, /openapi.json: every body and every answer that can come.

FastAPI describes bodies that it reads itself and answers that it checks itself; here bodies are
read under limits, and answers are made as they are sent, so that both are described by hand.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from .answers import ErrorAnswer
from .bodies import JSON

REF = "#/components/schemas/{model}"
EVENTS = "text/event-stream"
OK = "What was asked for"
# Every status that an error has, whatever the address.
ERRORS = {
    400: "The request is wrong, in the field that is named",
    401: "The API key is missing, or none of this server's",
    403: "A page of another site asks, which is not allowed to",
    404: "No such model, or no such address",
    421: "The request is for a server of another name",
    500: "The server failed, and its log tells more",
    503: "The model is being opened, or too many requests wait; Retry-After says how many seconds",
}
# Beside them, of an address that takes a body.
BODY_ERRORS = {
    408: "The body took too long to come",
    413: "The body is too long",
    415: "The body is of another type than application/json",
}


def described(
    app: FastAPI,
    summary: str,
    *,
    answer: Any,
    body: Any = None,
    event: Any = None,
    path: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return what FastAPI is told of an endpoint: its body, its answer, or of a union each of them,
    an event of its stream, and the parts of its path with what they are; the application keeps
    their types for `describe`."""
    told = [kind for kind in (body, *_members(answer), event) if kind is not None]
    app.state.kinds = [*getattr(app.state, "kinds", []), *told]
    content: dict[str, Any] = {JSON: {"schema": _schema(answer)}}
    if event is not None:
        content[EVENTS] = {"schema": _event(event)}
    responses: dict[int | str, dict[str, Any]] = {200: {"description": OK, "content": content}}
    error = {JSON: {"schema": _schema(ErrorAnswer)}}
    errors = ERRORS if body is None else ERRORS | BODY_ERRORS
    for status, meaning in errors.items():
        responses[status] = {"description": meaning, "content": error}
    extra: dict[str, Any] = {}
    if body is not None:
        extra["requestBody"] = {"required": True, "content": {JSON: {"schema": _schema(body)}}}
    if path:
        extra["parameters"] = [_parameter(name, meant) for name, meant in path.items()]
    return {"summary": summary, "responses": responses, "openapi_extra": extra}


def probe(summary: str, answers: Mapping[int, str], *, kind: str = JSON) -> dict[str, Any]:
    """Return what FastAPI is told of an address beside /v1: what each status means, and of which
    type answers are."""
    responses: dict[int | str, dict[str, Any]] = {}
    schema = {"type": "object" if kind == JSON else "string"}
    for status, told in answers.items():
        responses[status] = {"description": told, "content": {kind: {"schema": schema}}}
    error = {JSON: {"schema": _schema(ErrorAnswer)}}
    for status in (400, 403, 421, 500):
        responses[status] = {"description": ERRORS[status], "content": error}
    return {"summary": summary, "responses": responses, "response_model": None}


def describe(app: FastAPI, *, wants_key: bool) -> None:
    """Have an application describe all that it has, by the types of bodies and answers that
    `described` was told of; to be called once it has everything."""
    kinds = {kind.__name__: kind for kind in (*app.state.kinds, ErrorAnswer)}

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, kinds, wants_key)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's own guide has it


def _document(app: FastAPI, kinds: Mapping[str, Any], wants_key: bool) -> dict[str, Any]:
    """Return the document."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    components = document.setdefault("components", {})
    components["schemas"] = components.get("schemas", {}) | _schemas(kinds)
    if wants_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["security"] = [{"key": []}] if path.startswith("/v1/") else []
    return document


def _schemas(kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Return the descriptions of some types, and of all that they are made of, by name."""
    adapters: list[tuple[str, Literal["validation"], TypeAdapter]] = []
    for name, kind in kinds.items():
        # A body is described as it is taken, an answer as it comes: they are the same here.
        adapters.append((name, "validation", TypeAdapter(kind)))
    found, rest = TypeAdapter.json_schemas(adapters, ref_template=REF)
    schemas: dict[str, Any] = dict(rest.get("$defs", {}))
    for (name, _), schema in found.items():
        # One that others are made of is among the definitions by its own name.
        if "$ref" not in schema:
            schemas[name] = schema
    return schemas


def _schema(kind: Any) -> dict[str, Any]:
    """Return a reference to a type's description, or to those of a union's types."""
    refs = [{"$ref": REF.format(model=each.__name__)} for each in _members(kind)]
    return refs[0] if len(refs) == 1 else {"anyOf": refs}


def _members(kind: Any) -> tuple[Any, ...]:
    """Return the types of a union, or a type alone."""
    return get_args(kind) or (kind,)


def _event(kind: Any) -> dict[str, Any]:
    """Return the description of a stream's event; OpenAPI 3.1 has no other place for it."""
    told = {
        "type": "string",
        "contentMediaType": JSON,
        "contentSchema": {"anyOf": [_schema(kind), _schema(ErrorAnswer)]},
    }
    last = {"const": "[DONE]", "description": "Of the last event"}
    data = {"anyOf": [last, told]}
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}


def _parameter(name: str, told: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": "path",
        "required": True,
        "description": told,
        "schema": {"type": "string"},
    }
