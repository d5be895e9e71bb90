"""What a row of the batch is for: a text that goes on, a text whose readers are told, or a question
to a router.

L layers, V vocabulary, C choices of a router.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from .gates import FREE, GateChoice
from .generation import Finish, Generation, Piece, RequestChoice, Token, Watcher
from .sampling import Drawn, TokenSampler
from .text_stream import TextStream


@dataclass(frozen=True)
class Order:
    """Whose a row is: of one request there may be several."""

    client: str
    until: float | None  # on the monotonic clock, after which no further token is begun
    is_over: Callable[[], bool]  # nobody waits for it, or it has ended already
    fail: Callable[[BaseException], None]
    text: Generation | None = None  # None: it is only asked where one goes

    @classmethod
    def of_text(cls, generation: Generation, client: str) -> "Order":
        """Return a text's, whose time runs from when it was asked for."""
        seconds = generation.sampling.seconds
        until = None if seconds is None else generation.times.asked + seconds
        return cls(client, until, lambda: generation.finished, generation.fail, generation)

    @classmethod
    def of_route(cls, future: Future[Any], client: str) -> "Order":
        """Return the one of a question where a text goes, which has no end."""

        def fail(error: BaseException) -> None:
            # it may be given up at any moment
            with suppress(InvalidStateError):
                future.set_exception(error)

        return cls(client, None, future.done, fail)

    @property
    def is_late(self) -> bool:
        """Whether its time is over."""
        return self.until is not None and time.monotonic() > self.until


class ServedRow:
    """A sequence that the model reads, and what becomes of that."""

    needs_logits = True  # once all of it is read
    tells_all = False  # at every place who reads it, and not only where a token is drawn
    # of each of its own tokens its probability, with those of so many likeliest; None: of none
    scores: int | None = None

    def __init__(self, order: Order, ids: Sequence[int], reader: str | None):
        self.order = order
        self.ids = tuple(ids)
        self.reader = reader  # None: whom the router chooses
        self.number = FREE  # of the reader, where it has one
        self.choice: RequestChoice | None = None  # of a router, for the whole of it
        self.read = 0  # tokens whose keys and values are kept
        self.chunks = 0  # passes that it was read in
        self.features: Any = None  # what its network keeps of it

    @property
    def client(self) -> str:
        """Whose it is."""
        return self.order.client

    @property
    def places(self) -> int:
        """How many tokens of it may be kept at most."""
        return len(self.ids)

    @property
    def is_reading(self) -> bool:
        """Whether there are tokens that were given and not read."""
        return self.read < len(self.ids)

    def chosen(self, reader: str, number: int, choice: RequestChoice | None = None) -> None:
        """Say who reads it, and what a router said where one chose."""
        self.reader = reader
        self.number = number
        self.choice = choice

    def begin(self) -> None:
        """Say that it has a row."""

    def scored(self, scores: Sequence[Drawn]) -> None:
        """Take the probabilities of some of its tokens, after their predecessors, where they are
        wanted."""

    def heard(self, choices: Sequence[GateChoice]) -> None:
        """Take who read some of its tokens, where it tells all."""

    def end_late(self) -> Finish | None:
        """End it where it is, as its time is over; return why its text ends, None where it has
        none."""
        self.order.fail(TimeoutError("its time was over before it was its turn; try again"))
        return None


class TextRow(ServedRow):
    """A text that goes on."""

    def __init__(
        self,
        order: Order,
        ids: Sequence[int],
        reader: str | None,
        sink: "Sink",
        sampler: TokenSampler,
        stream: TextStream,
        ends: frozenset[int],
        limit: int,
    ):
        super().__init__(order, ids, reader)
        self.sink = sink
        self.sampler = sampler
        self.last = FREE  # the newest token, which is not read yet
        self.count = 0  # of tokens that were drawn
        self._stream = stream
        self._ends = ends
        self._limit = limit
        self._held: deque[tuple[Drawn, GateChoice]] = deque()

    @property
    def places(self) -> int:
        """How many tokens of it may be kept at most."""
        # the last one is never read
        return len(self.ids) + self._limit - 1

    def begin(self) -> None:
        """Say that it has a row."""
        super().begin()
        self.sink.began()

    def chosen(self, reader: str, number: int, choice: RequestChoice | None = None) -> None:
        """Say who reads it, and what a router said where one chose."""
        super().chosen(reader, number, choice)
        self.sink.chosen(reader, choice)

    def take(self, drawn: Drawn, choice: GateChoice) -> Finish | None:
        """Take the next token and who spoke it; return why the text ends with it, where it does."""
        self.last = drawn.id
        self.count += 1
        self.sink.drew(drawn)
        if drawn.id in self._ends:
            # the end of a text is drawn, but no part of it
            self._show(self._stream.end())
            return self._finish("stop")
        self._held.append((drawn, choice))
        self._show(self._stream.add(drawn.id))
        if self._stream.stopped:
            return self._finish("stop")
        if self.count < self._limit:
            return None
        self._show(self._stream.end())
        return self._finish("stop" if self._stream.stopped else "length")

    def end_late(self) -> Finish | None:
        """End it where it is, as its time is over."""
        if not self.count:
            return super().end_late()
        self._show(self._stream.end())
        return self._finish("stop" if self._stream.stopped else "length")

    def _show(self, texts: Sequence[str]) -> None:
        """Hand on the tokens whose texts these are."""
        tells = self.sampler.sampling.logprobs is not None
        for text in texts:
            drawn, choice = self._held.popleft()
            token = Token(drawn.id, text, choice.experts, choice.weights)
            nats = drawn.nats if tells else None
            self.sink.add(Piece(token, text, nats, drawn.likeliest))

    def _finish(self, finish: Finish) -> Finish:
        self.sink.add(Piece(None, "", finish=finish))
        return finish


