"""POST /v1/chat/completions: answers to chats, in OpenAI's form.

Every field of OpenAI's is taken where it asks for nothing that is not done here.
"""

from collections.abc import Iterable, Iterator
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .answering import answered
from .answers import ChatChoice, ChatCompletion, ChatDelta, ChatEvent, ChatLogprobs, ChatPart
from .forms import Form, Json
from .generation import Piece, Prompt, Sampling
from .interface import described
from .messages import Messages
from .protocol import OnlyFalse, OnlyNone, OnlyText, few, only, read_body
from .sampling_body import ALL, MAX_LIKELIEST, SamplingBody
from .service import Service
from .template_variables import Scalar
from .told import Telling, chat_logprobs

# What each of these says where it is left out, or what it says where there are no tools.
Modalities = Annotated[Any, only(None, ["text"])]
NoTool = Annotated[Any, only(None, "none", "auto")]
NoThought = Annotated[Any, only(None, "none", "medium")]
Medium = Annotated[Any, only(None, "medium")]
AnyTier = Annotated[Any, only(None, "auto", "default")]
# The field that says which is called, and the one that lists what there is.
CHOSEN_FROM = {"tool_choice": "tools", "function_call": "functions"}


def _draws(given: int) -> int:
    """Return a number of tokens as it came. Raises ValueError for none."""
    if not given:
        raise ValueError("must be at least 1, or -1 for as many as there is room for")
    return given


Most = Annotated[int, Field(ge=ALL), AfterValidator(_draws)]


