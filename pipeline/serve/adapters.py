"""A bundle of adapters opened to answer: who reads a text is chosen by its first tokens, and goes
on with it.

The network is the stack that `reassemble` builds, which is transformers' own class with PEFT's
layers; on opening, what it computes without adapters is held against the class that any user of the
bundle would load.

B sequences, T tokens, V vocabulary, D model width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..families import family
from ..protocols import held
from .engine import CompletionEngine, open_model, probe
from .gates import GateChoice
from .generation import Token


@dataclass(frozen=True)
class OneReader:
    """The same choice at every position of a text."""

    number: int

    def positions(self, first: int, end: int) -> list[GateChoice]:
        """Return what was chosen at positions first to end - 1."""
        return [GateChoice([[self.number]], [[1.0]])] * (end - first)


class AdapterEngine(CompletionEngine):
    """An open bundle of adapters; the last of its experts is the base, which has none.

    Raises MissingArtifact, DamagedArtifact or NewerStore for one that cannot be served,
    MismatchError for one that does not compute what its stack does.
    """

    def _open(self, folder: Path) -> None:
        self.stack = family(self.about["family"]).reassemble(folder)
        self.experts = self.stack.names
        self.model = open_model(folder)
        self._check_logits(folder, self._base_logits())
        # both are the same base: one of them is enough
        self.model = self.stack.model.network

    def _base_logits(self) -> torch.Tensor:
        """Return logits_TV of the stack's base on the probe."""
        base = self.stack.model
        ids_BT = probe(self.context_tokens, len(base.head))
        with torch.no_grad():
            h_BTD = base.hidden(ids_BT)
        return (h_BTD[0].float() @ base.head.float().T).float()

    def route(self, ids: Sequence[int]) -> list[Token]:
        """Return an encoded text's own tokens, each with who reads the text."""
        with self._exclusive(ids) as reader:
            led = len(self.start_ids)
            return self._tokens(list(ids[led:]), reader.positions(led, len(ids)))

    @contextmanager
    def _exclusive(self, ids: Sequence[int]) -> Iterator[OneReader]:
        """Have the model to oneself, as the one who reads a text of these tokens changes it."""
        with held(self._lock), torch.no_grad():
            choice = self.stack.choice(ids)
            with self.stack.reading(choice.number):
                yield OneReader(choice.number)
