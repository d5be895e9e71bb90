"""The model of a bundle as the scheduler runs it: rows of their own lengths in one pass, each with
its reader.

B rows, T tokens of the longest, S places that are looked at, L layers, K experts per token, D model
width, V vocabulary, N = B*T.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from ..model.chunks import chunk_of
from ..model.experts import BLOCK_ROWS, Expert
from ..model.kernels.frozen import product_dtype
from ..model.kernels.shared_base import Factors, shared_base_mix
from ..model.kernels.swiglu import is_swiglu
from ..model.low_rank import LowRankExpert, base_of, mix_on_base
from ..model.router import Router
from ..model.trunk import Trunk
from .gates import FREE, NOBODY, GateChoice, GateHearing
from .generation import BASE_READER, DENSE_READER
from .held_weights import cast_weights
from .rows import ServedRow
from .sampling import Drawn, check_numbers, with_nats
from .slot_cache import SlotCache, rounded

FEW_ROWS = 8
# Tokens of prompts that a step reads, at least and at most. Of a small model a pass takes as long
# for a few as for many; of a large one whoever is given tokens waits for each that is read.
FEWEST_READ = 256
MOST_READ = 2048
# Parameters times tokens that a step reads: on a processor's core, where it was measured, under a
# second. A GPU has some 500 times its arithmetic; there nothing was measured.
READ = {"cpu": 2**35, "cuda": 2**44}


@dataclass(frozen=True)
class Chunk:
    """What a row reads in one pass: some of its tokens, and the place of the first of them."""

    row: ServedRow
    slot: int
    ids: tuple[int, ...]
    start: int

    @property
    def end(self) -> int:
        """Place after the last."""
        return self.start + len(self.ids)

    @property
    def is_drawn(self) -> bool:
        """Whether it is a token that was drawn, and no part of what the row began with."""
        return self.start >= len(self.row.ids)


@dataclass(frozen=True)
class Batch:
    """The chunks of one pass, filled up on the right."""

    chunks: tuple[Chunk, ...]
    pad_id: int
    device: torch.device

    @cached_property
    def longest(self) -> int:
        """T."""
        return max(len(chunk.ids) for chunk in self.chunks)

    @cached_property
    def seen(self) -> int:
        """S."""
        return max(chunk.end for chunk in self.chunks)

    @cached_property
    def taken(self) -> list[int]:
        """How many of the N = B*T tokens each chunk takes, with what fills it up."""
        return [self.longest] * len(self.chunks)

    @cached_property
    def own(self) -> list[slice]:
        """Which of them are each chunk's own."""
        starts = accumulate(self.taken, initial=0)
        return [
            slice(start, start + len(chunk.ids))
            for start, chunk in zip(starts, self.chunks, strict=False)
        ]

    @cached_property
    def ids_BT(self) -> Tensor:
        """Tokens."""
        rows = []
        for chunk in self.chunks:
            padding = (self.pad_id,) * (self.longest - len(chunk.ids))
            rows.append(chunk.ids + padding)
        return torch.tensor(rows, device=self.device)

    @cached_property
    def count_B(self) -> Tensor:
        """How many tokens of each row are its own."""
        return torch.tensor([len(chunk.ids) for chunk in self.chunks], device=self.device)

    @cached_property
    def place_BT(self) -> Tensor:
        """Place of each token in its text; of what fills a row up that of its last one, as some
        models turn all places by the largest."""
        start_B = torch.tensor([chunk.start for chunk in self.chunks], device=self.device)
        place_BT = start_B.unsqueeze(1) + torch.arange(self.longest, device=self.device)
        return place_BT.minimum((start_B + self.count_B - 1).unsqueeze(1))

    def enter(self, cache: SlotCache, step: int) -> None:
        """Tell a cache where this pass writes, and that it looks at a multiple of so many
        places."""
        slots = [chunk.slot for chunk in self.chunks]
        cache.write(slots, self.written_BT(cache.places), rounded(self.seen, step))

    @property
    def key_rows(self) -> Sequence[int]:
        """Where each chunk's keys and values are among those that the cache gives the pass."""
        return range(len(self.chunks))

    def written_BT(self, beyond: int) -> Tensor:
        """Return where each token is kept; what fills rows up goes `beyond` all texts."""
        is_own_BT = torch.arange(self.longest, device=self.device) < self.count_B.unsqueeze(1)
        return torch.where(is_own_BT, self.place_BT, beyond)

    def mask_B1TS(self, window: int | None = None) -> Tensor:
        """Return what each token sees: itself and those before it, of its own text, at most
        `window` of them."""
        # Whole, and given as it is: what transformers makes itself takes all rows for equally long
        at_S = torch.arange(self.seen, device=self.device)
        place_BT1 = self.place_BT.unsqueeze(-1)
        sees_BTS = at_S <= place_BT1
        if window is not None:
            sees_BTS = sees_BTS & (at_S > place_BT1 - window)
        return sees_BTS.unsqueeze(1)

    def last(self, x_BTD: Tensor) -> Tensor:
        """Return x_BD of the last token of each row."""
        places = [own.stop - 1 for own in self.own]
        return x_BTD.flatten(0, 1)[torch.tensor(places, device=x_BTD.device)]


