"""Completions in OpenAI's format, with the experts of every token."""

import secrets
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Request
from pydantic import Field

from .engine import Engine, Sampling, Token, share, strongest
from .protocol import ApiError, Body, RequestLimits, Service, described, only, read

STOPS, STOP_CHARACTERS = 4, 200


DIGITS = 4  # of a weight


_Off, _One, _Zero, _None = only(False), only(1), only(0), only(None)


_Stop = Annotated[str, Field(min_length=1, max_length=STOP_CHARACTERS)]


class CompletionBody(Body):
    """What /v1/completions takes."""

    model: str | None = Field(None, description="Name of the model; none: the one that is served")
    prompt: str = Field(description="Text to go on with; an empty one starts a new text")
    max_tokens: int = Field(16, ge=1, description="Tokens to draw at most")
    temperature: float = Field(1.0, ge=0, le=2, description="0 takes the likeliest token each time")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Share of the probability that tokens are drawn from"
    )
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="Same seed and request, same text"
    )
    stop: _Stop | Annotated[list[_Stop], Field(max_length=STOPS)] | None = Field(
        None, description="Strings that end the text and are not part of it"
    )
    return_experts: bool = Field(False, description="Also tell which experts spoke each token")
    user: str | None = Field(None, description="Taken and not used")
    stream: _Off = False
    echo: _Off = False
    n: _One = 1
    best_of: _One = 1
    presence_penalty: _Zero = 0
    frequency_penalty: _Zero = 0
    logprobs: _None = None
    suffix: _None = None
    logit_bias: _None = None
    stream_options: _None = None

    def sampling(self, seconds: float) -> Sampling:
        """Return the part that is about drawing tokens."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(self.max_tokens, self.temperature, self.top_p, self.seed, stop, seconds)


class RouteBody(Body):
    """What /v1/route takes."""

    model: str | None = Field(None, description="Name of the model; none: the one that is served")
    text: str = Field(min_length=1, description="Text whose tokens are to be routed")


class CompletionService(Service):
    """Texts that go on, each token with its experts."""

    known = "GET /healthz, GET /v1/models, POST /v1/completions, POST /v1/route"

    def __init__(self, folder: Path, limits: RequestLimits | None):
        super().__init__(Engine(folder), limits or RequestLimits())

    def add_to(self, app: FastAPI, guarded: list) -> None:
        """Give an application the endpoints of this service."""

        @app.post("/v1/completions", dependencies=guarded, openapi_extra=described(CompletionBody))
        async def completions(request: Request) -> dict:
            return await self.complete(await read(request, CompletionBody, self.limits.body_bytes))

        @app.post("/v1/route", dependencies=guarded, openapi_extra=described(RouteBody))
        async def route(request: Request) -> dict:
            return await self.route(await read(request, RouteBody, self.limits.body_bytes))

    def model(self) -> dict:
        """Return what /v1/models says of the bundle."""
        e = self.engine
        return {
            "id": e.name,
            "object": "model",
            "created": e.made_at,
            "owned_by": "moleforge",
            "experts": list(e.experts),
            "top_k": e.about["top_k"],
            "context_tokens": e.context_tokens,
        }

    async def complete(self, body: CompletionBody) -> dict:
        """Return a text that goes on. Raises ApiError."""
        self.check_model(body.model)
        if body.max_tokens > self.limits.new_tokens:
            raise ApiError(
                400,
                f"max_tokens: at most {self.limits.new_tokens} here (found {body.max_tokens})",
                "max_tokens",
            )
        ids = await self.run(lambda: self._encoded(body.prompt, "prompt", body.max_tokens))
        done = await self.run(lambda: self.engine.complete(ids, body.sampling(self.limits.seconds)))
        choice = {"index": 0, "text": done.text, "logprobs": None, "finish_reason": done.finish}
        usage = {
            "prompt_tokens": len(ids),
            "completion_tokens": done.drawn,
            "total_tokens": len(ids) + done.drawn,
        }
        experts = {"experts": self._told(done.tokens)} if body.return_experts else {}
        return {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.engine.name,
            "choices": [choice],
            "usage": usage,
            **experts,
        }

    async def route(self, body: RouteBody) -> dict:
        """Return a text's tokens with the experts that read them. Raises Refused."""
        self.check_model(body.model)
        ids = await self.run(lambda: self._encoded(body.text, "text", 0))
        tokens = await self.run(lambda: self.engine.route(ids))
        return {"object": "route", "model": self.engine.name, **self._told(tokens)}

    def _encoded(self, text: str, param: str, new_tokens: int) -> list[int]:
        ids, room = self.engine.encode(text), self.engine.context_tokens
        if len(ids) + new_tokens > room:
            wanted = f" and {new_tokens} are to be drawn" if new_tokens else ""
            raise ApiError(
                400,
                f"{param}: {len(ids)} tokens{wanted}, but this model's context is {room} tokens; "
                f"shorten {param}{' or lower max_tokens' if new_tokens else ''}",
                param,
                "context_length_exceeded",
            )
        return ids

    def _told(self, tokens: list[Token]) -> dict:
        """Return tokens with their experts, and each expert's share."""
        names = self.engine.experts
        shares = [
            {k: round(v, DIGITS) for k, v in each.items()} for each in share(tokens, len(names))
        ]
        return {
            "experts": [{"name": name, **each} for name, each in zip(names, shares, strict=True)],
            "tokens": [
                asdict(t)
                | {
                    "top": names[strongest(t)],
                    "weights": [[round(w, DIGITS) for w in k] for k in t.weights],
                }
                for t in tokens
            ],
        }
