"""Chats with pictures over a bundle of adapters, in OpenAI's format, and which expert a request
goes to.

Invariant: pictures come inside the request and are checked before anything is run; this server
fetches nothing. What answers is the stack that the report measured.
"""

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from fastapi import FastAPI, Request
from fastapi.params import Depends
from PIL import Image
from pydantic import BeforeValidator, Field

from ..config.task_data import ImageLimitsConfig
from ..data.images.images import claimed_size, open_checked, resized
from ..data.images.inline import bytes_in
from ..data.tasks.markup import StrangePlaceholder, without_placeholders
from ..errors import DataError
from ..families import family
from ..protocols import POLL_S, check_wanted
from .engine import Engine
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

if TYPE_CHECKING:
    from ..families.adapters.inference import Request as StackRequest
    from ..families.adapters.stack import AdapterStack, Answer, Choice

BODY_BYTES = 32 << 20  # pictures come inside
# Of one picture before it is resized, and of all that are being decoded. Pillow keeps 4 bytes of a
# pixel, and up to five copies while it turns one and puts it over white: 1.3 GB.
PICTURE_PIXELS = 64_000_000

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
    engine: "ChatEngine"

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
        done = await self._run(lambda: self.engine.answer(body, self.limits.seconds))
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
        choice = await self._run(lambda: self.engine.route(body, self.limits.seconds))
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


class PixelRoom:
    """How many pixels may be decoded at once, over all requests."""

    def __init__(self, pixels: int):
        self.pixels = pixels
        self._free = pixels
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, pixels: int, until: float) -> Iterator[None]:
        """Have room for so many pixels, at most all there is. Raises TimeoutError where there is
        none by `until`, on the monotonic clock, and Abandoned."""
        with self._changed:
            while self._free < pixels:
                check_wanted()
                if time.monotonic() > until:
                    raise TimeoutError("too many large pictures at once; try again in a moment")
                self._changed.wait(POLL_S)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


class ChatEngine(Engine):
    """An open bundle of adapters.

    Raises MissingArtifact, DamagedArtifact, NewerStore or MismatchError for one that cannot be
    served.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.stack: AdapterStack = family(self.about["family"]).reassemble(folder)
        self.image = ImageLimitsConfig(**self.about["base"]["image"])
        # As much as the largest picture that is taken needs, for all requests together.
        self.room = PixelRoom(PICTURE_PIXELS)

    def answer(self, body: ChatBody, seconds: float) -> "Answer":
        """Return the answer to a request; past `seconds` no further token is begun, nor do its
        pictures wait for room any longer. Raises DataError, TimeoutError."""
        # Clients send the old name, the new one, or both alike.
        most = body.max_completion_tokens or body.max_tokens
        request = self._request(body.messages[0], seconds)
        return self.stack.answer([request], seconds, most, body.expert)[0]

    def route(self, body: RoutingBody, seconds: float) -> "Choice":
        """Return where a request goes; its pictures wait for room no longer than `seconds`. Raises
        DataError, TimeoutError."""
        request = self._request(body.messages[0], seconds)
        return self.stack.route([request])[0]

    def _request(self, message: Message, seconds: float) -> "StackRequest":
        """Return a message as the stack takes it: one text, and its pictures in order."""
        if isinstance(message.content, str):
            return self.stack.request(self._plain(message.content, 0), ())
        texts = []
        urls = []
        for part in message.content:
            if isinstance(part, TextPart):
                texts.append(part.text)
            else:
                urls.append(part.image_url.url)
        # Counted before any is opened, which is what takes memory.
        most = self.stack.model.limits.media
        if len(urls) > most:
            raise DataError(f"{len(urls)} images; at most {most} are taken")
        until = time.monotonic() + seconds
        images = [self._picture(url, until) for url in urls]
        return self.stack.request(self._plain("\n".join(texts), len(images)), images)

    def _picture(self, url: str, until: float) -> Image.Image:
        """Return the picture in a data: URI, checked and resized as in training. Raises DataError,
        TimeoutError where there is no room for it by `until`."""
        # Whatever kind it says: what it is, is read from its bytes.
        if url[:5].lower() != "data:":
            raise DataError(
                "image_url must be a data: URI (data:image/png;base64,...), "
                f"not {url[:40]!r}: this server fetches nothing"
            )
        try:
            data = bytes_in(url) or b""
        except ValueError as error:
            raise DataError(f"image_url is not base64: {error}") from None
        width, height = claimed_size(data, PICTURE_PIXELS)
        # One picture at a time: a request that held room and waited for more could wait for ever.
        with self.room.taken(width * height, until):
            image = open_checked(data, max_pixels=PICTURE_PIXELS)
            return resized(image, self.image.min_pixels, self.image.max_pixels)

    def _plain(self, text: str, pictures: int) -> str:
        """Return a question as experts were asked it in training, without placeholders of pictures.
        Raises DataError."""
        mark = self.stack.model.chat.media.placeholder
        # Who writes the model's own mark without a picture writes about it; it is encoded as words.
        if not pictures and mark and mark in text:
            return text
        try:
            plain, _ = without_placeholders(text, pictures)
        except StrangePlaceholder as error:
            told = str(error).replace("the row has", "the message has")
            raise DataError(f"{told}; send it as an image_url, or leave the mark out") from None
        return plain


def _routing(confidence: float, alternatives: Iterable[tuple[str, float]]) -> dict:
    """Return the router's part of an answer."""
    others = []
    for name, probability in alternatives:
        others.append({"expert": name, "probability": round(probability, DIGITS)})
    return {"confidence": round(confidence, DIGITS), "alternatives": others}
