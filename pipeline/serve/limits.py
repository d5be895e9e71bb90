"""What one request may ask for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RequestLimits:
    """What a request may ask for; above it, it is refused with 4xx, or 503 when too many wait."""

    body_bytes: int = 1 << 20
    new_tokens: int = 1024
    waiting: int = 32  # fewer than starlette has threads, which is 40
    seconds: float = 120.0  # then a completion ends where it is
