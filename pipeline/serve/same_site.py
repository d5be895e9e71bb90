"""No page of another site uses this server through the browser of whoever runs it.

A page may send requests to any address that its reader's machine reaches, and by a name that it
lets point there (DNS rebinding) it may even read the answers. Browsers say in `Origin` which page
asks and in `Host` which name it asked for: both must be of this server, or named to it.
"""

import ipaddress
import socket
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from .refusals import ApiError, refuse

ANY = "*"
_PORTS = {"http": "80", "https": "443"}
# What a browser says of a request that needs no Origin: an image or a script of another page.
_ELSEWHERE = ("cross-site", "same-site")


class Hosts:
    """The names by which a server is asked for: what it listens on, and those allowed beside it.

    `*` is any name, `*.example.org` any below one. A page cannot rebind an address that is written
    as a number, so of a server that listens everywhere every such address is its own.
    """

    def __init__(self, listens_on: str, allowed: Collection[str] = ()):
        self._names = {name.lower() for name in allowed}
        self._any_address = False
        self._loopback = False
        self._names.add(listens_on.lower())
        try:
            address = ipaddress.ip_address(listens_on or "0.0.0.0")  # noqa: S104
        except ValueError:
            # "localhost", or another name
            self._loopback = listens_on == "localhost"
        else:
            self._any_address = address.is_unspecified
            self._loopback = address.is_loopback or address.is_unspecified
        if self._any_address:
            self._names.add(socket.gethostname().lower())
        if self._loopback:
            self._names.add("localhost")

    def has(self, name: str) -> bool:
        """Whether a name, as in a Host header without its port, is of this server."""
        name = name.lower().removesuffix(".")
        if ANY in self._names or name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            _, _, above = name.partition(".")
            return bool(above) and f"*.{above}" in self._names
        return self._any_address or (self._loopback and address.is_loopback)


class SameSite:
    """Refuses requests under another server's name, and those of pages of other sites."""

    def __init__(self, app: ASGIApp, hosts: Hosts, origins: Collection[str] = ()):
        self.hosts = hosts
        self.origins = frozenset(origin.rstrip("/").lower() for origin in origins)
        self.app = _shared(app, origins) if origins else app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it with 421 or 403 before its body is read."""
        if scope["type"] == "http":
            try:
                self._check(Headers(scope=scope))
            except ApiError as error:
                await refuse(error, scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, headers: Headers) -> None:
        asked = headers.getlist("host")
        # HTTP/1.0 needs none, and probes of old load balancers bring none; every browser does
        if not asked and "origin" not in headers:
            return
        own = _name_and_port(asked[0]) if len(asked) == 1 else None
        if own is None or not self.hosts.has(own[0]):
            raise ApiError(
                421,
                f"this server is not known as {', '.join(asked)[:100]!r}; "
                "start it with --allowed-host NAME if it is",
                None,
                "host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is not None:
            self._check_origin(origin, own)
            return
        elsewhere = headers.get("sec-fetch-site") in _ELSEWHERE and ANY not in self.origins
        # whoever follows a link to this server wants to
        if elsewhere and headers.get("sec-fetch-mode") != "navigate":
            raise _other_site("another site")

    def _check_origin(self, origin: str, own: tuple[str, str]) -> None:
        if ANY in self.origins or origin.lower() in self.origins:
            return
        scheme, _, place = origin.partition("://")
        found = _name_and_port(place)
        # Not the scheme itself: what encrypts in front of this server is not seen here.
        default = _PORTS.get(scheme.lower(), "")
        if found and (found[0], found[1] or default) == (own[0], own[1] or default):
            return
        raise _other_site(f"{origin[:100]!r}")


def _other_site(who: str) -> ApiError:
    return ApiError(
        403,
        f"pages of {who} may not use this server; start it with --allow-origin ORIGIN if they may",
        None,
        "origin_not_allowed",
    )


def _name_and_port(place: str) -> tuple[str, str] | None:
    """Return name and port ("": none) of what stands in a Host header; None of what is none."""
    try:
        parts = urlsplit(f"//{place}")
        port = parts.port
    except ValueError:
        return None
    # nothing but name and port: no user, path or query
    if parts.netloc != place or "@" in place or not parts.hostname:
        return None
    return parts.hostname.lower(), "" if port is None else str(port)


def _shared(app: ASGIApp, origins: Collection[str]) -> ASGIApp:
    """Return an application whose answers pages of these origins may read."""
    return CORSMiddleware(
        app,
        allow_origins=[origin.rstrip("/") for origin in origins],
        allow_methods=("GET", "POST"),
        # clients of OpenAI's send headers of their own
        allow_headers=("*",),
        expose_headers=("X-Request-Id",),
        # a page of the open network that was named may ask a server at home
        allow_private_network=True,
    )
