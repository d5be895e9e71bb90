"""Bodies of requests before they are read: of one kind, not too long, and not too slow.

Invariant: no more of a body is read than a request may have, of all bodies together no more than
the server has room for, and for no longer than one may take.
"""

import asyncio
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .limits import ConnectionLimits
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

    def __init__(self, app: ASGIApp, limit_bytes: Callable[[], int], limits: ConnectionLimits):
        self.app = app
        self.limit_bytes = limit_bytes
        self.limits = limits
        self.held_bytes = 0  # of the requests that are being answered

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
        if not announces_body(scope):
            await self.app(scope, receive, send)
            return
        body = _Body(self, receive, limit_bytes)
        try:
            await self.app(scope, body.receive, send)
        finally:
            self.held_bytes -= body.count


class _Body:
    """A body that is read while it is short and quick enough, and there is room for it."""

    def __init__(self, check: BodyCheck, receive: Receive, limit_bytes: int):
        self.count = 0
        self._check = check
        self._receive = receive
        self._limit_bytes = limit_bytes
        self._until = asyncio.get_running_loop().time() + check.limits.body_seconds
        self._whole = False

    async def receive(self) -> Message:
        """Return the next block. Raises ApiError, which comes up where the body is read."""
        # then only the client's leaving comes, for which an answer may wait long
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            seconds = self._check.limits.body_seconds
            text = f"the request was not whole after {seconds:.0f} seconds"
            raise ApiError(408, text, None, "too_slow", Connection="close") from None
        # the length that a client announces is only its word
        size = len(message.get("body", b""))
        self.count += size
        self._check.held_bytes += size
        self._whole = not message.get("more_body", False)
        if self.count > self._limit_bytes:
            raise too_large(self._limit_bytes)
        if self._check.held_bytes > self._check.limits.bodies_bytes:
            text = "too many large requests at once; try again in a moment"
            wait = {"Retry-After": "1", "Connection": "close"}
            raise ApiError(503, text, None, "overloaded", **wait)
        return message


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
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        # else it would be told to be no JSON, of which its sender is sure
        text = f"the request is encoded as {encoding[:60]!r}; send it without Content-Encoding"
        raise ApiError(415, text, None, "unsupported_encoding")
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON:
        # a page of any site may send text/plain and forms without asking first
        found = f"not {kind[:60]!r}" if kind else "and this one has none"
        raise ApiError(
            415, f"requests are of Content-Type {JSON}, {found}", None, "unsupported_media_type"
        )
