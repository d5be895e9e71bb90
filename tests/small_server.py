"""The server around a service without a model, on a real socket: what is of HTTP alone can be
tried in a moment."""

import asyncio
import socket
import threading
import time
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import httpx
from fastapi import Request
from starlette.responses import StreamingResponse

from pipeline.serve.app import Access, closed
from pipeline.serve.connections import ServerConfig
from pipeline.serve.keys import Keys
from pipeline.serve.limits import ConnectionLimits, RequestLimits
from pipeline.serve.listening import Server

PATIENCE_S = 120  # longer than anything here takes; then a test fails instead of hanging


def application(limits=None, connections=None, opened=True, **access):
    """Return an application with three addresses: one that gives back what it gets, one that waits
    until `app.state.release` is set, one that streams as long as anybody reads."""
    access.setdefault("keys", Keys())
    app = closed(Access(**access), connections or ConnectionLimits())
    app.state.release = asyncio.Event()
    app.state.left = []
    app.state.waiting = 0
    app.state.service = SimpleNamespace(limits=limits or RequestLimits(body_bytes=1000))
    app.state.gate.opened = opened

    @app.post("/v1/echo")
    async def echo(request: Request) -> dict:
        return {"length": len(await request.body()), "client": request.state.client}

    @app.post("/v1/wait")
    async def wait(request: Request) -> dict:
        await request.body()
        app.state.waiting += 1
        await app.state.release.wait()
        return {"waited": True}

    @app.post("/v1/fail")
    async def fail(request: Request) -> dict:
        raise RuntimeError(f"over {(await request.body()).decode()}")

    @app.post("/v1/stream")
    async def stream(request: Request) -> StreamingResponse:
        await request.body()

        async def blocks():
            try:
                while not app.state.release.is_set():
                    yield b"x" * 60_000
                    await asyncio.sleep(0.001)
            finally:
                app.state.left.append("stream")

        return StreamingResponse(blocks())

    return app


@contextmanager
def served(app, drain_seconds=5.0):
    """Run the server in a thread; yields a client of it, whose `server` it is."""
    config = ServerConfig(app, app.state.connections, timeout_graceful_shutdown=1)
    server = Server(config, app.state.gate, drain_seconds)
    listening = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        with httpx.Client(base_url=address, timeout=PATIENCE_S) as client:
            client.server = server
            client.thread = thread
            yield client
    finally:
        app.state.release.set()
        server.should_exit = True
        thread.join(PATIENCE_S)


def until(true) -> None:
    """Wait until something is so."""
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def raw(client, *blocks, pause_s=0.0, whole=True):
    """Send bytes as they are, and return what comes back until the server closes."""
    with connection(client) as sock:
        # who is refused meanwhile need not be read to the end
        with suppress(BrokenPipeError, ConnectionResetError):
            for block in blocks:
                sock.sendall(block)
                time.sleep(pause_s)
        return rest(sock) if whole else sock.recv(1 << 16)


def connection(client):
    """Return a socket that is connected to a client's server."""
    place = (client.base_url.host, client.base_url.port)
    return socket.create_connection(place, timeout=PATIENCE_S)


def rest(sock):
    """Return all that comes until the other side closes."""
    blocks = []
    while block := sock.recv(1 << 16):
        blocks.append(block)
    return b"".join(blocks)
