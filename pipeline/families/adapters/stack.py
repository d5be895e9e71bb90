"""The finished stack: a router that names the expert, the experts, and an answer that says who gave
it and how sure.

Invariant: weights of experts are never averaged. Pictures are looked at once per request, by router
and experts alike; which adapters answer follows from the router's probabilities alone.

N requests, C choices (the experts, then none where there is one), F features of a request.
"""

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL.Image import Image

from ...config.base import NONE
from ...errors import MismatchError
from ...metrics.routing import softmax
from ..lora_vlm.base import open_base
from ..lora_vlm.config import LoraVlmConfig
from .base import LoadedBase
from .chat import Chat
from .config import AdapterExpertConfig
from .inference import BASE, BatchRow, Generation, GenerationLimits, MultiAdapterModel, Request
from .peft_io import label_ids, load
from .router import Calibration, routing_prompt

ROUTER = "router"  # the router's adapter
CHUNK = 64  # requests whose pictures' features are held at once


@dataclass(frozen=True)
class ExpertInfo:
    """An expert as the stack knows it."""

    name: str
    label: str
    task: str
    description: str
    metric: str
    new_tokens: int  # of an answer, at most

    @classmethod
    def of(cls, entry: AdapterExpertConfig) -> "ExpertInfo":
        """Return what the stack needs to know of an expert's settings."""
        task = entry.task or entry.name
        return cls(
            entry.name, entry.label, task, entry.description, entry.metric, entry.max_new_tokens
        )


@dataclass(frozen=True)
class Policy:
    """Who answers, given the router's probabilities."""

    # of confidence, below which the likeliest top_k experts answer and the best answer is taken
    threshold: float
    top_k: int
    fallback: str  # who answers a request that is no expert's: base, or an expert

    def runs(self, ranked: Sequence[tuple[str, float]]) -> tuple[str, ...]:
        """Return who answers, from the choices with their probabilities, likeliest first."""
        first, confidence = ranked[0]
        if first == NONE:
            return (self.fallback,)
        experts = tuple(name for name, _ in ranked if name != NONE)
        return experts[: 1 if confidence >= self.threshold else self.top_k]


@dataclass(frozen=True)
class Choice:
    """Where a request goes: the likeliest expert (or none), how likely, and every choice, likeliest
    first."""

    expert: str
    confidence: float
    alternatives: tuple[tuple[str, float], ...]
    runs: tuple[str, ...]  # who answers: an expert, the base, or several to be ranked


@dataclass(frozen=True)
class Answer:
    """What was answered, by whom, and how long its batch took."""

    text: str
    expert: str  # that gave it; base when no expert did
    confidence: float  # of the router in its first choice
    alternatives: tuple[
        tuple[str, float], ...
    ]  # every choice with its probability, likeliest first
    finish: str  # stop or length
    given: int  # tokens of the request, its pictures' included
    drawn: int  # tokens of the answer
    route_s: float
    generate_s: float
    others: tuple[tuple[str, str], ...] = ()  # (expert, text) that were ranked below


