"""Completions in OpenAI's format, with the experts of every token."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Request
from fastapi.params import Depends
from pydantic import Field

from ..store.bundle import about
from .adapters import AdapterEngine
from .engine import CompletionEngine, expert_shares, top_expert
from .generation import Sampling, Token
from .limits import RequestLimits
from .protocol import (
    DIGITS,
    Body,
    OnlyFalse,
    OnlyNone,
    OnlyOne,
    OnlyZero,
    Service,
    body_schema,
    following,
    read_body,
)
from .refusals import ApiError

# OpenAI's own limit of stop strings; their length bounds how much text each new token is looked
# for in.
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 200

# By the form of a bundle's experts, where it says one; who chooses for each token says none.
ENGINES: dict[str, type[CompletionEngine]] = {"adapter": AdapterEngine}

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class CompletionBody(Body):
    """What /v1/completions takes."""

    model: str | None = Field(None, description="Name of the model; none: the one that is served")
    prompt: str = Field(description="Text to go on with; an empty one starts a new text")
    max_tokens: int = Field(16, ge=1, description="Tokens to draw at most")
    temperature: float = Field(1.0, ge=0, le=2, description="0 takes the likeliest token each time")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Share of the probability that tokens are drawn from"
    )
    # What torch takes for a seed without wrapping it around.
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="Same seed and request, same text"
    )
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = Field(
        None, description="Strings that end the text and are not part of it"
    )
    return_experts: bool = Field(False, description="Also tell which experts spoke each token")
    user: str | None = Field(None, description="Taken and not used")
    # The rest of OpenAI's fields, of which only the default is served.
    stream: OnlyFalse = False
    echo: OnlyFalse = False
    n: OnlyOne = 1
    best_of: OnlyOne = 1
    presence_penalty: OnlyZero = 0
    frequency_penalty: OnlyZero = 0
    logprobs: OnlyNone = None
    suffix: OnlyNone = None
    logit_bias: OnlyNone = None
    stream_options: OnlyNone = None

    def sampling(self, seconds: float) -> Sampling:
        """Return the part that is about drawing tokens; past `seconds` no further one is begun."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=tuple(stop),
            seconds=seconds,
        )


class RouteBody(Body):
    """What /v1/route takes."""

    model: str | None = Field(None, description="Name of the model; none: the one that is served")
    text: str = Field(min_length=1, description="Text whose tokens are to be routed")


class CompletionService(Service):
    """Texts that go on, each token with its experts."""

    addresses = "GET /healthz, GET /v1/models, POST /v1/completions, POST /v1/route"
    engine: CompletionEngine

    def __init__(self, folder: Path, limits: RequestLimits | None):
        super().__init__(folder, limits)
        kind = ENGINES.get(str(about(folder).get("form")), CompletionEngine)
        self.engine = kind(folder)
        self.limits = limits or RequestLimits()

    def add_to(self, app: FastAPI, guarded: Sequence[Depends]) -> None:
        """Give an application /v1/completions and /v1/route, behind the guards."""

        @app.post(
            "/v1/completions", dependencies=guarded, openapi_extra=body_schema(CompletionBody)
        )
        async def completions(request: Request) -> dict:
            body = await read_body(request, CompletionBody, self.limits.body_bytes)
            async with following(request):
                return await self.complete(body)

        @app.post("/v1/route", dependencies=guarded, openapi_extra=body_schema(RouteBody))
        async def route(request: Request) -> dict:
            body = await read_body(request, RouteBody, self.limits.body_bytes)
            async with following(request):
                return await self.route(body)

    def details(self) -> dict:
        """Return the experts of a token and the longest text, in tokens."""
        top_k = self.engine.about["top_k"]
        return {"top_k": top_k, "context_tokens": self.engine.context_tokens}

    async def complete(self, body: CompletionBody) -> dict:
        """Return a text that goes on. Raises ApiError."""
        self.check_model(body.model)
        if body.max_tokens > self.limits.new_tokens:
            raise ApiError(
                400,
                f"max_tokens: at most {self.limits.new_tokens} here (found {body.max_tokens})",
                "max_tokens",
            )
        # Encoding has a thread too: a megabyte of text would hold up every other request.
        ids = await self.run(lambda: self._encode(body.prompt, "prompt", body.max_tokens))
        sampling = body.sampling(self.limits.seconds)
        done = await self.run(lambda: self.engine.complete(ids, sampling))
        choice = {"index": 0, "text": done.text, "logprobs": None, "finish_reason": done.finish}
        usage = {
            "prompt_tokens": len(ids),
            "completion_tokens": done.completion_tokens,
            "total_tokens": len(ids) + done.completion_tokens,
        }
        answer = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.engine.name,
            "choices": [choice],
            "usage": usage,
        }
        if body.return_experts:
            answer["experts"] = self._routing(done.tokens)
        return answer

    async def route(self, body: RouteBody) -> dict:
        """Return a text's tokens with the experts that read them. Raises ApiError."""
        self.check_model(body.model)
        ids = await self.run(lambda: self._encode(body.text, "text", 0))
        tokens = await self.run(lambda: self.engine.trace(ids))
        return {"object": "route", "model": self.engine.name, **self._routing(tokens)}

    def _encode(self, text: str, param: str, new_tokens: int) -> list[int]:
        """Return a text's tokens. Raises ApiError when they and the new ones are over the
        context."""
        ids = self.engine.encode(text)
        context = self.engine.context_tokens
        if len(ids) + new_tokens <= context:
            return ids
        wanted = f" and {new_tokens} are to be drawn" if new_tokens else ""
        advice = " or lower max_tokens" if new_tokens else ""
        raise ApiError(
            400,
            f"{param}: {len(ids)} tokens{wanted}, but this model's context is {context} tokens; "
            f"shorten {param}{advice}",
            param,
            "context_length_exceeded",
        )

    def _routing(self, tokens: list[Token]) -> dict:
        """Return tokens with their experts, and each expert's share."""
        names = self.engine.speakers
        experts = []
        for name, shares in zip(names, expert_shares(tokens, len(names)), strict=True):
            rounded = {key: round(value, DIGITS) for key, value in shares.items()}
            experts.append({"name": name, **rounded})
        shown = []
        for token in tokens:
            weights = []
            for layer in token.weights:
                weights.append([round(weight, DIGITS) for weight in layer])
            shown.append(asdict(token) | {"top": names[top_expert(token)], "weights": weights})
        return {"experts": experts, "tokens": shown}
