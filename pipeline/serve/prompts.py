"""How requests become prompts: texts and chats, encoded as the model was trained to read them, and
checked against what it takes.

Invariant: no text of a client's yields a special token; in a chat only the template's own do.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..data.tasks.markup import StrangePlaceholder, without_placeholders
from ..errors import DataError
from ..families.adapters.chat import ChatTurn
from ..model.loading import quiet_library
from .chat_engine import ChatEngine
from .engine import CompletionEngine
from .generation import Prompt
from .messages import Turn
from .pictures import opened
from .template_variables import Scalar, variables_of

NOTHING_SET: Mapping[str, Scalar] = MappingProxyType({})


class NoChat(DataError):
    """A bundle cannot be asked in messages."""


class Prompts(ABC):
    """What a bundle's requests become; may be called from several threads."""

    temperature: float  # of a request that says none
    ends_are_taught: bool  # whether each reader has a length of its own for what it answers
    vocab_size: int
    before: int  # a token that others are decoded behind, as some decoders treat a start otherwise

    @abstractmethod
    def text(self, text: str, reader: str | None) -> Prompt:
        """Return a text to go on with. Raises DataError for one that cannot be read."""

    @property
    @abstractmethod
    def template_variables(self) -> frozenset[str] | None:
        """What a request may set of the chat template; None where there is no template."""

    @abstractmethod
    def chat(
        self,
        turns: Sequence[Turn],
        reader: str | None,
        *,
        goes_on: bool,
        seconds: float,
        variables: Mapping[str, Scalar] = NOTHING_SET,
    ) -> Prompt:
        """Return a chat to answer, or, where its last turn goes on, to go on with; its pictures
        wait for memory no longer than `seconds`. `variables` are those of `template_variables`.

        Raises DataError for one that cannot be read, TimeoutError.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones with their names."""

    def ids(self, ids: Sequence[int], reader: str | None) -> Prompt:
        """Return tokens to go on with. Raises DataError for a number that none has."""
        strange = [token for token in ids if not 0 <= token < self.vocab_size]
        if strange:
            raise DataError(
                f"there is no token {strange[0]}; this model has {self.vocab_size} of them"
            )
        return Prompt(tuple(ids), reader=reader, goes_on=True)

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Return each token's own text, as it stands in the middle of a text."""
        known = len(self.decode([self.before]))
        return [self.decode([self.before, token])[known:] for token in ids]


