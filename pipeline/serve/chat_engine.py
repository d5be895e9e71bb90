"""A bundle of adapters opened to answer: questions with their pictures, each read by whom the
router chooses or who is named; those of different readers run in one batch.

B rows, T tokens, V vocabulary, D model width.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config.task_data import ImageLimitsConfig
from ..families import family
from .adapters import row_adapter
from .engine import Engine
from .gates import FREE
from .generation import (
    BASE_READER,
    Capacity,
    Generation,
    Medium,
    Prompt,
    RequestChoice,
    Route,
    Sampling,
)
from .networks import Batch, Chunk, OneReader
from .pictures import DecodingRoom
from .rows import Contest, Order, QuestionRow, ServedRow, Sink, TextRow, TextSink
from .sampling import TokenSampler
from .text_stream import TextStream

if TYPE_CHECKING:
    from ..families.adapters.inference import MultiAdapterModel
    from ..families.adapters.media import MediaFeatures
    from ..families.adapters.stack import AdapterStack, Choice

ROUTER = "router"  # the router's adapter, which reads questions and no text


class ChatEngine(Engine):
    """An open bundle of adapters.

    Raises MissingArtifact, DamagedArtifact, NewerStore or MismatchError for one that cannot be
    served.
    """

    def __init__(self, folder: Path, capacity: Capacity | None = None):
        super().__init__(folder, capacity)
        self.stack: AdapterStack = family(self.about["family"]).reassemble(folder)
        self.image = ImageLimitsConfig(**self.about["base"]["image"])
        # Of all requests together.
        self.room = DecodingRoom()
        self.readers = (*self.experts, BASE_READER)
        model = self.stack.model
        self.context_tokens: int = model.core.config.get_text_config().max_position_embeddings
        self._serve(ChatAdapters(model, self.readers))

    def submit(self, prompt: Prompt, sampling: Sampling, client: str = "") -> Generation:
        """Have a question answered; of clients that wait, the one with the fewest running is first.

        Raises Overloaded, NoSuchReader, and DataError for what is over the context.
        """
        self._check(prompt, sampling)
        generation = Generation(prompt, sampling)
        order = Order.of_text(generation, client)
        media = _Media(prompt.media)
        if prompt.reader is not None:
            sink = TextSink(generation, self.watcher)
            row: ServedRow = self._answering(order, generation, prompt.reader, sink, media)
        else:

            def answered(logit_V: Tensor) -> list[ServedRow]:
                choice = self.stack.choice(logit_V)
                generation.choice = _as_told(choice)
                generation.times.routed = time.monotonic()
                return self._readers_of(order, generation, choice, media)

            row = self._asking(order, prompt, media, answered)
        self.scheduler.add(row)
        return generation

    def route(self, prompt: Prompt, client: str = "") -> Future[Route]:
        """Have it said where a question goes. Raises as `submit` does; cancelling the future gives
        it up."""
        self._check(prompt)
        future: Future[Route] = Future()

        def answered(logit_V: Tensor) -> list[ServedRow]:
            choice = self.stack.choice(logit_V)
            if future.set_running_or_notify_cancel():
                future.set_result(Route(choice=_as_told(choice)))
            return []

        order = Order.of_route(future, client)
        self.scheduler.add(self._asking(order, prompt, _Media(prompt.media), answered))
        return future

    def _asking(
        self,
        order: Order,
        prompt: Prompt,
        media: "_Media",
        answered: Callable[[Tensor], Sequence[ServedRow]],
    ) -> QuestionRow:
        """Return the row that asks the router."""
        row = QuestionRow(order, prompt.routing_ids, ROUTER, answered)
        row.features = _Seen(media)
        return row

    def _readers_of(
        self, order: Order, generation: Generation, choice: "Choice", media: "_Media"
    ) -> list[ServedRow]:
        """Return the rows of those whom the router chose."""
        from ..families.adapters.stack import rank

        if len(choice.answered_by) == 1:
            sink = TextSink(generation, self.watcher)
            return [self._answering(order, generation, choice.answered_by[0], sink, media)]
        contest = Contest(generation, self.watcher, lambda reader, nats: rank(choice, reader, nats))
        entries = [contest.entry(reader) for reader in choice.answered_by]
        rows: list[ServedRow] = []
        for reader, entry in zip(choice.answered_by, entries, strict=True):
            rows.append(self._answering(order, generation, reader, entry, media, ranks=True))
        return rows

    def _answering(
        self,
        order: Order,
        generation: Generation,
        reader: str,
        sink: Sink,
        media: "_Media",
        ranks: bool = False,
    ) -> TextRow:
        """Return the row of one reader's answer."""
        prompt = generation.prompt
        sampling = generation.sampling
        room = self.context_tokens - len(prompt.ids)
        limit = min(self.stack.new_tokens(reader), room)
        row = TextRow(
            order,
            prompt.ids,
            reader,
            sink,
            TokenSampler(sampling, tells=ranks),
            TextStream(self._decode, sampling.stop),
            self._end_ids(),
            min(sampling.max_tokens or limit, limit),
        )
        row.features = _Seen(media)
        return row

    def _decode(self, ids: list[int]) -> str:
        return str(self.stack.model.chat.tokenizer.decode(ids, skip_special_tokens=True))


