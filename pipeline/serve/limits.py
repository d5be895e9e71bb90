"""What one request may ask for, how many run at once, and what one connection may take."""

from dataclasses import dataclass
from typing import Self

from ..config.serving import ServeConfig
from .generation import Capacity

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

    @classmethod
    def of(cls, serves: str, wanted: ServeConfig) -> Self:
        """Return those of a bundle that serves completions or chat."""
        return cls(
            body_bytes=wanted.max_body_bytes or BODY_BYTES.get(serves, cls.body_bytes),
            new_tokens=wanted.max_new_tokens,
            waiting=wanted.max_waiting,
            seconds=wanted.max_seconds,
            context_tokens=wanted.max_context,
        )


def capacity_of(wanted: ServeConfig) -> Capacity:
    """Return how much an engine takes on."""
    asked = wanted.max_prefill_tokens
    return Capacity(
        rows=wanted.max_batch,
        waiting=wanted.max_waiting,
        prefill_tokens=asked if isinstance(asked, int) else None,
        cache_bytes=wanted.max_cache,
    )


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
