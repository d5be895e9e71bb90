"""Connections that take too long, too much or too many: what uvicorn leaves open for ever.

uvicorn itself ends a connection that is idle between two requests. Before the first request, within
one's headers and where nobody reads the answer it waits for as long as the client likes.
"""

import asyncio
import contextlib
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .limits import ConnectionLimits
from .refusals import ApiError

# Asked by what would restart a server that does not answer, or wants to see why.
ALWAYS = (b"GET /healthz ", b"HEAD /healthz ", b"GET /metrics ", b"HEAD /metrics ")


class ServerConfig(uvicorn.Config):
    """uvicorn's settings for an application, with what a connection may take."""

    def __init__(self, app: Any, limits: ConnectionLimits, **more: Any):
        # h11 and not whatever is installed: it bounds headers, and refuses what smuggles requests
        super().__init__(
            app,
            http=Connection,
            ws="none",
            # nothing to do; and a second Ctrl-C would print a traceback of it
            lifespan="off",
            h11_max_incomplete_event_size=limits.header_bytes,
            timeout_keep_alive=limits.idle_seconds,
            server_header=False,
            access_log=False,
            log_config=None,
            **more,
        )
        self.limits = limits


class Connection(H11Protocol):
    """A connection whose headers come in time, whose answers are read, and which is one of so
    many."""

    def __init__(self, config: ServerConfig, *args: Any, **more: Any):
        super().__init__(config, *args, **more)
        self._limits = config.limits
        self._headers_due: asyncio.TimerHandle | None = None
        self._reading_due: asyncio.TimerHandle | None = None
        self._one_too_many = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        open_now = len(self.connections)
        # told with 503 once it has asked: what is closed before that is a reset to the client
        self._one_too_many = open_now > self._limits.connections
        if open_now > 2 * self._limits.connections:
            transport.abort()
            return
        self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget what was waited for."""
        self._stop(self._headers_due, self._reading_due)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what came, unless the connection has been given up."""
        if self.transport.is_closing():
            return
        if self._one_too_many and not data.startswith(ALWAYS):
            self._unset_keepalive_if_required()
            self._refuse(
                ApiError(503, "too many connections are open; try again in a moment", None, "full")
            )
            return
        super().data_received(data)
        self._wait_for_headers()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no request of HTTP, in the form of every other error."""
        self._refuse(ApiError(400, "this is no valid HTTP request"))

    def pause_writing(self) -> None:
        """Begin to wait for a client that does not read."""
        super().pause_writing()
        self._stop(self._reading_due)
        self._reading_due = self.loop.call_later(self._limits.write_seconds, self._give_up)

    def resume_writing(self) -> None:
        """Go on: the client has read."""
        self._stop(self._reading_due)
        super().resume_writing()

    def _wait_for_headers(self) -> None:
        """See to it that headers which are awaited come in time, from the first byte on or before
        it."""
        awaited = self.conn.their_state is h11.IDLE and not self.transport.is_closing()
        if not awaited:
            self._stop(self._headers_due)
            self._headers_due = None
        elif self._headers_due is None:
            seconds = self._limits.header_seconds
            self._headers_due = self.loop.call_later(seconds, self._too_slow)

    def _too_slow(self) -> None:
        """End a connection whose headers did not come."""
        self._headers_due = None
        # a request was read meanwhile, behind another
        if self.conn.their_state is not h11.IDLE:
            return
        # browsers open connections ahead of need, and would show the answer to the first request
        if not self.conn.trailing_data[0]:
            self.transport.close()
            return
        self._refuse(ApiError(408, "no whole request came in time", None, "too_slow"))

    def _give_up(self) -> None:
        """End a connection nobody reads from; what was to be sent is dropped."""
        self.transport.abort()

    def _refuse(self, error: ApiError) -> None:
        """Answer with an error, if an answer is due, and end the connection."""
        if self.transport.is_closing():
            return
        if self.cycle is not None:
            # whose answer would come behind this one
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        # in the middle of another answer there is no place for this one
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = error.response()
            headers = [*answer.raw_headers, (b"connection", b"close")]
            start = h11.Response(status_code=answer.status_code, headers=headers)
            # of a HEAD request no body may follow
            with contextlib.suppress(h11.LocalProtocolError):
                for event in (start, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
                    self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _stop(self, *timers: asyncio.TimerHandle | None) -> None:
        for timer in timers:
            if timer is not None:
                timer.cancel()
