"""Addresses as clients put them together: with a slash at the end, or two where one is meant.

Answered where they are. FastAPI, and vLLM by it, redirect what ends in a slash (307): a redirect
names scheme and host, which a proxy in front need not have told, not every client posts its body
again, and none is redirected from two slashes.
"""

import re

from starlette.types import ASGIApp, Receive, Scope, Send

_SLASHES = re.compile("/{2,}")


class PlainAddresses:
    """Takes surplus slashes out of addresses, which is what a base_url that ends in one leaves."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] == "http":
            # As it came it stays in raw_path, for the log
            plain = _SLASHES.sub("/", scope["path"]).rstrip("/") or "/"
            scope = {**scope, "path": plain}
        await self.app(scope, receive, send)
