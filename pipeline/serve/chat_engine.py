"""A bundle of adapters opened to answer: one question with its pictures, read by whom the router
chooses or who is named."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.task_data import ImageLimitsConfig
from ..data.tasks.markup import StrangePlaceholder, without_placeholders
from ..errors import DataError
from ..families import family
from .engine import Engine
from .pictures import PixelRoom, opened

if TYPE_CHECKING:
    from ..families.adapters.inference import Request as StackRequest
    from ..families.adapters.stack import AdapterStack, Answer, Choice


@dataclass(frozen=True)
class Question:
    """What is asked: a text, and data: URIs of the pictures that it is about."""

    text: str
    pictures: Sequence[str] = ()


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
        self.room = PixelRoom()

    def answer(
        self, question: Question, seconds: float, most: int | None, expert: str | None
    ) -> "Answer":
        """Return the answer to a question, of at most so many tokens, by an expert or by whom the
        router chooses; past `seconds` no further token is begun, nor do its pictures wait for room
        any longer. Raises DataError, TimeoutError."""
        request = self._request(question, seconds)
        return self.stack.answer([request], seconds, most, expert)[0]

    def route(self, question: Question, seconds: float) -> "Choice":
        """Return where a question goes; its pictures wait for room no longer than `seconds`. Raises
        DataError, TimeoutError."""
        request = self._request(question, seconds)
        return self.stack.route([request])[0]

    def _request(self, question: Question, seconds: float) -> "StackRequest":
        """Return a question as the stack takes it: one text, and its pictures in order."""
        # Counted before any is opened, which is what takes memory.
        most = self.stack.model.limits.media
        count = len(question.pictures)
        if count > most:
            raise DataError(f"{count} images; at most {most} are taken")
        until = time.monotonic() + seconds
        images = [opened(url, self.image, self.room, until) for url in question.pictures]
        return self.stack.request(self._plain(question.text, count), images)

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
