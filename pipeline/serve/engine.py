"""A bundle opened to answer: texts go on, many at once, and every token tells its experts.

T tokens, V vocabulary, E experts, A assignments of tokens to experts.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config.serving import Dtype
from ..data.text import tokenizer
from ..errors import ConfigError, DamagedArtifact, DataError, TooLong
from ..families import PRELOAD, family
from ..hardware import device, has_bf16
from ..model.language_model import filled
from ..store.bundle import DENSE, SUMS, about, start_ids, verify
from .dense import DenseModel, opened_dense, steady_dense
from .echoed import EchoedRow
from .gates import GateChoice
from .generation import (
    BASE_READER,
    DENSE_READER,
    Capacity,
    Generation,
    NoSuchReader,
    Prompt,
    Route,
    Sampling,
    Stats,
    Token,
    Watcher,
    result_of,
)
from .networks import Network, StockMixture, UnmergedMixture
from .opening import check_logits, check_tokens, open_model, probe_logits
from .rows import Order, ServedRow, TextRow, TextSink, TracedRow
from .sampling import TokenSampler
from .scheduler import Scheduler
from .steady.mixture import SteadyMixture, can_be_steady
from .steady.network import SteadyNetwork
from .steady.trial import is_steady
from .text_stream import TextStream, shares_of

MOST_OF_A_NAME = 200  # characters; configurations allow 64
NO_BF16 = "has no form in bf16 here; set serve.dtype to fp32 or auto"
FASTER = (
    "products run in fp32; this processor has bf16, in which they are faster: "
    "--dtype auto, or serve.dtype"
)
NO_ROOM = "is too large to hold its weights in bf16 beside its files; set serve.dtype to fp32"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Completion:
    """What was said, why it ended (stop or length), how many tokens were drawn, with one that ends
    a text, and the tokens of the text."""

    text: str
    finish: str
    completion_tokens: int
    tokens: list[Token]

    @classmethod
    def of(cls, generation: Generation) -> "Completion":
        """Return a text once it has ended. Raises what `Generation.wait` does."""
        pieces = generation.wait()
        text = "".join(piece.text for piece in pieces)
        tokens = [piece.token for piece in pieces if piece.token]
        finish = pieces[-1].finish or "stop"
        return cls(text, finish, generation.completion_tokens, tokens)


class Engine(ABC):
    """An open bundle, as far as every service needs it.

    Raises MissingArtifact, DamagedArtifact or NewerStore for one that cannot be served.
    """

    dtype: Dtype = "fp32"  # of products, as it is wanted
    echoes = False  # whether a prompt's own tokens can be told, with their probabilities
    context_tokens: int
    readers: tuple[str, ...]  # who can be asked for by name
    speakers: tuple[str, ...]  # by the numbers that tokens tell

    def __init__(self, folder: Path, capacity: Capacity | None = None, dtype: Dtype = "fp32"):
        verify(folder)
        self.dtype = dtype
        self.about = about(folder)
        # The name of a module, which is imported, so that only those that there are may be said.
        if self.about["family"] not in PRELOAD:
            raise DamagedArtifact(f"{folder} is of the family {self.about['family']!r}: none here")
        self.name, *experts = names(folder, self.about)
        self.experts = tuple(experts)
        # The sums are written last, so they are as old as the bundle.
        sums = folder / SUMS
        self.made_at = int(sums.stat().st_mtime)
        self.capacity = capacity or Capacity()
        self.stats = Stats()
        self.watcher: Watcher | None = None

    def _serve(self, network: Network) -> None:
        """Have a network run what is asked from now on."""
        # not chosen unasked: on a machine without it the same request would be answered otherwise
        if self.dtype == network.dtype == "fp32" and device() == "cpu" and has_bf16():
            log.info(FASTER)
        self.network = network
        self.speakers = network.speakers
        self.model: Any = network.model
        self.scheduler = Scheduler(network, self.capacity, self.stats)
        self.scheduler.stepped = self._stepped
        self.scheduler.ended = self._ended

    @abstractmethod
    def submit(self, prompt: Prompt, sampling: Sampling, client: str = "") -> Generation:
        """Have a text generated; of clients that wait, the one with the fewest running is first.

        Raises Overloaded, NoSuchReader, and DataError for what is over the context.
        """

    @abstractmethod
    def route(self, prompt: Prompt, client: str = "") -> Future[Route]:
        """Have it said where a prompt goes. Raises as `submit` does; cancelling the future gives it
        up."""

    def close(self, seconds: float | None = None) -> None:
        """Take nothing more on, bring to an end what is asked already, for at most so long, and end
        the rest with Overloaded. Returns once nothing runs any more."""
        self.scheduler.close(seconds)

    def _stepped(self, rows: int, seconds: float) -> None:
        if self.watcher:
            self.watcher.stepped(rows, seconds)

    def _ended(self, row: ServedRow, finish: str) -> None:
        text = row.order.text
        # of a text that a router is asked about, or that several answer, rows end before it does
        if self.watcher and text is not None and text.finished and not text.counted:
            text.counted = True
            self.watcher.ended(text, finish)

    def _check(self, prompt: Prompt, sampling: Sampling | None = None) -> None:
        """Raise NoSuchReader or DataError for what cannot be run."""
        if prompt.reader is not None and prompt.reader not in self.readers:
            raise NoSuchReader(prompt.reader, self.readers, self._why_not(prompt.reader))
        size = self.network.vocab_size
        biased: Iterable[int] = sampling.logit_bias if sampling else ()
        for token in (*prompt.ids, *biased):
            if not 0 <= token < size:
                raise DataError(f"{token} is no token: there are {size:,}, counted from 0")
        count = len(prompt.ids)
        if not count:
            raise DataError("there is no token to go on from")
        # a text that is only routed draws none; one without a limit needs room for one
        wanted = 0
        if sampling is not None:
            wanted = 1 if sampling.max_tokens is None else sampling.max_tokens
        if count + wanted > self.context_tokens:
            raise TooLong(
                f"{count} tokens and {wanted} to be drawn are over the context of "
                f"{self.context_tokens} tokens"
            )

    def _why_not(self, _reader: str) -> str:
        """Return why a reader is not there, where there is more to say than that."""
        return ""

    @property
    def _may_be_steady(self) -> bool:
        """Whether products may run in bf16, where the stack has such a form."""
        if self.dtype == "auto":
            # on a GPU nothing was measured, so nothing is chosen there unasked
            return device() == "cpu" and has_bf16()
        return self.dtype == "bf16"

    def _steady(self, folder: Path) -> Network | None:
        """Return the stack in bf16, None where it is to run in fp32. Raises ConfigError."""
        return self._tried_steady(folder, self._made_steady, self._tried_readers)

    def _tried_steady(
        self,
        folder: Path,
        make: Callable[[Path], SteadyNetwork | None],
        readers: Sequence[str | None] = (None,),
    ) -> Network | None:
        """Return what is made in bf16 of a folder, None where it is to run in fp32. Raises
        ConfigError."""
        if not self._may_be_steady:
            return None
        network = make(folder)
        if network is None:
            if self.dtype == "auto":
                return None
            raise ConfigError(f"{folder} {NO_BF16}")
        if not network.is_held:
            # Each weight would be cast again for each of its products, and most run in fp32
            if self.dtype == "auto":
                return None
            raise ConfigError(f"{folder} {NO_ROOM}")
        if not is_steady(network, self.context_tokens, readers):
            if self.dtype == "auto":
                return None
            log.warning(
                "in bf16 a text depends on those beside it on this machine: the same request may "
                "be answered otherwise; serve.dtype: fp32 does not"
            )
        log.info("products run in bf16")
        return network

    @abstractmethod
    def _made_steady(self, folder: Path) -> SteadyNetwork | None:
        """Return the stack in bf16, None where it has no such form."""

    @property
    def _tried_readers(self) -> Sequence[str | None]:
        """Return who reads the texts that it is tried with."""
        return (None,)

    def _ends_of(self, sampling: Sampling) -> frozenset[int]:
        """Return those of a text, which are none where it is to go on past them."""
        return frozenset() if sampling.past_end else self._end_ids()

    def _end_ids(self) -> frozenset[int]:
        """Return the tokens that end a text."""
        ends = self.model.generation_config.eos_token_id
        return frozenset(ends if isinstance(ends, list) else [ends])


class CompletionEngine(Engine):
    """An open bundle whose texts go on.

    Raises MissingArtifact, DamagedArtifact or NewerStore for one that cannot be served,
    MismatchError for one that does not compute what its stack does, ConfigError for a dtype that it
    is not run in.
    """

    echoes = True

    def __init__(self, folder: Path, capacity: Capacity | None = None, dtype: Dtype = "fp32"):
        super().__init__(folder, capacity, dtype)
        self.context_tokens: int = self.about["context_tokens"]
        self.start_ids = start_ids(self.about)
        self.tokenizer = tokenizer.pretrained(str(folder))
        network = self._opened(folder)
        if self.about.get("dense"):
            network.stand_beside(self._dense(folder / DENSE, network.dtype))
            self.readers = (*self.readers, DENSE_READER)
        self._serve(network)
        # Before, whoever used the stock one had to put the first token there.
        if self.about["format"] >= 2:
            check_tokens(folder, self.tokenizer, self.start_ids)

    def _opened(self, folder: Path) -> Network:
        """Return the model, once it is held against the stack."""
        # The stack first: it looks at all files before a library does.
        stack = family(self.about["family"]).reassemble(folder)
        expected_TV = probe_logits(stack.trunk, stack.mixture, self.context_tokens)
        if self.about.get("unmerged"):
            generation_config = self._held_against(folder, expected_TV)
            self.readers = (*self.experts, BASE_READER)
            if steady := self._steady(folder):
                steady.model.generation_config = generation_config
                return steady
            stack.trunk.network.generation_config = generation_config
            return UnmergedMixture(stack.trunk, stack.experts, stack.mixture.router)
        # It is gone before the model is opened, so that both are never held
        del stack
        base = self._anchor()
        self.readers = self.experts if base is None else (*self.experts, BASE_READER)
        if self._may_be_steady:
            # Neither are the model, all of it in fp32, and what runs in bf16
            generation_config = self._held_against(folder, expected_TV)
            if steady := self._steady(folder):
                steady.model.generation_config = generation_config
                return steady
        model = open_model(folder)
        check_logits(folder, model, expected_TV, self.context_tokens)
        return StockMixture(model, self.experts, base)

    def _held_against(self, folder: Path, expected_TV: torch.Tensor) -> Any:
        """Hold the class that stock tools load against the stack; return how that generates. Raises
        MismatchError."""
        stock = open_model(folder)
        check_logits(folder, stock, expected_TV, self.context_tokens)
        return stock.generation_config

    def _made_steady(self, folder: Path) -> SteadyNetwork | None:
        """Return the stack in bf16, None where it has no such form."""
        # once more, as what runs in bf16 is changed for it
        stack = family(self.about["family"]).reassemble(folder)
        if not can_be_steady(stack.trunk, list(stack.experts.values())):
            return None
        return SteadyMixture(stack.trunk, stack.experts, stack.mixture.router, self._anchor())

    def _dense(self, folder: Path, dtype: str) -> Network:
        """Return a dense model, a checkpoint that was looked at with the bundle, once the class
        that stock tools load is held against it; its products run in the stack's dtype."""
        model = opened_dense(folder)
        expected_TV = probe_logits(model, filled, self.context_tokens)
        self._held_against(folder, expected_TV)
        steady = self._tried_steady(folder, steady_dense) if dtype == "bf16" else None
        return steady or DenseModel(model)

    def _anchor(self) -> int | None:
        """Return the number of the expert that is the trunk's own network, where one is kept."""
        for number, expert in enumerate(self.about["experts"]):
            if expert.get("domain") is None:
                return number
        return None

    def _why_not(self, reader: str) -> str:
        if reader != BASE_READER:
            return ""
        return (
            "this bundle holds full experts without the base's own network (trunk.anchor: drop), "
            "so the base cannot read a text"
        )

    def encode(self, text: str) -> list[int]:
        """Return a text's tokens, led by what began every text of the training; markup in it is
        plain text."""
        (encoded,) = self.tokenizer.encode([text])
        ids = [*self.start_ids, *encoded.ids]
        # An empty text begins as generate does when it is given nothing
        return ids or [self.tokenizer.end_id]

    def submit(self, prompt: Prompt, sampling: Sampling, client: str = "") -> Generation:
        """Have a text go on; of clients that wait, the one with the fewest running is first.

        Raises Overloaded, NoSuchReader, and DataError for what is over the context.
        """
        self._check(prompt, sampling)
        generation = Generation(prompt, sampling)
        order = Order.of_text(generation, client)
        sink = TextSink(generation, self.watcher)
        stream = TextStream(self._decode, sampling.stop, prompt.ids if prompt.goes_on else ())
        limit = self.context_tokens - len(prompt.ids)
        if sampling.max_tokens is not None:
            limit = min(sampling.max_tokens, limit)
        kind = EchoedRow if sampling.echoes else TextRow
        row = kind(
            order,
            prompt.ids,
            prompt.reader,
            sink,
            TokenSampler(sampling),
            stream,
            self._ends_of(sampling),
            limit,
        )
        self.scheduler.add(row)
        return generation

    def route(self, prompt: Prompt, client: str = "") -> Future[Route]:
        """Have it said who reads each token of a text, less those that begin every text. Raises as
        `submit` does; cancelling the future gives it up."""
        self._check(prompt)
        future: Future[Route] = Future()
        # a chat is begun as its template has it
        begins = prompt.ids[: len(self.start_ids)] == tuple(self.start_ids)
        led = len(self.start_ids) if begins else 0

        def done(choices: list[GateChoice]) -> None:
            tokens = self._tokens(prompt.ids[led:], choices[led:])
            if future.set_running_or_notify_cancel():
                future.set_result(Route(tuple(tokens), row.choice))

        row = TracedRow(Order.of_route(future, client), prompt.ids, prompt.reader, done)
        self.scheduler.add(row)
        return future

    def complete(self, ids: Sequence[int], sampling: Sampling) -> Completion:
        """Go on with a text of encoded ids. Raises Abandoned within a token of nobody's waiting for
        it any more."""
        prompt = Prompt(tuple(ids))
        return Completion.of(self.submit(prompt, sampling))

    def trace(self, ids: Sequence[int]) -> list[Token]:
        """Return an encoded text's own tokens, each with the experts that read it."""
        found = result_of(self.route(Prompt(tuple(ids))))
        return list(found.tokens)

    def _tokens(self, ids: Sequence[int], choices: Sequence[GateChoice]) -> list[Token]:
        """Return tokens whose texts, put together, are what ids say."""
        tokens = []
        for token, text, choice in zip(ids, shares_of(ids, self._decode), choices, strict=True):
            tokens.append(Token(token, text, choice.experts, choice.weights))
        return tokens

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.model.decode(ids)


