"""Bodies of requests before they are read: of one kind, not too long, and not too slow.

Invariant: no more of a body is read than a request may have, and for no longer than it may take.
"""

import asyncio
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .refusals import ApiError, announces_body, refuse

JSON = "application/json"
_WITH_BODY = ("POST", "PUT", "PATCH")


def too_large(limit_bytes: int) -> ApiError:
    """Return the refusal of a body that is too long."""
    return ApiError(
        413,
        f"the request is over {limit_bytes:,} bytes",
        None,
        "too_large",
        Connection="close",
    )


class BodyCheck:
    """Refuses bodies that are too long, of another kind or ambiguous, before any of it is read, and
    ends the reading of one that does not come to its end."""

    def __init__(self, app: ASGIApp, limit_bytes: Callable[[], int], seconds: float):
        self.app = app
        self.limit_bytes = limit_bytes
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it with 400, 413 or 415."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit_bytes = self.limit_bytes()
        try:
            _check(scope, limit_bytes)
        except ApiError as error:
            await refuse(error, scope, receive, send)
            return
        if announces_body(scope):
            receive = self._bounded(receive, limit_bytes)
        await self.app(scope, receive, send)

    def _bounded(self, receive: Receive, limit_bytes: int) -> Receive:
        """Return what receives a body's blocks while it is short and quick enough. That raises
        ApiError, which comes up where the body is read."""
        until = asyncio.get_running_loop().time() + self.seconds
        count = 0
        whole = False

        async def bounded() -> Message:
            nonlocal count, whole
            # then only the client's leaving comes, for which an answer may wait long
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    408,
                    f"the request was not whole after {self.seconds:.0f} seconds",
                    None,
                    "too_slow",
                    Connection="close",
                ) from None
            # the length that a client announces is only its word
            count += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if count > limit_bytes:
                raise too_large(limit_bytes)
            return message

        return bounded


def _check(scope: Scope, limit_bytes: int) -> None:
    """Raise ApiError for what the headers tell already."""
    headers = Headers(scope=scope)
    length = headers.get("content-length")
    if length is not None and "transfer-encoding" in headers:
        # two lengths: whoever forwards it may go by the other one, and see another request in it
        raise ApiError(
            400, "the request gives a Content-Length and a Transfer-Encoding; send one of them"
        )
    if length is not None:
        # as digits, which int would also take from other alphabets
        if not (length.isascii() and length.isdecimal()):
            raise ApiError(400, "the Content-Length is not a number")
        if int(length[:20]) > limit_bytes:
            raise too_large(limit_bytes)
    if scope["method"] not in _WITH_BODY:
        return
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON:
        # a page of any site may send text/plain and forms without asking first
        found = f"not {kind[:60]!r}" if kind else "and this one has none"
        raise ApiError(
            415, f"requests are of Content-Type {JSON}, {found}", None, "unsupported_media_type"
        )
