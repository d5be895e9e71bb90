"""From a request that was read to its answer, whole or as a stream."""

import asyncio
from collections.abc import Callable, Iterable

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from ..protocols import Abandoned
from .forms import Form
from .generation import Prompt, Sampling
from .leaving import EventStream, following
from .sampling_body import SamplingBody
from .service import Service, client_of, refusal, told
from .streaming import events


async def answered(
    service: Service,
    request: Request,
    body: SamplingBody,
    form: type[Form],
    prompts: Callable[[], list[Prompt]],
    samplings: Callable[[Prompt], Iterable[Sampling]],
    param: str,
) -> Response:
    """Return the answer to a request: `prompts` encodes what it asks, in a thread, `samplings` says
    how texts go on from one of them, `param` is the field that prompts are made of. Raises
    ApiError."""
    async with following(request) as client:
        # Encoding has a thread too: a megabyte of text would hold up every other request.
        asked = await service.run(prompts, param, client_of(request))
        wanted = [(prompt, list(samplings(prompt))) for prompt in asked]
        generations = service.begin(wanted, request, param)
        client.add(generations)
        made = form(service, body, generations)
        if not body.stream:
            tellings = [await told(generation) for generation in generations]
            # Sixteen texts of 1,024 tokens with twenty probabilities each take 1.8 s to write, in
            # which no other request would be heard; not in the threads where pictures wait for room
            return await asyncio.to_thread(lambda: JSONResponse(made.whole(tellings)))
        # Who left by now would not be heard of again: that message was read here.
        if client.gone.is_set():
            raise refusal(Abandoned("nobody waits for the answer any more"), None)
    return EventStream(events(made), generations)
