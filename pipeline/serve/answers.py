"""The forms in which the endpoints answer: OpenAI's, and beside their fields who spoke.

What the interface's own description says of answers is made of these.
"""

from typing import Literal, NotRequired

from pydantic import ConfigDict, with_config

# pydantic takes that of typing from Python 3.12 on
from typing_extensions import TypedDict

# A field that is not described here must not be answered with.
_whole = with_config(ConfigDict(extra="forbid"))

FinishReason = Literal["stop", "length"]


@_whole
class ErrorDetail(TypedDict):
    """What was wrong: a sentence, and the field of the request that it is about."""

    message: str
    type: str
    param: str | None
    code: str | None


@_whole
class ErrorAnswer(TypedDict):
    """A request that was refused, or that failed."""

    error: ErrorDetail


@_whole
class Usage(TypedDict):
    """Tokens that were read and drawn, those of pictures and of a text's end among them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@_whole
class ToldToken(TypedDict):
    """A token, per layer the numbers and weights of its experts, and who had the most weight; of a
    dense model, which has no experts, no layers and nobody."""

    id: int
    text: str
    experts: list[list[int]]
    weights: list[list[float]]
    top: str | None


@_whole
class AnswerShare(TypedDict):
    """Of all assignments of tokens the share that an expert had, and its mean weight."""

    name: str
    share: float
    weight: float


@_whole
class ToldExperts(TypedDict):
    """Who spoke: token by token, and in all. In a stream each event has its own tokens, and the
    last one of a text the shares."""

    experts: NotRequired[list[AnswerShare]]
    tokens: list[ToldToken]


@_whole
class Alternative(TypedDict):
    """Who might have answered, and how likely the router found it."""

    expert: str
    probability: float


@_whole
class OtherAnswer(TypedDict):
    """An answer that was ranked below the one that is given."""

    expert: str
    content: str


@_whole
class Seconds(TypedDict):
    """How long it took until it was known who answers, and from then on."""

    route: float
    generate: float


@_whole
class CompletionLogprobs(TypedDict):
    """Probabilities of tokens, in nats; each list has an entry for each token. The first one of a
    prompt that is echoed has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


@_whole
class LikelyToken(TypedDict):
    """A token that might have been drawn, and how likely it was, in nats; bytes is null for one
    that is no whole character."""

    token: str
    logprob: float
    bytes: list[int] | None


@_whole
class ChatToken(LikelyToken):
    """A token that was drawn, and the likeliest in its place."""

    top_logprobs: list[LikelyToken]


@_whole
class ChatLogprobs(TypedDict):
    """Probabilities of an answer's tokens."""

    content: list[ChatToken]
    refusal: None


@_whole
class CompletionChoice(TypedDict):
    """A text that goes on."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    experts: NotRequired[ToldExperts]


@_whole
class CompletionPart(TypedDict):
    """What an event adds to a text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    experts: NotRequired[ToldExperts]


@_whole
class ChatMessage(TypedDict):
    """An answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


@_whole
class ChatChoice(TypedDict):
    """An answer, and why it ended."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    experts: NotRequired[ToldExperts]
    others: NotRequired[list[OtherAnswer]]


@_whole
class ChatDelta(TypedDict):
    """What an event adds to an answer."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]


@_whole
class ChatPart(TypedDict):
    """What an event adds to an answer, and in its last one why it ended."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    experts: NotRequired[ToldExperts]


class _Routed(TypedDict):
    """Where one expert reads a whole text: who, and how sure the router was of its first choice."""

    expert: NotRequired[str]
    confidence: NotRequired[float]
    alternatives: NotRequired[list[Alternative]]


class _Answer(_Routed):
    """What every answer says."""

    id: str
    created: int
    model: str


@_whole
class CompletionAnswer(_Answer):
    """Texts that go on."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage
    seconds: Seconds


@_whole
class CompletionEvent(_Answer):
    """An event of a stream of texts; the one with the usage has no choices."""

    object: Literal["text_completion"]
    choices: list[CompletionPart]
    usage: NotRequired[Usage | None]


@_whole
class ChatCompletion(_Answer):
    """Answers of a chat."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    seconds: Seconds


@_whole
class ChatEvent(_Answer):
    """An event of a stream of answers; the one with the usage has no choices."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatPart]
    usage: NotRequired[Usage | None]


@_whole
class TokenRoute(TypedDict):
    """Who reads each token of a text."""

    object: Literal["route"]
    model: str
    experts: list[AnswerShare]
    tokens: list[ToldToken]


@_whole
class RequestRoute(TypedDict):
    """Who answers a whole request: the likeliest, and those whose answers are ranked."""

    object: Literal["route"]
    model: str
    expert: str
    confidence: float
    alternatives: list[Alternative]
    answered_by: list[str]


@_whole
class ModelCard(TypedDict):
    """Whom a request can name: the stack, one of its experts, the base, or a dense model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_tokens: int
    max_model_len: int
    parent: NotRequired[str]  # of an expert, and of the base: the stack
    experts: NotRequired[list[str]]
    top_k: NotRequired[int]
    form: NotRequired[str]
    rank: NotRequired[int]
    base: NotRequired[str | None]
    baseline: NotRequired[str]  # of a dense model: which of the run's it is
    limits: NotRequired[dict[str, int]]
    bundle: NotRequired[dict[str, str]]  # its address and the sum of its sums
    label: NotRequired[str]
    domain: NotRequired[str]
    task: NotRequired[str]
    description: NotRequired[str]


@_whole
class ModelList(TypedDict):
    """All of them."""

    object: Literal["list"]
    data: list[ModelCard]