class ChatBody(SamplingBody):
    """What /v1/chat/completions takes."""

    messages: Messages = Field(description="What was said so far, the last one to be answered")
    max_tokens: Most | None = Field(
        None,
        description="Tokens to draw at most; above the limit there is, or -1, as many as that",
    )
    max_completion_tokens: Most | None = Field(None, description="The same under its newer name")
    logprobs: bool = Field(False, description="Tell each token's probability")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LIKELIEST, description="Also those of so many likeliest tokens"
    )
    add_generation_prompt: bool = Field(
        True, description="Have the answer begin anew; false only to go on with the last message"
    )
    continue_final_message: bool = Field(
        False,
        validate_default=True,
        description="Go on with the last message, which is the assistant's",
    )
    chat_template_kwargs: Annotated[dict[str, Scalar], BeforeValidator(few)] | None = Field(
        None, description="Variables that the model's chat template reads, such as enable_thinking"
    )
    # What a provider may do better for it; nothing here depends on it.
    metadata: Annotated[dict[str, str], BeforeValidator(few)] | None = Field(
        None, description="Taken and not used"
    )
    parallel_tool_calls: bool | None = Field(None, description="Taken and not used")
    prompt_cache_key: str | None = Field(None, description="Taken and not used")
    prompt_cache_options: dict[str, Any] | None = Field(None, description="Taken and not used")
    prompt_cache_retention: str | None = Field(None, description="Taken and not used")
    safety_identifier: str | None = Field(None, description="Taken and not used")
    # The rest of OpenAI's fields, of which only what asks for nothing is served.
    audio: OnlyNone = None
    function_call: NoTool = None
    functions: OnlyNone = None
    modalities: Modalities = None
    moderation: OnlyNone = None
    prediction: OnlyNone = None
    reasoning_effort: NoThought = None
    response_format: OnlyText = None
    service_tier: AnyTier = None
    store: OnlyFalse = False
    tool_choice: NoTool = None
    tools: OnlyNone = None
    verbosity: Medium = None
    web_search_options: OnlyNone = None

    @model_validator(mode="before")
    @classmethod
    def _calls_nothing(cls, given: Any) -> Any:
        # Which tools there are asks for nothing where none is to be called.
        if not isinstance(given, dict):
            return given
        unused = {listed for chosen, listed in CHOSEN_FROM.items() if given.get(chosen) == "none"}
        return {key: value for key, value in given.items() if key not in unused}

    @field_validator("top_logprobs")
    @classmethod
    def _goes_with_logprobs(cls, given: int | None, info: ValidationInfo) -> int | None:
        if given and not info.data.get("logprobs"):
            raise ValueError("it goes with logprobs; set logprobs to true")
        return given

    @field_validator("continue_final_message")
    @classmethod
    def _is_the_assistants(cls, given: bool, info: ValidationInfo) -> bool:
        messages = info.data.get("messages")
        if not given and info.data.get("add_generation_prompt") is False:
            raise ValueError("it must be true where add_generation_prompt is false")
        if given and info.data.get("add_generation_prompt"):
            raise ValueError("it goes on with a message, so add_generation_prompt must be false")
        if given and messages and messages[-1].role != "assistant":
            raise ValueError("the last message must be the assistant's, which is gone on with")
        return given

    @property
    def likeliest(self) -> int | None:
        """How many likeliest tokens are told with each one; None: no probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def most(self) -> int | None:
        """How many tokens may be drawn; None: as many as there is room for."""
        # Clients send the old name, the new one, or both alike.
        most = self.max_completion_tokens or self.max_tokens
        return None if most == ALL else most


class ChatForm(Form):
    """How answers are told."""

    kind = "chatcmpl"
    whole_object = "chat.completion"
    event_object = "chat.completion.chunk"
    body: ChatBody

    @property
    def tells_probabilities(self) -> bool:
        """Whether probabilities are told."""
        return self.body.logprobs

    def choice(self, number: int, telling: Telling) -> Json:
        """Return an answer that has ended."""
        assert telling.finish is not None  # noqa: S101  # only then is it told
        choice: ChatChoice = {
            "index": number,
            "message": {"role": "assistant", "content": telling.text, "refusal": None},
            "logprobs": self._logprobs(telling.drawn),
            "finish_reason": telling.finish,
        }
        generation = self.generations[number]
        # Of a router that was not sure, the answers that were ranked below.
        if generation.choice is not None:
            others = generation.others
            choice["others"] = [{"expert": name, "content": text} for name, text in others]
        return {**choice}

    def part(self, number: int, piece: Piece, _offset: int) -> Json:
        """Return what a piece adds to an answer."""
        delta: ChatDelta = {"content": piece.text} if piece.text else {}
        return self._part(number, delta, piece)

    def first(self) -> Iterator[Json]:
        """Yield an event for each answer that says whose it is."""
        for number in range(len(self.generations)):
            delta: ChatDelta = {"role": "assistant", "content": ""}
            yield self.of_choices([self._part(number, delta, None)])

    def _part(self, number: int, delta: ChatDelta, piece: Piece | None) -> Json:
        told: ChatPart = {
            "index": number,
            "delta": delta,
            "logprobs": self._logprobs([piece]) if piece and piece.token else None,
            "finish_reason": piece.finish if piece else None,
        }
        return {**told}

    def _logprobs(self, drawn: Iterable[Piece]) -> ChatLogprobs | None:
        if not self.tells_probabilities:
            return None
        return chat_logprobs(drawn, self.service.prompts.token_texts)


def add_chat(app: FastAPI, service: Service) -> None:
    """Give an application /v1/chat/completions."""

    @app.post(
        "/v1/chat/completions",
        **described(app, "Answer a chat", body=ChatBody, answer=ChatCompletion, event=ChatEvent),
    )
    async def completions(request: Request) -> Response:
        body = await read_body(request, ChatBody, service.limits.body_bytes)
        reader = service.reader(body.model)
        service.check_bias(body.logit_bias)
        variables = body.chat_template_kwargs or {}
        service.check_variables(variables)
        turns = [message.turn() for message in body.messages]
        limit_s = service.limits.seconds

        def prompts() -> list[Prompt]:
            # Pictures are opened here, as decoding one takes long enough to hold up the rest.
            prompt = service.prompts.chat(
                turns,
                reader,
                goes_on=body.continue_final_message,
                seconds=limit_s,
                variables=variables,
            )
            return [prompt]

        def samplings(prompt: Prompt) -> Iterator[Sampling]:
            most = service.most(prompt, "messages", body.most)
            return body.samplings(most, service.prompts.temperature, body.likeliest, limit_s)

        return await answered(
            service, request, body, ChatForm, prompts, samplings, param="messages"
        )
