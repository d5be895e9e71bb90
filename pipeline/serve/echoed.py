"""Texts that are told from their prompt on, as those who measure a model ask for them: each token
with its probability after those before it."""

from collections.abc import Sequence

from .gates import GateChoice
from .generation import Piece, Token
from .rows import Order, Sink, TextRow
from .sampling import Drawn, TokenSampler
from .text_stream import TextStream, shares_of


class EchoedRow(TextRow):
    """A text whose prompt's tokens are told before those that are drawn; of these there may be
    none."""

    def __init__(
        self,
        order: Order,
        ids: Sequence[int],
        reader: str | None,
        sink: Sink,
        sampler: TokenSampler,
        stream: TextStream,
        ends: frozenset[int],
        limit: int,
    ):
        super().__init__(order, ids, reader, sink, sampler, stream, ends, limit)
        self.tells_all = True
        self.scores = sampler.sampling.logprobs
        self.needs_logits = limit > 0
        self._scores: list[Drawn] = []
        self._choices: list[GateChoice] = []

    @property
    def places(self) -> int:
        """How many tokens of it may be kept at most."""
        return max(super().places, len(self.ids))

    def scored(self, scores: Sequence[Drawn]) -> None:
        """Take the probabilities of some of the prompt's tokens."""
        self._scores += scores

    def heard(self, choices: Sequence[GateChoice]) -> None:
        """Take who read some of the prompt's tokens, and tell all once there are all."""
        self._choices += choices
        if self.is_reading:
            return
        # what is drawn from here on is told as it comes
        self.tells_all = False
        self.scores = None
        self._tell()
        if not self._limit:
            self._finish("length")

    def _tell(self) -> None:
        """Hand on the prompt's tokens: the first has no probability, as none is before it."""
        unknown = Drawn(self.ids[0])
        scores = [unknown, *self._scores] if self._scores else [unknown] * len(self.ids)
        texts = shares_of(self.ids, self._stream.decode)
        for token, text, choice, drawn in zip(self.ids, texts, self._choices, scores, strict=True):
            told = Token(token, text, choice.experts, choice.weights)
            self.sink.add(Piece(told, text, drawn.nats, drawn.likeliest))
