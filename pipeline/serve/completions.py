"""POST /v1/completions: texts that go on, in OpenAI's form."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import BeforeValidator, Field

from .answering import answered
from .answers import (
    CompletionAnswer,
    CompletionChoice,
    CompletionEvent,
    CompletionLogprobs,
    CompletionPart,
)
from .forms import Form, Json
from .generation import Piece, Prompt, Sampling
from .interface import described
from .protocol import only, read_body
from .refusals import ApiError
from .sampling_body import ALL, MAX_CHOICES, MAX_LIKELIEST, SamplingBody
from .service import Service
from .told import Telling, completion_logprobs

# What editors send at the end of a file, where nothing follows.
NoText = Annotated[Any, only(None, "")]


def _is_ids(given: object) -> bool:
    return isinstance(given, list) and bool(given) and all(type(each) is int for each in given)


def _prompts(given: object) -> object:
    """Return a prompt as it came. Raises ValueError for what is none."""
    if isinstance(given, str) or _is_ids(given):
        return given
    if isinstance(given, list) and given:
        texts = all(isinstance(each, str) for each in given)
        if texts or all(_is_ids(each) for each in given):
            return given
    raise ValueError(
        "must be a text, or a list of texts, of tokens' numbers, or of lists of such numbers"
    )


class CompletionBody(SamplingBody):
    """What /v1/completions takes."""

    prompt: Annotated[
        str | list[str] | list[int] | list[list[int]],
        BeforeValidator(_prompts),
    ] = Field(description="Text to go on with, or several; an empty one starts a new text")
    max_tokens: int = Field(
        16,
        ge=ALL,
        description="Tokens to draw at most; none of a text that is echoed alone; -1: as many as "
        "there is room for",
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LIKELIEST,
        description="Tell each token's probability, and those of so many likeliest",
    )
    echo: bool = Field(
        False,
        description="Tell the prompt before what is drawn, with logprobs each of its tokens' "
        "probability after those before it; a language model's bundle alone",
    )
    # The one of OpenAI's fields of which only the default is served.
    suffix: NoText = None

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """What is to go on, one after another."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        # The type of a list is that of its first entry: the check above has seen to it.
        out: list[str | list[int]] = []
        numbers: list[int] = []
        for each in given:
            if isinstance(each, int):
                numbers.append(each)
            else:
                out.append(each)
        return [numbers] if numbers else out


class CompletionForm(Form):
    """How texts that go on are told."""

    kind = "cmpl"
    whole_object = "text_completion"
    event_object = "text_completion"
    body: CompletionBody

    @property
    def tells_probabilities(self) -> bool:
        """Whether probabilities are told."""
        return self.body.logprobs is not None

    def choice(self, number: int, telling: Telling) -> Json:
        """Return a text that has ended."""
        assert telling.finish is not None  # noqa: S101  # only then is it told
        choice: CompletionChoice = {
            "index": number,
            "text": telling.text,
            "logprobs": self._logprobs(telling.drawn, 0),
            "finish_reason": telling.finish,
        }
        return {**choice}

    def part(self, number: int, piece: Piece, offset: int) -> Json:
        """Return what a piece adds to a text."""
        told: CompletionPart = {
            "index": number,
            "text": piece.text,
            "logprobs": self._logprobs([piece], offset) if piece.token else None,
            "finish_reason": piece.finish,
        }
        return {**told}

    def _logprobs(self, drawn: Iterable[Piece], offset: int) -> CompletionLogprobs | None:
        if not self.tells_probabilities:
            return None
        return completion_logprobs(drawn, offset, self.service.prompts.token_texts)


def add_completions(app: FastAPI, service: Service) -> None:
    """Give an application /v1/completions."""

    @app.post(
        "/v1/completions",
        **described(
            app,
            "Go on with a text",
            body=CompletionBody,
            answer=CompletionAnswer,
            event=CompletionEvent,
        ),
    )
    async def completions(request: Request) -> Response:
        body = await read_body(request, CompletionBody, service.limits.body_bytes)
        reader = service.reader(body.model)
        _check_size(body, service)

        def prompts() -> list[Prompt]:
            return [_prompt(each, reader, service) for each in body.prompts]

        def samplings(prompt: Prompt) -> Iterator[Sampling]:
            most: int | None = body.max_tokens
            if body.max_tokens == ALL:
                most = service.most(prompt, "prompt", None)
            elif len(prompt.ids) + body.max_tokens > service.context_tokens:
                raise service.too_long(prompt, "prompt", body.max_tokens)
            drawn = body.samplings(
                most, service.prompts.temperature, body.logprobs, service.limits.seconds
            )
            return (replace(sampling, echoes=body.echo) for sampling in drawn)

        return await answered(
            service, request, body, CompletionForm, prompts, samplings, param="prompt"
        )


def _prompt(given: str | list[int], reader: str | None, service: Service) -> Prompt:
    """Return what is to go on, encoded. Raises DataError."""
    if isinstance(given, str):
        return service.prompts.text(given, reader)
    return service.prompts.ids(given, reader)


def _check_size(body: CompletionBody, service: Service) -> None:
    """Raise ApiError for more than one request may ask for."""
    most = service.limits.new_tokens
    if body.max_tokens > most:
        raise ApiError(
            400, f"max_tokens: at most {most} here (found {body.max_tokens})", "max_tokens"
        )
    if not (body.max_tokens or body.echo):
        raise ApiError(
            400,
            "max_tokens: 0 draws nothing, and without echo nothing would be told; ask for 1 or "
            "more, or set echo to true",
            "max_tokens",
        )
    if body.echo and not service.engine.echoes:
        raise ApiError(
            400,
            "echo: not supported by a bundle that answers questions, which are put to it in a form "
            "of its own; leave it out",
            "echo",
        )
    texts = len(body.prompts) * body.n
    if texts > MAX_CHOICES:
        raise ApiError(
            400, f"prompt: {texts} texts are asked for, n to each; at most {MAX_CHOICES}", "prompt"
        )
    service.check_bias(body.logit_bias)
