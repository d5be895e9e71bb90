"""An S3 server of our own on this machine, which notes what it is asked and fails when told to."""

import contextlib
import threading
from dataclasses import dataclass

import httpx
from fsspec.config import conf

SLOW_DOWN = b"<Error><Code>InternalError</Code><Message>not now</Message></Error>"
ENDED = b"<Error><Code>NoSuchUpload</Code><Message>it has been ended</Message></Error>"


@dataclass(frozen=True)
class Asked:
    """A request."""

    method: str
    path: str
    query: str
    bytes: int

    @property
    def is_part(self) -> bool:
        """Whether a part of a file was sent."""
        return self.method == "PUT" and "partNumber=" in self.query


class Watched:
    """moto's application; `fails(asked)` says "before" or "after" it was done, or nothing."""

    def __init__(self, app):
        self._app, self._lock, self._busy = app, threading.Lock(), 0
        self.asked, self.most, self.fails = [], 0, lambda _asked: ""

    def __call__(self, environ, start_response):
        """Answer a request."""
        length = int(environ.get("CONTENT_LENGTH") or 0)
        asked = Asked(
            environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("QUERY_STRING", ""), length
        )
        with self._lock:
            self._busy += 1
            self.most = max(self.most, self._busy)
            self.asked.append(asked)
        try:
            when = self.fails(asked)
            if when == "before":
                environ["wsgi.input"].read(length)
                return _failed(start_response)
            answer = list(self._app(environ, start_response if not when else _nowhere))
            return _failed(start_response) if when else answer
        except KeyError:
            # Of an upload that somebody else has ended S3 says so, where moto has no word for it
            if "uploadId=" not in asked.query:
                raise
            start_response("404 Not Found", [("Content-Type", "application/xml")])
            return [ENDED]
        finally:
            with self._lock:
                self._busy -= 1

    def parts(self) -> list[Asked]:
        """Return the parts that were sent, and forget all that was asked."""
        found = [asked for asked in self.asked if asked.is_part]
        self.asked.clear()
        return found


def _nowhere(_status, _headers, _error=None):
    return lambda _data: None


def _failed(start_response):
    start_response("500 Internal Server Error", [("Content-Type", "application/xml")])
    return [SLOW_DOWN]


@contextlib.contextmanager
def s3_server():
    """Yield the server, its address, and a client of it; it has one bucket, shelf."""
    import boto3
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    watched = Watched(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, watched, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=url, **keys)
    client.create_bucket(Bucket="shelf")
    watched.asked.clear()
    # As people name a server of their own to fsspec
    before = conf.get("s3")
    conf["s3"] = {"key": "a", "secret": "b", "endpoint_url": url}
    try:
        yield watched, url, client
    finally:
        # What is kept is the process's and not the server's: the next one would begin with it
        httpx.post(f"{url}/moto-api/reset").raise_for_status()
        server.shutdown()
        thread.join()
        conf.pop("s3") if before is None else conf.update(s3=before)
