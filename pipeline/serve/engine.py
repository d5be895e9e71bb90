"""A bundle opened to answer: texts go on, and every token tells its experts.

The model is the stock class that any user of the bundle would load, and its own `generate` decodes.
On opening, its logits are held against the stack that `reassemble` builds, so what was measured is
what is served. One request at a time has the model.

B sequences, T tokens, V vocabulary, D model width, L layers, E experts, K experts per token,
A assignments of tokens to experts.
"""

import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from ..data.text import tokenizer
from ..errors import DamagedArtifact, MismatchError
from ..families import PRELOAD, family
from ..hardware import device
from ..model.loading import quiet_library
from ..protocols import check_wanted, held, is_unwanted
from ..store.bundle import SUMS, about, start_ids, verify
from .gates import GateChoice, recorded
from .generation import Sampling, Token

if TYPE_CHECKING:
    from transformers import GenerationConfig

PROBE_TOKENS = 64
# Of the logits' spread: fp32 rounds by a hundredth of it, another convention is off by more.
PROBE_LIMIT = 1e-4
# Logits over a smaller temperature overflow; the most likely token it is.
COLDEST = 1e-3
MARGIN_TOKENS = 4  # more than a decoder looks back
HELD_TOKENS = 64  # of bytes that are no text, after which they are shown as they are


class Chosen(Protocol):
    """Who reads a text, token by token."""

    def positions(self, first: int, end: int) -> list[GateChoice]:
        """Return what was chosen at positions first to end - 1."""


class CausalModel(Protocol):
    """What is used of the models that AutoModelForCausalLM opens; they share no class that has
    all of it."""

    generation_config: "GenerationConfig"
    base_model: nn.Module  # without the head

    def __call__(self, *, input_ids: torch.Tensor) -> Any:
        """Run the model; the result has logits of shape (B, T, V)."""

    def generate(self, ids_BT: torch.Tensor, **options: Any) -> torch.Tensor:
        """Return ids_BT with what follows them."""


@dataclass(frozen=True)
class Completion:
    """What was said, why it ended (stop or length), how many tokens were drawn, with one that ends
    a text, and the tokens of the text."""

    text: str
    finish: str
    completion_tokens: int
    tokens: list[Token]


class Engine:
    """An open bundle, as far as every service needs it.

    Raises MissingArtifact, DamagedArtifact or NewerStore for one that cannot be served.
    """

    def __init__(self, folder: Path):
        verify(folder)
        self.about = about(folder)
        # The name of a module, which is imported, so that only those that there are may be said.
        if self.about["family"] not in PRELOAD:
            raise DamagedArtifact(f"{folder} is of the family {self.about['family']!r}: none here")
        self.name: str = str(self.about["run"])
        experts = [expert["name"] for expert in self.about["experts"]]
        self.experts = tuple(experts)
        # The sums are written last, so they are as old as the bundle.
        sums = folder / SUMS
        self.made_at = int(sums.stat().st_mtime)


