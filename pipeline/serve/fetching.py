"""Pictures that are fetched from the network, where whoever runs the server allows it, and from
nowhere else.

A client names the address, so the server could be made to ask what only it can reach: a router, a
database, the cloud's own service that hands out credentials. Hence: hosts that were allowed by
name, addresses of the open network alone, each checked as it was resolved and then connected to as
checked, also behind a redirect; so many bytes, so many seconds, as they are and not unpacked.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import SplitResult, urljoin, urlsplit

from ..errors import DataError
from ..protocols import check_wanted

ANY = "*"
MOST_BYTES = 32 << 20
# Of one picture, redirects and all.
MOST_S = 20.0
MOST_REDIRECTS = 3
_BLOCK_BYTES = 64 << 10
_PORTS = {"https": 443, "http": 80}
_REDIRECTS = (301, 302, 303, 307, 308)
# Addresses that a gateway turns into others, which are not seen here.
_TRANSLATED = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Fetcher:
    """Fetches files from some hosts; without any, it refuses every address."""

    def __init__(self, hosts: Collection[str] = ()):
        self.hosts = frozenset(host.lower() for host in hosts)

    def fetch(self, url: str, until: float) -> bytes:
        """Return what lies at an address, by a time on the monotonic clock.

        Raises DataError for one that is not allowed or cannot be had, Abandoned.
        """
        until = min(until, time.monotonic() + MOST_S)
        for _ in range(MOST_REDIRECTS + 1):
            parts = self._checked(url)
            try:
                found, place = _answer(parts, until)
            # what ssl and http raise as well
            except (OSError, http.client.HTTPException, UnicodeError):
                raise _refused(url, "it cannot be reached") from None
            if place is None:
                return found
            try:
                url = urljoin(url, place)
            except ValueError:
                raise _refused(url, "it leads on to what is no address") from None
        raise _refused(url, f"it leads on more than {MOST_REDIRECTS} times")

    def _checked(self, url: str) -> SplitResult:
        """Return an address's parts. Raises DataError for one that may not be asked."""
        if not self.hosts:
            raise DataError(
                "image_url must be a data: URI (data:image/png;base64,...), "
                f"not {url[:40]!r}: this server fetches nothing"
            )
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise _refused(url, "it is no address") from None
        host = (parts.hostname or "").lower()
        if parts.scheme not in _PORTS or not host or parts.username is not None:
            raise _refused(url, "it is no https or http address of a host")
        if ANY not in self.hosts and host not in self.hosts:
            raise _refused(url, "pictures of this host are not fetched here")
        # Another port is another service, though of the same host.
        if port not in (None, _PORTS[parts.scheme]):
            raise _refused(url, "only the usual port is asked")
        return parts


def _answer(parts: SplitResult, until: float) -> tuple[bytes, str | None]:
    """Return what an address answers, or where it leads on to. Raises DataError, OSError."""
    host = parts.hostname or ""
    port = _PORTS[parts.scheme]
    address = _public_address(host, port)
    secure = ssl.create_default_context() if parts.scheme == "https" else None
    path = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
    with _connected(address, port, until) as plain, _ended_by(plain, until):
        sock = secure.wrap_socket(plain, server_hostname=host) if secure else plain
        # a connection of our own making: http.client would resolve the name once more
        connection = http.client.HTTPConnection(host, port)
        connection.sock = sock
        connection.request(
            "GET",
            path,
            # as it is: what is small and unpacks to gigabytes is not asked for
            headers={"Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close"},
        )
        response = connection.getresponse()
        if response.status in _REDIRECTS:
            return b"", response.getheader("Location") or ""
        if response.status != 200:
            raise _refused(parts.geturl(), f"it answers with status {response.status}")
        return _read(response, parts.geturl()), None


def _public_address(host: str, port: int) -> str:
    """Return an address of a host, once all that it has are of the open network. Raises DataError,
    OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    for each in addresses:
        # a scope, as in fe80::1%eth0, is of a link of this machine's
        if "%" in each or not is_public(ipaddress.ip_address(each)):
            raise DataError(f"{host} is no host of the open network, and others are not asked")
    return addresses[0]


def is_public(address: Address) -> bool:
    """Whether an address is of the open network, and not another one in its clothes."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address.sixtofour is not None or address.teredo is not None:
            return False
        if any(address in network for network in _TRANSLATED):
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _connected(address: str, port: int, until: float) -> socket.socket:
    """Return a socket that is connected to an address, and waits no longer than until then."""
    sock = socket.create_connection((address, port), timeout=_left(until))
    sock.settimeout(_left(until))
    return sock


@contextmanager
def _ended_by(sock: socket.socket, until: float) -> Iterator[None]:
    """Have a connection end at a time, whatever is being waited for: to a socket's own timeout, a
    byte now and then is in time for ever."""

    def end() -> None:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(_left(until), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    # what it cut off looks like an end
    _left(until)


def _read(response: http.client.HTTPResponse, url: str) -> bytes:
    """Return a body, while it is short enough."""
    body = bytearray()
    while True:
        check_wanted()
        block = response.read1(_BLOCK_BYTES)
        if not block:
            return bytes(body)
        body += block
        if len(body) > MOST_BYTES:
            raise _refused(url, f"it has over {MOST_BYTES:,} bytes")


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError("too slow")
    return left


def _refused(url: str, why: str) -> DataError:
    # what stands behind a question mark may be a key
    shown = url.partition("?")[0][:80]
    return DataError(f"the picture at {shown!r} is not fetched: {why}")
