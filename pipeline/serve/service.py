"""What the endpoints of one bundle do alike: who is asked, what is begun, which error is whose
fault.

Invariant: a text that was begun is told to its end, or given up.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from ..errors import DataError, TooLong
from ..protocols import Abandoned
from .generation import (
    BASE_READER,
    DENSE_READER,
    Generating,
    Generation,
    NoSuchReader,
    Overloaded,
    Prompt,
    Sampling,
)
from .limits import RequestLimits
from .prompts import NoChat, Prompts
from .refusals import ApiError
from .template_variables import Scalar, unread
from .told import Telling
from .waiting_line import has_room, most_of_one

# Of the forty threads in which requests are prepared, that one client has at once: pictures wait in
# theirs for memory, and others' texts would wait behind them
MOST_THREADS = 8
# By which clients know that a shorter request would be taken
TOO_LONG = "context_length_exceeded"
EXPERT = "expert:"  # before an expert's name, where a request names who reads

T = TypeVar("T")


class Service:
    """A bundle that is asked over HTTP."""

    def __init__(
        self,
        engine: Generating,
        prompts: Prompts,
        limits: RequestLimits,
        bundle: Mapping[str, str] | None = None,
    ):
        self.engine = engine
        self.prompts = prompts
        self.limits = limits
        self.bundle = bundle  # which one it is, where it is one
        self.prepared = 0  # requests that have a thread or wait for one
        # of each client who has any: its requests, and its turns for a thread
        self._preparing: Counter[str] = Counter()
        self._turns: dict[str, asyncio.Semaphore] = {}

    @property
    def is_full(self) -> bool:
        """Whether another request would be sent away."""
        return max(self.engine.stats.waiting, self.prepared) >= self.limits.waiting

    @property
    def context_tokens(self) -> int:
        """The longest text, in tokens, prompt and answer together."""
        return min(
            self.engine.context_tokens, self.limits.context_tokens or self.engine.context_tokens
        )

    @property
    def models(self) -> tuple[str, ...]:
        """Whom a request can name: the stack first."""
        names = []
        for reader in self.engine.readers:
            is_expert = reader != BASE_READER and not self.is_dense(reader)
            names.append(f"{EXPERT}{reader}" if is_expert else reader)
        return (self.engine.name, *names)

    def is_dense(self, reader: str | None) -> bool:
        """Whether a reader is the dense model, and no expert of that name, which a bundle without
        such a model may have."""
        return reader == DENSE_READER and reader not in self.engine.experts

    def reader(self, model: str | None) -> str | None:
        """Return who reads a request that names a model; None: whom the router chooses. Raises
        ApiError for a name that is not served."""
        # A run may be called base; its own name means the stack.
        if model in (None, self.engine.name):
            return None
        if model not in self.models:
            known = ", ".join(self.models)
            raise ApiError(
                404,
                f"the model {model!r} is not served here; there are {known}",
                "model",
                "model_not_found",
            )
        return model.removeprefix(EXPERT)

    async def run(self, work: Callable[[], T], param: str, client: str) -> T:
        """Run work on a client's request in a thread; `param` is the field that it reads. Raises
        ApiError, also while too many requests wait for one already."""
        # Counted without a lock: only the event loop's own thread comes here.
        own = self._preparing[client]
        if not has_room(own, self.prepared, self.limits.waiting):
            full = self.prepared >= self.limits.waiting
            raise refusal(Overloaded(self.prepared if full else own, one_client=not full), param)
        self.prepared += 1
        try:
            async with self._turn(client):
                return await run_in_threadpool(work)
        except (DataError, TimeoutError, Abandoned) as error:
            raise refusal(error, param) from None
        finally:
            self.prepared -= 1

    @asynccontextmanager
    async def _turn(self, client: str) -> AsyncIterator[None]:
        """Wait until a client has fewer threads than one may have."""
        self._preparing[client] += 1
        turns = self._turns.setdefault(client, asyncio.Semaphore(MOST_THREADS))
        try:
            async with turns:
                yield
        finally:
            self._preparing[client] -= 1
            if not self._preparing[client]:
                del self._preparing[client], self._turns[client]

    def begin(
        self, asked: Sequence[tuple[Prompt, Sequence[Sampling]]], request: Request, param: str
    ) -> list[Generation]:
        """Return texts that are generated from now on, some for each prompt. Raises ApiError, and
        then none of them is."""
        texts = sum(len(samplings) for _, samplings in asked)
        most = most_of_one(self.limits.waiting + self.engine.stats.rows)
        # to wait for more would be in vain
        if texts > most:
            raise ApiError(
                400, f"n: {texts} texts are asked for, and there is room for {most}", "n"
            )
        client = client_of(request)
        begun: list[Generation] = []
        try:
            for prompt, samplings in asked:
                for sampling in samplings:
                    begun.append(self.engine.submit(prompt, sampling, client))
        except (DataError, Overloaded) as error:
            for generation in begun:
                generation.cancel()
            raise refusal(error, param) from None
        return begun

    def most(self, prompt: Prompt, param: str, asked: int | None) -> int | None:
        """Return how many tokens may follow a prompt where so many are asked for; None: as many as
        its reader was taught. Raises ApiError where there is no room for any."""
        left = self.context_tokens - len(prompt.ids)
        if left < 1:
            raise self.too_long(prompt, param, 0)
        if asked is None and self.prompts.ends_are_taught:
            return None
        room = min(left, self.limits.new_tokens)
        return room if asked is None else min(asked, room)

    def check_bias(self, bias: Mapping[str, float] | None) -> None:
        """Raise ApiError for a bias of a token that there is not."""
        strange = [token for token in bias or () if int(token) >= self.prompts.vocab_size]
        if strange:
            raise ApiError(
                400,
                f"logit_bias: there is no token {strange[0]}; this model has "
                f"{self.prompts.vocab_size} of them",
                "logit_bias",
            )

    def check_variables(self, given: Mapping[str, Scalar]) -> None:
        """Raise ApiError for variables that the chat template does not read."""
        known = self.prompts.template_variables
        told = "" if known is None else unread(given, known)
        if told:
            raise ApiError(400, f"chat_template_kwargs: {told}", "chat_template_kwargs")

    def too_long(self, prompt: Prompt, param: str, wanted: int) -> ApiError:
        """Return the error for a prompt that is over the context, with tokens that are wanted."""
        drawn = f" and {wanted} are to be drawn" if wanted else ""
        advice = " or lower max_tokens" if wanted else ""
        return ApiError(
            400,
            # "This model's maximum context length is" are OpenAI's words, which clients look for
            f"{param}: {len(prompt.ids)} tokens{drawn}, but this model's maximum context length is "
            f"{self.context_tokens} tokens; shorten {param}{advice}",
            param,
            TOO_LONG,
        )


def client_of(request: Request) -> str:
    """Return who asks, for a fair order."""
    known = request.scope.get("state", {}).get("client")
    if known is not None:
        return str(known)
    return request.client.host if request.client else ""


def refusal(error: Exception, param: str | None) -> ApiError:
    """Return what a client gets for an error of the engine's, or for a content that cannot be
    read."""
    if isinstance(error, Abandoned):
        # heard by nobody; the status is nginx's for it, in this server's log
        return ApiError(499, "the client left before its answer was there")
    if isinstance(error, (Overloaded, TimeoutError)):
        closing = isinstance(error, Overloaded) and error.closing
        reason = "stopping" if closing else "overloaded"
        return ApiError(503, str(error), None, reason, **{"Retry-After": "1"})
    if isinstance(error, NoSuchReader):
        return ApiError(404, f"model: {error}", "model", "model_not_found")
    code = None
    if isinstance(error, NoChat):
        code = "no_chat_template"
    elif isinstance(error, TooLong):
        code = TOO_LONG
    return ApiError(400, f"{param}: {error}", param, code)


async def told(generation: Generation) -> Telling:
    """Return a text once it has ended. Raises ApiError."""
    telling = Telling()
    try:
        async for piece in generation.pieces():
            telling.add(piece)
    except (Overloaded, TimeoutError, Abandoned) as error:
        raise refusal(error, None) from None
    return telling
