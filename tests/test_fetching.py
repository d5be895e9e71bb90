"""Pictures fetched by their address: only from hosts that were allowed, never from what the open
network does not reach, whichever way an address is dressed up."""

import http.server
import ipaddress
import socket
import threading
import time
from typing import ClassVar

import pytest

from pipeline.errors import DataError
from pipeline.serve import fetching
from pipeline.serve.fetching import Fetcher, is_public

PNG = b"\x89PNG" + b"x" * 200_000


class Site(http.server.BaseHTTPRequestHandler):
    """Hands out a picture, leads on, dawdles, and never ends."""

    asked: ClassVar[list] = []

    def do_GET(self):
        self.asked.append((self.path, dict(self.headers)))
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:].replace("~", "://"))
            self.end_headers()
            return
        self.send_response(404 if self.path == "/none" else 200)
        self.end_headers()
        try:
            if self.path == "/endless":
                while True:
                    self.wfile.write(b"x" * 65_536)
            elif self.path == "/slow":
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            self.wfile.write(PNG)
        except OSError:
            pass

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site():
    """The port of a site on this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.fixture
def network(site, monkeypatch):
    """A network where names lead to public addresses, at which our site answers; yields what was
    resolved and what was connected to."""
    seen = {"resolved": [], "connected": []}
    addresses = {"pictures.example": ["93.184.216.34"], "other.example": ["93.184.216.35"]}
    addresses |= {"inside.example": ["10.0.0.7"], "both.example": ["93.184.216.34", "127.0.0.1"]}

    def resolve(host, port, **_):
        seen["resolved"].append(host)
        found = addresses.get(host, [host])
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in found]

    def connected(address, **options):
        seen["connected"].append(address)
        sock = socket.socket()
        sock.settimeout(options["timeout"])
        sock.connect(("127.0.0.1", site))
        return sock

    monkeypatch.setattr(fetching.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(fetching.socket, "create_connection", connected)
    Site.asked.clear()
    return seen


def fetched(url, *hosts, seconds=5):
    return Fetcher(hosts).fetch(url, time.monotonic() + seconds)


def test_a_picture_of_an_allowed_host_is_fetched_from_the_address_that_was_checked(network):
    assert fetched("http://Pictures.example/a?b=c", "pictures.example") == PNG
    assert network == {"resolved": ["pictures.example"], "connected": [("93.184.216.34", 80)]}
    ((path, headers),) = Site.asked
    assert path == "/a?b=c" and headers["Host"] == "pictures.example"
    assert headers["Accept-Encoding"] == "identity"
    assert fetched("http://pictures.example/to/http~other.example/x", "*") == PNG


REFUSED = {
    "nothing allowed": ("http://pictures.example/", (), "fetches nothing"),
    "another host": ("http://other.example/", ("pictures.example",), "host are not fetched"),
    "a host below": ("http://a.pictures.example/", ("pictures.example",), "host are not fetched"),
    "a file": ("file:///etc/passwd", ("*",), "no https or http"),
    "ftp": ("ftp://pictures.example/", ("*",), "no https or http"),
    "no host": ("http:///x", ("*",), "no https or http"),
    "a user": ("http://pictures.example@inside.example/", ("*",), "no https or http"),
    "another port": ("http://pictures.example:8080/", ("*",), "usual port"),
    "no port": ("http://pictures.example:x/", ("*",), "no address"),
    "inside": ("http://inside.example/", ("*",), "open network"),
    "inside, by name allowed": ("http://inside.example/", ("inside.example",), "open network"),
    "one of two inside": ("http://both.example/", ("*",), "open network"),
    "this machine": ("http://127.0.0.1/", ("*",), "open network"),
    "the cloud's own": ("http://169.254.169.254/latest/meta-data", ("*",), "open network"),
    "leads inside": ("http://pictures.example/to/http~inside.example/", ("*",), "open network"),
    "leads elsewhere": (
        "http://pictures.example/to/http~other.example/",
        ("pictures.example",),
        "host are not fetched",
    ),
    "leads to no address": ("http://pictures.example/to/http~[x", ("*",), "what is no address"),
    "leads to a file": ("http://pictures.example/to/file~/etc/passwd", ("*",), "no https"),
    "leads in a circle": ("http://pictures.example/to//to/" + "/to/" * 8, ("*",), "leads on"),
    "not there": ("http://pictures.example/none", ("*",), "status 404"),
}


@pytest.mark.parametrize(("url", "hosts", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_fetched(network, url, hosts, said):
    with pytest.raises(DataError, match=said):
        fetched(url, *hosts)
    assert all(ipaddress.ip_address(host).is_global for host, _ in network["connected"])


def test_a_name_that_leads_elsewhere_the_second_time_is_not_asked_again(network, monkeypatch):
    """What is connected to is what was checked: a name is resolved once."""
    answers = iter((["93.184.216.34"], ["127.0.0.1"]))

    def rebinds(host, port, **_):
        return [(0, 0, 0, "", (each, port)) for each in next(answers)]

    monkeypatch.setattr(fetching.socket, "getaddrinfo", rebinds)
    assert fetched("http://pictures.example/", "*") == PNG
    with pytest.raises(DataError, match="open network"):
        fetched("http://pictures.example/", "*")


def test_so_many_bytes_and_so_many_seconds(network, monkeypatch):
    monkeypatch.setattr(fetching, "MOST_BYTES", 1 << 20)
    with pytest.raises(DataError, match="over 1,048,576 bytes"):
        fetched("http://pictures.example/endless", "*")
    began = time.monotonic()
    with pytest.raises(DataError, match="cannot be reached"):
        fetched("http://pictures.example/slow", "*", seconds=0.4)
    assert time.monotonic() - began < 4


@pytest.mark.parametrize(
    ("address", "wanted"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("0.0.0.0", False),  # noqa: S104
        ("10.1.2.3", False),
        ("100.64.0.1", False),
        ("127.0.0.1", False),
        ("169.254.169.254", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("192.0.0.1", False),
        ("198.18.0.1", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1", False),
        ("fc00::1", False),
        ("fd00:ec2::254", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::a00:7", False),
        ("2002:a00:7::", False),
        ("2001:db8::1", False),
    ],
)
def test_what_is_of_the_open_network(address, wanted):
    assert is_public(ipaddress.ip_address(address)) is wanted
