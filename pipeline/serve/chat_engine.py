"""A bundle of adapters opened to answer: questions with their pictures, each read by whom the
router chooses or who is named; those of different readers run in one batch.

B rows, T tokens, V vocabulary, D model width.
"""

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config.serving import Dtype
from ..config.task_data import ImageLimitsConfig
from ..families import family
from ..hardware import device
from ..model.kernels.frozen import FrozenEmbedding, FrozenLinear
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
from .networks import Batch, Chunk, Network, OneReader
from .pictures import DecodingRoom
from .rows import Contest, Order, QuestionRow, ServedRow, Sink, TextRow, TextSink
from .sampling import TokenSampler
from .steady.network import SteadyNetwork, can_be_steady, text_model
from .text_stream import TextStream

if TYPE_CHECKING:
    from ..families.adapters.inference import MultiAdapterModel
    from ..families.adapters.media import MediaFeatures
    from ..families.adapters.stack import AdapterStack, Choice

UNSTEADY = (
    "the base is held in bfloat16, in which a text depends on those beside it: the same request "
    "may be answered otherwise; with --dtype bf16, or serve.dtype, each is what it is alone"
)
ROUTER = "router"  # the router's adapter, which reads questions and no text

log = logging.getLogger(__name__)


class ChatEngine(Engine):
    """An open bundle of adapters.

    Raises MissingArtifact, DamagedArtifact, NewerStore or MismatchError for one that cannot be
    served, ConfigError for a dtype that it is not run in.
    """

    stack: "AdapterStack"

    def __init__(self, folder: Path, capacity: Capacity | None = None, dtype: Dtype = "fp32"):
        super().__init__(folder, capacity, dtype)
        self.image = ImageLimitsConfig(**self.about["base"]["image"])
        # Of all requests together.
        self.room = DecodingRoom()
        self.readers = (*self.experts, BASE_READER)
        self._serve(self._opened(folder))

    def _opened(self, folder: Path) -> Network:
        """Return the base with its adapters."""
        if steady := self._steady(folder):
            return steady
        # what was tried is changed; it goes before it is opened once more, so that both never are
        vars(self).pop("stack", None)
        self._reassemble(folder)
        network = ChatAdapters(self.stack.model, self.readers, self.room)
        if network.dtype == "bf16" and device() == "cpu":
            log.info(UNSTEADY)
        return network

    def _made_steady(self, folder: Path) -> SteadyNetwork | None:
        """Return the stack in bf16, None where it has no such form."""
        self._reassemble(folder)
        model = self.stack.model
        if not can_be_steady(model.core):
            return None
        return SteadyChat(model, self.readers, self.room)

    def _reassemble(self, folder: Path) -> None:
        self.stack = family(self.about["family"]).reassemble(folder)
        config = self.stack.model.core.config.get_text_config()
        self.context_tokens: int = config.max_position_embeddings

    @property
    def _tried_readers(self) -> Sequence[str | None]:
        return self.experts

    def submit(self, prompt: Prompt, sampling: Sampling, client: str = "") -> Generation:
        """Have a question answered; of clients that wait, the one with the fewest running is first.

        Raises Overloaded, NoSuchReader, and DataError for what is over the context.
        """
        self._check(prompt, sampling)
        generation = Generation(prompt, sampling)
        order = Order.of_text(generation, client)
        media = _Media(prompt.media, client)
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
        self.scheduler.add(self._asking(order, prompt, _Media(prompt.media, client), answered))
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
            self._ends_of(sampling),
            min(sampling.max_tokens or limit, limit),
        )
        row.features = _Seen(media)
        return row

    def _decode(self, ids: list[int]) -> str:
        return str(self.stack.model.chat.tokenizer.decode(ids, skip_special_tokens=True))