class CompletionEngine(Engine):
    """An open bundle whose texts go on.

    Raises MissingArtifact, DamagedArtifact or NewerStore for one that cannot be served,
    MismatchError for one that does not compute what its stack does.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.context_tokens: int = self.about["context_tokens"]
        self.start_ids = start_ids(self.about)
        self.tokenizer = tokenizer.pretrained(str(folder))
        self._open(folder)
        self._check_tokens(folder)
        # generate keeps state in the model, and the gates' hooks would hear of both requests.
        self._lock = threading.Lock()

    def _open(self, folder: Path) -> None:
        """Open the model, once it is held against the stack."""
        # The stack first: it looks at all files before a library does, and is gone before the
        # model is opened, so that both are never held.
        expected_TV = _stack_logits(self.about["family"], folder, self.context_tokens)
        self.model: CausalModel = open_model(folder)
        self._check_logits(folder, expected_TV)

    def encode(self, text: str) -> list[int]:
        """Return a text's tokens, led by what began every text of the training; markup in it is
        plain text."""
        (encoded,) = self.tokenizer.encode([text])
        ids = [*self.start_ids, *encoded.ids]
        # An empty text begins as generate does when it is given nothing
        return ids or [self.tokenizer.end_id]

    def complete(self, ids: Sequence[int], sampling: Sampling) -> Completion:
        """Go on with a text of encoded ids. Raises Abandoned within a token of nobody's waiting for
        it any more."""
        prompt_BT = torch.tensor([ids], device=device())
        prompt_tokens = len(ids)
        criteria: list[Any] = [_stop_unwanted]
        if sampling.stop:
            criteria.append(_StopOnText(self._decode, prompt_tokens, sampling.stop))
        with self._exclusive(ids) as gates, _seeded(sampling.seed):
            out_BT = self.model.generate(
                prompt_BT,
                attention_mask=torch.ones_like(prompt_BT),
                generation_config=self._generation_config(sampling),
                stopping_criteria=criteria,
            )
            check_wanted()
        drawn_T = out_BT[0, prompt_tokens:]
        drawn = drawn_T.tolist()
        # A token was chosen where the one before it was read: the first new one at the last of
        # the prompt. The last one was never read.
        first = prompt_tokens - 1
        choices = gates.positions(first, first + len(drawn))
        kept = list(drawn)
        finish = "length"
        # The end of a text is drawn, but no part of it.
        if drawn[-1] in self._end_ids():
            kept.pop()
            finish = "stop"
        text = self._decode(kept)
        # The earliest counts: cut one after another, one could hide where another began.
        ends = [text.find(stop) for stop in sampling.stop if stop in text]
        if ends:
            text = text[: min(ends)]
            finish = "stop"
        tokens = self._tokens(kept, choices, len(text))
        return Completion(text, finish, len(drawn), tokens)

    def route(self, ids: Sequence[int]) -> list[Token]:
        """Return an encoded text's own tokens, each with the experts that read it."""
        ids_BT = torch.tensor([ids], device=device())
        with self._exclusive(ids) as gates:
            # Without the head, whose logits over the vocabulary nobody reads here.
            self.model.base_model(input_ids=ids_BT, use_cache=False)
        led = len(self.start_ids)
        choices = gates.positions(led, len(ids))
        return self._tokens(list(ids[led:]), choices)

    @contextmanager
    def _exclusive(self, _ids: Sequence[int]) -> Iterator[Chosen]:
        """Have the model to oneself for a text, for inference, and record what its gates
        choose."""
        with held(self._lock), torch.no_grad(), recorded(self.model.base_model) as gates:
            yield gates

    def _tokens(
        self, ids: list[int], choices: list[GateChoice], length: int | None = None
    ) -> list[Token]:
        """Return tokens whose texts, put together, are the first `length` characters of what ids
        say."""
        tokens = []
        at = 0
        texts = self._token_texts(ids)
        # Not strict: the choice of an end token is the last of choices and not among ids.
        for token, text, choice in zip(ids, texts, choices, strict=False):
            if length is not None:
                if at >= length:
                    break
                text = text[: length - at]
            at += len(text)
            spoken = Token(token, text, choice.experts, choice.weights)
            tokens.append(spoken)
        return tokens

    def _token_texts(self, ids: list[int]) -> Iterator[str]:
        """Yield each token's share of the text; a character of several tokens belongs to its last
        one."""
        # Decoded behind the tokens before them, because a decoder may treat a text's start
        # otherwise, but not behind all of them, which would take time by the square.
        before: list[int] = []
        held: list[int] = []
        for i, token in enumerate(ids):
            held.append(token)
            known = self._decode(before)
            text = self._decode(before + held)
            text = text[len(known) :]
            # U+FFFD stands for bytes that are no whole character yet.
            partial = text.endswith("\ufffd")
            last = i == len(ids) - 1
            if partial and not last and len(held) < HELD_TOKENS:
                yield ""
                continue
            yield text
            before = held
            held = []

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.model.decode(ids)

    def _end_ids(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        if isinstance(ends, list):
            return set(ends)
        return {ends}

    def _generation_config(self, sampling: Sampling) -> "GenerationConfig":
        """Return the request as transformers takes it."""
        from transformers import GenerationConfig

        own = self.model.generation_config
        settings: dict[str, Any] = {
            "eos_token_id": own.eos_token_id,
            "pad_token_id": own.pad_token_id,
            "max_new_tokens": sampling.max_tokens,
            "max_time": sampling.seconds,
        }
        if sampling.temperature >= COLDEST:
            settings["do_sample"] = True
            settings["temperature"] = float(sampling.temperature)
            settings["top_p"] = float(sampling.top_p)
            # Left out, transformers would keep the 50 likeliest.
            settings["top_k"] = 0
        return GenerationConfig(**settings)

    def _check_logits(self, folder: Path, expected_TV: torch.Tensor) -> None:
        """Raise MismatchError unless the stock model gives the stack's logits of shape (T, V)."""
        ids_BT = probe(self.context_tokens, expected_TV.shape[1])
        with torch.no_grad():
            output = self.model(input_ids=ids_BT)
        logits_TV = output.logits[0].float()
        difference_TV = logits_TV - expected_TV
        worst_T = difference_TV.abs().amax(-1)
        # The median: a tie between gates may fall differently, and shows at its own token only.
        typical = worst_T.median() / expected_TV.std()
        off = typical.item()
        # Not `off > limit`, which NaN would pass.
        if not off <= PROBE_LIMIT:
            raise MismatchError(
                f"{folder} loaded by transformers gives other logits than its own stack "
                f"(typically {off:.2g} of their spread apart): transformers reads it in another "
                "way; install the version of requirements.txt"
            )

    def _check_tokens(self, folder: Path) -> None:
        """Raise MismatchError unless the stock tokenizer gives a text the tokens it has here."""
        from transformers import AutoTokenizer

        # Before, whoever used the stock one had to put the first token there.
        if self.about["format"] < 2:
            return
        drawn = [place * 7919 % self.tokenizer.vocab_size for place in range(PROBE_TOKENS)]
        # Text that spells a special token is plain here, and that token there.
        plain = [token for token in drawn if token not in self.tokenizer.special]
        text = self.tokenizer.model.decode(plain)
        with quiet_library():
            stock = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        if stock(text)["input_ids"] != self.encode(text):
            raise MismatchError(
                f"{folder} opened by transformers gives text other tokens than it was trained on; "
                "install the version of requirements.txt"
            )


def open_model(folder: Path) -> CausalModel:
    """Return the bundle as transformers opens it, frozen, on the device."""
    from transformers import AutoModelForCausalLM

    with quiet_library():
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            # As the stack computes, so that both can be compared.
            dtype=torch.float32,
            attn_implementation="sdpa",
            # Pickles could run code, and names could be looked up on the Hub.
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    return model.eval().requires_grad_(False).to(device())


def _stack_logits(family_name: str, folder: Path, context_tokens: int) -> torch.Tensor:
    """Return logits_TV of the stack on the probe; the stack itself is gone afterwards."""
    stack = family(family_name).reassemble(folder)
    head_VD = stack.trunk.head
    ids_BT = probe(context_tokens, len(head_VD))
    with torch.no_grad():
        x_BTD = stack.trunk.hidden(ids_BT, stack.mixture)
        logits_TV = x_BTD[0] @ head_VD.T
    return logits_TV.float()


def probe(context_tokens: int, vocab_size: int) -> torch.Tensor:
    """Return ids_BT of one sequence spread over the vocabulary."""
    count = min(PROBE_TOKENS, context_tokens)
    place_T = torch.arange(count, device=device())
    # Steps of a prime, so that ids repeat only where the vocabulary is a multiple of it.
    ids_T = place_T * 7919 % vocab_size
    return ids_T.unsqueeze(0)


def _stop_unwanted(ids_BT: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
    """End a text that nobody waits for any more."""
    return torch.full((len(ids_BT),), is_unwanted(), device=ids_BT.device)


@dataclass(frozen=True)
class _StopOnText:
    """Ends a text once one of some strings is in it; looks only where a new token can have
    completed one."""

    decode: Callable[[list[int]], str]
    prompt_tokens: int
    strings: tuple[str, ...]

    @property
    def window_tokens(self) -> int:
        """How far back a string can begin that the newest token completes."""
        # A token says a byte at least, so this many hold the longest string.
        longest_bytes = max(len(string.encode()) for string in self.strings)
        return longest_bytes + MARGIN_TOKENS

    def __call__(self, ids_BT: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        new_T = ids_BT[0, self.prompt_tokens :]
        recent_T = new_T[-self.window_tokens :]
        text = self.decode(recent_T.tolist())
        found = any(string in text for string in self.strings)
        return torch.tensor([found], device=ids_BT.device)


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draw from a seed, or from one nobody can guess, and leave torch's generators as they were."""
    gpus = range(torch.cuda.device_count())
    with torch.random.fork_rng(gpus):
        if seed is None:
            seed = secrets.randbits(63)
        torch.manual_seed(seed)
        yield


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


def top_expert(token: Token) -> int:
    """Return the number of the expert with the most weight over all layers."""
    total: dict[int, float] = {}
    layers = zip(token.experts, token.weights, strict=True)
    for experts, weights in layers:
        for expert, weight in zip(experts, weights, strict=True):
            total[expert] = total.get(expert, 0.0) + weight
    # Of equal ones the first in the stack, whichever layer named it first.
    return max(sorted(total), key=total.__getitem__)