class PackedBatch(Batch):
    """The same behind each other in one row that nothing fills up: B is 1, T all tokens. For those
    who attend to each text by itself."""

    @cached_property
    def taken(self) -> list[int]:
        """How many of the tokens each chunk takes."""
        return [len(chunk.ids) for chunk in self.chunks]

    @cached_property
    def ids_BT(self) -> Tensor:
        """Tokens."""
        ids = list(chain.from_iterable(chunk.ids for chunk in self.chunks))
        return torch.tensor([ids], device=self.device)

    @cached_property
    def place_BT(self) -> Tensor:
        """Place of each token in its text."""
        places: list[int] = []
        for chunk in self.chunks:
            places += range(chunk.start, chunk.end)
        return torch.tensor([places], device=self.device)

    def enter(self, cache: SlotCache, _step: int) -> None:
        """Tell a cache where this pass writes; it looks at all slots as they are."""
        slots: list[int] = []
        for chunk in self.chunks:
            slots += [chunk.slot] * len(chunk.ids)
        cache.write_packed(slots, self.place_BT)

    @property
    def key_rows(self) -> Sequence[int]:
        """Where each chunk's keys and values are among those that the cache gives the pass."""
        return [chunk.slot for chunk in self.chunks]

    def mask_B1TS(self, _window: int | None = None) -> Tensor:
        """Return what stands in the place of a mask, as nobody looks at one."""
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)