class TextPrompts(Prompts):
    """Those of a language model: texts as in training, chats by the trunk's own chat template."""

    temperature = 1.0
    ends_are_taught = False

    def __init__(self, engine: CompletionEngine, folder: Path):
        from transformers import AutoTokenizer

        self.engine = engine
        self.vocab_size = engine.tokenizer.vocab_size
        self.before = engine.encode(".")[-1]
        with quiet_library():
            self._stock: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        # It encodes what a client spells of special tokens in another state than the rest.
        self._lock = threading.Lock()

    @property
    def has_template(self) -> bool:
        """Whether chats can be read."""
        return bool(self._stock.chat_template)

    def text(self, text: str, reader: str | None) -> Prompt:
        """Return a text to go on with."""
        return Prompt(tuple(self.engine.encode(text)), reader=reader, goes_on=True)

    @cached_property
    def template_variables(self) -> frozenset[str] | None:
        """What a request may set of the chat template; None where there is no template."""
        return variables_of(self._stock) if self.has_template else None

    def chat(
        self,
        turns: Sequence[Turn],
        reader: str | None,
        *,
        goes_on: bool,
        seconds: float,
        variables: Mapping[str, Scalar] = NOTHING_SET,
    ) -> Prompt:
        """Return a chat as the trunk's template writes it. Raises DataError."""
        if not self.has_template:
            raise NoChat(
                f"{self.engine.name} has no chat template, as its trunk came without one, and "
                "messages cannot be put to it; send a prompt to /v1/completions"
            )
        if any(turn.pictures for turn in turns):
            raise DataError(f"{self.engine.name} is a language model and reads no pictures")
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            with self._lock:
                # In Jinja's sandbox; the template's size was looked at when the bundle was opened.
                ids = self._stock.apply_chat_template(
                    messages,
                    add_generation_prompt=not goes_on,
                    continue_final_message=goes_on,
                    sanitize_control_tokens=True,
                    return_dict=False,
                    **variables,
                )
        except Exception as error:  # a template raises what it likes
            raise DataError(f"the model's chat template does not take them: {error}") from None
        return Prompt(tuple(ids), reader=reader, goes_on=goes_on)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens."""
        return self.engine.tokenizer.model.decode(list(ids), skip_special_tokens=False)


class TaskPrompts(Prompts):
    """Those of adapters that were trained on tasks: chats by the base's template, each turn as a
    question was in training, and what the router reads of them."""

    # The likeliest text, as in the answers that the report measured.
    temperature = 0.0
    ends_are_taught = True

    def __init__(self, engine: ChatEngine):
        self.engine = engine
        tokenizer = engine.stack.model.chat.tokenizer
        self.vocab_size = len(tokenizer)
        self.before = tokenizer.encode(".", add_special_tokens=False)[-1]

    def text(self, text: str, reader: str | None) -> Prompt:
        """Return a text to go on with, which the router reads as a question. Raises DataError."""
        stack = self.engine.stack
        return Prompt(stack.model.read_plain(text), (), reader, stack.routing_ids(text, ()))

    def ids(self, ids: Sequence[int], reader: str | None) -> Prompt:
        """Return tokens to go on with, whose text the router reads as a question. Raises DataError,
        also for one that stands for a picture: there is none for it."""
        # before their text, which a million of them have too, is made and encoded again
        self.engine.stack.model.check_tokens(len(ids), ())
        prompt = super().ids(ids, reader)
        media = self.engine.stack.model.chat.media
        if media.placeholder_id in ids:
            raise DataError(
                f"the token {media.placeholder_id} stands for a picture, and tokens come without "
                "any; send messages to /v1/chat/completions"
            )
        question = self.decode(ids)
        return Prompt(prompt.ids, (), reader, self.engine.stack.routing_ids(question, ()))

    @property
    def template_variables(self) -> frozenset[str] | None:
        """Nothing: experts were taught on questions as the template writes them by itself."""
        return frozenset()

    def chat(
        self,
        turns: Sequence[Turn],
        reader: str | None,
        *,
        goes_on: bool,
        seconds: float,
        variables: Mapping[str, Scalar] = NOTHING_SET,
    ) -> Prompt:
        """Return a chat with its pictures opened; the router reads its last question, with all of
        its pictures. Raises DataError, TimeoutError."""
        stack = self.engine.stack
        urls = [url for turn in turns for url in turn.pictures]
        # Before any picture is opened, which takes memory, or text looked through, which takes time
        stack.model.check_parts(sum(len(turn.text) for turn in turns), len(urls))
        plain = [self._plain(turn) for turn in turns]
        questions = [turn.text for turn in plain if turn.role == "user"]
        if not questions:
            raise DataError("one of them has to be of the user: that is who asks")
        until = time.monotonic() + seconds
        media = [opened(url, self.engine.image, self.engine.room, until) for url in urls]
        ids = stack.model.read(plain, media, goes_on=goes_on)
        return Prompt(ids, tuple(media), reader, stack.routing_ids(questions[-1], media))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens."""
        tokenizer = self.engine.stack.model.chat.tokenizer
        return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def _plain(self, turn: Turn) -> ChatTurn:
        """Return a turn as experts were asked it in training, without placeholders of pictures.
        Raises DataError."""
        count = len(turn.pictures)
        mark = self.engine.stack.model.chat.media.placeholder
        # Who writes the model's own mark without a picture writes about it; it is encoded as words.
        if turn.role != "user" or (not count and mark and mark in turn.text):
            return ChatTurn(turn.role, turn.text, count)
        try:
            plain, _ = without_placeholders(turn.text, count)
        except StrangePlaceholder as error:
            told = str(error).replace("the row has", "the message has")
            raise DataError(f"{told}; send it as an image_url, or leave the mark out") from None
        return ChatTurn("user", plain, count)
