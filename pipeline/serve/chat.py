"""Chats with pictures over a bundle of adapters, in OpenAI's format, and which expert a request
goes to.

Invariant: pictures come inside the request and are checked before anything is run; this server
fetches nothing. What answers is the stack that the report measured.
"""

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from fastapi import FastAPI, Request
from fastapi.params import Depends
from pydantic import BeforeValidator, Field

from ..errors import DataError
from .chat_engine import ChatEngine, Question
from .limits import RequestLimits
from .messages import one_question
from .protocol import (
    DIGITS,
    Body,
    OnlyFalse,
    OnlyNone,
    OnlyOne,
    OnlyText,
    OnlyZero,
    Service,
    body_schema,
    following,
    read_body,
)
from .refusals import ApiError

BODY_BYTES = 32 << 20  # pictures come inside

T = TypeVar("T")


class Picture(Body):
    """Where a picture is: a data: URI."""

    url: str = Field(
        description="data:image/png;base64,... or another kind of picture; nothing is fetched"
    )
    detail: str | None = Field(None, description="Taken and not used")


class TextPart(Body):
    """A part of a message that is text."""

    type: Literal["text"]
    text: str


class PicturePart(Body):
    """A part of a message that is a picture."""

    type: Literal["image_url"]
    image_url: Picture


class Message(Body):
    """A turn of a chat."""

    # No system text and no earlier turns: no expert has seen any.
    role: Literal["user"] = Field(description="user; experts were trained on single questions")
    content: str | list[Annotated[TextPart | PicturePart, Field(discriminator="type")]] = Field(
        description="Text, or parts: text and image_url"
    )
    name: str | None = Field(None, description="Taken and not used")

    def question(self) -> Question:
        """Return one text, and its pictures in order."""
        if isinstance(self.content, str):
            return Question(self.content)
        texts = []
        urls = []
        for part in self.content:
            if isinstance(part, TextPart):
                texts.append(part.text)
            else:
                urls.append(part.image_url.url)
        return Question("\n".join(texts), urls)


class RoutingBody(Body):
    """What /v1/route takes: what a request holds that is only to be routed."""

    model: str | None = Field(None, description="Name of the model; none: the one that is served")
    messages: Annotated[list[Message], BeforeValidator(one_question)] = Field(
        min_length=1, max_length=1, description="One message, of the user"
    )
    user: str | None = Field(None, description="Taken and not used")


class ChatBody(RoutingBody):
    """What /v1/chat/completions takes."""

    expert: str | None = Field(
        None, description="Who answers: an expert or base; none: whom the router chooses"
    )
    max_tokens: int | None = Field(
        None, ge=1, description="Tokens to draw at most; none: the expert's own limit"
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, description="The same under its newer name"
    )
    # Answers are the likeliest text, as those that the report measured, so nothing is drawn.
    temperature: OnlyZero = 0
    top_p: OnlyOne = 1
    stream: OnlyFalse = False
    n: OnlyOne = 1
    presence_penalty: OnlyZero = 0
    frequency_penalty: OnlyZero = 0
    logprobs: OnlyNone = None
    stop: OnlyNone = None
    tools: OnlyNone = None
    logit_bias: OnlyNone = None
    response_format: OnlyText = None
    seed: int | None = Field(
        None, description="Taken and not used: answers are not drawn at random"
    )


class ChatService(Service):
    """Answers of experts to questions about pictures."""

    addresses = "GET /healthz, GET /v1/models, POST /v1/chat/completions, POST /v1/route"
    engine: ChatEngine

    def __init__(self, folder: Path, limits: RequestLimits | None):
        super().__init__(folder, limits)
        self.engine = ChatEngine(folder)
        self.limits = limits or RequestLimits(body_bytes=BODY_BYTES)

    def add_to(self, app: FastAPI, guarded: Sequence[Depends]) -> None:
        """Give an application /v1/chat/completions and /v1/route, behind the guards."""

        @app.post("/v1/chat/completions", dependencies=guarded, openapi_extra=body_schema(ChatBody))
        async def completions(request: Request) -> dict:
            body = await read_body(request, ChatBody, self.limits.body_bytes)
            async with following(request):
                return await self.complete(body)

        @app.post("/v1/route", dependencies=guarded, openapi_extra=body_schema(RoutingBody))
        async def route(request: Request) -> dict:
            body = await read_body(request, RoutingBody, self.limits.body_bytes)
            async with following(request):
                return await self.route(body)

    def details(self) -> dict:
        """Return the base and the limits of a request."""
        about = self.engine.about
        return {"base": about["base"]["model"], "limits": about["limits"]}

    async def complete(self, body: ChatBody) -> dict:
        """Return the stack's answer, or that of the expert asked for. Raises ApiError."""
        self.check_model(body.model)
        if body.expert not in (None, "base", *self.engine.experts):
            known = ", ".join(self.engine.experts)
            raise ApiError(
                400, f"expert: there is no {body.expert!r}; there are {known} and base", "expert"
            )
        # Clients send the old name, the new one, or both alike.
        most = body.max_completion_tokens or body.max_tokens
        question = body.messages[0].question()
        seconds = self.limits.seconds
        done = await self._run(lambda: self.engine.answer(question, seconds, most, body.expert))
        message = {"role": "assistant", "content": done.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": done.finish}
        return {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.engine.name,
            "choices": [choice],
            "usage": {
                "prompt_tokens": done.prompt_tokens,
                "completion_tokens": done.completion_tokens,
                "total_tokens": done.prompt_tokens + done.completion_tokens,
            },
            "expert": done.expert,
            **_routing(done.confidence, done.alternatives),
            "others": [{"expert": name, "content": text} for name, text in done.others],
            "seconds": {
                "route": round(done.route_s, DIGITS),
                "generate": round(done.generate_s, DIGITS),
            },
        }

    async def route(self, body: RoutingBody) -> dict:
        """Return which expert a request goes to. Raises ApiError."""
        self.check_model(body.model)
        question = body.messages[0].question()
        choice = await self._run(lambda: self.engine.chosen(question, self.limits.seconds))
        return {
            "object": "route",
            "model": self.engine.name,
            "expert": choice.expert,
            **_routing(choice.confidence, choice.alternatives),
            "answered_by": list(choice.answered_by),
        }

    async def _run(self, work: Callable[[], T]) -> T:
        """Run work in a thread; what is wrong with the request's content becomes a 400."""
        # Pictures are opened inside work, as decoding one takes long enough to hold up the rest.
        try:
            return await self.run(work)
        except DataError as error:
            raise ApiError(400, f"messages: {error}", "messages") from None


def _routing(confidence: float, alternatives: Iterable[tuple[str, float]]) -> dict:
    """Return the router's part of an answer."""
    others = []
    for name, probability in alternatives:
        others.append({"expert": name, "probability": round(probability, DIGITS)})
    return {"confidence": round(confidence, DIGITS), "alternatives": others}
