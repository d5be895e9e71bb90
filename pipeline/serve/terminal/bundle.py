"""A bundle opened for one person: what is typed becomes a text that is generated."""

import secrets
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...config.serving import Dtype, ServeConfig
from ...data.images.images import BadImage, claimed_size
from ...errors import DataError
from ..from_bundle import open_service
from ..generation import Generating, Generation, Prompt, Sampling
from ..messages import Turn
from ..prompts import Prompts
from ..service import EXPERT

STACK = "stack"  # the name of whom the router chooses, where readers are named
TOKENS = 256  # of a text that ends nowhere, where no number is asked for
# A picture may be typed in; it waits for nobody's
PICTURE_S = 60.0
SEEDS = 2**31


class OpenBundle:
    """An engine with what makes its prompts, and how texts go on that it is asked for."""

    def __init__(self, engine: Generating, prompts: Prompts, asked: Mapping[str, Any]):
        """`asked`: fields of Sampling that were typed."""
        self.engine = engine
        self.prompts = prompts
        most = None if prompts.ends_are_taught else TOKENS
        own = Sampling(max_tokens=most, temperature=prompts.temperature)
        self.sampling = replace(own, **asked)

    @property
    def readers(self) -> tuple[str, ...]:
        """Who can be asked for: the stack, and whom the engine lets read alone."""
        return (STACK, *map(_asked_for, self.engine.readers))

    def seeded(self) -> "OpenBundle":
        """Return the same with a seed, where texts are drawn and none was typed: several texts have
        it in common."""
        if self.sampling.seed is not None or not self.sampling.temperature:
            return self
        out = OpenBundle(self.engine, self.prompts, {})
        out.sampling = replace(self.sampling, seed=secrets.randbelow(SEEDS))
        return out

    def prompt(self, text: str, pictures: Sequence[Path], reader: str | None) -> Prompt:
        """Return a text to go on with, or of a bundle of tasks a question. Raises DataError."""
        if self.prompts.ends_are_taught:
            return self.question([Turn("user", text, data_urls(pictures))], reader)
        if pictures:
            raise DataError(
                f"{self.engine.name} is a language model and reads no pictures; leave them out"
            )
        return self._fitting(self.prompts.text(_sound(text), own_name(reader)))

    def question(self, turns: Sequence[Turn], reader: str | None) -> Prompt:
        """Return a chat whose last turn is to be answered. Raises DataError."""
        _sound(turns[-1].text)
        prompt = self.prompts.chat(turns, own_name(reader), goes_on=False, seconds=PICTURE_S)
        return self._fitting(prompt)

    def begin(self, prompt: Prompt) -> Generation:
        """Return a text that is generated from now on. Raises DataError."""
        sampling = self.sampling
        room = self.engine.context_tokens - len(prompt.ids)
        if sampling.max_tokens is not None:
            sampling = replace(sampling, max_tokens=min(sampling.max_tokens, room))
        return self.engine.submit(prompt, sampling)

    def _fitting(self, prompt: Prompt) -> Prompt:
        context = self.engine.context_tokens
        if len(prompt.ids) < context:
            return prompt
        raise DataError(
            f"the prompt has {len(prompt.ids):,} tokens, and the context of {self.engine.name} "
            f"{context:,}, which leaves no room for an answer; shorten it"
        )


@contextmanager
def opened(folder: Path, asked: Mapping[str, Any], dtype: Dtype) -> Iterator[OpenBundle]:
    """Open a bundle whose products run in a dtype, and close its engine at the end. Raises as
    `open_service`."""
    service = open_service(folder, ServeConfig(dtype=dtype))
    try:
        yield OpenBundle(service.engine, service.prompts, asked)
    finally:
        # whoever left waits for no text that is still on its way
        service.engine.close(0)


def own_name(reader: str | None) -> str | None:
    """Return a reader as the engine has it: None for the stack."""
    if reader is None or reader == STACK:
        return None
    return reader.removeprefix(EXPERT)


def _asked_for(reader: str) -> str:
    """Return how a reader is named: an expert that is called stack as the API names it."""
    return f"{EXPERT}{reader}" if reader == STACK else reader


def _sound(text: str) -> str:
    """Return a text as it came. Raises DataError for one with bytes that are none, which Python
    hands on from a command line as halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text is not UTF-8 behind its character {error.start}; write it in UTF-8"
        ) from None
    return text


def data_urls(pictures: Sequence[Path]) -> tuple[str, ...]:
    """Return picture files as requests bring pictures: the checks are then the same. Raises
    DataError."""
    urls = []
    for path in pictures:
        try:
            content = path.read_bytes()
        # ValueError: of a name that no file can have
        except (OSError, ValueError) as error:
            told = getattr(error, "strerror", None) or error
            raise DataError(f"{path} cannot be read: {told}") from None
        try:
            claimed_size(content)
        except BadImage as error:
            raise DataError(f"{path}: {error}") from None
        # what it is, is read from its bytes
        urls.append(f"data:image/any;base64,{b64encode(content).decode()}")
    return tuple(urls)