def names(folder: Path, described: Mapping[str, Any]) -> list[str]:
    """Return what a bundle calls its run and its experts. Raises DamagedArtifact for names that a
    log, a terminal or a page would show as something else than they are."""
    found = [described["run"], *(expert["name"] for expert in described["experts"])]
    for name in found:
        plain = isinstance(name, str) and name.isprintable() and name.strip() == name != ""
        if not plain or len(name) > MOST_OF_A_NAME:
            raise DamagedArtifact(f"{folder} has {str(name)[:40]!r} for a name, which is none")
    if len(set(found[1:])) < len(found) - 1:
        raise DamagedArtifact(f"{folder} has two experts of one name")
    return found


def expert_shares(tokens: Sequence[Token], experts: int) -> list[dict[str, float]]:
    """Return per expert its share of all assignments and its mean weight, over tokens and layers;
    each adds up to 1."""
    chosen = [token.experts for token in tokens]
    weights = [token.weights for token in tokens]
    index_A = torch.tensor(chosen, dtype=torch.long).flatten()
    weight_A = torch.tensor(weights, dtype=torch.float64).flatten()
    count_E = index_A.bincount(minlength=experts)
    total_E = index_A.bincount(weight_A, minlength=experts)
    share_E = _normalized(count_E.double())
    mean_E = _normalized(total_E)
    shares = zip(share_E, mean_E, strict=True)
    return [{"share": share, "weight": mean} for share, mean in shares]


def _normalized(value_E: torch.Tensor) -> list[float]:
    # Without tokens everything is 0, and so are the shares.
    share_E = value_E / value_E.sum().clamp(min=1e-9)
    return share_E.tolist()


def top_expert(token: Token) -> int | None:
    """Return the number of the expert with the most weight over all layers; None where no expert
    spoke it, as in a dense model."""
    total: dict[int, float] = {}
    layers = zip(token.experts, token.weights, strict=True)
    for experts, weights in layers:
        for expert, weight in zip(experts, weights, strict=True):
            total[expert] = total.get(expert, 0.0) + weight
    if not total:
        return None
    # Of equal ones the first in the stack, whichever layer named it first.
    return max(sorted(total), key=total.__getitem__)


def top_name(token: Token, speakers: Sequence[str]) -> str | None:
    """Return that expert's name."""
    number = top_expert(token)
    return None if number is None else speakers[number]