class ChatAdapters(OneReader):
    """A base with its adapters and what its requests come with, whose rows are read under adapters
    of their own."""

    def __init__(
        self,
        model: "MultiAdapterModel",
        speakers: Sequence[str],
        room: DecodingRoom | None = None,
    ):
        # not above: it imports PEFT, which only bundles of adapters need
        from ..families.adapters.row_adapters import RowAdapters

        super().__init__(model.core, speakers)
        self.hold(model.core)
        self._room = room  # where what encoders make of media is kept; None: it is not
        self._multi = model
        self._media = model.chat.media
        self._adapters = RowAdapters(model.model)
        self.pad_id = model.chat.pad_id

    def hold(self, network: Any) -> None:
        """Have the model's weights in the dtype of its products: here as the base has them."""
        if network.dtype == torch.bfloat16:
            self.dtype = "bf16"

    def number(self, reader: str) -> int:
        """Return the number of who reads a row; the router, which says no token, has none."""
        return FREE if reader == ROUTER else super().number(reader)

    def prepare(self, rows: Sequence[ServedRow]) -> None:
        """Encode what rows come with, together, and once for all who read it alike."""
        super().prepare(rows)
        for row in rows:
            # those that a network is tried with come with nothing
            row.features = row.features or _Seen(_Media(()))
        by_encoder: dict[str, list[_Media]] = {}
        for row in rows:
            media = row.features.media
            encoder = self._encoder(row)
            if encoder not in media.by_encoder:
                by_encoder.setdefault(encoder, []).append(media)
        for encoder, several in by_encoder.items():
            keys = [[self._key(media, medium) for medium in media.opened] for media in several]
            known = self._known(several, keys, encoder)
            for media, own in zip(several, keys, strict=True):
                media.by_encoder[encoder] = tuple(known[key] for key in own)
        for row in rows:
            seen = row.features
            seen.encoded = seen.media.by_encoder[self._encoder(row)]
            seen.position_3T = self._media.positions(self.model, row.ids, seen.encoded)
            if seen.position_3T is not None:
                seen.behind = int(seen.position_3T.max()) + 1 - len(row.ids)

    def _key(self, media: "_Media", medium: Medium) -> Hashable:
        """Return what a medium is known by: what it shows, and who showed it."""
        # of each client its own: else how soon an answer comes would tell what others have shown
        return id(medium) if self._room is None else (media.client, self._media.digest(medium))

    def _known(
        self, several: Sequence["_Media"], keys: Sequence[Sequence[Hashable]], encoder: str
    ) -> "dict[Hashable, MediaFeatures]":
        """Return what an encoder makes of media, by their keys; a chat shows all of its own again
        with each of its questions, and they are encoded once."""
        known: dict[Hashable, MediaFeatures] = {}
        new: dict[Hashable, Medium] = {}
        for media, own in zip(several, keys, strict=True):
            for key, medium in zip(own, media.opened, strict=True):
                made = self._room.kept((encoder, key)) if self._room else None
                if made is None:
                    new[key] = medium
                else:
                    known[key] = made
        for key, made in zip(new, self.encoded([*new.values()], encoder), strict=True):
            known[key] = made
            if self._room:
                self._room.keep((encoder, key), *self._media.detached(made))
        return known

    def encoded(self, media: Sequence[Medium], encoder: str) -> "list[MediaFeatures]":
        """Return what an encoder makes of media."""
        # in passes that have a bound of their own, each medium once
        return self._multi.encode_media(media, encoder)

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
                **self.extras(batch),
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
        if batch.longest == 1 and all(chunk.is_drawn for chunk in batch.chunks):
            positions = [chunk.start + chunk.row.features.behind for chunk in batch.chunks]
            position_B = torch.tensor(positions, device=batch.device)
            return position_B.view(1, -1, 1).expand(3, -1, -1)
        rows = [_positions_of(chunk, batch.longest) for chunk in batch.chunks]
        return torch.stack(rows, 1).to(batch.device)


class SteadyChat(SteadyNetwork, ChatAdapters):
    """The same with products in bf16; pictures are seen as the base was opened, each by itself."""

    def hold(self, network: Any) -> None:
        """Have the model compute each row as it is alone."""
        text = text_model(network)
        for parent in list(text.modules()):
            for name, child in list(parent.named_children()):
                # what adapters multiply with stands in such dictionaries, and stays in fp32
                if type(child) is nn.Linear and not isinstance(parent, nn.ModuleDict):
                    setattr(parent, name, FrozenLinear.around(child))
        # what lies between products is in fp32, whatever the base was opened in
        text.embed_tokens = FrozenEmbedding.around(text.embed_tokens)
        text.embed_tokens.dtype = torch.float32
        self.make_steady(network)
        self.make_steady_silu(network)

    def encoded(self, media: Sequence[Medium], encoder: str) -> "list[MediaFeatures]":
        """Return what an encoder makes of media."""
        found: list[MediaFeatures] = []
        for medium in media:
            found += self._multi.encode_media([medium], encoder)
        return found


def _positions_of(chunk: Chunk, count: int) -> Tensor:
    """Return position_3T of a chunk, filled up to a count."""
    place_T = torch.arange(chunk.start, chunk.start + count)
    position_3T = chunk.row.features.position_3T
    if position_3T is None:
        return place_T.expand(3, -1)
    own_3T = position_3T[:, chunk.start : chunk.start + count]
    rest_T = place_T[own_3T.shape[1] :] + chunk.row.features.behind
    return torch.cat([own_3T, rest_T.expand(3, -1)], 1)


@dataclass
class _Media:
    """What a request comes with, opened, and what encoders make of it: the base's own, or that of
    an adapter that changes it."""

    opened: tuple[Medium, ...]
    client: str = ""
    by_encoder: dict[str, tuple["MediaFeatures", ...]] = field(default_factory=dict)


@dataclass
class _Seen:
    """What one row of a request sees of its media."""

    media: _Media
    encoded: tuple["MediaFeatures", ...] = ()
    position_3T: Tensor | None = None
    # added to the place of a token that comes after the request, as positions go on one after
    # another from the request's largest one
    behind: int = 0


def _as_told(choice: "Choice") -> RequestChoice:
    """Return the router's choice as it is told."""
    return RequestChoice(choice.expert, choice.confidence, choice.alternatives, choice.answered_by)