class TracedRow(ServedRow):
    """A text of which it is told who reads each token; none is drawn."""

    needs_logits = False
    tells_all = True

    def __init__(
        self,
        order: Order,
        ids: Sequence[int],
        reader: str | None,
        done: Callable[[list[GateChoice]], None],
    ):
        super().__init__(order, ids, reader)
        self._choices: list[GateChoice] = []
        self._done = done

    def heard(self, choices: Sequence[GateChoice]) -> None:
        """Take who read some of its tokens."""
        self._choices += choices
        if len(self._choices) == len(self.ids):
            self._done(self._choices)


class QuestionRow(ServedRow):
    """A question to a router, answered by the logits after it; other rows may follow from that."""

    def __init__(
        self,
        order: Order,
        ids: Sequence[int],
        reader: str,
        answered: Callable[[Tensor], Sequence[ServedRow]],
    ):
        super().__init__(order, ids, reader)
        self.answered = answered  # with logit_V


class Sink(Protocol):
    """Where what is made of a text goes."""

    generation: Generation

    def began(self) -> None:
        """It has a row."""

    def chosen(self, reader: str, choice: RequestChoice | None) -> None:
        """It is known who reads it."""

    def drew(self, drawn: Drawn) -> None:
        """A token was drawn."""

    def add(self, piece: Piece) -> None:
        """A piece may be shown."""


class TextSink:
    """Hands a row's text to whoever asked for it."""

    def __init__(self, generation: Generation, watcher: Watcher | None = None):
        self.generation = generation
        self._watcher = watcher
        self._newest = generation.times.asked  # when it had its newest token

    def began(self) -> None:
        """It has a row."""
        times = self.generation.times
        times.begun = times.begun or time.monotonic()

    def chosen(self, reader: str, choice: RequestChoice | None) -> None:
        """It is known who reads it."""
        self.generation.reader = reader
        self.generation.choice = choice or self.generation.choice
        times = self.generation.times
        times.routed = times.routed or time.monotonic()

    def drew(self, drawn: Drawn) -> None:
        """A token was drawn."""
        self.generation.completion_tokens += 1
        self._clock()

    def _clock(self) -> None:
        """Take the time of a token."""
        now = time.monotonic()
        times = self.generation.times
        is_first = times.first is None
        times.first = times.first or now
        if self._watcher and is_first:
            self._watcher.began(self.generation, now - times.asked)
        elif self._watcher:
            self._watcher.went_on(now - self._newest)
        self._newest = now

    def add(self, piece: Piece) -> None:
        """A piece may be shown."""
        self.generation.add(piece)


class Contest:
    """Several readers answer the same request; the answer with the greatest product of the router's
    probability and its own mean probability is kept, and told once all are there."""

    def __init__(
        self,
        generation: Generation,
        watcher: Watcher | None,
        rank: Callable[[str, float], float],
    ):
        self.generation = generation
        self.watcher = watcher
        self._rank = rank  # of a reader, and the mean nats of its tokens
        self._answers: list[_ReaderText] = []

    def entry(self, reader: str) -> "_Entry":
        """Return where one reader's answer goes; all are there before the first one ends."""
        answer = _ReaderText(reader)
        self._answers.append(answer)
        return _Entry(self, answer)

    def ended(self) -> None:
        """Hear that an answer is whole."""
        if not all(answer.is_whole for answer in self._answers):
            return
        # stable: of answers that rank alike the likelier expert's is kept
        best, *rest = sorted(
            self._answers, key=lambda each: self._rank(each.reader, each.mean_nats), reverse=True
        )
        generation = self.generation
        generation.reader = best.reader
        generation.completion_tokens = len(best.nats)
        generation.others = tuple((each.reader, each.text) for each in rest)
        for piece in best.pieces:
            generation.add(piece)


@dataclass
class _ReaderText:
    """What one reader says. It does not know what it is part of: who knows each other is found
    only now and then, and until then its pictures are in memory."""

    reader: str
    nats: list[float] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Whether no piece comes any more."""
        return bool(self.pieces and self.pieces[-1].finish)

    @property
    def mean_nats(self) -> float:
        """Mean log-probability of its tokens."""
        return sum(self.nats) / max(1, len(self.nats))

    @property
    def text(self) -> str:
        """What it says."""
        return "".join(piece.text for piece in self.pieces)


class _Entry(TextSink):
    """Hands over one reader's answer, until it is known whose is kept."""

    def __init__(self, contest: Contest, answer: _ReaderText):
        super().__init__(contest.generation, contest.watcher)
        self.contest = contest
        self.answer = answer

    def drew(self, drawn: Drawn) -> None:
        """A token was drawn."""
        self.answer.nats.append(drawn.nats or 0.0)
        self._clock()

    def add(self, piece: Piece) -> None:
        """A piece may be shown, if this answer is kept."""
        self.answer.pieces.append(piece)
        if piece.finish:
            self.contest.ended()
