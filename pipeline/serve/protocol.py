"""What every endpoint has in common: limits, bodies that are checked, the waiting line, errors in
OpenAI's form.

Invariant: whatever a client sends, it gets JSON back, with the status that says whose fault an
error is.
"""

import hmac
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect


@dataclass(frozen=True)
class RequestLimits:
    """What a request may ask for; above it, it is refused with 4xx, or 503 when too many wait."""

    body_bytes: int = 1 << 20
    new_tokens: int = 1024
    waiting: int = 32  # fewer than starlette has threads, which is 40
    seconds: float = 120.0  # then a completion ends where it is


class ApiError(Exception):
    """A request that is answered with an error; raised anywhere below an endpoint."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        **headers: str,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = (
            status,
            message,
            param,
            code,
            headers,
        )


def only(value) -> Any:
    """Return the type of a field of OpenAI's that has one value here, so that a client learns what
    is not done."""

    def check(given):
        if given != value:
            raise ValueError(f"not supported yet; leave it out or set it to {json.dumps(value)}")
        return value

    return Annotated[Any, AfterValidator(check)]


class Body(BaseModel):
    """A request: JSON types are taken at their word, unknown fields refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, given):
        return (
            {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given
        )


class Service:
    """What the endpoints of one bundle do, less HTTP; `engine` has the bundle's name and when it
    was made."""

    known = ""  # its addresses, for who asks for another

    def __init__(self, engine, limits: RequestLimits):
        self.engine, self.limits, self.inside = engine, limits, 0

    def check_model(self, name: str | None) -> None:
        """Raise Refused for another model's name."""
        if name not in (None, self.engine.name):
            raise ApiError(
                404,
                f"the model {name!r} is not served here; {self.engine.name!r} is",
                "model",
                "model_not_found",
            )

    async def run(self, work: Callable):
        """Run work in a thread; refuse it while too many requests wait already."""
        if self.inside > self.limits.waiting:
            raise ApiError(
                503,
                f"{self.inside} requests are waiting already; try again in a moment",
                None,
                "overloaded",
                **{"Retry-After": "1"},
            )
        self.inside += 1
        try:
            return await run_in_threadpool(work)
        finally:
            self.inside -= 1


def check_key(key: str | None, request: Request) -> None:
    """Raise ApiError unless there is no key, or the request brings it."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if key is None or (
        scheme.lower() == "bearer"
        and hmac.compare_digest(given.strip().encode("latin-1"), key.encode())
    ):
        return
    said = (
        "is not the one this server was started with"
        if given
        else "is missing: send Authorization: Bearer KEY"
    )
    raise ApiError(
        401, f"the API key {said}", None, "invalid_api_key", **{"WWW-Authenticate": "Bearer"}
    )


async def read(request: Request, kind: type[Body], limit_bytes: int):
    """Return a request's body, checked; stop reading once it is too long."""
    body = bytearray()
    try:
        async for block in request.stream():
            body += block
            if len(body) > limit_bytes:
                raise ApiError(
                    413,
                    f"the request is over {limit_bytes:,} bytes",
                    None,
                    "too_large",
                    Connection="close",
                )
    except ClientDisconnect:
        raise ApiError(400, "the client left before the request was whole") from None
    try:
        return kind.model_validate_json(bytes(body))
    except ValidationError as error:
        raise _wrong(error.errors(include_url=False)) from None


def _wrong(problems: list[dict]) -> ApiError:
    """Return the refusal that names every wrong field."""
    texts, names = [], []
    for problem in problems:
        name = str(problem["loc"][0]) if problem["loc"] else ""
        text = problem["msg"].removeprefix("Value error, ")
        text = (
            "no such field" if problem["type"] == "extra_forbidden" else text[:1].lower() + text[1:]
        )
        texts.append(f"{name}: {text}" if name else f"the request is not a JSON object: {text}")
        names.append(name or None)
    return ApiError(400, "; ".join(dict.fromkeys(texts)), names[0])


def described(kind: type[Body]) -> dict:
    """Return the part of the interface's own description that tells a body's fields."""
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": kind.model_json_schema()}},
        }
    }


def _error(
    status: int, message: str, param: str | None = None, code: str | None = None, headers=None
) -> JSONResponse:
    kinds = {401: "authentication_error", 404: "not_found_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status, headers)


async def refused(_request: Request, refused: ApiError) -> JSONResponse:
    """Return the answer to a request that was refused."""
    return _error(refused.status, refused.message, refused.param, refused.code, refused.headers)


async def no_such_address(request: Request, error: HTTPException) -> JSONResponse:
    """Return the answer where nothing is served."""
    known = request.app.state.service.known
    return _error(
        error.status_code,
        f"{request.method} {request.url.path} is not served here; {known} are",
        headers=error.headers,
    )


async def failed(_request: Request, _cause: Exception) -> JSONResponse:
    """Return the answer to a request at which the server itself failed; the connection ends, as
    uvicorn closes it."""
    return _error(
        500,
        "the server failed at this request; its log tells more",
        headers={"Connection": "close"},
    )
