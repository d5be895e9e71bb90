"""A bundle opened to answer: texts go on, and every token tells its experts.

The model is the stock class that any user of the bundle would load, and its own `generate` decodes.
On opening, its logits are held against the stack that `reassemble` builds, so what was measured is
what is served. One request at a time has the model.

B sequences, T tokens, V vocabulary, L layers, E experts, K experts per token.
"""

import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..data.text import tokenizer
from ..errors import MismatchError
from ..families import family
from ..hardware import device
from ..store.bundle import SUMS, about, verify

PROBE_TOKENS = 64
# of the logits' spread; fp32 rounds by a hundredth of it, another convention is off by more
PROBE_LIMIT = 1e-4
COLDEST = 1e-3  # logits over less overflow; the most likely token it is
MARGIN_TOKENS = 4  # more than a decoder looks back
HELD_TOKENS = 64  # of bytes that are no text, after which they are shown as they are


@dataclass(frozen=True)
class Token:
    """A token, its text, and per layer the numbers and weights of its experts, first choice first."""

    id: int
    text: str
    experts: list[list[int]]
    weights: list[list[float]]


@dataclass(frozen=True)
class Sampling:
    """How a text goes on: temperature 0 takes the likeliest token, seed None draws another one each
    time."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    seconds: float | None = None  # after which no further token is begun


@dataclass(frozen=True)
class Completion:
    """What was said, why it ended (stop or length), how many tokens were drawn, and the tokens of
    the text."""

    text: str
    finish: str
    drawn: int
    tokens: list[Token]


class Engine:
    """An open bundle.

    Raises MissingArtifact, DamagedArtifact or NewerStore for one that cannot be served,
    MismatchError for one that does not compute what its stack does.
    """

    def __init__(self, folder: Path):
        verify(folder)
        self.about = about(folder)
        self.name: str = self.about["run"]
        self.experts = tuple(expert["name"] for expert in self.about["experts"])
        self.context_tokens: int = self.about["context_tokens"]
        self.made_at = int((folder / SUMS).stat().st_mtime)
        self.tokenizer = tokenizer.pretrained(str(folder))
        expected_TV = _stack_logits(self.about["family"], folder, self.context_tokens)
        self.model = _stock(folder)
        self._compare(folder, expected_TV)
        self._alone = threading.Lock()

    def encode(self, text: str) -> list[int]:
        """Return a text's tokens, led by the one that began every text of the training; markup in
        it is plain text."""
        return [self.about["start_id"], *self.tokenizer.encode([text])[0].ids]

    def complete(self, ids: Sequence[int], sampling: Sampling) -> Completion:
        """Go on with a text of encoded ids."""
        given_BT = torch.tensor([ids], device=device())
        with self._alone, torch.no_grad(), _seeded(sampling.seed), _watching(self.model) as watch:
            out_BT = self.model.generate(
                given_BT,
                attention_mask=torch.ones_like(given_BT),
                generation_config=self._settings(sampling),
                stopping_criteria=[_Stop(self._decode, len(ids), sampling.stop)]
                if sampling.stop
                else None,
            )
            first = len(ids) - 1  # the position that chose the first new token
            choices = watch.positions(first, out_BT.shape[1] - 1)
        drawn = out_BT[0, len(ids) :].tolist()
        said = drawn[:-1] if drawn[-1] in self._ends() else drawn
        text = self._decode(said)
        found = [at for at in (text.find(s) for s in sampling.stop) if at >= 0]
        ended = bool(found) or len(said) < len(drawn)
        text = text[: min(found)] if found else text
        return Completion(
            text, "stop" if ended else "length", len(drawn), self._tokens(said, choices, len(text))
        )

    def route(self, ids: Sequence[int]) -> list[Token]:
        """Return the tokens of an encoded text after the first, each with the experts that read it."""
        given_BT = torch.tensor([ids], device=device())
        with self._alone, torch.no_grad(), _watching(self.model) as watch:
            self.model.model(input_ids=given_BT, use_cache=False)
            choices = watch.positions(1, len(ids))
        return self._tokens(list(ids[1:]), choices)

    def _tokens(self, ids: list[int], choices: list, length: int | None = None) -> list[Token]:
        """Return tokens whose texts, put together, are the first `length` characters of what ids
        say."""
        tokens, at = [], 0
        for token, text, (experts, weights) in zip(ids, self._pieces(ids), choices, strict=False):
            if length is not None and at >= length:
                break
            text = text if length is None else text[: length - at]
            tokens.append(Token(token, text, experts, weights))
            at += len(text)
        return tokens

    def _pieces(self, ids: list[int]) -> Iterator[str]:
        """Yield each token's share of the text; a character of several tokens belongs to its last
        one."""
        before, held = [], []
        for i, token in enumerate(ids):
            held.append(token)
            text = self._decode(before + held)[len(self._decode(before)) :]
            whole = not text.endswith("\ufffd") or len(held) >= HELD_TOKENS or i == len(ids) - 1
            yield text if whole else ""
            if whole:
                before, held = held, []

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.model.decode(ids)

    def _ends(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        return set(ends) if isinstance(ends, list) else {ends}

    def _settings(self, sampling: Sampling):
        """Return the request as transformers takes it."""
        from transformers import GenerationConfig

        own = self.model.generation_config
        fixed = {"eos_token_id": own.eos_token_id, "pad_token_id": own.pad_token_id}
        if sampling.temperature >= COLDEST:  # top_k 0: transformers would keep 50
            drawing = {
                "temperature": float(sampling.temperature),
                "top_p": float(sampling.top_p),
                "top_k": 0,
            }
            fixed |= {"do_sample": True, **drawing}
        return GenerationConfig(
            max_new_tokens=sampling.max_tokens, max_time=sampling.seconds, **fixed
        )

    def _compare(self, folder: Path, expected_TV: torch.Tensor) -> None:
        """Raise MismatchError unless the stock model gives the stack's logits of shape (T, V)."""
        with torch.no_grad():
            found_TV = self.model(
                input_ids=_probe(self.context_tokens, expected_TV.shape[1])
            ).logits[0]
        # a tie between gates may fall differently, and shows at its own token only
        off = ((found_TV.float() - expected_TV).abs().amax(-1).median() / expected_TV.std()).item()
        if not off <= PROBE_LIMIT:
            raise MismatchError(
                f"{folder} loaded by transformers gives other logits than its own stack (typically {off:.2g} of their "
                "spread apart): transformers reads it in another way; install the version of requirements.txt"
            )


