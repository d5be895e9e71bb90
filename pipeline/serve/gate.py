"""Whether requests are let through: not while the bundle is opened, nor once the server is told to
stop. Who is inside can be waited for, and sent away."""

import asyncio
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Literal

from starlette.types import ASGIApp, Receive, Scope, Send

from .refusals import ApiError, refuse

Problem = Literal["loading", "full", "stopping"]
_TOLD: dict[str, tuple[str, str]] = {
    "loading": ("the model is still being opened; try again in a moment", "5"),
    "stopping": (
        "this server is shutting down; ask another, or this one once it is back",
        "5",
    ),
}


# From when texts are ended to when whoever is still inside is: to send what tells of it.
TOLD_S = 0.5


class Gate:
    """What an application is ready for; shared by its layers, its probes and who stops it."""

    def __init__(self) -> None:
        self.opened = False
        self.stopping = False
        # asked by /readyz alone: a full queue is told by the engine, which knows whose turn it is
        self.is_full: Callable[[], bool] = lambda: False
        self.end_texts: Callable[[], None] = lambda: None  # has them end, and waits for nothing
        self._inside: set[asyncio.Task | None] = set()

    @property
    def problem(self) -> Problem | None:
        """What keeps a server from taking another request; None: nothing does."""
        if self.stopping:
            return "stopping"
        if not self.opened:
            return "loading"
        return "full" if self.is_full() else None

    @property
    def inside(self) -> int:
        """How many requests are being answered."""
        return len(self._inside)

    @contextmanager
    def passed(self) -> Iterator[None]:
        """Be inside, with the task that this is called in."""
        task = asyncio.current_task()
        self._inside.add(task)
        try:
            yield
        finally:
            self._inside.discard(task)

    def cut(self) -> None:
        """Have every request that is inside end: texts with an event that tells it, and what is
        left a moment later as it is."""
        self.end_texts()
        asyncio.get_running_loop().call_later(TOLD_S, self._cancel)

    def _cancel(self) -> None:
        for task in self._inside:
            if task:
                task.cancel()


class GateKeeper:
    """Refuses requests with 503 while the gate is closed, but for a few addresses."""

    def __init__(self, app: ASGIApp, gate: Gate, always: Collection[str]):
        self.app = app
        self.gate = gate
        self.always = frozenset(always)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it before its body is read."""
        if scope["type"] != "http" or scope["path"] in self.always:
            await self.app(scope, receive, send)
            return
        problem = self.gate.problem
        if problem in _TOLD:
            text, seconds = _TOLD[problem]
            error = ApiError(503, text, None, problem, **{"Retry-After": seconds})
            await refuse(error, scope, receive, send)
            return
        with self.gate.passed():
            await self.app(scope, receive, send)
