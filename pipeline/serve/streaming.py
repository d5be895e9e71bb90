"""Texts told while they are generated, as server-sent events.

Invariant: a stream that was begun ends with [DONE], or with the client; what goes wrong on the way
is an event of its own, in the form that errors have.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from ..errors import DataError
from ..protocols import Abandoned
from .forms import Form
from .generation import Generation, Overloaded, Piece
from .refusals import FAILED, error_body
from .service import refusal
from .told import Telling

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
# That JSON lets stand in a text, and clients that read line by line as httpx does take for its end
LINE_ENDS = {ord(each): f"\\u{ord(each):04x}" for each in "\x85\u2028\u2029"}


def event(content: Any) -> bytes:
    """Return an object as an event."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text.translate(LINE_ENDS)}\n\n".encode()


async def events(form: Form) -> AsyncGenerator[bytes, None]:
    """Yield what is told of some texts, as they come."""
    tellings = [Telling() for _ in form.generations]
    try:
        for content in form.first():
            yield event(content)
        async with aclosing(merged(form.generations)) as pieces:
            async for number, piece in pieces:
                tellings[number].add(piece)
                told = form.event(number, tellings[number], piece)
                if told is not None:
                    yield event(told)
        for content in form.last():
            yield event(content)
    except Abandoned:
        # nobody reads it
        return
    except (DataError, Overloaded, TimeoutError) as error:
        known = refusal(error, None)
        yield event(error_body(known.status, known.message, known.param, known.code))
    except Exception:
        # The status has gone out, so no handler can tell it any more.
        log.exception("a text failed while it was told")
        yield event(error_body(500, FAILED))
    yield DONE


async def merged(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, Piece], None]:
    """Yield the pieces of several texts as they come, each with its text's number. Raises what the
    first of them raises that fails."""
    news: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue()

    async def read(number: int, generation: Generation) -> None:
        try:
            async with aclosing(generation.pieces()) as pieces:
                async for piece in pieces:
                    news.put_nowait((number, piece))
        except Exception as error:
            news.put_nowait((number, error))
        else:
            news.put_nowait((number, None))

    readers = []
    for number, generation in enumerate(generations):
        readers.append(asyncio.create_task(read(number, generation)))
    left = len(readers)
    try:
        while left:
            number, found = await news.get()
            if isinstance(found, Exception):
                try:
                    raise found
                finally:
                    # else the error knows this frame, which knows the error and every text
                    del found
            if found is None:
                left -= 1
            else:
                yield number, found
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
