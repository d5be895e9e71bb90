"""The finished stack: a router that names the expert, the experts, and an answer that says who gave
it and how sure.

Invariant: weights of experts are never averaged. Media are encoded once per request, for router and
experts alike; which adapters answer follows from the router's probabilities alone.

N requests, C choices (the experts, then none where there is one), F features of a request,
D width of the base, V vocabulary.
"""

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel

from ...config.base import NONE
from ...errors import MismatchError
from ...metrics.routing import softmax
from .. import Parts
from .base import LoadedBase
from .chat import ChatTurn
from .config import AdapterRunConfig
from .inference import BASE, BatchRow, GenerationLimits, MultiAdapterModel, Reply, Request
from .media import MediaFeatures, Medium
from .peft_io import label_ids, load
from .router import Calibration, routing_prompt
from .sections import AdapterExpertConfig

ROUTER = "router"  # the router's adapter
CHUNK = 64  # requests whose features are held at once
CHARACTERS_PER_TOKEN = 8  # at most, of a prompt that is worth encoding to count its tokens


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
        return cls(
            name=entry.name,
            label=entry.label,
            task=entry.task or entry.name,
            description=entry.description,
            metric=entry.metric,
            new_tokens=entry.max_new_tokens,
        )


@dataclass(frozen=True)
class Policy:
    """Who answers, given the router's probabilities."""

    # of confidence, below which the likeliest top_k experts answer and the best answer is taken
    threshold: float
    top_k: int
    fallback: str  # who answers a request that is no expert's: base, or an expert

    def select(self, ranked: Sequence[tuple[str, float]]) -> tuple[str, ...]:
        """Return who answers, from the choices with their probabilities, likeliest first."""
        first, confidence = ranked[0]
        if first == NONE:
            return (self.fallback,)
        experts = tuple(name for name, _ in ranked if name != NONE)
        if confidence >= self.threshold:
            return experts[:1]
        return experts[: self.top_k]


