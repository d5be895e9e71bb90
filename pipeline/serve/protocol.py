"""What every endpoint has in common: bodies that are read under a limit and checked.

Invariant: whatever a client sends, it gets JSON back, with the status that says whose fault an
error is.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, core_schema
from starlette.requests import ClientDisconnect

from ..config.wording import sentence
from .bodies import too_large
from .refusals import ApiError

# Of an object; each field that is wrong costs more than it takes to send.
MOST_FIELDS = 1024
MOST_VALUES = 1 << 20
MOST_PROBLEMS = 8  # that are told of one request
NOT_DONE = "not supported yet"


# Not compared: typing makes one type of what is equal, and to Python 1 is True.
@dataclass(frozen=True, eq=False)
class Only:
    """The check of a field of OpenAI's that has one value here, the first of some that mean it.

    Clients send such fields with their defaults; taken and not used, another value would be a
    promise that is not kept.
    """

    values: tuple[Any, ...]

    def check(self, given: object) -> object:
        """Return the field's one value. Raises ValueError for another."""
        value = self.values[0]
        # To ask for no tools, or for no probabilities, is to ask for nothing.
        is_nothing = value is None and (given is False or given in ([], {}))
        if given not in self.values and not is_nothing:
            wanted = " or ".join(json.dumps(each) for each in self.values)
            raise ValueError(f"{NOT_DONE}; leave it out or set it to {wanted}")
        return value

    def __get_pydantic_core_schema__(self, _kind: Any, _handler: Any) -> core_schema.CoreSchema:
        # Any, so that a wrong type is told as not supported too, and 1.0 passes for 1.
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, _schema: Any, _handler: Any) -> dict[str, Any]:
        nothing: list[Any] = [False, [], {}] if self.values[0] is None else [None]
        return {"enum": [*self.values, *nothing]}


def only(*values: object) -> Only:
    """Return the check of a field that may have one of some values, which all mean the first."""
    return Only(values)


OnlyFalse = Annotated[Any, only(False)]
OnlyTrue = Annotated[Any, only(True)]
OnlyOne = Annotated[Any, only(1)]
OnlyZero = Annotated[Any, only(0)]
OnlyNone = Annotated[Any, only(None)]
OnlyText = Annotated[Any, only(None, {"type": "text"})]


class Body(BaseModel):
    """A request: JSON types are taken at their word, unknown fields refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, given: Any) -> Any:
        # Clients in typed languages send null for what was not set.
        if not isinstance(given, dict):
            return given
        few(given)
        return {key: value for key, value in given.items() if value is not None}


B = TypeVar("B", bound=Body)


def few(given: object) -> object:
    """Return what maps names as it came. Raises ValueError where it has too many of them."""
    if isinstance(given, dict) and len(given) > MOST_FIELDS:
        raise ValueError(f"has {len(given)} fields; at most {MOST_FIELDS} are read")
    return given


def check_parts(body: bytes | bytearray) -> None:
    """Raise ApiError for a body of more values than any request needs, before they are made: each
    takes some times the room that it has in the body. What is large in a request is text."""
    if len(body) <= MOST_VALUES:
        return
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > MOST_VALUES:
        message = f"the request has over {MOST_VALUES:,} values in it"
        raise ApiError(413, message, None, "too_large")


async def read_body(request: Request, kind: type[B], limit_bytes: int) -> B:
    """Return a request's body, checked; stop reading once it is too long. Raises ApiError."""
    body = bytearray()
    try:
        # Block by block, as the length that a client announces is only its word.
        async for block in request.stream():
            body += block
            if len(body) > limit_bytes:
                raise too_large(limit_bytes)
    except ClientDisconnect:
        raise ApiError(400, "the client left before the request was whole") from None
    check_parts(body)
    try:
        return kind.model_validate_json(bytes(body))
    except ValidationError as error:
        raise _invalid(error.errors(include_url=False)) from None


def _invalid(problems: Sequence[ErrorDetails]) -> ApiError:
    """Return the error that names every wrong field."""
    texts = []
    # Of what may be left out pydantic says beside the rest that it might be null.
    problems = [each for each in problems if each["type"] != "none_required"]
    for problem in problems:
        # The words for settings are right for fields too, but not for the body as a whole.
        text = sentence(problem) if problem["loc"] else problem["msg"]
        if problem["type"] == "extra_forbidden":
            # Of a message's part, the whole path would say no more.
            inner = f" {problem['loc'][-1]}" if len(problem["loc"]) > 1 else ""
            text = f"no such field{inner}"
        else:
            text = text[:1].lower() + text[1:]
            if text.startswith(NOT_DONE) and len(problem["loc"]) > 1:
                text = f"{problem['loc'][-1]} is {text}"
        name = _field(problem)
        if not name and problem["type"] == "value_error":
            texts.append(f"the request {sentence(problem)}")
        else:
            texts.append(f"{name}: {text}" if name else f"the request is not a JSON object: {text}")
    # A field with several allowed types has a problem with each, in the same words; once is enough.
    told = list(dict.fromkeys(texts))
    more = len(told) - MOST_PROBLEMS
    told = told[:MOST_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])
    return ApiError(400, "; ".join(told), _field(problems[0]) or None)


def _field(problem: ErrorDetails) -> str:
    """Return the field of the body that a problem is in; "" when the body itself is wrong."""
    # a field may be called nothing
    return str(problem["loc"][0]) or '""' if problem["loc"] else ""
