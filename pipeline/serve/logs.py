"""What the server writes down: a line for each request and for what happens to itself, as text or
as JSON.

Invariant: no line holds a prompt, an answer, a picture or a key. So of a request there is what it
asked for, by address, and what became of it; of an error its kind and where it was raised, as its
text may quote what a client sent.
"""

import asyncio
import json
import logging
import re
import secrets
import time
import traceback
from collections.abc import Callable
from typing import Literal

import torch
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .refusals import FAILED, response

OURS = "pipeline"
LogFormat = Literal["plain", "json"]
log = logging.getLogger(__name__)

REQUEST_ID = "X-Request-Id"
# Of what clients send as one: it goes into the log and back as it is.
_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
# Whose text is of this machine alone.
_OF_THE_MACHINE = (OSError, MemoryError, torch.OutOfMemoryError)
_MOST_FRAMES = 8
MOST_OF_A_PATH = 300
MOST_OF_A_CLIENT = 64  # an address, which behind a proxy of this machine a header says
# Of a line: what a log record has beside its message
_FIELDS = "fields"
CUT = "this server has shut down before the answer was whole; ask again"
# How uvicorn begins to say what has a line of ours, or of WebSockets, which nothing here has.
_SAID_BETTER = (
    "ASGI callable returned without completing response",
    "No supported WebSocket library",
)


class JsonLines(logging.Formatter):
    """A JSON object a line: time, level, where from, what happened, and what belongs to it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        line = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info and record.exc_info[1]:
            line |= _error(record.exc_info[1])
        return json.dumps(line)


class PlainLines(logging.Formatter):
    """A line for a person: time, level, what happened, and name=value of what belongs to it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of a record."""
        fields = getattr(record, _FIELDS, {})
        told = [_utc(record.created), record.levelname, record.getMessage()]
        told += [f"{name}={value}" for name, value in fields.items()]
        # a line break of a library's would look like a line of ours, and what a proxy passes on of
        # a client may command a terminal
        line = "".join(map(_printable, " ".join(told)))
        if record.exc_info and record.exc_info[1]:
            error = _error(record.exc_info[1])
            line += f"\n  {error['error']}" + "".join(f"\n    {at}" for at in error["raised_at"])
        return line


def _printable(character: str) -> str:
    """Return a character as a terminal shows it and does nothing else."""
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def _utc(seconds: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"


def _error(error: BaseException) -> dict:
    """Return what may be told of an error: its kind, its text where that is of this machine alone,
    and where it was raised, innermost first."""
    kind = type(error).__name__
    told = f"{kind}: {error}" if isinstance(error, _OF_THE_MACHINE) else kind
    raised_at = []
    frames = traceback.extract_tb(error.__traceback__)
    # what lies above is the way that every request takes
    for frame in reversed(frames[-_MOST_FRAMES:]):
        raised_at.append(f"{frame.filename}:{frame.lineno} {frame.name}")
    return {"error": told, "raised_at": raised_at}


class _NotTwice(logging.Filter):
    """Leaves out what uvicorn says of requests that have a line of ours."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is written."""
        return not record.getMessage().startswith(_SAID_BETTER)


def configure(kind: LogFormat) -> None:
    """Have everything that is logged in this process written to standard error, in one form."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if kind == "json" else PlainLines())
    handler.addFilter(_NotTwice())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    # of all there is, ours says what a person wants to know while nothing is wrong
    logging.getLogger(OURS).setLevel(logging.INFO)
    logging.captureWarnings(True)


class RequestLog:
    """Gives each request an id and a line in the log, and answers for what fails below."""

    def __init__(
        self,
        app: ASGIApp,
        told: Callable[[Scope, int, float], None],
        quiet: frozenset[str] = frozenset(),
    ):
        self.app = app
        self.told = told  # called with the request, its status and its seconds
        self.quiet = quiet  # addresses that are asked all the time, whose success is no news

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; whatever is raised below becomes a 500, or ends the connection where
        the answer has begun."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.monotonic()
        request_id = _id_of(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0
        whole = False

        async def noted(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            elif message["type"] == "http.response.body":
                whole = not message.get("more_body", False)
            await send(message)

        problem: BaseException | None = None
        try:
            await self.app(scope, receive, noted)
        # cancelled as well: by a server that ends, which waits for nothing any more
        except BaseException as error:
            problem = error
        if not status:
            failed = response(500, FAILED, headers={"Connection": "close"})
            if isinstance(problem, asyncio.CancelledError):
                failed = response(503, CUT, None, "stopping", {"Connection": "close"})
            await failed(scope, receive, noted)
        seconds = time.monotonic() - began
        self.told(scope, status, seconds)
        self._write(scope, status, seconds, whole, problem)

    def _write(
        self,
        scope: Scope,
        status: int,
        seconds: float,
        whole: bool,
        problem: BaseException | None,
    ) -> None:
        path = scope["path"]
        if status < 400 and path in self.quiet:
            return
        client = scope.get("client")
        fields = {
            "request_id": scope["state"]["request_id"],
            "client": client[0][:MOST_OF_A_CLIENT] if client else "",
            "method": scope["method"],
            # as it came, escaped, without the query: a key or a text may stand there
            "path": _shown_path(scope),
            "status": status,
            "seconds": round(seconds, 4),
        }
        if not whole:
            # it was begun, and the client left or something failed
            fields["whole"] = False
        level = logging.ERROR if status >= 500 and problem else logging.INFO
        error = None if isinstance(problem, asyncio.CancelledError) else problem
        log.log(level, "request", extra={_FIELDS: fields}, exc_info=error)


def _shown_path(scope: Scope) -> str:
    raw = scope.get("raw_path", scope["path"].encode()).decode("latin-1")
    # as long as an address of ours may be; who sends a longer one fills no disk with it
    return raw.partition("?")[0][:MOST_OF_A_PATH]


def event(logger: logging.Logger, text: str, **fields: object) -> None:
    """Write down what happened, with what belongs to it."""
    logger.info(text, extra={_FIELDS: fields})


def _id_of(scope: Scope) -> str:
    """Return the id that a client gave its request, where it is sane, and else a new one."""
    given = Headers(scope=scope).get(REQUEST_ID, "")
    return given if _SANE_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