@dataclass(frozen=True)
class Choice:
    """Where a request goes: the likeliest expert (or none), how likely, and every choice, likeliest
    first."""

    expert: str
    confidence: float
    alternatives: tuple[tuple[str, float], ...]
    answered_by: tuple[str, ...]  # an expert, the base, or several to be ranked


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
    prompt_tokens: int  # those of media included
    completion_tokens: int
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
        model: MultiAdapterModel,
        experts: Sequence[ExpertInfo],
        calibration: Calibration,
        policy: Policy,
    ):
        self.model = model
        self.experts = tuple(experts)
        self.calibration = calibration
        self.policy = policy
        self.names = tuple(expert.name for expert in experts)
        self.choices = calibration.names
        self._new_tokens = {expert.name: expert.new_tokens for expert in experts}
        # the base stands in for any expert
        longest = max(expert.new_tokens for expert in experts)
        self._new_tokens[BASE] = longest
        missing = {*self.names, ROUTER} - set(model.adapters)
        if missing:
            raise MismatchError(
                f"the stack has no adapter for {', '.join(sorted(missing))}", stage="train_experts"
            )
        if set(self.choices) - {NONE} != set(self.names):
            raise MismatchError(
                f"the router chooses among {', '.join(self.choices)}, the stack has "
                f"{', '.join(self.names)}",
                stage="train_router",
            )
        ids = label_ids(model.chat.tokenizer, calibration.labels)
        self._label_ids = list(ids.values())

    def route(self, requests: Sequence[Request]) -> list[Choice]:
        """Return where each request goes. Raises DataError for a request over the limits."""
        logit_NC = self.logits(requests)
        prob_NC = softmax(logit_NC, self.calibration.temperature)
        return [self._choice(prob_C) for prob_C in prob_NC]

    def answer(
        self,
        requests: Sequence[Request],
        seconds: float | None = None,
        max_new_tokens: int | None = None,
        expert: str | None = None,
    ) -> list[Answer]:
        """Return the stack's answer to each request, in order.

        Past `seconds` no further token is begun; `max_new_tokens` is a limit beside the experts'
        own; `expert` answers whatever the router says. Raises DataError for a request over the
        limits, before anything runs.
        """
        out = []
        for chunk in self._chunks(requests):
            out += self._answers(chunk, seconds, max_new_tokens, expert)
        return out

    def generate(
        self,
        requests: Sequence[Request],
        adapters: Sequence[Sequence[str]],
        max_new_tokens: Sequence[int | None] | None = None,
    ) -> list[dict[str, Reply]]:
        """Return what each of a request's adapters answers, whatever the router would say; one
        sequence per request.

        `max_new_tokens` limits each request's answers beside the experts' own limits. Raises
        DataError for a request over the limits, or an adapter that is not there.
        """
        limits = max_new_tokens or [None] * len(requests)
        out: list[dict[str, Reply]] = []
        for chunk in self._chunks(requests):
            done = len(out)
            part = slice(done, done + len(chunk))
            encoded = self._encoded(chunk)
            out += self._generate(chunk, encoded, adapters[part], limits[part])
        return out

    def logits(self, requests: Sequence[Request], adapter: str = ROUTER) -> np.ndarray:
        """Return logit_NC over the choices, before calibration: the router's, or those of another
        adapter so asked."""
        # what follows counts the choices, also where there is nothing to choose for
        if not requests:
            return np.empty((0, len(self.choices)))
        parts = []
        for chunk in self._chunks(requests):
            encoded = self._encoded(chunk)
            parts.append(self._logits(chunk, encoded, adapter))
        return np.concatenate(parts)

    def pooled(self, requests: Sequence[Request]) -> np.ndarray:
        """Return x_NF of the frozen base: the mean of its last hidden states over a request."""
        if not requests:
            return np.empty((0, 1))
        parts = []
        for chunk in self._chunks(requests):
            encoded = self._encoded(chunk)
            rows = []
            for request, features in zip(chunk, encoded, strict=True):
                rows.append(self._row(request, features, BASE))
            x_ND = self.model.pooled(rows)
            parts.append(x_ND.numpy())
        return np.concatenate(parts)

    def new_tokens(self, reader: str) -> int:
        """Return how many tokens a reader's answer may have; an adapter that is no expert of this
        stack (the router) answers with its label."""
        return self._new_tokens.get(reader, 1)

    def prompt_ids(self, prompt: str, media: Sequence[Medium]) -> tuple[int, ...]:
        """Return what is read of a request: its turn, with a place for every token of its
        media."""
        chat = self.model.chat
        # not by `chat.prompt_ids`, which keeps what it was asked: a client's words are nobody's
        # but its own, and thousands of long prompts take gigabytes
        ids = chat.turn_ids([ChatTurn("user", prompt, len(media))])
        return tuple(chat.expand(ids, [chat.media.tokens(medium) for medium in media]))

    def routing_ids(self, prompt: str, media: Sequence[Medium]) -> tuple[int, ...]:
        """Return what the router reads of it."""
        return self.prompt_ids(routing_prompt(self.calibration.instruction, prompt), media)

    def choice(self, logit_V: torch.Tensor) -> Choice:
        """Return where a request goes, by the router's logits after its `routing_ids`."""
        logit_C = logit_V[self._label_ids].float().cpu()
        logit_NC = logit_C.unsqueeze(0).numpy()
        return self._choice(softmax(logit_NC, self.calibration.temperature)[0])

    def _chunks(self, requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
        # all are checked before any runs, so that a bad one costs nothing
        for request in requests:
            self.model.check(request)
        for start in range(0, len(requests), CHUNK):
            yield requests[start : start + CHUNK]

    def _encoded(self, requests: Sequence[Request]) -> list[tuple[MediaFeatures, ...]]:
        """Return the base's features of each request's media."""
        media: list[Medium] = []
        for request in requests:
            media += request.media
        # together, as the encoder is faster at many than at one after another
        features = self.model.encode_media(media)
        out = []
        for request in requests:
            own = len(request.media)
            out.append(tuple(features[:own]))
            features = features[own:]
        return out

    def _row(
        self,
        request: Request,
        features: tuple[MediaFeatures, ...],
        adapter: str,
        prompt: str | None = None,
    ) -> BatchRow:
        """Return a row, with the adapter's own features where it changes the encoder."""
        if adapter in self.model.encoder_adapters:
            features = tuple(self.model.encode_media(request.media, adapter))
        if prompt is None:
            prompt = request.prompt
        ids = self.model.encode(prompt, features)
        return BatchRow(ids, features, adapter)

    def _logits(
        self,
        requests: Sequence[Request],
        encoded: Sequence[tuple[MediaFeatures, ...]],
        adapter: str = ROUTER,
    ) -> np.ndarray:
        rows = []
        for request, features in zip(requests, encoded, strict=True):
            prompt = routing_prompt(self.calibration.instruction, request.prompt)
            rows.append(self._row(request, features, adapter, prompt))
        return self.model.label_logits(rows, self._label_ids).numpy()

    def _choice(self, prob_C: np.ndarray) -> Choice:
        # stable: of equally probable choices the first one, on every machine
        order = np.argsort(-prob_C, kind="stable")
        ranked = tuple((self.choices[i], float(prob_C[i])) for i in order)
        expert, confidence = ranked[0]
        return Choice(
            expert=expert,
            confidence=confidence,
            alternatives=ranked,
            answered_by=self.policy.select(ranked),
        )

    def _answers(
        self,
        requests: Sequence[Request],
        seconds: float | None,
        max_new_tokens: int | None,
        expert: str | None,
    ) -> list[Answer]:
        started = time.monotonic()
        encoded = self._encoded(requests)
        logit_NC = self._logits(requests, encoded)
        prob_NC = softmax(logit_NC, self.calibration.temperature)
        choices = [self._choice(prob_C) for prob_C in prob_NC]
        route_s = time.monotonic() - started
        if expert is None:
            adapters = [choice.answered_by for choice in choices]
        else:
            adapters = [(expert,)] * len(requests)
        # routing was part of the time that there is
        left = None if seconds is None else seconds - route_s
        limits = [max_new_tokens] * len(requests)
        generated = self._generate(requests, encoded, adapters, limits, left)
        generate_s = time.monotonic() - started - route_s
        out = []
        for choice, generations in zip(choices, generated, strict=True):
            out.append(_best(choice, generations, route_s, generate_s))
        return out

    def _generate(
        self,
        requests: Sequence[Request],
        encoded: Sequence[tuple[MediaFeatures, ...]],
        adapters: Sequence[Sequence[str]],
        max_new_tokens: Sequence[int | None],
        seconds: float | None = None,
    ) -> list[dict[str, Reply]]:
        """Return what each of a request's adapters answers; all of them run in mixed batches."""
        rows = []
        limits = []
        owners = []  # the number of the request that a row is of
        for i, request in enumerate(requests):
            most = max_new_tokens[i] or sys.maxsize
            for name in adapters[i]:
                rows.append(self._row(request, encoded[i], name))
                limits.append(min(self.new_tokens(name), most))
                owners.append(i)
        out: list[dict[str, Reply]] = [{} for _ in requests]
        generations = self.model.generate(rows, limits, seconds)
        for i, row, generation in zip(owners, rows, generations, strict=True):
            out[i][row.adapter] = generation
        return out


def rank(choice: Choice, reader: str, log_probability: float) -> float:
    """Return the logarithm of the router's probability of a reader times that of its answer, the
    mean over its tokens."""
    # the base has no probability of its own, and a probability of 0 no logarithm
    probability = max(dict(choice.alternatives).get(reader, 1.0), 1e-12)
    return math.log(probability) + log_probability


def _best(
    choice: Choice,
    generations: Mapping[str, Reply],
    route_s: float,
    generate_s: float,
) -> Answer:
    """Return the answer with the greatest product of the router's and its own mean probability."""

    def own_rank(name: str) -> float:
        return rank(choice, name, generations[name].log_probability)

    best, *rest = sorted(generations, key=own_rank, reverse=True)
    kept = generations[best]
    others = [(name, generations[name].text) for name in rest]
    return Answer(
        text=kept.text,
        expert=best,
        confidence=choice.confidence,
        alternatives=choice.alternatives,
        finish=kept.finish,
        prompt_tokens=kept.prompt_tokens,
        completion_tokens=kept.completion_tokens,
        route_s=route_s,
        generate_s=generate_s,
        others=tuple(others),
    )


def assemble(
    cfg: AdapterRunConfig,
    parts: Parts,
    base: LoadedBase,
) -> AdapterStack:
    """Build the finished stack from the run's parts on its open base.

    Raises MissingArtifact, DamagedArtifact, or MismatchError for parts made on another base.
    """
    folders = {name: parts.folder("train_experts", name) for name in cfg.experts}
    folders[ROUTER] = parts.folder("train_router")
    experts = [ExpertInfo.of(cfg.loras.entry(name)) for name in cfg.experts]
    return build_stack(
        base,
        folders,
        experts,
        calibration=Calibration.read(folders[ROUTER]),
        policy=policy_of(cfg),
        limits=limits_of(cfg),
    )


def build_stack(
    base: LoadedBase,
    folders: Mapping[str, Path],
    experts: Sequence[ExpertInfo],
    calibration: Calibration,
    policy: Policy,
    limits: GenerationLimits,
) -> AdapterStack:
    """Load the adapters kept in folders, by name, on an open base. Raises MismatchError or
    DamagedArtifact."""
    model: PeftModel | None = None
    for name, folder in folders.items():
        # the first one wraps the base, the others join it
        model = load(model or base.model, folder, name, base.pin)
    if model is None:
        raise ValueError("a stack has at least its router's adapter")
    return AdapterStack(MultiAdapterModel(model, base.chat, limits), experts, calibration, policy)


def policy_of(cfg: AdapterRunConfig) -> Policy:
    """Return who answers, as the configuration says it."""
    router = cfg.loras.router
    return Policy(router.threshold, router.top_k, router.fallback)


def limits_of(cfg: AdapterRunConfig) -> GenerationLimits:
    """Return the largest request that some adapter was trained on."""
    tokens = 0
    for name in (*cfg.experts, ROUTER):
        tokens = max(tokens, cfg.loras.options(name).max_tokens)
    return GenerationLimits(
        media=cfg.dataset.limits.max_media,
        prompt_characters=CHARACTERS_PER_TOKEN * tokens,
        tokens=tokens,
        batch_rows=cfg.evaluate.batch_rows,
    )
