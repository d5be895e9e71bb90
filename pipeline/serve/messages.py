"""The messages of a chat as clients send them, and the turns that are made of them.

Checked before pydantic sees them: a message is one of several things to it, and it would tell what
is wrong with each of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from .protocol import Body, OnlyNone

PARTS = ("text", "image_url")
# Messages and parts together; what a context holds of them is far less.
MOST_PIECES = 8192
SHOWN = 40  # characters of what a client sent, in a message about it
ROLES = ("system", "developer", "user", "assistant")
# Of clients that call tools; here nothing calls any.
_OF_TOOLS = ("tool", "function")
_EXAMPLE = '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'


@dataclass(frozen=True)
class Turn:
    """What one side of a chat said: a text, and data: URIs of the pictures that it is about."""

    role: Literal["system", "user", "assistant"]
    text: str
    pictures: tuple[str, ...] = ()


class Picture(Body):
    """Where a picture is: a data: URI."""

    url: str = Field(
        description="data:image/png;base64,..., or an address of a host that is allowed"
    )
    detail: str | None = Field(None, description="Taken and not used")

    @model_validator(mode="before")
    @classmethod
    def _of_its_address(cls, given: Any) -> Any:
        # As some clients send it.
        return {"url": given} if isinstance(given, str) else given


def _or_text(schema: dict[str, Any]) -> None:
    """Have a field's description say that it may be a text as well."""
    described = dict(schema)
    schema.clear()
    schema["anyOf"] = [described, {"type": "string"}]


class TextPart(Body):
    """A part of a message that is text."""

    type: Literal["text"]
    text: str
    # One of the client's own, about what its provider keeps of a prompt.
    prompt_cache_breakpoint: Any = Field(None, description="Taken and not used")


class PicturePart(Body):
    """A part of a message that is a picture."""

    type: Literal["image_url"]
    image_url: Picture = Field(json_schema_extra=_or_text)
    prompt_cache_breakpoint: Any = Field(None, description="Taken and not used")


class Message(Body):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="developer is read as system"
    )
    content: str | list[Annotated[TextPart | PicturePart, Field(discriminator="type")]] | None = (
        Field(None, description="Text, or parts: text and, of the user, image_url")
    )
    name: str | None = Field(None, description="Taken and not used")
    # What clients send back of an answer that they got.
    refusal: OnlyNone = None
    annotations: OnlyNone = None
    audio: OnlyNone = None
    function_call: OnlyNone = None
    tool_calls: OnlyNone = None

    def turn(self) -> Turn:
        """Return what was said: one text, and its pictures in order."""
        role = "system" if self.role == "developer" else self.role
        if not isinstance(self.content, list):
            return Turn(role, self.content or "")
        texts = []
        urls = []
        for part in self.content:
            if isinstance(part, TextPart):
                texts.append(part.text)
            else:
                urls.append(part.image_url.url)
        return Turn(role, "\n".join(texts), tuple(urls))


def checked(given: object) -> object:
    """Return messages as they came. Raises ValueError for what is no list of messages, in words for
    who wrote the client."""
    if not isinstance(given, list) or not given:
        raise ValueError('give a list of messages, as in [{"role": "user", "content": "..."}]')
    pieces = len(given)
    for number, message in enumerate(given):
        # Where there is one only, nobody asks which.
        where = f"message {number}: " if len(given) > 1 else ""
        if not isinstance(message, Mapping):
            raise ValueError(
                f'{where}it must be an object, as in {{"role": "user", "content": "..."}}'
            )
        content = message.get("content")
        pieces += len(content) if isinstance(content, list) else 0
        if pieces > MOST_PIECES:
            raise ValueError(f"over {MOST_PIECES} messages and parts of them; send fewer")
        problem = _problem(message)
        if problem:
            raise ValueError(f"{where}{problem}")
    return given


Messages = Annotated[list[Message], BeforeValidator(checked), Field(min_length=1)]


def _problem(message: Mapping[str, Any]) -> str:
    """Return what is wrong with a message; "" where nothing is."""
    role = message.get("role")
    if role in _OF_TOOLS:
        return f"a {role} message is not read: nothing here calls tools; leave it out"
    if role not in ROLES:
        return f"its role must be {', '.join(ROLES[:-1])} or {ROLES[-1]}, not {_shown(role)}"
    content = message.get("content")
    # An answer of which nothing came, as clients keep it.
    if isinstance(content, str) or (content is None and role == "assistant"):
        return ""
    if not isinstance(content, list) or not content:
        return "content must be a text, or a list of parts of text and image_url"
    for number, part in enumerate(content):
        problem = _part_problem(part, role)
        if problem:
            return f"part {number} of content: {problem}"
    return ""


def _part_problem(part: object, role: object) -> str:
    """Return what is wrong with a part of a message; "" where nothing is."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or kind not in PARTS:
        found = f"type {_shown(kind)}" if kind is not None else "no type"
        return f"it has {found}, and {' and '.join(PARTS)} are read; a picture is {_EXAMPLE}"
    value = part.get(kind)
    if kind == "text":
        return "" if isinstance(value, str) else "text must be a text"
    if role != "user":
        return f"a picture is shown by the user, not in a message of the role {role}"
    url = value.get("url") if isinstance(value, Mapping) else value
    if not isinstance(url, str):
        return f"image_url must be an object with a url, as in {_EXAMPLE}"
    return ""


def _shown(value: object) -> str:
    """Return what a client sent as a message shows it, however long it is."""
    shown = repr(value)
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
