"""Who may ask: API keys, which requests bring as bearer tokens."""

import hmac

from fastapi import Request

from .refusals import ApiError


def check_key(key: str | None, request: Request) -> None:
    """Raise ApiError unless there is no key, or the request brings it."""
    if key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Headers are latin-1. The comparison takes as long for a nearly right key as for a wrong one,
    # so that its time does not tell how much of it is right.
    same = hmac.compare_digest(given.strip().encode("latin-1"), key.encode())
    if scheme.lower() == "bearer" and same:
        return
    if given:
        problem = "is not the one this server was started with"
    else:
        problem = "is missing: send Authorization: Bearer KEY"
    raise ApiError(
        401, f"the API key {problem}", None, "invalid_api_key", **{"WWW-Authenticate": "Bearer"}
    )
