"""One base with all its adapters: label logits and texts of batches whose rows run under different
adapters.

Invariant: every call names the adapter of each row and leaves no hook behind, whatever happens in
it; so no answer depends on an earlier call, and a batch says what its rows say alone. One call at a
time has the model.

B rows of a batch, N rows of a call, T tokens, C labels, V vocabulary, D width.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.model import _adapter_names_pre_forward_hook as _leaked
from transformers import GenerationConfig, LogitsProcessorList

from ...errors import DataError, TooLong
from ...protocols import check_wanted, held, is_unwanted
from .chat import Chat, ChatTurn
from .media import MediaFeatures, Medium
from .peft_io import NO_ADAPTER, core_of, own_name, peft_name

BASE = "base"  # the name of a row that runs under no adapter
# tokens; rows whose lengths differ by less are padded to one length without much waste
SIMILAR = 32


@dataclass(frozen=True)
class Request:
    """What is asked, and the media it is asked about."""

    prompt: str
    media: tuple[Medium, ...] = ()


@dataclass(frozen=True)
class GenerationLimits:
    """How large a request and a batch may be; a request above them is refused, never cut."""

    media: int = 4
    prompt_characters: int = 8000
    tokens: int = 4096  # of prompt and media
    batch_rows: int = 32
    batch_tokens: int = 32_768  # rows times the longest one, new tokens included


@dataclass(frozen=True)
class BatchRow:
    """One sequence to run: encoded prompt, its media in order, and the adapter."""

    ids: tuple[int, ...]
    media: tuple[MediaFeatures, ...]
    adapter: str


@dataclass(frozen=True)
class Reply:
    """What one adapter answered, and why it ended: stop or length."""

    text: str
    finish: str
    prompt_tokens: int
    completion_tokens: int
    log_probability: float  # mean over the completion's tokens, nats


class MultiAdapterModel:
    """A PEFT model with all its adapters loaded, and the chat that its requests are put in."""

    def __init__(
        self,
        model: PeftModel,
        chat: Chat,
        limits: GenerationLimits,
    ):
        self.model = model.eval()
        self.chat = chat
        self.limits = limits
        self.core = core_of(model)
        self.adapters = tuple(own_name(known) for known in model.peft_config)
        self.encoder_adapters = chat.media.changed_by(self.core)
        self._lock = threading.Lock()
        # the Hub's settings draw at random, and an answer must be repeatable: the ends are kept
        own = self.core.generation_config
        ends = own.eos_token_id
        if not isinstance(ends, list):
            ends = [ends]
        pad = own.pad_token_id
        if pad is None:
            pad = ends[0]
        self._ends = set(ends)
        self.core.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad)

    def check(self, request: Request) -> None:
        """Raise DataError for a request over the limits, before anything is run."""
        count = len(request.media)
        self.check_parts(len(request.prompt), count)
        # each medium takes the place of one placeholder of the prompt
        of_prompt = len(self.chat.prompt_ids(request.prompt, count)) - count
        self.check_tokens(of_prompt, self._media_tokens(request.media))

    def read(
        self, turns: Sequence[ChatTurn], media: Sequence[Medium], *, goes_on: bool = False
    ) -> tuple[int, ...]:
        """Return the ids of a conversation with all its media in order, ready to be answered; where
        its last turn goes on, that is gone on with. Raises DataError for one over the limits, or
        that the base's chat template does not take."""
        characters = sum(len(turn.text) for turn in turns)
        self.check_parts(characters, len(media))
        try:
            ids = self.chat.turn_ids(turns, goes_on=goes_on)
        except Exception as error:  # a template raises what it likes
            raise DataError(f"the base's chat template does not take them: {error}") from None
        tokens = self._media_tokens(media)
        self.check_tokens(len(ids) - len(media), tokens)
        return tuple(self.chat.expand(ids, tokens))

    def read_plain(self, text: str) -> tuple[int, ...]:
        """Return the ids of a text that is no turn of a chat. Raises DataError for one over the
        limits."""
        self.check_parts(len(text), 0)
        ids = self.chat.tokenizer.encode(self.chat.escape(text), add_special_tokens=False)
        self.check_tokens(len(ids), ())
        # a text needs something to go on from
        return tuple(ids) or (self.chat.pad_id,)

    def _media_tokens(self, media: Sequence[Medium]) -> list[int]:
        return [self.chat.media.tokens(medium) for medium in media]

    def check_parts(self, characters: int, media: int) -> None:
        """Raise TooLong for more characters, DataError for more media than are worth a look."""
        limits = self.limits
        if media > limits.media:
            kind = f"{self.chat.media.name}s"
            raise DataError(f"the request has {media} {kind}; at most {limits.media} are taken")
        # before it is encoded, which takes long for a long one
        if characters > limits.prompt_characters:
            raise TooLong(
                f"the prompt has {characters:,} characters; at most "
                f"{limits.prompt_characters:,} are taken, and the maximum input length is "
                f"{limits.tokens:,} tokens"
            )

    def check_tokens(self, of_prompt: int, media_tokens: Sequence[int]) -> None:
        """Raise TooLong for more tokens than a request may have."""
        limits = self.limits
        of_media = sum(media_tokens)
        tokens = of_prompt + of_media
        if tokens <= limits.tokens:
            return
        count = len(media_tokens)
        kind = f"{self.chat.media.name}s"
        share = f"{of_media:,} of them for {count} {kind}; " if count else ""
        smaller = f"smaller or fewer {kind}, or " if count else ""
        # "maximum input length" are the words that LiteLLM looks for
        raise TooLong(
            f"the request has {tokens:,} tokens, {share}the maximum input length is "
            f"{limits.tokens:,} tokens. Send {smaller}a shorter prompt"
        )

    def encode_media(self, media: Sequence[Medium], adapter: str = BASE) -> list[MediaFeatures]:
        """Run the encoder, the base's own or that of an adapter in `encoder_adapters`, once over
        each distinct medium."""
        # the same object may come several times: it is opened once and held by its callers
        distinct = {id(medium): medium for medium in media}
        features: list[MediaFeatures] = []
        batches = self.chat.media.batches(list(distinct.values()))
        for prepared in batches:
            with self._running(), self._encoder_of(adapter):
                features += self.chat.media.encode(self.core, prepared)
        by_medium = dict(zip(distinct, features, strict=True))
        return [by_medium[id(medium)] for medium in media]

    def encode(self, prompt: str, media: Sequence[MediaFeatures]) -> tuple[int, ...]:
        """Return the ids of a user's turn with media in front, ready to be answered."""
        ids = self.chat.prompt_ids(prompt, len(media))
        media_tokens = [each.tokens for each in media]
        return tuple(self.chat.expand(ids, media_tokens))

    def label_logits(self, rows: Sequence[BatchRow], labels: Sequence[int]) -> torch.Tensor:
        """Return logit_NC of the tokens `labels` after each row, in float32."""
        self._check_names(rows)
        out_NC = torch.empty(len(rows), len(labels))
        nothing_new = [0] * len(rows)
        for batch in self._batches(rows, nothing_new):
            picked = [rows[i] for i in batch]
            with self._running():
                inputs = self._inputs(picked)
                inputs["adapter_names"] = _names(picked)
                out = self.model(**inputs, logits_to_keep=1, use_cache=False)
            logits_BC = out.logits[:, -1, list(labels)]
            out_NC[batch] = logits_BC.float().cpu()
        return out_NC

    def generate(
        self,
        rows: Sequence[BatchRow],
        new_tokens: Sequence[int],
        seconds: float | None = None,
    ) -> list[Reply]:
        """Return every row's greedy answer of at most its own number of new tokens, in the order of
        rows.

        Past `seconds` no further token is begun. Raises DataError for an adapter that is not
        loaded.
        """
        self._check_names(rows)
        out: dict[int, Reply] = {}
        until = None if seconds is None else time.monotonic() + seconds
        for batch in self._batches(rows, new_tokens):
            picked = [rows[i] for i in batch]
            limits = [new_tokens[i] for i in batch]
            generations = self._generate(picked, limits, until)
            out |= zip(batch, generations, strict=True)
        return [out[i] for i in range(len(rows))]

    def pooled(self, rows: Sequence[BatchRow]) -> torch.Tensor:
        """Return x_ND, the mean of the last hidden states over each row's tokens, in float32."""
        self._check_names(rows)
        if not rows:
            return torch.empty(0, 0)
        x_ND = torch.empty(0, 0)
        nothing_new = [0] * len(rows)
        for batch in self._batches(rows, nothing_new):
            picked = [rows[i] for i in batch]
            with self._running():
                inputs = self._inputs(picked)
                # the PEFT model's own forward ends at the logits, so its hooks are set here
                with self.model._enable_peft_forward_hooks(adapter_names=_names(picked)):
                    states = self.core.base_model(**inputs, use_cache=False)
            h_BTD = states.last_hidden_state.float()
            keep_BT1 = inputs["attention_mask"].unsqueeze(-1)
            sum_BD = (h_BTD * keep_BT1).sum(1)
            mean_BD = sum_BD / keep_BT1.sum(1)
            if not len(x_ND):
                # Taken once: what a pass leaves would lie between blocks that the next one needs
                x_ND = torch.empty(len(rows), mean_BD.shape[1])
            x_ND[batch] = mean_BD.cpu()
        return x_ND

    def _generate(
        self,
        rows: list[BatchRow],
        new_tokens: list[int],
        until: float | None,
    ) -> list[Reply]:
        inputs = self._inputs(rows)
        given = inputs["input_ids"].shape[1]
        likelihood = _Likelihood()
        left = None
        if until is not None:
            # the library takes 0 for no limit
            left = max(0.01, until - time.monotonic())
        with self._running():
            out_BT = self.model.generate(
                **inputs,
                adapter_names=_names(rows),
                do_sample=False,
                max_new_tokens=max(new_tokens),
                max_time=left,
                logits_processor=LogitsProcessorList([likelihood]),
                stopping_criteria=[_StopRows(given, new_tokens)],
            )
            check_wanted()
        nats_BT = torch.stack(likelihood.nats, 1).tolist()
        ids_BT = out_BT[:, given:].tolist()
        out = []
        for i, row in enumerate(rows):
            # a batch goes on until its last row ends
            own = ids_BT[i][: new_tokens[i]]
            out.append(self._generation(row, own, nats_BT[i]))
        return out

    def _generation(
        self,
        row: BatchRow,
        ids: list[int],
        nats: list[float],
    ) -> Reply:
        ends = [i for i, token in enumerate(ids) if token in self._ends]
        end = ends[0] if ends else len(ids)
        text = self.chat.tokenizer.decode(ids[:end], skip_special_tokens=True)
        # the token that ends an answer is one of it, as it was learned
        count = end + 1 if ends else end
        mean = sum(nats[:count]) / max(1, count)
        return Reply(
            text=str(text),
            finish="stop" if ends else "length",
            prompt_tokens=len(row.ids),
            completion_tokens=count,
            log_probability=mean,
        )

    @contextmanager
    def _encoder_of(self, adapter: str) -> Iterator[None]:
        """Have the encoder as one adapter changes it, or as it was; adapter names per row do not
        reach it."""
        if adapter in self.encoder_adapters:
            self.model.set_adapter(peft_name(adapter), inference_mode=True)
            yield
        elif self.encoder_adapters:
            with self.model.disable_adapter():
                yield
        else:
            yield

    def _inputs(self, rows: Sequence[BatchRow]) -> dict[str, Any]:
        """Return what the model takes for a batch, padded on the left: an answer must follow its
        prompt directly."""
        ids = [row.ids for row in rows]
        inputs: dict[str, Any] = dict(self.chat.tensors(ids, "left"))
        media: list[MediaFeatures] = []
        for row in rows:
            media += row.media
        if media:
            inputs |= self.chat.media.feature_inputs(media)
        for key, value in inputs.items():
            if torch.is_tensor(value):
                inputs[key] = value.to(self.core.device)
        return inputs

    def _batches(self, rows: Sequence[BatchRow], new_tokens: Sequence[int]) -> Iterator[list[int]]:
        """Yield the numbers of rows that run together: of similar length, within the limits of a
        batch.

        Among rows of similar length those of one adapter stand together, as fewer adapters in a
        batch run faster.
        """

        def similar(i: int) -> tuple:
            return len(rows[i].ids) // SIMILAR, new_tokens[i], rows[i].adapter, i

        limits = self.limits
        batch: list[int] = []
        prompt = 0  # tokens of the batch's longest
        answer = 0
        for i in sorted(range(len(rows)), key=similar):
            own = len(rows[i].ids)
            prompt = max(prompt, own)
            answer = max(answer, new_tokens[i])
            too_many = len(batch) == limits.batch_rows
            tokens = (len(batch) + 1) * (prompt + answer)
            if batch and (too_many or tokens > limits.batch_tokens):
                yield batch
                batch = []
                prompt = own
                answer = new_tokens[i]
            batch.append(i)
        if batch:
            yield batch

    def _check_names(self, rows: Sequence[BatchRow]) -> None:
        """Raise DataError before PEFT sees a name that it does not know, which would leave its
        hooks behind."""
        asked = {row.adapter for row in rows}
        unknown = sorted(asked - {*self.adapters, BASE})
        if unknown:
            known = ", ".join(self.adapters)
            raise DataError(f"no adapter is called {unknown[0]}; there are {known} and {BASE}")

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Have the model alone, without gradients; take PEFT's hooks away after an exception, as it
        does not.

        A hook that stays would make later rows run under the adapters of the failed call
        (huggingface/peft#3475).
        """
        with held(self._lock), torch.no_grad():
            try:
                yield
            except BaseException:
                _unhook(self.model)
                raise


def _names(rows: Sequence[BatchRow]) -> list[str]:
    """Return each row's adapter as PEFT calls it."""
    return [NO_ADAPTER if row.adapter == BASE else peft_name(row.adapter) for row in rows]


def _unhook(model: torch.nn.Module) -> int:
    """Remove the hooks that PEFT sets for adapter names; return how many there were."""
    removed = 0
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if getattr(hook, "func", None) is _leaked:
                del module._forward_pre_hooks[key]
                # torch keeps a second note of hooks that take keywords
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                removed += 1
    return removed


class _Likelihood:
    """Keeps the log-probability of each step's likeliest token, which is the one a greedy answer
    takes."""

    def __init__(self) -> None:
        self.nats: list[torch.Tensor] = []

    def __call__(self, _ids_BT: torch.Tensor, score_BV: torch.Tensor) -> torch.Tensor:
        wide_BV = score_BV.float()
        # of the likeliest token, without the log-probabilities of all the others
        self.nats.append(wide_BV.amax(-1) - wide_BV.logsumexp(-1))
        return score_BV


class _StopRows:
    """Ends each row after its own number of new tokens, and all where nobody waits for them."""

    def __init__(self, given: int, new_tokens: Sequence[int]):
        self.given = given
        self.most_B = torch.tensor(new_tokens)

    def __call__(self, ids_BT: torch.Tensor, _scores: torch.Tensor, **_: Any) -> torch.Tensor:
        made = ids_BT.shape[1] - self.given
        if is_unwanted():
            return torch.ones_like(self.most_B, dtype=torch.bool, device=ids_BT.device)
        return (self.most_B <= made).to(ids_BT.device)
