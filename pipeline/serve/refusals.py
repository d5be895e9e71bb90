"""Requests that are answered with an error, in OpenAI's form, with the status that says whose fault
it is."""

from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..errors import plain


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
        message = plain(message)
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers


def response(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Return an error in OpenAI's form."""
    if status == 401:
        kind = "authentication_error"
    elif status == 404:
        kind = "not_found_error"
    else:
        kind = "server_error" if status >= 500 else "invalid_request_error"
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status, headers)


def add_error_handlers(app: FastAPI) -> None:
    """Have an application answer every error in OpenAI's form."""

    @app.exception_handler(ApiError)
    async def refused(_request: Request, error: ApiError) -> JSONResponse:
        return response(error.status, error.message, error.param, error.code, error.headers)

    @app.exception_handler(HTTPException)
    async def no_such_address(request: Request, error: HTTPException) -> JSONResponse:
        asked = f"{request.method} {request.url.path}"
        known = request.app.state.service.addresses
        message = f"{asked} is not served here; {known} are"
        return response(error.status_code, message, headers=error.headers)

    @app.exception_handler(Exception)
    async def failed(_request: Request, _error: Exception) -> JSONResponse:
        # Nothing of the error: it may hold what another client sent. uvicorn closes the connection
        # after this, and says so only if told; a client that kept it could have its next request
        # reset.
        return response(
            500,
            "the server failed at this request; its log tells more",
            headers={"Connection": "close"},
        )