class ChatAdapters(OneReader):
    """A base with its adapters and what its requests come with, whose rows are read under adapters
    of their own."""

    def __init__(self, model: "MultiAdapterModel", speakers: Sequence[str]):
        # not above: it imports PEFT, which only bundles of adapters need
        from ..families.adapters.peft_io import RowAdapters

        super().__init__(model.core, speakers)
        self._multi = model
        self._media = model.chat.media
        self._adapters = RowAdapters(model.model)
        self.pad_id = model.chat.pad_id

    def number(self, reader: str) -> int:
        """Return the number of who reads a row; the router, which says no token, has none."""
        return FREE if reader == ROUTER else super().number(reader)

    def prepare(self, rows: Sequence[ServedRow]) -> None:
        """Encode what rows come with, together, and once for all who read it alike."""
        super().prepare(rows)
        by_encoder: dict[str, list[_Media]] = {}
        for row in rows:
            media = row.features.media
            encoder = self._encoder(row)
            if encoder not in media.by_encoder:
                by_encoder.setdefault(encoder, []).append(media)
        for encoder, several in by_encoder.items():
            opened = [medium for media in several for medium in media.opened]
            # in passes that have a bound of their own, each medium once
            features = iter(self._multi.encode_media(opened, encoder))
            for media in several:
                media.by_encoder[encoder] = tuple(islice(features, len(media.opened)))
        for row in rows:
            seen = row.features
            seen.encoded = seen.media.by_encoder[self._encoder(row)]
            seen.position_3T = self._media.positions(self.model, row.ids, seen.encoded)

    def _encoder(self, row: ServedRow) -> str:
        """Return whose encoder a row's media are read by: the base's, or an adapter's own."""
        changed = row.reader in self._multi.encoder_adapters
        return row.reader if row.reader is not None and changed else BASE_READER

    def hidden(self, batch: Batch) -> Tensor:
        """Return x_BTD after the final norm."""
        inputs = self._media.feature_inputs(parts) if (parts := self._parts(batch)) else {}
        names = [row_adapter(chunk.row) for chunk in batch.chunks]
        with self._adapters.reading(names):
            out = self.model.base_model(
                input_ids=batch.ids_BT,
                attention_mask=self.masks(batch),
                position_ids=self._positions(batch),
                past_key_values=self.cache,
                use_cache=True,
                **inputs,
            )
        x_BTD: Tensor = out.last_hidden_state
        return x_BTD

    def _parts(self, batch: Batch) -> list[Any]:
        """Return what the tokens of media in this pass read."""
        placeholder = self._media.placeholder_id
        parts: list[Any] = []
        for chunk in batch.chunks:
            features = chunk.row.features.encoded
            if features and chunk.start < len(chunk.row.ids):
                before = chunk.row.ids[: chunk.start].count(placeholder)
                parts += self._media.cut(features, before, before + chunk.ids.count(placeholder))
        return parts

    def _positions(self, batch: Batch) -> Tensor:
        """Return position_BT, or position_3BT where a row's are counted otherwise."""
        if all(chunk.row.features.position_3T is None for chunk in batch.chunks):
            return batch.place_BT
        rows = [_positions_of(chunk, batch.longest) for chunk in batch.chunks]
        return torch.stack(rows, 1).to(batch.device)


def _positions_of(chunk: Chunk, count: int) -> Tensor:
    """Return position_3T of a chunk, filled up to a count."""
    place_T = torch.arange(chunk.start, chunk.start + count)
    position_3T = chunk.row.features.position_3T
    if position_3T is None:
        return place_T.expand(3, -1)
    own_3T = position_3T[:, chunk.start : chunk.start + count]
    # what comes after the request goes on from its largest position, one after another
    behind = int(position_3T.max()) + 1 - position_3T.shape[1]
    rest_T = place_T[own_3T.shape[1] :] + behind
    return torch.cat([own_3T, rest_T.expand(3, -1)], 1)


@dataclass
class _Media:
    """What a request comes with, opened, and what encoders make of it: the base's own, or that of
    an adapter that changes it."""

    opened: tuple[Medium, ...]
    by_encoder: dict[str, tuple["MediaFeatures", ...]] = field(default_factory=dict)


@dataclass
class _Seen:
    """What one row of a request sees of its media."""

    media: _Media
    encoded: tuple["MediaFeatures", ...] = ()
    position_3T: Tensor | None = None


def _as_told(choice: "Choice") -> RequestChoice:
    """Return the router's choice as it is told."""
    return RequestChoice(choice.expert, choice.confidence, choice.alternatives, choice.answered_by)
