"""The form of an answer over one or several texts, whole or as the events of a stream."""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from .answers import Alternative, Seconds, ToldExperts, Usage
from .generation import Generation, Piece, Token
from .sampling_body import SamplingBody
from .service import Service
from .told import DIGITS, Telling, alternatives_told, experts_told, shares_told, tokens_of

Json = dict[str, Any]


class Form(ABC):
    """How the texts that a request asked for are told."""

    kind: str  # in front of an answer's own name
    whole_object: str
    event_object: str

    def __init__(self, service: Service, body: SamplingBody, generations: Sequence[Generation]):
        self.service = service
        self.body = body
        self.generations = generations
        self._common = {
            "id": f"{self.kind}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": body.model or service.engine.name,
        }
        self._reader_told = False

    @abstractmethod
    def choice(self, number: int, telling: Telling) -> Json:
        """Return a text that has ended, less who spoke it."""

    @abstractmethod
    def part(self, number: int, piece: Piece, offset: int) -> Json:
        """Return what a piece adds to a text at some place of it, less who spoke it."""

    @property
    @abstractmethod
    def tells_probabilities(self) -> bool:
        """Whether each token's probability is told."""

    def whole(self, tellings: Sequence[Telling]) -> Json:
        """Return the answer, once all texts have ended."""
        choices = []
        for number, telling in enumerate(tellings):
            choice = self.choice(number, telling)
            if self.body.return_experts:
                choice["experts"] = self._experts(telling.tokens, telling)
            choices.append(choice)
        return {
            **self._common,
            "object": self.whole_object,
            "choices": choices,
            "usage": usage(self.generations),
            **self._reader(),
            "seconds": seconds(self.generations),
        }

    def first(self) -> Iterator[Json]:
        """Yield the events that are sent before any piece has come."""
        return iter(())

    def event(self, number: int, telling: Telling, piece: Piece) -> Json | None:
        """Return the event of a piece, which `telling` has by now; None where there is nothing to
        tell."""
        tells_tokens = self.tells_probabilities or self.body.return_experts
        if not (piece.text or piece.finish or tells_tokens):
            return None
        choice = self.part(number, piece, len(telling.text) - len(piece.text))
        if self.body.return_experts:
            ended = telling if piece.finish else None
            choice["experts"] = self._experts(tokens_of([piece]), ended)
        told = self.of_choices([choice])
        if not (number or self._reader_told):
            self._reader_told = True
            told |= self._reader()
        return told

    def last(self) -> Iterator[Json]:
        """Yield the events that are sent once all texts have ended: the usage, if it is wanted."""
        if self.body.tells_usage:
            yield self.of_choices([]) | {"usage": usage(self.generations)}

    def of_choices(self, choices: list[Json]) -> Json:
        """Return an event with some texts' parts."""
        told = {**self._common, "object": self.event_object, "choices": choices}
        if not self.body.tells_usage:
            return told
        # OpenAI's clients find it in every event once they have asked for it.
        by_now = usage(self.generations) if self.body.tells_usage_by_now else None
        return told | {"usage": by_now}

    def _experts(self, tokens: Sequence[Token], ended: Telling | None) -> ToldExperts:
        """Return who spoke some tokens, and in all of a text that has ended."""
        names = self.service.engine.speakers
        told: ToldExperts = {"tokens": experts_told(tokens, names)}
        if ended is not None:
            told["experts"] = shares_told(ended.tokens, names)
        return told

    def _reader(self) -> Json:
        """Return who reads the first text, where it is one for all of it."""
        generation = self.generations[0]
        told: Json = {}
        if generation.reader is not None and not self.service.is_dense(generation.reader):
            told["expert"] = generation.reader
        if generation.choice is not None:
            alternatives: list[Alternative] = alternatives_told(generation.choice)
            confidence = round(generation.choice.confidence, DIGITS)
            told |= {"confidence": confidence, "alternatives": alternatives}
        return told


def usage(generations: Sequence[Generation]) -> Usage:
    """Return the tokens of some texts; a prompt of several counts once."""
    read = {}
    drawn = 0
    for generation in generations:
        read[id(generation.prompt)] = generation.prompt_tokens
        drawn += generation.completion_tokens
    total = sum(read.values())
    return {"prompt_tokens": total, "completion_tokens": drawn, "total_tokens": total + drawn}


def seconds(generations: Sequence[Generation]) -> Seconds:
    """Return how long some texts took: until it was known who reads the first of them, and from
    then on until the last one ended."""
    routed = min(each.times.between("asked", "routed") for each in generations)
    ended = max(each.times.between("asked", "ended") for each in generations)
    return {"route": round(routed, DIGITS), "generate": round(max(0.0, ended - routed), DIGITS)}