class Network(ABC):
    """A frozen model with slots for the texts that it reads."""

    pad_id = 0
    dtype = "fp32"  # of products
    seen_step = 1  # a pass looks at a multiple of so many places
    packs = False  # whether what is read and what was drawn go through one pass
    beside: "Network | None" = None  # a dense model, whose texts have slots of the same cache

    def __init__(self, model: Any, speakers: Sequence[str]):
        self.model = model  # transformers' own class, with its head
        self.speakers = tuple(speakers)  # by number
        config = model.config.get_text_config()
        self.cache = SlotCache(config.num_hidden_layers)
        self.vocab_size = model.lm_head.weight.shape[0]
        self.device = model.lm_head.weight.device
        self._config = config

    @property
    def weights(self) -> list[nn.Module]:
        """Where the weights are that its texts are read with."""
        return [self.model]

    @property
    def parameters(self) -> int:
        """How many numbers those are; of a mixture with those of all experts."""
        counts = {}
        for module in self.weights:
            # what stands in several places is counted once
            counts.update({id(each): each.numel() for each in module.parameters()})
        return sum(counts.values())

    @property
    def prefill_tokens(self) -> int:
        """How many tokens of prompts a step reads, unless it is said."""
        return tokens_to_read(self.parameters, self.device.type)

    @property
    def place_bytes(self) -> int:
        """Bytes of keys and values of one token."""
        known = self.cache.place_bytes
        if known is not None:
            return known
        config = self._config
        width = getattr(config, "head_dim", None)
        if width is None:
            width = config.hidden_size // config.num_attention_heads
        numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * width
        return numbers * torch.float32.itemsize

    def stand_beside(self, dense: "Network") -> None:
        """Have a dense model read the rows that ask for it. It keeps as much of a token as this
        one does: a slot is whoever's text stands in it."""
        self.beside = dense
        dense.cache = self.cache

    def reads(self, row: ServedRow) -> "Network":
        """Return the model that a row is read by: rows of two models are in no pass together."""
        if self.beside is not None and row.reader == DENSE_READER:
            return self.beside
        return self

    def number(self, reader: str) -> int:
        """Return the number of who can read a text. Raises ValueError for others."""
        if self.beside is not None and reader == DENSE_READER:
            return NOBODY
        return self.speakers.index(reader)

    def prepare(self, rows: Sequence[ServedRow]) -> None:
        """Do what has to be done once before rows are read; no pass is under way. Rows with a
        reader get his number."""
        for row in rows:
            if row.reader is not None and row.number == FREE:
                row.chosen(row.reader, self.number(row.reader))

    def batch(self, chunks: Sequence[Chunk]) -> Batch:
        """Return the chunks of one pass."""
        kind = PackedBatch if self.packs else Batch
        return kind(tuple(chunks), self.pad_id, self.device)

    def read(self, batch: Batch) -> tuple[Tensor, list[list[GateChoice]]]:
        """Run one pass, whose keys and values are kept; return x_BTD, and per row who read its
        tokens: all of them where the row tells all, else the last one."""
        batch.enter(self.cache, self.seen_step)
        return self.hidden(batch), self.heard(batch)

    def extras(self, _batch: Batch) -> dict[str, Any]:
        """Return what a pass is given beside its tokens."""
        return {}

    def run(self, batch: Batch) -> Tensor:
        """Return x_BTD after the final norm of a language model."""
        out = self.model.base_model(
            input_ids=batch.ids_BT,
            attention_mask=self.masks(batch),
            position_ids=batch.place_BT,
            past_key_values=self.cache,
            use_cache=True,
            **self.extras(batch),
        )
        x_BTD: Tensor = out.last_hidden_state
        return x_BTD

    @abstractmethod
    def hidden(self, batch: Batch) -> Tensor:
        """Return x_BTD after the final norm."""

    @abstractmethod
    def heard(self, batch: Batch) -> list[list[GateChoice]]:
        """Return who read the tokens of the pass that has just run, as `read` does."""

    def logits(self, x_BD: Tensor) -> Tensor:
        """Return logit_BV."""
        logits: Tensor = self.model.lm_head(x_BD)
        return logits

    def scored(self, x_ND: Tensor, next_ids: Sequence[int], likeliest: int) -> list[Drawn]:
        """Return the tokens that follow in a text that is there, with their probabilities and those
        of so many likeliest. Raises ArithmeticError for logits that are no numbers."""
        found: list[Drawn] = []
        count = chunk_of(self.vocab_size)
        for start in range(0, len(next_ids), count):
            logit_NV = self.logits(x_ND[start : start + count]).float()
            check_numbers(logit_NV)
            found += with_nats(logit_NV, next_ids[start : start + count], likeliest)
        return found

    def masks(self, batch: Batch) -> Any:
        """Return the mask as the class takes it: one, or one by kind of layer."""
        config = self._config
        window = getattr(config, "sliding_window", None)
        kinds = set(getattr(config, "layer_types", None) or ())
        if config.model_type == "llama":
            # Whatever its configuration has for a window, the class has none
            return batch.mask_B1TS()
        if config.model_type not in ("qwen3", "qwen2"):
            return batch.mask_B1TS(window)
        # of these not every layer has a window, whatever the configuration has for one
        masks = {"full_attention": batch.mask_B1TS()}
        if "sliding_attention" in kinds:
            masks["sliding_attention"] = batch.mask_B1TS(window)
        return masks


class TokenRouted(Network):
    """A network whose gates choose experts for each token."""

    def __init__(self, model: Any, speakers: Sequence[str]):
        super().__init__(model, speakers)
        self.hearing = GateHearing()

    def hidden(self, batch: Batch) -> Tensor:
        """Return x_BTD after the final norm."""
        readers = [chunk.row.number for chunk in batch.chunks]
        with self.hearing.listening(readers, batch.taken, batch.device):
            return self.run(batch)

    def heard(self, batch: Batch) -> list[list[GateChoice]]:
        """Return who read the tokens of the pass that has just run."""
        counts = []
        places: list[int] = []
        for chunk, own in zip(batch.chunks, batch.own, strict=True):
            first = own.start if chunk.row.tells_all else own.stop - 1
            counts.append(own.stop - first)
            if chunk.row.number == FREE:
                places += range(first, own.stop)
        chosen = iter(self.hearing.heard(places))
        told = []
        for chunk, count in zip(batch.chunks, counts, strict=True):
            if chunk.row.number == FREE:
                told.append(list(islice(chosen, count)))
            else:
                alone = GateChoice.of_reader(chunk.row.number, self.hearing.layers)
                told.append([alone] * count)
        return told


