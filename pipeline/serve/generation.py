"""What an engine is asked and what it gives back: the seam between the model and HTTP.

A text that is being generated is a handle that one thread, the engine's, adds pieces to and any
other reads them from. Nothing here knows a model, a tokenizer or a request's form.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from ..errors import DataError
from ..protocols import POLL_S, Abandoned, is_unwanted

BASE_READER = "base"  # who reads a text that no expert does
DENSE_READER = "dense"  # a model beside the stack, which has no experts

T = TypeVar("T")

Finish = Literal["stop", "length"]
# An opened picture, say. Only the family that takes it looks into it.
Medium = Any


class Overloaded(Exception):
    """There is no room for a request, neither to run nor to wait; in a moment there may be."""

    def __init__(self, waiting: int, closing: bool = False, one_client: bool = False):
        self.waiting = waiting
        self.closing = closing  # then there will be none here any more
        if closing:
            text = "this server is shutting down; ask another, or this one once it is back"
        else:
            whose = " of this client, and the places left are for others" if one_client else ""
            text = f"{waiting} requests are waiting already{whose}; try again in a moment"
        super().__init__(text)


class NoSuchReader(DataError):
    """A text is to be read by someone whom the bundle does not hold."""

    def __init__(self, reader: str, readers: Sequence[str], why: str = ""):
        self.reader = reader
        self.readers = tuple(readers)
        known = ", ".join(readers)
        text = why or f"there is no {reader!r}"
        super().__init__(f"{text}; there are {known}")


@dataclass(frozen=True)
class Capacity:
    """How much an engine takes on."""

    rows: int = 32  # texts that are generated at once
    waiting: int = 256  # texts that wait for a row
    # of prompts in one step, so that a long one does not hold up those that are being generated;
    # None: by the size of the model
    prefill_tokens: int | None = None
    # of keys and values; a text that needs more runs alone
    cache_bytes: int = 2 << 30


@dataclass(frozen=True)
class Sampling:
    """How a text goes on: temperature 0 takes the likeliest token, seed None draws another one each
    time."""

    # None: as many as its reader was taught, or the context has; 0: of a text that is echoed
    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    seconds: float | None = None  # from when it was asked, after which no further token is begun
    top_k: int = 0  # of the likeliest tokens that are drawn from; 0: all
    min_p: float = 0.0  # of the likeliest token's probability that a token needs to be drawn
    presence_penalty: float = 0.0  # taken once from the logit of a token that was drawn before
    frequency_penalty: float = 0.0  # taken as often as it was drawn
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to logits, by token
    # None: no probabilities are told; n: each token's, and beside it those of the n likeliest
    logprobs: int | None = None
    past_end: bool = False  # a token that ends a text is one like all others
    echoes: bool = False  # its prompt's tokens are told too, before those that are drawn


@dataclass(frozen=True)
class Prompt:
    """What a text begins with, encoded and checked, and who reads it."""

    ids: tuple[int, ...]
    media: tuple[Medium, ...] = ()  # in the order of their places in ids
    reader: str | None = None  # "base" or an expert's name; None: whom the router chooses
    routing_ids: tuple[int, ...] = ()  # what a router that is asked in words of its own reads
    goes_on: bool = False  # whether what comes is of one text with these tokens, and no answer


@dataclass(frozen=True)
class Token:
    """A token, its text, and per layer the numbers and weights of its experts, likeliest first.

    Where one expert reads the whole text it has that number and weight 1. `speakers` of the engine
    has the name of each number. Both are empty where a dense model has no experts.
    """

    id: int
    text: str
    experts: Sequence[Sequence[int]]
    weights: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Piece:
    """A token whose text may be shown, or the end.

    A token is held back while its character is not whole, or while it may be the start of a stop
    string; so a step adds none, one or several. What a stop string cuts off is in no piece. All
    texts together are the whole, and each is its token's.
    """

    token: Token | None  # None: the end
    text: str
    # of the token, where they are asked for; nats. None also of a text's first one
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()  # (token, logprob), likeliest first
    finish: Finish | None = None  # of the end


@dataclass(frozen=True)
class RequestChoice:
    """Whom a router chose for a whole text, how likely, and every choice, likeliest first."""

    expert: str  # the likeliest
    confidence: float
    alternatives: tuple[tuple[str, float], ...]
    answered_by: tuple[str, ...]  # who reads it; of several the best answer is kept


@dataclass(frozen=True)
class Route:
    """Where a text goes: by token, or as a whole."""

    tokens: tuple[Token, ...] = ()  # the text's own, with who reads each; () of a whole request
    choice: RequestChoice | None = None


@dataclass
class Times:
    """When what happened to a text, on the monotonic clock."""

    asked: float = field(default_factory=time.monotonic)
    begun: float | None = None  # it had a row
    routed: float | None = None  # it was known who reads it
    first: float | None = None  # it had its first token
    ended: float | None = None

    def between(self, start: str, end: str) -> float:
        """Return the seconds between two of them; 0 where one has not happened."""
        first = getattr(self, start)
        last = getattr(self, end)
        return 0.0 if first is None or last is None else last - first


class Generation:
    """A text that is being generated. Pieces are added by the engine, and read by anyone, from the
    first one on, as often as one likes."""

    def __init__(self, prompt: Prompt, sampling: Sampling):
        self.prompt = prompt
        self.sampling = sampling
        self.times = Times()
        self.completion_tokens = 0  # drawn so far, with one that ends the text
        self.reader: str | None = prompt.reader  # who reads it, once that is known
        self.choice: RequestChoice | None = None  # where a router chose for the whole text
        self.others: tuple[tuple[str, str], ...] = ()  # (reader, text) that were ranked below
        self.counted = False  # a watcher has been told of its end
        self._pieces: list[Piece] = []
        self._error: BaseException | None = None
        self._cancelled = False
        self._changed = threading.Condition()
        self._wakes: list[Callable[[], None]] = []

    @property
    def prompt_tokens(self) -> int:
        """Tokens that were read before the first one was drawn, those of media among them."""
        return len(self.prompt.ids)

    @property
    def tokens(self) -> list[Token]:
        """Those that may be shown by now, whatever becomes of it."""
        with self._changed:
            return [piece.token for piece in self._pieces if piece.token]

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants it any more."""
        return self._cancelled

    @property
    def finished(self) -> bool:
        """Whether no piece comes any more."""
        return self._error is not None or bool(self._pieces and self._pieces[-1].finish)

    def cancel(self) -> None:
        """Give it up: no further token of it is drawn, and its place is free before the next step.
        Whoever reads its pieces gets Abandoned."""
        self._cancelled = True
        self.fail(Abandoned("nobody waits for the answer any more"))

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Yield its pieces as they come; who stops before the last one gives the text up.

        Raises what the engine raised over it: Abandoned where it was cancelled, TimeoutError where
        its seconds were over before it had a row, Overloaded where the engine closed.
        """
        loop = asyncio.get_running_loop()
        news = asyncio.Event()

        def wake() -> None:
            # the loop may be gone before the engine knows that nobody reads
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(news.set)

        with self._changed:
            self._wakes.append(wake)
        done = 0
        try:
            while True:
                news.clear()
                found = self._since(done)
                for piece in found:
                    done += 1
                    yield piece
                    if piece.finish:
                        return
                # What ended it may have come while these were read.
                if not found:
                    await news.wait()
        finally:
            with self._changed:
                self._wakes.remove(wake)
            if not self.finished:
                self.cancel()

    def follow(self) -> Iterator[Piece]:
        """Yield its pieces as they come, in a thread that waits for them, as `pieces` does. Raises
        Abandoned where the work of this thread is not wanted any more."""
        done = 0
        try:
            while True:
                for piece in self._since(done):
                    done += 1
                    yield piece
                    if piece.finish:
                        return
                with self._changed:
                    if len(self._pieces) == done and not self.finished:
                        self._changed.wait(POLL_S)
                if is_unwanted():
                    self.cancel()
        finally:
            if not self.finished:
                self.cancel()

    def wait(self) -> list[Piece]:
        """Return all its pieces, once the last one is there, and raise as `pieces` does. Raises
        Abandoned where the work of this thread is not wanted any more."""
        with self._changed:
            while not self.finished:
                if is_unwanted():
                    self.cancel()
                    break
                self._changed.wait(POLL_S)
            if self._error is not None:
                raise _anew(self._error)
            return list(self._pieces)

    def _since(self, first: int) -> list[Piece]:
        """Return what came after the first pieces; where nothing did, raise what ended the text."""
        with self._changed:
            found = self._pieces[first:]
            if self._error is not None and not found:
                raise _anew(self._error)
            return found

    def add(self, piece: Piece) -> None:
        """Add a piece; called by the engine alone."""
        with self._changed:
            if self.finished:
                return
            self._pieces.append(piece)
            if piece.finish:
                self.times.ended = time.monotonic()
        self._tell()

    def fail(self, error: BaseException) -> None:
        """End it with an error, unless it has ended."""
        with self._changed:
            if self.finished:
                return
            # the frames that an error went through know the text, its pictures among them: kept
            # here, it would keep them until Python next looks for what knows itself
            self._error = _anew(error)
            self.times.ended = time.monotonic()
        self._tell()

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()
            wakes = list(self._wakes)
        for wake in wakes:
            wake()


def _anew(error: BaseException) -> BaseException:
    """Return an error of the same words that was not raised yet."""
    kind = type(error)
    try:
        anew = kind.__new__(kind, *error.args)
    except TypeError:  # of a library that lets nobody else make one
        anew = RuntimeError()
    vars(anew).update(vars(error))
    # a few are told by what only their own making sets
    return anew if str(anew) == str(error) else RuntimeError(f"{kind.__name__}: {error}")


def result_of(future: Future[T]) -> T:
    """Return what a future gives, or raise what it raises. Raises Abandoned where the work of this
    thread is not wanted any more, and gives it up."""
    while True:
        try:
            return future.result(POLL_S)
        except TimeoutError:
            # or it is the work itself that was too late
            if future.done():
                raise
        if is_unwanted():
            future.cancel()
            raise Abandoned("nobody waits for the answer any more")


@dataclass
class Stats:
    """What an engine has done so far, and does now. Only counted up, but for the first four."""

    running: int = 0  # texts with a row
    waiting: int = 0
    rows: int = 0  # texts that can run at once
    prefill_tokens: int = 0  # of prompts that a step reads at most
    steps: int = 0
    step_rows: int = 0  # of all steps together: over steps, the mean batch
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0  # for want of room
    # assignments of tokens to experts, by name, over layers; a text under one reader counts its own
    spoken: dict[str, float] = field(default_factory=dict)


class Watcher(Protocol):
    """Who is told what takes how long; each call must be quick, and comes from the engine's
    thread."""

    def stepped(self, rows: int, seconds: float) -> None:
        """A step gave so many texts a token each."""

    def began(self, generation: Generation, seconds: float) -> None:
        """A text had its first token so long after it was asked for."""

    def went_on(self, seconds: float) -> None:
        """A text had another token so long after the one before."""

    def ended(self, generation: Generation, finish: str) -> None:
        """A text ended: stop, length, cancelled or failed."""


class Generating(Protocol):
    """What HTTP knows of an engine."""

    name: str
    made_at: int  # seconds since 1970
    about: dict[str, Any]  # what its bundle says of itself
    experts: tuple[str, ...]
    speakers: tuple[str, ...]  # by the numbers that tokens tell
    # who can be asked for by name: the experts, and "base" and "dense" where they are
    readers: tuple[str, ...]
    context_tokens: int
    echoes: bool  # whether a prompt's own tokens can be told, with their probabilities
    stats: Stats
    watcher: Watcher | None

    def submit(self, prompt: Prompt, sampling: Sampling, client: str = "") -> Generation:
        """Have a text generated; of clients that wait, the one with the fewest running is first.

        Raises Overloaded, NoSuchReader, and DataError for what is over the context.
        """

    def route(self, prompt: Prompt, client: str = "") -> Future[Route]:
        """Have it said where a prompt goes; `asyncio.wrap_future` makes it awaitable. Raises as
        `submit` does; cancelling the future gives it up."""

    def close(self, seconds: float | None = None) -> None:
        """Take nothing more on, bring to an end what is asked already, for at most so long, and end
        the rest with Overloaded. Returns once the engine's thread has ended."""
