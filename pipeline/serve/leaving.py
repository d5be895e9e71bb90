"""Clients that leave: what is done for one ends once it is gone.

Invariant: a text whose client has left is given up at once, whether it waits, is read or is being
told; no text is given up for a client that is there.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress

from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..protocols import while_wanted
from .generation import Generation


class Followed:
    """A client's presence while its answer is made."""

    def __init__(self) -> None:
        self.gone = threading.Event()
        self._generations: list[Generation] = []

    def add(self, generations: Iterable[Generation]) -> None:
        """Have texts given up once the client is gone, which it may be by now."""
        self._generations += generations
        if self.gone.is_set():
            self.give_up()

    def left(self) -> None:
        """Say that the client is gone."""
        self.gone.set()
        self.give_up()

    def give_up(self) -> None:
        """Give up what has not ended."""
        give_up(self._generations)


def give_up(generations: Iterable[Generation]) -> None:
    """Cancel those of some texts that have not ended."""
    for generation in generations:
        if not generation.finished:
            generation.cancel()


@asynccontextmanager
async def following(request: Request) -> AsyncIterator[Followed]:
    """Have the work inside, threads included, end with Abandoned once the client is gone. The body
    must have been read: both would read the same messages."""
    followed = Followed()

    async def watch() -> None:
        await _gone(request.receive)
        followed.left()

    while_wanted(followed.gone.is_set)
    watcher = asyncio.create_task(watch())
    try:
        yield followed
    except BaseException:
        followed.give_up()
        raise
    finally:
        # a thread outlives its request where the server is told to stop
        followed.gone.set()
        watcher.cancel()


class EventStream(StreamingResponse):
    """Server-sent events of texts that are being generated, which end with the client."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], generations: Sequence[Generation]):
        # Proxies that gather what passes would hold a token back until there are many.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers)
        self._events = events
        self._generations = generations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until there are no more, or nobody to send them to.

        Not as the library does it: under newer servers it learns of a client that left only when it
        sends, and a text that waits for its turn sends nothing.
        """
        telling = asyncio.ensure_future(self.stream_response(send))
        leaving = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({telling, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if telling.done():
                # Where the socket is closed under it, that is a client that left too.
                with suppress(OSError):
                    telling.result()
        finally:
            give_up(self._generations)
            for task in (telling, leaving):
                task.cancel()
            await asyncio.gather(telling, leaving, return_exceptions=True)
            # what it raised knows this frame, which would know it in turn, and every text
            del telling, task
            await self._events.aclose()


async def _gone(receive: Callable) -> None:
    """Return once a client has left."""
    while (await receive())["type"] != "http.disconnect":
        continue
