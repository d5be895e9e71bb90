"""How an application listens: at once, while its bundle is still opened, and until it is told to
stop.

Invariant: whatever the bundle turns out to be, the address was there first, and says so.

Told to stop by either signal, it takes nothing new, goes on with what is inside for so many
seconds, and ends: by itself after SIGTERM, with KeyboardInterrupt after Ctrl-C. A second Ctrl-C
waits for nothing.
"""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from ..errors import PipelineError
from ..interrupts import STOPPED
from .connections import ServerConfig
from .gate import Gate
from .logs import event

# Longer than most answers take, shorter than what Kubernetes waits before it kills.
DRAIN_S = 25.0
BACKLOG = 2048  # connections that wait to be taken, as uvicorn has it
# From when requests are ended to when the process ends without them.
CUT_S = 2.0
log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn's server, which drains before it stops."""

    def __init__(
        self,
        config: ServerConfig,
        gate: Gate,
        drain_seconds: float,
        hang_up: Callable[[], None] | None = None,
    ):
        super().__init__(config)
        self.gate = gate
        self.drain_seconds = drain_seconds
        self.hang_up = hang_up  # called at SIGHUP; None: it ends the process, as ever
        self.interrupted = False  # by Ctrl-C
        self._hung_up = False
        self._drained_at: float | None = None
        self._cut = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while the server runs; uvicorn's own way raises them again afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers: dict[int, Any] = {signal.SIGINT: self._stop, signal.SIGTERM: self._stop}
        if self.hang_up and hasattr(signal, "SIGHUP"):
            handlers[signal.SIGHUP] = self._note_hang_up
        before = {}
        for number, handler in handlers.items():
            before[number] = signal.signal(number, handler)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        """Begin to stop. Only notes it: a handler runs in the middle of anything."""
        if number == signal.SIGINT:
            self.force_exit = self.gate.stopping
            self.interrupted = True
        self.gate.stopping = True
        self.should_exit = self.should_exit or self.force_exit

    def _note_hang_up(self, _number: int, _frame: FrameType | None) -> None:
        self._hung_up = True

    async def on_tick(self, counter: int) -> bool:
        """Say, ten times a second, whether to end: once what was inside is done, or cut."""
        if self._hung_up and self.hang_up:
            self._hung_up = False
            self.hang_up()
        if self.gate.stopping and not self.should_exit:
            self._drain()
        return await super().on_tick(counter)

    def _drain(self) -> None:
        now = time.monotonic()
        if self._drained_at is None:
            self._drained_at = now + self.drain_seconds
            event(log, "stopping", requests=self.gate.inside, seconds=self.drain_seconds)
        if not self.gate.inside or now > self._drained_at + CUT_S:
            self.should_exit = True
        elif now > self._drained_at and not self._cut:
            self._cut = True
            event(log, "ending what is not done", requests=self.gate.inside)
            self.gate.cut()


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 takes a free one. Raises PipelineError when the address
    cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Bound here and not by uvicorn: it would end the process over an address in use, and with
    # port 0 the address would be known to its log alone.
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        # Before the address is told: whoever reads it may ask at once.
        listening.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listening.close()
        raise PipelineError(
            f"cannot listen on {host} port {port}: {error}; "
            "choose another with --host or --port (0: any free port)"
        ) from None
    return listening


def address_of(listening: socket.socket, host: str) -> str:
    """Return the URL under which a listening socket is reached."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listening.getsockname()[1]}"


class Loading:
    """A bundle that is opened in a thread, while the server answers that it is not ready."""

    def __init__(self, load: Callable[[], None], server: Server):
        self.error: BaseException | None = None
        self._load = load
        self._server = server
        # as a daemon: a server that is told to stop does not wait for gigabytes
        self._thread = threading.Thread(target=self._run, name="loading", daemon=True)
        self._thread.start()

    @property
    def goes_on(self) -> bool:
        """Whether it has not ended."""
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._load()
        except BaseException as error:
            # raised again where the server was started
            self.error = error
            self._server.should_exit = True


def listen(
    app: FastAPI,
    host: str,
    port: int,
    announce: Callable[[str], None],
    load: Callable[[], None] | None = None,
    drain_seconds: float = DRAIN_S,
    hang_up: Callable[[], None] | None = None,
) -> None:
    """Serve until told to stop; port 0 takes a free one. `load` opens the bundle meanwhile, and
    `hang_up` is called at SIGHUP.

    Raises PipelineError when the address cannot be had, what `load` raises, and KeyboardInterrupt
    after Ctrl-C.
    """
    config = ServerConfig(app, app.state.connections, timeout_graceful_shutdown=1)
    server = Server(config, app.state.gate, drain_seconds, hang_up)
    loading = None
    with bound(host, port) as listening:
        address = address_of(listening, host)

        def opened() -> None:
            if load:
                load()
            engine = app.state.service.engine
            announce(
                f"serving {engine.name} at {address}; up to {engine.stats.prefill_tokens:,} tokens "
                "of prompts are read between two of an answer; Ctrl-C stops"
            )

        if load:
            announce(f"listening at {address}; /readyz tells when the model is open")
            loading = Loading(opened, server)
        else:
            opened()
        server.run(sockets=[listening])
    if app.state.close:
        # what was asked has been waited for, or cut
        app.state.close(0.0)
    if loading and loading.error is not None:
        raise loading.error
    if loading and loading.goes_on:
        _leave(server.interrupted)
    if server.interrupted:
        raise KeyboardInterrupt


def _leave(interrupted: bool) -> None:
    """End the process in the middle of opening a bundle, which nothing can be told to stop."""
    logging.shutdown()
    if interrupted:
        os.write(2, b"stopped\n")
    os._exit(STOPPED if interrupted else 0)
