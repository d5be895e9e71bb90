"""What one request may ask for, and what one connection may take."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

# By what a bundle serves: in chats pictures come inside the request.
BODY_BYTES = {"chat": 32 << 20}


@dataclass(frozen=True)
class RequestLimits:
    """What a request may ask for; above it, it is refused with 4xx, or 503 when too many wait."""

    body_bytes: int = 1 << 20
    new_tokens: int = 1024
    waiting: int = 256  # texts that wait until there is a place for them
    seconds: float = 120.0  # then a completion ends where it is
    context_tokens: int | None = None  # of prompt and answer; None: the model's own
    image_hosts: tuple[str, ...] = ()  # whose pictures are fetched; *: any of the open network

    @classmethod
    def of(cls, serves: str, changes: Mapping[str, Any]) -> Self:
        """Return those of a bundle that serves completions or chat, some of them changed; None
        changes nothing."""
        given = {name: value for name, value in changes.items() if value is not None}
        if serves in BODY_BYTES:
            given = {"body_bytes": BODY_BYTES[serves]} | given
        return cls(**given)


@dataclass(frozen=True)
class ConnectionLimits:
    """What a connection may take before it is ended, however little it sends."""

    # below the 1,024 open files that most systems give a process
    connections: int = 512
    # OpenAI's client sends a kilobyte; cookies of other servers on localhost may come along
    header_bytes: int = 32 << 10
    header_seconds: float = 10.0  # from the first moment on to the end of the headers
    # of all requests that are being answered: each is held some times over while it is read
    bodies_bytes: int = 256 << 20
    # as large a body as is taken, over 5 Mbit/s
    body_seconds: float = 60.0
    # for whoever does not read what was asked for; shorter than a laptop is closed
    write_seconds: float = 30.0
    idle_seconds: int = 5  # between two requests
