"""One base with all its adapters: label logits and texts of batches whose rows run under different
adapters.

Invariant: every call names the adapter of each row and leaves no hook behind, whatever happens in
it; so no answer depends on an earlier call, and a batch says what its rows say alone. One call at a
time has the model.

B rows of a batch, N rows of a call, T tokens, P patches, C labels, V vocabulary, D width.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft.tuners.lora.model import _adapter_names_pre_forward_hook as _leaked
from PIL import Image
from transformers import GenerationConfig, LogitsProcessorList
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    BaseModelOutputWithDeepstackFeatures as Features,
)

from ...errors import DataError
from .chat import Chat

BASE = "base"  # the name of a row that runs under no adapter
# tokens; rows whose lengths differ by less are padded to one length without much waste
SIMILAR = 32
PATCHES = 16_384  # that go through the vision tower together
_NO_ADAPTER = "__base__"  # PEFT's word for it


@dataclass(frozen=True)
class Request:
    """What is asked, and the pictures it is asked about."""

    prompt: str
    images: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class GenerationLimits:
    """How large a request and a batch may be; a request above them is refused, never cut."""

    images: int = 4
    prompt_characters: int = 8000
    tokens: int = 4096  # of prompt and images
    batch_rows: int = 32
    batch_tokens: int = 32_768  # rows times the longest one, new tokens included


@dataclass(frozen=True)
class ImageFeatures:
    """What the vision tower makes of one picture, shared by every adapter that looks at it."""

    grid: tuple[int, int, int]  # frames, rows and columns of patches
    embed_TD: torch.Tensor
    deep: tuple[torch.Tensor, ...]  # (T, D) per layer that takes them in


@dataclass(frozen=True)
class BatchRow:
    """One sequence to run: encoded prompt, its pictures in order, and the adapter."""

    ids: tuple[int, ...]
    sights: tuple[ImageFeatures, ...]
    adapter: str


@dataclass(frozen=True)
class Generation:
    """What one adapter answered, and why it ended: stop or length."""

    text: str
    finish: str
    given: int  # tokens of the request
    drawn: int  # tokens of the answer
    log_probability: float  # mean over these, nats


class MultiAdapterModel:
    """A PEFT model with all its adapters loaded, and the chat that its requests are put in."""

    def __init__(self, model, chat: Chat, limits: GenerationLimits):
        self.model, self.chat, self.limits = model.eval(), chat, limits
        self.core = model.get_base_model()
        self.adapters = tuple(model.peft_config)
        self._alone = threading.Lock()
        own = (
            self.core.generation_config
        )  # the Hub's draws at random, and an answer must be repeatable
        ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        self._ends, self._pad = (
            set(ends),
            own.pad_token_id if own.pad_token_id is not None else ends[0],
        )
        self.core.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=self._pad)
        self.sighted = _sighted(self.core)

    def check(self, request: Request) -> None:
        """Raise DataError for a request over the limits, before anything is run."""
        limits, prompt = self.limits, request.prompt
        if len(request.images) > limits.images:
            raise DataError(
                f"the request has {len(request.images)} images; at most {limits.images} are taken"
            )
        if len(prompt) > limits.prompt_characters:
            raise DataError(
                f"the prompt has {len(prompt):,} characters; at most {limits.prompt_characters:,} are taken"
            )
        on_images = sum(self._tokens_of(image) for image in request.images)
        tokens = (
            len(self.chat.prompt_ids(prompt, len(request.images))) + on_images - len(request.images)
        )
        if tokens > limits.tokens:
            raise DataError(
                f"the request has {tokens:,} tokens, {on_images:,} of them for {len(request.images)} images; at most "
                f"{limits.tokens:,} are taken. Send smaller or fewer images, or a shorter prompt"
            )

    def see(self, images: Sequence[Image.Image], adapter: str = BASE) -> list[ImageFeatures]:
        """Run the vision tower, the base's own or that of an adapter in `sighted`, once over each
        distinct picture."""
        kept = {id(image): image for image in images}
        seen = dict(zip(kept, self._see(list(kept.values()), adapter), strict=True))
        return [seen[id(image)] for image in images]

    def encode(self, prompt: str, sights: Sequence[ImageFeatures]) -> tuple[int, ...]:
        """Return the ids of a user's turn with pictures in front, ready to be answered."""
        return tuple(
            self.chat.expand(
                self.chat.prompt_ids(prompt, len(sights)), [len(s.embed_TD) for s in sights]
            )
        )

    def label_logits(self, rows: Sequence[BatchRow], labels: Sequence[int]) -> torch.Tensor:
        """Return logit_NC of the tokens `labels` after each row, in float32."""
        self._check_names(rows)
        out_NC = torch.empty(len(rows), len(labels))
        for batch in self._batches(rows, [0] * len(rows)):
            picked = [rows[i] for i in batch]
            with self._running():
                inputs = self._inputs(picked) | {"adapter_names": _names(picked)}
                logits_B1V = self.model(**inputs, logits_to_keep=1, use_cache=False).logits
            out_NC[batch] = logits_B1V[:, -1, list(labels)].float().cpu()
        return out_NC

    def texts(
        self, rows: Sequence[BatchRow], new_tokens: Sequence[int], seconds: float | None = None
    ) -> list[Generation]:
        """Return every row's greedy answer of at most its own number of new tokens, in the order of
        rows.

        Past `seconds` no further token is begun. Raises DataError for an adapter that is not
        loaded.
        """
        self._check_names(rows)
        out: list[Generation | None] = [None] * len(rows)
        until = None if seconds is None else time.monotonic() + seconds
        for batch in self._batches(rows, new_tokens):
            said = self._texts([rows[i] for i in batch], [new_tokens[i] for i in batch], until)
            for i, each in zip(batch, said, strict=True):
                out[i] = each
        return out

    def pooled(self, rows: Sequence[BatchRow]) -> torch.Tensor:
        """Return x_ND, the mean of the last hidden states over each row's tokens, in float32."""
        self._check_names(rows)
        out = [None] * len(rows)
        for batch in self._batches(rows, [0] * len(rows)):
            picked = [rows[i] for i in batch]
            with self._running():
                inputs = self._inputs(picked)
                # the PEFT model's own forward ends at the logits, and these hooks are what it would
                # set
                with self.model._enable_peft_forward_hooks(adapter_names=_names(picked)):
                    h_BTD = self.core.model(**inputs, use_cache=False).last_hidden_state.float()
            keep_BT1 = inputs["attention_mask"].unsqueeze(-1)
            for i, x_D in zip(
                batch, ((h_BTD * keep_BT1).sum(1) / keep_BT1.sum(1)).cpu(), strict=True
            ):
                out[i] = x_D
        return torch.stack(out) if out else torch.empty(0, 0)

    def _texts(
        self, rows: list[BatchRow], new_tokens: list[int], until: float | None
    ) -> list[Generation]:
        inputs = self._inputs(rows)
        given, likelihood = inputs["input_ids"].shape[1], _Likelihood()
        left = None if until is None else max(0.01, until - time.monotonic())
        with self._running():
            out_BT = self.model.generate(
                **inputs,
                adapter_names=_names(rows),
                do_sample=False,
                max_new_tokens=max(new_tokens),
                max_time=left,
                logits_processor=LogitsProcessorList([likelihood]),
                stopping_criteria=[_StopStrings(given, new_tokens)],
            )
        nats_BT = torch.stack(likelihood.nats, 1).tolist()
        each = zip(rows, out_BT[:, given:].tolist(), nats_BT, new_tokens, strict=True)
        return [self._said(row, ids[:most], nats) for row, ids, nats, most in each]

    def _said(self, row: BatchRow, ids: list[int], nats: list[float]) -> Generation:
        end = next((i for i, token in enumerate(ids) if token in self._ends), None)
        drawn = len(ids) if end is None else end + 1
        text = self.chat.tokenizer.decode(ids[:end], skip_special_tokens=True)
        finish = "length" if end is None else "stop"
        return Generation(text, finish, len(row.ids), drawn, sum(nats[:drawn]) / max(1, drawn))

    def _see(self, images: list[Image.Image], adapter: str) -> Iterator[ImageFeatures]:
        made = [self.chat.patches([image]) for image in images]
        for start, end in _runs([len(patches) for patches, _ in made], PATCHES):
            patches_P, grid_N3 = (
                torch.cat(each).to(self.core.device) for each in zip(*made[start:end], strict=True)
            )
            with self._running(), self._looking(adapter):
                seen = self.core.get_image_features(patches_P, grid_N3)
            deep = (
                zip(*seen.deepstack_features, strict=True)
                if seen.deepstack_features
                else [()] * (end - start)
            )
            for grid, embed_TD, layers in zip(
                grid_N3.tolist(), seen.pooler_output, deep, strict=True
            ):
                yield ImageFeatures(tuple(grid), embed_TD, tuple(layers))

    def _tokens_of(self, image: Image.Image) -> int:
        try:
            return self.chat.image_tokens(*image.size)
        except ValueError as error:
            raise DataError(
                f"an image of {image.width} x {image.height} px cannot be read: {error}"
            ) from None

    @contextmanager
    def _looking(self, adapter: str) -> Iterator[None]:
        """Have the vision tower as one adapter changes it, or as it was; adapter names per row do
        not reach it."""
        if adapter in self.sighted:
            self.model.set_adapter(adapter, inference_mode=True)
            yield
        elif self.sighted:
            with self.model.disable_adapter():
                yield
        else:
            yield

    def _inputs(self, rows: Sequence[BatchRow]) -> dict:
        """Return what the model takes for a batch, padded on the left: an answer must follow its
        prompt directly."""
        inputs = self.chat.tensors([row.ids for row in rows], "left")
        sights = [sight for row in rows for sight in row.sights]
        if sights:
            inputs["image_grid_thw"] = torch.tensor([sight.grid for sight in sights])
        inputs = {key: value.to(self.core.device) for key, value in inputs.items()}
        if sights:
            deep = [tuple(layer) for layer in zip(*(sight.deep for sight in sights), strict=True)]
            seen = Features(
                pooler_output=tuple(s.embed_TD for s in sights), deepstack_features=deep
            )
            inputs["mm_encoder_outputs"] = {"image": seen}
        return inputs

    def _batches(self, rows: Sequence[BatchRow], new_tokens: Sequence[int]) -> Iterator[list[int]]:
        """Yield the numbers of rows that run together: of similar length, within the limits of a
        batch.

        Among rows of similar length those of one adapter stand together, as fewer adapters in a
        batch run faster.
        """
        order = sorted(
            range(len(rows)),
            key=lambda i: (len(rows[i].ids) // SIMILAR, new_tokens[i], rows[i].adapter, i),
        )
        batch: list[int] = []
        for i in order:
            longest = max(len(rows[j].ids) for j in (*batch, i)) + max(
                new_tokens[j] for j in (*batch, i)
            )
            if batch and (
                len(batch) == self.limits.batch_rows
                or (len(batch) + 1) * longest > self.limits.batch_tokens
            ):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _check_names(self, rows: Sequence[BatchRow]) -> None:
        """Raise DataError before PEFT sees a name that it does not know, which would leave its
        hooks behind."""
        unknown = sorted({row.adapter for row in rows} - {*self.adapters, BASE})
        if unknown:
            raise DataError(
                f"no adapter is called {unknown[0]}; there are {', '.join(self.adapters)} and {BASE}"
            )

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Have the model alone, without gradients; take PEFT's hooks away after an exception, as it
        does not.

        A hook that stays would make later rows run under the adapters of the failed call
        (huggingface/peft#3475).
        """
        with self._alone, torch.no_grad():
            try:
                yield
            except BaseException:
                _unhook(self.model)
                raise


def _names(rows: Sequence[BatchRow]) -> list[str]:
    return [_NO_ADAPTER if row.adapter == BASE else row.adapter for row in rows]


def _runs(sizes: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of neighbours whose sizes add up to `most` at most, at least one each."""
    start = total = 0
    for i, size in enumerate(sizes):
        if i > start and total + size > most:
            yield start, i
            start, total = i, 0
        total += size
    if sizes:
        yield start, len(sizes)


def _unhook(model: torch.nn.Module) -> int:
    """Remove the hooks that PEFT sets for adapter names; return how many there were."""
    removed = 0
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if getattr(hook, "func", None) is _leaked:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                removed += 1
    return removed


def _sighted(core: torch.nn.Module) -> frozenset[str]:
    """Return the adapters that have weights in the vision tower."""
    names = (name.partition(".lora_A.")[2] for name, _ in core.model.visual.named_parameters())
    return frozenset(name.split(".")[0] for name in names if name)


class _Likelihood:
    """Keeps the log-probability of each step's likeliest token, which is the one a greedy answer
    takes."""

    def __init__(self):
        self.nats: list[torch.Tensor] = []

    def __call__(self, _ids_BT: torch.Tensor, score_BV: torch.Tensor) -> torch.Tensor:
        wide_BV = score_BV.float()
        self.nats.append(wide_BV.amax(-1) - wide_BV.logsumexp(-1))
        return score_BV


class _StopStrings:
    """Ends each row after its own number of new tokens."""

    def __init__(self, given: int, new_tokens: Sequence[int]):
        self.given, self.most_B = given, torch.tensor(new_tokens)

    def __call__(self, ids_BT: torch.Tensor, _scores, **_) -> torch.Tensor:
        return (self.most_B <= ids_BT.shape[1] - self.given).to(ids_BT.device)
