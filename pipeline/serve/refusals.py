"""Requests that are answered with an error, in OpenAI's form, with the status that says whose fault
it is."""

import asyncio
import contextlib
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from ..errors import plain
from .answers import ErrorAnswer

# For which what is still being sent is read and dropped: a socket that is closed over unread bytes
# is reset, and the client may never see why.
LINGER_S = 2.0
FAILED = "the server failed at this request; its log tells more"
# Of what a client sent, an error repeats some, and no more than this.
MOST_CHARACTERS = 2000
MOST_OF_A_NAME = 100
# For who asks for another, also while the bundle is being opened.
ADDRESSES = (
    "GET /healthz, GET /v1/models, POST /v1/completions, POST /v1/chat/completions, POST /v1/route"
)


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
        message = _cut(plain(message), MOST_CHARACTERS)
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param and _cut(param, MOST_OF_A_NAME)
        self.code = code
        self.headers = headers

    def response(self) -> JSONResponse:
        """Return what the client gets."""
        return response(self.status, self.message, self.param, self.code, self.headers)


def response(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Return the answer that is an error."""
    return JSONResponse(error_body(status, message, param, code), status, headers)


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> ErrorAnswer:
    """Return an error in OpenAI's form."""
    if status == 401:
        kind = "authentication_error"
    elif status == 404:
        kind = "not_found_error"
    else:
        kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def add_error_handlers(app: FastAPI) -> None:
    """Have an application answer every error that is not its own in OpenAI's form."""

    @app.exception_handler(ApiError)
    async def refused(_request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def no_such_address(request: Request, error: HTTPException) -> JSONResponse:
        asked = f"{request.method} {_cut(request.url.path, MOST_OF_A_NAME)}"
        message = f"{asked} is not served here; {ADDRESSES} are"
        return response(error.status_code, message, headers=error.headers)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def announces_body(scope: Scope) -> bool:
    """Whether a request says that a body comes behind its headers."""
    for name, value in scope["headers"]:
        if name == b"transfer-encoding" or (name == b"content-length" and value != b"0"):
            return True
    return False


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with an error before the body was read; where one is on its way, the connection ends
    with the answer, and not before the client can have read it."""
    answer = error.response()
    comes_more = announces_body(scope)
    if comes_more:
        answer.headers["Connection"] = "close"
    await send(
        {
            "type": "http.response.start",
            "status": answer.status_code,
            "headers": answer.raw_headers,
        }
    )
    # whole, so that the client has all of it while what it sends is read
    await send({"type": "http.response.body", "body": answer.body, "more_body": True})
    if comes_more:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                await _drop_body(receive)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _drop_body(receive: Receive) -> None:
    while True:
        message = await receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            return
