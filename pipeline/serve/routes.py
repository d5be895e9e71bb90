"""POST /v1/route: who reads a text, token by token, or who answers a request."""

import asyncio
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, ValidationInfo, field_validator

from ..errors import DataError
from ..protocols import Abandoned
from .answers import RequestRoute, TokenRoute
from .generation import Overloaded, Prompt, Route
from .interface import described
from .leaving import following
from .messages import Messages
from .protocol import Body, read_body
from .refusals import ApiError
from .service import Service, client_of, refusal
from .told import DIGITS, alternatives_told, experts_told, shares_told


class RouteBody(Body):
    """What /v1/route takes: a text, or messages."""

    model: str | None = Field(None, description="The stack's name; none: that one")
    text: str | None = Field(None, min_length=1, description="A text, as a prompt has it")
    messages: Messages | None = Field(None, validate_default=True, description="A chat")
    user: str | None = Field(None, description="Taken and not used")

    @field_validator("messages")
    @classmethod
    def _one_of_both(cls, given: Any, info: ValidationInfo) -> Any:
        has_text = "text" not in info.data or info.data["text"] is not None
        if given is None and not has_text:
            raise ValueError("give them, or a text")
        if given is not None and has_text:
            raise ValueError("give them or a text, not both")
        return given


def add_route(app: FastAPI, service: Service) -> None:
    """Give an application /v1/route."""

    @app.post(
        "/v1/route",
        **described(app, "Tell who reads a text", body=RouteBody, answer=TokenRoute | RequestRoute),
    )
    async def route(request: Request) -> Response:
        body = await read_body(request, RouteBody, service.limits.body_bytes)
        reader = service.reader(body.model)
        if reader is not None:
            why = "it has no experts" if service.is_dense(reader) else "others read alone"
            raise ApiError(400, f"model: only {service.engine.name} routes, as {why}", "model")
        param = "text" if body.messages is None else "messages"
        async with following(request):
            prompt = await service.run(lambda: _prompt(body, service), param, client_of(request))
            if len(prompt.ids) > service.context_tokens:
                raise service.too_long(prompt, param, 0)
            found = await _found(prompt, service, request, param)
        return JSONResponse(_form(found, service))


def _prompt(body: RouteBody, service: Service) -> Prompt:
    """Return what is to be routed, encoded. Raises DataError, TimeoutError."""
    if body.messages is None:
        return service.prompts.text(body.text or "", None)
    turns = [message.turn() for message in body.messages]
    seconds = service.limits.seconds
    return service.prompts.chat(turns, None, goes_on=False, seconds=seconds)


async def _found(prompt: Prompt, service: Service, request: Request, param: str) -> Route:
    """Return where a prompt goes. Raises ApiError."""
    try:
        future = service.engine.route(prompt, client_of(request))
        return await asyncio.wrap_future(future)
    except (DataError, Overloaded, TimeoutError, Abandoned) as error:
        raise refusal(error, param) from None


def _form(found: Route, service: Service) -> TokenRoute | RequestRoute:
    """Return who reads tokens, and each expert's share, or who answers a request."""
    model = service.engine.name
    names = service.engine.speakers
    if found.choice is None:
        return {
            "object": "route",
            "model": model,
            "experts": shares_told(found.tokens, names),
            "tokens": experts_told(found.tokens, names),
        }
    return {
        "object": "route",
        "model": model,
        "expert": found.choice.expert,
        "confidence": round(found.choice.confidence, DIGITS),
        "alternatives": alternatives_told(found.choice),
        "answered_by": list(found.choice.answered_by),
    }