class AdapterStack:
    """Base, experts and router, assembled.

    Raises MismatchError for an expert that is not loaded or that the router does not know,
    ConfigError for labels that are not one token each.
    """

    def __init__(
        self,
        mixed: MultiAdapterModel,
        members: Sequence[ExpertInfo],
        calibration: Calibration,
        policy: Policy,
    ):
        self.mixed, self.members, self.calibration, self.policy = (
            mixed,
            tuple(members),
            calibration,
            policy,
        )
        self.names = tuple(member.name for member in members)
        self.choices = calibration.names
        self._new_tokens = {member.name: member.new_tokens for member in members}
        self._new_tokens[BASE] = max(self._new_tokens.values())
        missing = {*self.names, ROUTER} - set(mixed.adapters)
        if missing:
            raise MismatchError(
                f"the stack has no adapter for {', '.join(sorted(missing))}; run train_experts"
            )
        if set(self.choices) - {NONE} != set(self.names):
            raise MismatchError(
                f"the router chooses among {', '.join(self.choices)}, the stack has {', '.join(self.names)}; "
                "run train_router"
            )
        self._label_ids = list(label_ids(mixed.chat.tokenizer, calibration.labels).values())

    def route(self, requests: Sequence[Request]) -> list[Choice]:
        """Return where each request goes. Raises DataError for a request over the limits."""
        return [
            self._choice(prob_C)
            for prob_C in softmax(self.logits(requests), self.calibration.temperature)
        ]

    def request(self, prompt: str, images: Sequence[Image]) -> Request:
        """Return a question about pictures as `answer` and `route` take it; serving knows no other
        class of ours."""
        return Request(prompt, tuple(images))

    def answer(
        self,
        requests: Sequence[Request],
        seconds: float | None = None,
        most: int | None = None,
        expert: str | None = None,
    ) -> list[Answer]:
        """Return the stack's answer to each request, in order.

        Past `seconds` no further token is begun; `most` is a limit of new tokens beside the
        experts' own; `expert` answers whatever the router says. Raises DataError for a request over
        the limits, before anything runs.
        """
        out = []
        for chunk in self._chunks(requests):
            out += self._answers(chunk, seconds, most, expert)
        return out

    def trial(
        self,
        requests: Sequence[Request],
        adapters: Sequence[Sequence[str]],
        most: Sequence[int | None] | None = None,
    ) -> list[dict[str, Generation]]:
        """Return what each of a request's adapters answers, whatever the router would say; one
        sequence per request.

        `most` limits each request's new tokens beside the experts' own limits. Raises DataError for
        a request over the limits, or an adapter that is not there.
        """
        out, wanted = [], iter(zip(adapters, most or [None] * len(requests), strict=True))
        for chunk in self._chunks(requests):
            names, limits = zip(*(next(wanted) for _ in chunk), strict=True)
            out += self._said(chunk, self._seen(chunk), names, limits)
        return out

    def logits(self, requests: Sequence[Request], adapter: str = ROUTER) -> np.ndarray:
        """Return logit_NC over the choices, before calibration: the router's, or those of another
        adapter so asked."""
        parts = [
            self._logits(chunk, self._seen(chunk), adapter) for chunk in self._chunks(requests)
        ]
        return np.concatenate(parts) if parts else np.empty((0, len(self.choices)))

    def pooled(self, requests: Sequence[Request]) -> np.ndarray:
        """Return x_NF of the frozen base: the mean of its last hidden states over a request."""
        parts = []
        for chunk in self._chunks(requests):
            seen = self._seen(chunk)
            rows = [
                self._row(request, sights, BASE)
                for request, sights in zip(chunk, seen, strict=True)
            ]
            parts.append(self.mixed.pooled(rows).numpy())
        return np.concatenate(parts) if parts else np.empty((0, 1))

    def _chunks(self, requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
        for request in requests:
            self.mixed.check(request)
        for start in range(0, len(requests), CHUNK):
            yield requests[start : start + CHUNK]

    def _seen(self, requests: Sequence[Request]) -> list[tuple]:
        flat = iter(self.mixed.see([image for request in requests for image in request.images]))
        return [tuple(next(flat) for _ in request.images) for request in requests]

    def _row(
        self, request: Request, sights: tuple, adapter: str, prompt: str | None = None
    ) -> BatchRow:
        """Return a row, with what an adapter of the vision tower sees where the adapter is one."""
        if adapter in self.mixed.sighted:
            sights = tuple(self.mixed.see(request.images, adapter))
        return BatchRow(
            self.mixed.encode(request.prompt if prompt is None else prompt, sights), sights, adapter
        )

    def _logits(
        self, requests: Sequence[Request], seen: Sequence[tuple], adapter: str = ROUTER
    ) -> np.ndarray:
        instruction = self.calibration.instruction
        rows = [
            self._row(request, sights, adapter, routing_prompt(instruction, request.prompt))
            for request, sights in zip(requests, seen, strict=True)
        ]
        return self.mixed.label_logits(rows, self._label_ids).numpy()

    def _choice(self, prob_C: np.ndarray) -> Choice:
        order = np.argsort(-prob_C, kind="stable")
        ranked = tuple((self.choices[i], float(prob_C[i])) for i in order)
        expert, confidence = ranked[0]
        return Choice(expert, confidence, ranked, self.policy.runs(ranked))

    def _answers(self, requests: Sequence[Request], seconds, most, expert) -> list[Answer]:
        started = time.monotonic()
        seen = self._seen(requests)
        prob_NC = softmax(self._logits(requests, seen), self.calibration.temperature)
        choices = [self._choice(prob_C) for prob_C in prob_NC]
        routed = time.monotonic()
        left = None if seconds is None else seconds - (routed - started)
        runs = [choice.runs if expert is None else (expert,) for choice in choices]
        said = self._said(requests, seen, runs, [most] * len(requests), left)
        times = {"route_s": routed - started, "generate_s": time.monotonic() - routed}
        return [_answer(choice, each, times) for choice, each in zip(choices, said, strict=True)]

    def _said(self, requests, seen, adapters, most, seconds=None) -> list[dict[str, Generation]]:
        """Return what each of a request's adapters answers; all of them run in mixed batches."""
        rows, at, limits = [], [], []
        for i, (request, sights, names, limit) in enumerate(
            zip(requests, seen, adapters, most, strict=True)
        ):
            rows += [self._row(request, sights, name) for name in names]
            at += [(i, name) for name in names]
            limits += [min(self._new_tokens.get(name, 1), limit or sys.maxsize) for name in names]
        texts = self.mixed.texts(rows, limits, seconds)
        out: list[dict[str, Generation]] = [{} for _ in requests]
        for (i, name), said in zip(at, texts, strict=True):
            out[i][name] = said
        return out


def _answer(choice: Choice, said: Mapping[str, Generation], times: Mapping[str, float]) -> Answer:
    """Return the answer with the greatest product of the router's and its own (mean) probability."""
    prior = dict(choice.alternatives)

    def rank(name: str) -> float:
        return math.log(max(prior.get(name, 1.0), 1e-12)) + said[name].log_probability

    best, *rest = sorted(said, key=rank, reverse=True)
    kept = said[best]
    return Answer(
        kept.text,
        best,
        choice.confidence,
        choice.alternatives,
        kept.finish,
        kept.given,
        kept.drawn,
        others=tuple((name, said[name].text) for name in rest),
        **times,
    )


def assemble(cfg: LoraVlmConfig, parts) -> AdapterStack:
    """Build the finished stack from the run's parts.

    Raises MissingArtifact, DamagedArtifact, or MismatchError for parts made on another base.
    """
    folders = {name: parts.folder("train_experts", name) for name in cfg.experts}
    router = parts.folder("train_router")
    members = [ExpertInfo.of(cfg.loras.entry(name)) for name in cfg.experts]
    opened = open_base(parts.folder("train_shared"), cfg.loras.base)
    calibration = Calibration.read(router)
    return put_together(
        opened, folders | {ROUTER: router}, members, calibration, policy_of(cfg), limits_of(cfg)
    )


def put_together(
    opened: LoadedBase,
    folders: Mapping[str, Path],
    members,
    calibration,
    policy,
    limits: GenerationLimits,
) -> AdapterStack:
    """Load the adapters kept in folders, by name, on an open base. Raises MismatchError or
    DamagedArtifact."""
    model = opened.model
    for name, folder in folders.items():
        model = load(model, folder, name, opened.pin)
    return AdapterStack(
        MultiAdapterModel(model, Chat(opened.processor), limits), members, calibration, policy
    )


def policy_of(cfg: LoraVlmConfig) -> Policy:
    """Return who answers, as the configuration says it."""
    return Policy(cfg.loras.router.threshold, cfg.loras.router.top_k, cfg.loras.router.fallback)


def limits_of(cfg: LoraVlmConfig) -> GenerationLimits:
    """Return the largest request that some adapter was trained on."""
    tokens = max(cfg.loras.options(name).max_tokens for name in (*cfg.experts, ROUTER))
    return GenerationLimits(
        images=cfg.dataset.limits.max_images,
        prompt_characters=8 * tokens,
        tokens=tokens,
        batch_rows=cfg.evaluate.batch_rows,
    )
