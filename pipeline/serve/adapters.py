"""A bundle of adapters opened to answer: who reads a text is chosen by its first tokens, and goes
on with it; texts of different readers run in one batch.

The network is the stack that `reassemble` builds, which is transformers' own class with PEFT's
layers; on opening, what it computes without adapters is held against the class that any user of the
bundle would load.

B rows, T tokens, D model width, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..families import family
from ..model.language_model import filled
from .engine import CompletionEngine
from .generation import BASE_READER, RequestChoice
from .held_weights import cast_weights
from .networks import Batch, Network, OneReader
from .opening import check_logits, open_model, probe_logits
from .rows import ServedRow
from .steady.network import SteadyNetwork, can_be_steady

if TYPE_CHECKING:
    from ..families.ffn_moe.adapter.stack import RequestStack, TextChoice


class AdapterEngine(CompletionEngine):
    """An open bundle of adapters; the last of its experts is the base, which has none.

    Raises MissingArtifact, DamagedArtifact or NewerStore for one that cannot be served,
    MismatchError for one that does not compute what its stack does.
    """

    def _opened(self, folder: Path) -> Network:
        """Return the base with its adapters, once it is held against the stock class."""
        self.stack: RequestStack = family(self.about["family"]).reassemble(folder)
        self.experts = self.stack.names
        self.readers = self.stack.names
        expected_TV = probe_logits(self.stack.model, filled, self.context_tokens)
        # Both are the same base: one of them is enough
        check_logits(folder, open_model(folder), expected_TV, self.context_tokens)
        if steady := self._steady(folder):
            steady.model.generation_config = self.stack.model.network.generation_config
            return steady
        return TextAdapters(self.stack)

    def _made_steady(self, folder: Path) -> SteadyNetwork | None:
        """Return the stack in bf16, None where it has no such form."""
        stack: RequestStack = family(self.about["family"]).reassemble(folder)
        if not can_be_steady(stack.model.network):
            return None
        return SteadyAdapters(stack)


class TextAdapters(OneReader):
    """A language model whose rows are read under adapters of their own."""

    def __init__(self, stack: "RequestStack"):
        # not above: it imports PEFT, which only bundles of adapters need
        from ..families.adapters.row_adapters import RowAdapters

        super().__init__(stack.model.network, stack.names)
        self.hold(stack.model.network)
        self._stack = stack
        self._adapters = RowAdapters(stack.model.adapters)

    def hold(self, network: Any) -> None:
        """Have the model's weights in the dtype of its products."""
        cast_weights(network)

    def prepare(self, rows: Sequence[ServedRow]) -> None:
        """Choose who reads the rows that have no reader yet."""
        super().prepare(rows)
        without = [row for row in rows if row.reader is None]
        if not without:
            return
        found = self.choices([row.ids for row in without])
        for row, choice in zip(without, found, strict=True):
            row.chosen(choice.name, choice.number, _as_told(choice))

    def choices(self, texts: Sequence[Sequence[int]]) -> "list[TextChoice]":
        """Return who reads each text."""
        return self._stack.choices(texts)

    def hidden(self, batch: Batch) -> Tensor:
        """Return x_BTD after the final norm."""
        names = [row_adapter(chunk.row) for chunk in batch.chunks]
        with self._adapters.reading(names):
            return self.run(batch)


class SteadyAdapters(SteadyNetwork, TextAdapters):
    """The same in bf16."""

    def hold(self, network: Any) -> None:
        """Have the model compute each row as it is alone."""
        self.make_steady(network)
        self.make_steady_silu(network)

    def choices(self, texts: Sequence[Sequence[int]]) -> "list[TextChoice]":
        """Return who reads each text, which is read by itself."""
        return [self._stack.choice(ids) for ids in texts]


def row_adapter(row: ServedRow) -> str | None:
    """Return the adapter that a row is read under; None: the base reads it."""
    return None if row.reader == BASE_READER else row.reader


def _as_told(choice: "TextChoice") -> RequestChoice:
    """Return a router's choice as it is told, likeliest first."""
    # stable: of equally likely ones the first stays first
    ranked = sorted(choice.probabilities.items(), key=lambda each: -each[1])
    expert, confidence = ranked[0]
    return RequestChoice(expert, confidence, tuple(ranked), (choice.name,))