def _stock(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    return model.to(device()).eval().requires_grad_(False)


def _stack_logits(kind: str, folder: Path, context_tokens: int) -> torch.Tensor:
    """Return logits_TV of the stack on the probe; the stack itself is gone afterwards."""
    stack = family(kind).reassemble(folder)
    with torch.no_grad():
        ids_BT = _probe(context_tokens, stack.trunk.head.shape[0])
        logits_TV = stack.trunk.hidden(ids_BT, stack.mixture)[0] @ stack.trunk.head.T
    return logits_TV.float()


def _probe(context_tokens: int, vocab_size: int) -> torch.Tensor:
    """Return ids_BT of one sequence spread over the vocabulary."""
    count = min(PROBE_TOKENS, context_tokens)
    return (torch.arange(count, device=device()) * 7919 % vocab_size).unsqueeze(0)


class _Stop:
    """Ends a text once one of some strings is in it; looks only where a new token can have
    completed one."""

    def __init__(self, decode, given: int, strings: Sequence[str]):
        self.decode, self.given, self.strings = decode, given, strings
        self.window = (
            max(len(s.encode()) for s in strings) + MARGIN_TOKENS
        )  # tokens, of a byte at least

    def __call__(self, ids_BT: torch.Tensor, _scores, **_) -> torch.Tensor:
        text = self.decode(ids_BT[0, self.given :][-self.window :].tolist())
        return torch.tensor([any(s in text for s in self.strings)], device=ids_BT.device)


class _Watch:
    """What the gates chose, position by position."""

    def __init__(self, layers: int):
        self.index, self.weight = [[] for _ in range(layers)], [[] for _ in range(layers)]

    def hook(self, layer: int):
        def keep(_gate, _inputs, outputs):
            _, weight_TK, index_TK = outputs
            self.index[layer].append(index_TK)
            self.weight[layer].append(weight_TK)

        return keep

    def positions(self, first: int, end: int) -> list[tuple[list[list[int]], list[list[float]]]]:
        """Return (experts, weights), each a list per layer, of positions first to end - 1."""
        index_TLK = torch.stack([torch.cat(each) for each in self.index], 1)[first:end]
        weight_TLK = torch.stack([torch.cat(each) for each in self.weight], 1)[first:end]
        return list(zip(index_TLK.tolist(), weight_TLK.tolist(), strict=True))


@contextmanager
def _watching(model: nn.Module) -> Iterator[_Watch]:
    gates = [layer.mlp.gate for layer in model.model.layers]
    watch = _Watch(len(gates))
    hooks = [gate.register_forward_hook(watch.hook(i)) for i, gate in enumerate(gates)]
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draw from a seed, or from one nobody can guess, and leave torch's generators as they were."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(secrets.randbits(63) if seed is None else seed)
        yield


def share(tokens: Sequence[Token], experts: int) -> list[dict[str, float]]:
    """Return per expert its share of all assignments and its mean weight, over tokens and layers;
    each adds up to 1."""
    index = torch.tensor([t.experts for t in tokens], dtype=torch.long).flatten()
    weight = torch.tensor([t.weights for t in tokens], dtype=torch.float64).flatten()
    count_E = index.bincount(minlength=experts).double()
    weight_E = index.bincount(weight, minlength=experts)
    both_E2 = torch.stack([count_E, weight_E], 1) / torch.stack(
        [count_E.sum(), weight_E.sum()]
    ).clamp(min=1e-9)
    return [{"share": s, "weight": w} for s, w in both_E2.tolist()]


def strongest(token: Token) -> int:
    """Return the number of the expert with the most weight over all layers."""
    total: dict[int, float] = {}
    for experts, weights in zip(token.experts, token.weights, strict=True):
        for expert, weight in zip(experts, weights, strict=True):
            total[expert] = total.get(expert, 0.0) + weight
    return max(total, key=lambda expert: (total[expert], -expert))
