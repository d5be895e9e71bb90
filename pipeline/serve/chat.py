"""Chats with pictures over a bundle of adapters, in OpenAI's format, and which expert a request
goes to.

Invariant: pictures come inside the request and are checked before anything is run; this server
fetches nothing. What answers is the stack that the report measured.
"""

import base64
import binascii
import re
import secrets
import time
from pathlib import Path
from typing import Annotated, Literal

from fastapi import FastAPI, Request
from PIL import Image
from pydantic import Field

from ..config.task_data import ImageLimitsConfig
from ..data.images.images import open_checked, resized
from ..errors import DataError
from ..families import family
from ..store.bundle import SUMS, about, verify
from .protocol import ApiError, Body, RequestLimits, Service, described, only, read

BODY_BYTES = 32 << 20  # pictures come inside
PICTURE_PIXELS = 64_000_000  # before it is resized
DIGITS = 4  # of a probability
_DATA = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.I)
_Off, _One, _Zero, _None = only(False), only(1), only(0), only(None)


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

    role: Literal["user"] = Field(description="user; experts were trained on single questions")
    content: str | list[Annotated[TextPart | PicturePart, Field(discriminator="type")]] = Field(
        description="Text, or parts: text and image_url"
    )


class Asking(Body):
    """What a request holds, whether it is to be answered or only routed."""

    model: str | None = Field(None, description="Name of the model; none: the one that is served")
    messages: list[Message] = Field(
        min_length=1, max_length=1, description="One message, of the user"
    )
    user: str | None = Field(None, description="Taken and not used")


class ChatBody(Asking):
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
    temperature: _Zero = 0
    top_p: _One = 1
    stream: _Off = False
    n: _One = 1
    presence_penalty: _Zero = 0
    frequency_penalty: _Zero = 0
    logprobs: _None = None
    stop: _None = None
    tools: _None = None
    seed: int | None = Field(
        None, description="Taken and not used: answers are not drawn at random"
    )


class ChatService(Service):
    """Answers of experts to questions about pictures."""

    known = "GET /healthz, GET /v1/models, POST /v1/chat/completions, POST /v1/route"

    def __init__(self, folder: Path, limits: RequestLimits | None):
        super().__init__(StackEngine(folder), limits or RequestLimits(body_bytes=BODY_BYTES))

    def add_to(self, app: FastAPI, guarded: list) -> None:
        """Give an application the endpoints of this service."""

        @app.post("/v1/chat/completions", dependencies=guarded, openapi_extra=described(ChatBody))
        async def completions(request: Request) -> dict:
            return await self.complete(await read(request, ChatBody, self.limits.body_bytes))

        @app.post("/v1/route", dependencies=guarded, openapi_extra=described(Asking))
        async def route(request: Request) -> dict:
            return await self.route(await read(request, Asking, self.limits.body_bytes))

    def model(self) -> dict:
        """Return what /v1/models says of the bundle."""
        e = self.engine
        return {
            "id": e.name,
            "object": "model",
            "created": e.made_at,
            "owned_by": "moleforge",
            "experts": list(e.experts),
            "base": e.about["base"]["model"],
            "limits": e.about["limits"],
        }

    async def complete(self, body: ChatBody) -> dict:
        """Return the stack's answer, or that of the expert asked for. Raises Refused."""
        self.check_model(body.model)
        if body.expert not in (None, "base", *self.engine.experts):
            known = ", ".join(self.engine.experts)
            raise ApiError(
                400, f"expert: there is no {body.expert!r}; there are {known} and base", "expert"
            )
        most = body.max_completion_tokens or body.max_tokens
        done = await self.run(
            lambda: self._checked(lambda: self.engine.answer(body, most, self.limits.seconds))
        )
        message = {"role": "assistant", "content": done.text, "refusal": None}
        return {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.engine.name,
            "choices": [
                {"index": 0, "message": message, "logprobs": None, "finish_reason": done.finish}
            ],
            "usage": {
                "prompt_tokens": done.prompt_tokens,
                "completion_tokens": done.completion_tokens,
                "total_tokens": done.prompt_tokens + done.completion_tokens,
            },
            "expert": done.expert,
            **_told(done.confidence, done.alternatives),
            "others": [{"expert": name, "content": text} for name, text in done.others],
            "seconds": {
                "route": round(done.route_s, DIGITS),
                "generate": round(done.generate_s, DIGITS),
            },
        }

    async def route(self, body: Asking) -> dict:
        """Return which expert a request goes to. Raises ApiError."""
        self.check_model(body.model)
        choice = await self.run(lambda: self._checked(lambda: self.engine.route(body)))
        told = _told(choice.confidence, choice.alternatives)
        return {
            "object": "route",
            "model": self.engine.name,
            "expert": choice.expert,
            **told,
            "answered_by": list(choice.answered_by),
        }

    def _checked(self, work):
        """Do work; what is wrong with the request's content becomes a 400."""
        try:
            return work()
        except DataError as error:
            raise ApiError(400, f"messages: {error}", "messages") from None


class StackEngine:
    """An open bundle of adapters.

    Raises MissingArtifact, DamagedArtifact, NewerStore or MismatchError for one that cannot be
    served.
    """

    def __init__(self, folder: Path):
        verify(folder)
        self.about = about(folder)
        self.name: str = self.about["run"]
        self.experts = tuple(expert["name"] for expert in self.about["experts"])
        self.made_at = int((folder / SUMS).stat().st_mtime)
        self.stack = family(self.about["family"]).reassemble(folder)
        self.image = ImageLimitsConfig(**self.about["base"]["image"])

    def answer(self, body: ChatBody, most: int | None, seconds: float):
        """Return the answer to a request. Raises DataError."""
        asked = self._asked(body.messages[0])
        return self.stack.answer([asked], seconds, most, body.expert)[0]

    def route(self, body: Asking):
        """Return where a request goes. Raises DataError."""
        return self.stack.route([self._asked(body.messages[0])])[0]

    def _asked(self, message: Message):
        if isinstance(message.content, str):
            return self.stack.request(message.content, ())
        texts = [part.text for part in message.content if isinstance(part, TextPart)]
        urls = [part.image_url.url for part in message.content if isinstance(part, PicturePart)]
        most = self.stack.model.limits.media
        if len(urls) > most:
            raise DataError(f"{len(urls)} images; at most {most} are taken")
        return self.stack.request("\n".join(texts), [self._picture(url) for url in urls])

    def _picture(self, url: str) -> Image.Image:
        """Return the picture in a data: URI, checked and resized as in training."""
        head = _DATA.match(url)
        if head is None:
            raise DataError(
                f"image_url must be a data: URI (data:image/png;base64,...), not {url[:40]!r}: this server fetches "
                "nothing"
            )
        try:
            data = base64.b64decode(url[head.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError(f"image_url is not base64: {error}") from None
        image = open_checked(data, max_pixels=PICTURE_PIXELS)
        return resized(image, self.image.min_pixels, self.image.max_pixels)


def _told(confidence: float, alternatives) -> dict:
    """Return the router's part of an answer."""
    others = [{"expert": name, "probability": round(p, DIGITS)} for name, p in alternatives]
    return {"confidence": round(confidence, DIGITS), "alternatives": others}