class StockMixture(TokenRouted):
    """transformers' own class of mixtures: full experts, merged ones among them."""

    def __init__(self, model: Any, experts: Sequence[str], base: int | None):
        super().__init__(model, experts)
        self._base = base  # the expert that is the base's own network, where one is
        self.hearing.hook(model.base_model)

    def number(self, reader: str) -> int:
        """Return the number of who can read a text. Raises ValueError for others."""
        if reader == BASE_READER and self._base is not None:
            return self._base
        return super().number(reader)


class UnmergedMixture(TokenRouted):
    """A trunk's own class with low-rank experts in its slots, unmerged: the base's products run
    once for all of a token's experts."""

    def __init__(self, trunk: Trunk, experts: dict[str, Expert], router: Router):
        base = base_of(list(experts.values()))
        if base is None:
            raise ValueError("these experts are no deltas on one base")
        super().__init__(trunk.network, (*experts, BASE_READER))
        cast_weights(trunk.network, base)
        self._base = base
        # the base is one more that can be chosen, by who asks for it alone
        self._members = [*experts.values(), base]
        self._router = router
        self._kept: dict[tuple[int, torch.dtype], list[Factors | None]] = {}
        for layer in trunk.network.model.layers:
            layer.mlp.ffn = self._mixed

    @property
    def weights(self) -> list[nn.Module]:
        """Where the weights are that its texts are read with."""
        return [self.model, *self._members]

    def _mixed(self, layer: int, x_BTD: Tensor) -> Tensor:
        """Return y_BTD of one layer."""
        if layer not in self._router.place:
            y_BTD: Tensor = self._base(layer, x_BTD)
            return y_BTD
        x_ND = x_BTD.flatten(0, -2)
        index_NK, weight_NK = self._router.route(layer, x_ND)
        index_NK, weight_NK = self.hearing.hear(index_NK, weight_NK)
        routed = (x_ND, index_NK, weight_NK)
        network = self._base.layers[layer]
        if not is_swiglu(network):
            return mix_on_base(self._base, self._members, layer, *routed).view_as(x_BTD)
        factors = self._factors(layer, product_dtype(x_ND))
        return shared_base_mix(network, factors, *routed, _block_rows(len(x_ND))).view_as(x_BTD)

    def _factors(self, layer: int, dtype: torch.dtype) -> list[Factors | None]:
        """Return what each member's deltas are multiplied with; kept, as nothing here is trained
        and to gather them takes a tenth of a small model's pass."""
        if (layer, dtype) not in self._kept:
            found: list[Factors | None] = []
            for member in self._members:
                if isinstance(member, LowRankExpert):
                    found.append(member.factors(layer, dtype))
                else:
                    found.append(None)
            self._kept[layer, dtype] = found
        return self._kept[layer, dtype]


def _block_rows(tokens: int) -> int:
    """Return what each expert's block is filled up to: of a token each of some texts most of a
    large one would be filling."""
    return FEW_ROWS if tokens <= BLOCK_ROWS else BLOCK_ROWS


def tokens_to_read(parameters: int, device: str) -> int:
    """Return how many tokens of prompts a step reads with a model of so many parameters: a power of
    two."""
    most = READ.get(device, READ["cuda"]) // max(1, parameters)
    tokens = MOST_READ
    while tokens > max(most, FEWEST_READ):
        tokens //= 2
    return tokens


class OneReader(Network):
    """A network whose texts are read by one reader each, from their beginning to their end."""

    def heard(self, batch: Batch) -> list[list[GateChoice]]:
        """Return who read the tokens of the pass that has just run."""
        told = []
        for chunk in batch.chunks:
            count = len(chunk.ids) if chunk.row.tells_all else 1
            told.append([GateChoice.of_reader(chunk.row.number)] * count)
        return told
