"""The finished stack of adapters: base, adapters and the router that chooses one for a text.

Invariant: the first tokens of a text are the base's, and what they are on average chooses; whoever
is chosen reads the text from its beginning and says everything after them. No later token changes a
choice.

B texts, T tokens, S layers that are read, C classes, E experts, D model width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ....model.language_model import filled
from ... import Parts
from ..config import FfnMoeConfig
from ..parts import token_loss
from ..sections import BASE
from .model import Adapted, stored_adapters
from .router import SETTINGS, WEIGHTS, TextRouter


@dataclass(frozen=True)
class TextChoice:
    """Who reads a text, and how likely each of the experts and the base are its own."""

    number: int  # of `names`
    name: str
    probabilities: dict[str, float]


@dataclass(frozen=True)
class RequestStack:
    """Base, adapters and router, assembled and frozen."""

    model: Adapted
    experts: tuple[str, ...]
    text_router: TextRouter

    @property
    def names(self) -> tuple[str, ...]:
        """Who may read a text: the experts in order, then the base."""
        return (*self.experts, BASE)

    def choose(self, ids_BT: torch.Tensor, bf16: bool = False) -> torch.Tensor:
        """Return index_B into `names`, by the first tokens of each text."""
        x_BSD = self.text_router.features(self.model, ids_BT, bf16)
        return self.text_router.router.choose(x_BSD)

    def choice(self, ids: Sequence[int]) -> TextChoice:
        """Return who reads one text."""
        return self.choices([ids])[0]

    def choices(self, texts: Sequence[Sequence[int]]) -> list[TextChoice]:
        """Return who reads each text."""
        # equally long ones run together, and most are at least as long as what chooses
        by_length: dict[int, list[int]] = {}
        for at, ids in enumerate(texts):
            length = min(len(ids), self.text_router.prompt_tokens)
            by_length.setdefault(length, []).append(at)
        found: dict[int, TextChoice] = {}
        for length, places in by_length.items():
            first = [list(texts[at][:length]) for at in places]
            found |= zip(places, self._choices(first), strict=True)
        return [found[at] for at in range(len(texts))]

    def _choices(self, ids: list[list[int]]) -> list[TextChoice]:
        """Return who reads texts of which these are the first tokens, equally many."""
        ids_BT = torch.tensor(ids, device=self.model.head.device)
        router = self.text_router.router
        p_BC = router.probabilities(self.text_router.features(self.model, ids_BT, False))
        out = []
        for number, p_C in zip(router.decide(p_BC).tolist(), p_BC.tolist(), strict=True):
            likely = [round(p, 6) for p in p_C]
            # a base without a class of its own has no probability, only what is below the threshold
            probabilities = dict(zip(self.names, likely, strict=False))
            out.append(TextChoice(number, self.names[number], probabilities))
        return out

    def reader(self, number: int) -> Adapted:
        """Return the model as the expert of that number changes it, or as the base is."""
        name = self.names[number]
        return self.model.under(None if name == BASE else name)

    @contextmanager
    def reading(self, number: int) -> Iterator[None]:
        """Have the network be what `reader` gives while the context is open."""
        with self.reader(number).active():
            yield

    def token_loss(self, ids_BT: torch.Tensor, bf16: bool = False) -> torch.Tensor:
        """Return nats_BT of every token after the first, each row a text of its own."""
        index_B = self.choose(ids_BT[:, :-1], bf16)
        nats_BT = token_loss(self.model, filled, ids_BT, bf16)
        # what is predicted from the first tokens is predicted before there is a choice
        first = self.text_router.prompt_tokens - 1
        for number in index_B.unique().tolist():
            chosen_B = index_B == number
            own_BT = token_loss(self.reader(number), filled, ids_BT[chosen_B], bf16)
            nats_BT[chosen_B, first:] = own_BT[:, first:]
        return nats_BT


def assemble(cfg: FfnMoeConfig, parts: Parts) -> RequestStack:
    """Build the finished stack from its parts.

    Raises MissingArtifact, DamagedArtifact, or MismatchError for adapters made on another base.
    """
    return join(cfg, parts, stored_adapters(cfg, parts))


def join(cfg: FfnMoeConfig, parts: Parts, adapted: Adapted) -> RequestStack:
    """Build the finished stack from a base and adapters that are open already."""
    settings = parts.folder("train_router") / SETTINGS
    weight_SCD = parts.tensors("train_router", WEIGHTS)["weight"]
    router = TextRouter.read(settings, weight_SCD.to(adapted.head.device), cfg.experts)
    return RequestStack(adapted, cfg.experts, router)
