"""An engine without a model behind the real endpoints: it says a text of its own, token by token,
so that what HTTP does with pieces is tested in milliseconds."""

import threading
import time
from concurrent.futures import Future
from typing import ClassVar

from pipeline.data.text import tokenizer
from pipeline.serve.app import Access, closed
from pipeline.serve.endpoints import add_endpoints
from pipeline.serve.generation import (
    Generation,
    NoSuchReader,
    Overloaded,
    Piece,
    RequestChoice,
    Route,
    Stats,
    Token,
)
from pipeline.serve.keys import Keys
from pipeline.serve.limits import RequestLimits
from pipeline.serve.prompts import TextPrompts
from pipeline.serve.service import Service

ADDRESS = "http://127.0.0.1"  # that a server without a socket is asked at
EXPERTS = ("sea", "shop")
SAID = "The tide leaves the reef, and the gulls follow it out to sea."
CORPUS = [SAID, "user assistant system hello there", "<|im_start|> <|im_end|>"] * 4
TEMPLATE = (
    "{%- for turn in messages -%}<|im_start|>{{ turn.role + '\\n' + turn.content }}<|im_end|>\n"
    "{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)


class FakeEngine:
    """Says SAID, whatever it is asked; with `step_s` a token each so many seconds, in a thread."""

    name = "fake"
    experts = EXPERTS
    speakers = (*EXPERTS, "base")
    readers = (*EXPERTS, "base")
    context_tokens = 256
    echoes = False
    made_at = 7
    about: ClassVar = {
        "experts": [{"name": "sea", "domain": "ocean"}, {"name": "shop"}],
        "top_k": 1,
    }
    watcher = None

    def __init__(self, step_s: float = 0.0, room: int = 100):
        self.step_s = step_s
        self.room = room
        self.stats = Stats()
        self.asked: list[tuple[Generation, str]] = []
        self.fails: Exception | None = None
        self.start_ids: list[int] = []
        self.tokenizer = tokenizer.train(400, CORPUS)

    def encode(self, text: str) -> list[int]:
        """Return a text's tokens."""
        (encoded,) = self.tokenizer.encode([text])
        return encoded.ids or [self.tokenizer.end_id]

    def submit(self, prompt, sampling, client="") -> Generation:
        """Have a text said."""
        if prompt.reader not in (None, *self.readers):
            raise NoSuchReader(prompt.reader, self.readers)
        if len(self.asked) >= self.room:
            raise Overloaded(len(self.asked))
        generation = Generation(prompt, sampling)
        self.asked.append((generation, client))
        if self.step_s:
            threading.Thread(target=self._say, args=(generation,)).start()
        else:
            self._say(generation)
        return generation

    def route(self, prompt, client="") -> Future:
        """Have every token read by the first expert."""
        future = Future()
        tokens = [self._token(each, self._text(each)) for each in prompt.ids]
        future.set_result(Route(tokens=tuple(tokens)))
        return future

    def close(self, seconds=None) -> None:
        """End what is asked."""
        for generation, _ in self.asked:
            generation.fail(Overloaded(0, closing=True))

    def _say(self, generation: Generation) -> None:
        sampling = generation.sampling
        ids = self.encode(SAID)
        finish = "stop"
        if sampling.max_tokens is not None and sampling.max_tokens < len(ids):
            ids = ids[: sampling.max_tokens]
            finish = "length"
        left = SAID
        stops = [SAID.find(stop) for stop in sampling.stop if stop in SAID]
        if stops:
            left = SAID[: min(stops)]
            finish = "stop"
        generation.times.routed = time.monotonic()
        for number, each in enumerate(ids):
            if self.step_s:
                time.sleep(self.step_s)
            if generation.cancelled:
                return
            if self.fails is not None and number == 2:
                generation.fail(self.fails)
                return
            text = self._text(each)[: len(left)]
            left = left[len(text) :]
            if not text:
                break
            generation.completion_tokens += 1
            likely = ((each, -0.5), (0, float("-inf")))[: sampling.logprobs or 0]
            logprob = None if sampling.logprobs is None else -0.5
            generation.add(Piece(self._token(each, text), text, logprob, likely))
        generation.add(Piece(None, "", finish=finish))

    def _token(self, number: int, text: str) -> Token:
        return Token(number, text, [[0], [1]], [[1.0], [1.0]])

    def _text(self, number: int) -> str:
        return self.tokenizer.model.decode([number], skip_special_tokens=False)


def routed_by_request(engine: FakeEngine) -> None:
    """Have an engine choose who reads a whole text, as one of adapters does."""
    choice = RequestChoice("sea", 0.75, (("sea", 0.75), ("shop", 0.25)), ("sea",))
    say = engine._say

    def said(generation: Generation) -> None:
        generation.choice = choice
        generation.reader = "sea"
        generation.others = (("shop", "no"),)
        say(generation)

    def route(prompt, client="") -> Future:
        future = Future()
        future.set_result(Route(choice=choice))
        return future

    engine._say = said
    engine.route = route


def served(
    folder,
    engine: FakeEngine,
    template: str | None = TEMPLATE,
    *,
    key: str | None = None,
    **limits,
):
    """Return the application over an engine; folder takes its tokenizer's files."""
    files = engine.tokenizer.stock_files([])
    for name, text in files.items():
        (folder / name).write_text(text)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    service = Service(engine, TextPrompts(engine, folder), RequestLimits(**limits))
    app = closed(Access(keys=Keys(key)))
    app.state.service = service
    add_endpoints(app, service, wants_key=key is not None)
    app.state.gate.opened = True
    return app
