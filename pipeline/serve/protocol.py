"""What every endpoint has in common: bodies that are checked, and the waiting line.

Invariant: whatever a client sends, it gets JSON back, with the status that says whose fault an
error is. A model runs one request at a time, in a thread; the rest wait, up to a limit.
"""

import asyncio
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.params import Depends
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from ..config.wording import sentence
from ..protocols import Abandoned, while_wanted
from .engine import Engine
from .limits import RequestLimits
from .refusals import ApiError

DIGITS = 4  # of a probability, a weight or a time in an answer

T = TypeVar("T")


def only(value: object) -> AfterValidator:
    """Return the check of a field of OpenAI's that has one value here.

    Clients send such fields with their defaults; taken and not used, another value would be a
    promise that is not kept.
    """

    def check(given: object) -> object:
        # To ask for no tools, or for no probabilities, is to ask for nothing.
        is_nothing = value is None and (given is False or given in ([], {}))
        if given != value and not is_nothing:
            raise ValueError(f"not supported yet; leave it out or set it to {json.dumps(value)}")
        return value

    return AfterValidator(check)


# Any, so that a wrong type is told as not supported too, and 1.0 passes for 1.
OnlyFalse = Annotated[Any, only(False)]
OnlyOne = Annotated[Any, only(1)]
OnlyZero = Annotated[Any, only(0)]
OnlyNone = Annotated[Any, only(None)]
OnlyText = Annotated[Any, only({"type": "text"})]


class Body(BaseModel):
    """A request: JSON types are taken at their word, unknown fields refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, given: Any) -> Any:
        # Clients in typed languages send null for what was not set.
        if not isinstance(given, dict):
            return given
        return {key: value for key, value in given.items() if value is not None}


class Service(ABC):
    """What the endpoints of one bundle do, less HTTP."""

    addresses = ""  # for who asks for another
    engine: Engine
    limits: RequestLimits

    @abstractmethod
    def __init__(self, folder: Path, limits: RequestLimits | None):
        """Open the bundle in folder; without limits it has those of its kind."""
        self.in_flight = 0

    @abstractmethod
    def add_to(self, app: FastAPI, guarded: Sequence[Depends]) -> None:
        """Give an application the endpoints of this service, behind the guards."""

    @abstractmethod
    def details(self) -> dict:
        """Return what /v1/models says of this kind of bundle alone."""

    def model(self) -> dict:
        """Return what /v1/models says of the bundle."""
        return {
            "id": self.engine.name,
            "object": "model",
            "created": self.engine.made_at,
            "owned_by": "moleforge",
            "experts": list(self.engine.experts),
            **self.details(),
        }

    def check_model(self, name: str | None) -> None:
        """Raise ApiError for another model's name."""
        if name in (None, self.engine.name):
            return
        raise ApiError(
            404,
            f"the model {name!r} is not served here; {self.engine.name!r} is",
            "model",
            "model_not_found",
        )

    async def run(self, work: Callable[[], T]) -> T:
        """Run work in a thread; raise ApiError while too many requests wait already."""
        # Counted without a lock: only the event loop's own thread comes here.
        if self.in_flight > self.limits.waiting:
            raise ApiError(
                503,
                f"{self.in_flight} requests are waiting already; try again in a moment",
                None,
                "overloaded",
                **{"Retry-After": "1"},
            )
        self.in_flight += 1
        try:
            return await run_in_threadpool(work)
        except Abandoned:
            # heard by nobody; the status is nginx's for it, in this server's log
            raise ApiError(499, "the client left before its answer was there") from None
        except TimeoutError as error:
            raise ApiError(503, str(error), None, "overloaded", **{"Retry-After": "1"}) from None
        finally:
            self.in_flight -= 1


@asynccontextmanager
async def following(request: Request) -> AsyncIterator[None]:
    """Have the work inside, threads included, end with Abandoned once the client is gone. The body
    must have been read: both would read the same messages."""
    gone = threading.Event()

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            continue
        gone.set()

    while_wanted(gone.is_set)
    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        # a thread outlives its request where the server is told to stop
        gone.set()
        watcher.cancel()


B = TypeVar("B", bound=Body)


async def read_body(request: Request, kind: type[B], limit_bytes: int) -> B:
    """Return a request's body, checked; stop reading once it is too long. Raises ApiError."""
    body = bytearray()
    try:
        # Block by block, as the length that a client announces is only its word.
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
        raise _invalid(error.errors(include_url=False)) from None


def _invalid(problems: Sequence[ErrorDetails]) -> ApiError:
    """Return the error that names every wrong field."""
    texts = []
    for problem in problems:
        # The words for settings are right for fields too, but not for the body as a whole.
        text = sentence(problem) if problem["loc"] else problem["msg"]
        if problem["type"] == "extra_forbidden":
            # Of a message's part, the whole path would say no more.
            inner = f" {problem['loc'][-1]}" if len(problem["loc"]) > 1 else ""
            text = f"no such field{inner}"
        else:
            text = text[:1].lower() + text[1:]
        name = _field(problem)
        texts.append(f"{name}: {text}" if name else f"the request is not a JSON object: {text}")
    # A field with several allowed types has a problem with each, in the same words; once is enough.
    message = "; ".join(dict.fromkeys(texts))
    return ApiError(400, message, _field(problems[0]) or None)


def _field(problem: ErrorDetails) -> str:
    """Return the field of the body that a problem is in; "" when the body itself is wrong."""
    return str(problem["loc"][0]) if problem["loc"] else ""


def body_schema(kind: type[Body]) -> dict:
    """Return the part of the interface's own description that tells a body's fields."""
    # By hand, as FastAPI knows only bodies that it reads itself, without a limit.
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": kind.model_json_schema()}},
        }
    }
