"""How texts go on, as completions and chats ask for it alike: OpenAI's fields, and those that
vLLM's users know beside them.

Invariant: what is taken is done. A field of theirs that nothing is done about here is taken where
it asks for nothing, and else refused by its name.
"""

from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from .generation import Sampling
from .protocol import MOST_FIELDS, Body, OnlyFalse, OnlyNone, OnlyOne, OnlyTrue, OnlyZero, few

# OpenAI takes 4, vLLM any number, and editors send a dozen; their length bounds how much text each
# new token is looked for in.
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 200
MAX_LIKELIEST = 20  # OpenAI's limit of a chat's top_logprobs
MAX_CHOICES = 16  # each has a row of its own
SEEDS = 2**64  # that torch takes, from -2**63 on
ALL = -1  # of max_tokens, as llama.cpp and LM Studio have it: as many as there is room for

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Bias = Annotated[float, Field(ge=-100, le=100)]


def _token_ids(given: dict[str, float]) -> dict[str, float]:
    """Return biases as they came. Raises ValueError for a key that is no token's number."""
    for key in given:
        # The form that JSON's own numbers have; what int() takes is more.
        if not (key.isdecimal() and key.isascii() and len(key) <= 9 and str(int(key)) == key):
            raise ValueError(f"its keys are tokens' numbers, as in {{'50256': -100}}, not {key!r}")
    return given


class StreamOptions(Body):
    """What a stream holds beside the text."""

    include_usage: bool = Field(False, description="Tell the usage in an event before the last")
    include_obfuscation: bool = Field(False, description="Taken and not used")
    continuous_usage_stats: bool = Field(
        False, description="With include_usage: tell in every event what there is by then"
    )


class SamplingBody(Body):
    """How texts go on, and in which form they come back."""

    model: str | None = Field(
        None, description="Who reads: the stack's name, expert:NAME or base; none: the stack"
    )
    temperature: float | None = Field(
        None,
        ge=0,
        le=2,
        description="0 takes the likeliest token each time; none: 1, of a bundle of tasks 0",
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="Share of the probability that tokens are drawn from"
    )
    top_k: int = Field(
        0, ge=-1, description="How many of the likeliest tokens are drawn from; 0 or -1: all"
    )
    min_p: float = Field(
        0.0, ge=0, le=1, description="Share of the likeliest token's probability that one needs"
    )
    # What torch takes for a seed without wrapping it around.
    seed: int | None = Field(
        None, ge=-SEEDS // 2, lt=SEEDS // 2, description="Same seed and request, same text"
    )
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = Field(
        None, description="Strings that end the text and are not part of it"
    )
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="Taken once from the logit of a token that was drawn"
    )
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="Taken as often as the token was drawn"
    )
    logit_bias: (
        Annotated[dict[str, Bias], BeforeValidator(few), AfterValidator(_token_ids)] | None
    ) = Field(None, max_length=MOST_FIELDS, description="Added to logits, by the token's number")
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="Texts to each prompt")
    stream: bool = Field(False, description="Tell the text as it comes, in server-sent events")
    stream_options: StreamOptions | None = Field(None, description="Of a stream alone")
    return_experts: bool = Field(False, description="Also tell which experts spoke each token")
    ignore_eos: bool = Field(
        False, description="Go on where a text would end, as who measures speed wants one length"
    )
    user: str | None = Field(None, description="Taken and not used")
    # The rest of vLLM's fields that clients send with their defaults.
    best_of: OnlyOne = 1
    repetition_penalty: OnlyOne = 1
    length_penalty: OnlyOne = 1
    use_beam_search: OnlyFalse = False
    min_tokens: OnlyZero = 0
    stop_token_ids: OnlyNone = None
    include_stop_str_in_output: OnlyFalse = False
    skip_special_tokens: OnlyTrue = True
    spaces_between_special_tokens: OnlyTrue = True
    prompt_logprobs: OnlyNone = None

    @field_validator("stream_options")
    @classmethod
    def _are_of_a_stream(
        cls, given: StreamOptions | None, info: ValidationInfo
    ) -> StreamOptions | None:
        if given is not None and not info.data.get("stream"):
            raise ValueError("it is of a stream alone; leave it out, or set stream to true")
        return given

    @property
    def tells_usage(self) -> bool:
        """Whether a stream is to end with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def tells_usage_by_now(self) -> bool:
        """Whether every event of a stream is to have the usage, as far as it has come."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    def samplings(
        self, max_tokens: int | None, temperature: float, likeliest: int | None, seconds: float
    ) -> Iterator[Sampling]:
        """Yield how each of n texts goes on; `temperature` is for a request that says none."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        bias = {int(key): value for key, value in (self.logit_bias or {}).items()}
        for number in range(self.n):
            yield Sampling(
                max_tokens=max_tokens,
                temperature=temperature if self.temperature is None else self.temperature,
                top_p=self.top_p,
                seed=self._seed(number),
                stop=tuple(stop),
                seconds=seconds,
                top_k=max(self.top_k, 0),
                min_p=self.min_p,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                logit_bias=bias,
                logprobs=likeliest,
                past_end=self.ignore_eos,
            )

    def _seed(self, number: int) -> int | None:
        """Return the seed of a text: the given one's, and for the next ones those that follow, as
        one seed would give n times the same."""
        if self.seed is None:
            return None
        return (self.seed + number + SEEDS // 2) % SEEDS - SEEDS // 2
