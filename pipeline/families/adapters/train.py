"""One adapter's training: batches of its rows, the loss on their answers, and what is kept of it.

Invariant: only the adapter's tensors get gradients, and a batch is a function of its place and the
seed: which rows, which prompts, which bits of their pictures.

B rows, T tokens, D width, V vocabulary, N learned tokens of a batch, K labels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial

import torch

from ...errors import DataError
from ...hardware import device
from ...model.loss import CHUNK_LOGITS, chunk_of, cross_entropy
from ...train.loop import Task
from ...train.memory_plan import MemoryPlan
from ..lora_vlm.config import LoraVlmConfig
from ..lora_vlm.cost import Sizes, memory_plan
from ..lora_vlm.image_cache import KEPT_BYTES, Features, opened_picture
from .base import LoadedBase
from .chat import IGNORED, Chat, Example, Sampler, TokenizedDataset, encode, prompt_augmentation
from .peft_io import add, files, own
from .router import label_logits

VALID_ROWS = 32  # per forward pass without gradients


class Training:
    """A base with one new adapter, and the way from rows to its loss."""

    def __init__(
        self,
        opened: LoadedBase,
        name: str,
        cfg: LoraVlmConfig,
        *,
        seed: int,
        bf16: bool,
        where: str,
    ):
        """Put the adapter on the base; `where` is its options' setting, for messages. Raises
        ConfigError."""
        self.pin, self.name, self.cfg, self.bf16, self.where = opened.pin, name, cfg, bf16, where
        self.chat, self.seed, self.options = Chat(opened.processor), seed, cfg.loras.options(name)
        torch.manual_seed(seed)
        self.model = add(opened.model, name, self.options, where)
        self.core = self.model.get_base_model()
        self.sizes = Sizes.of_config(self.core.config.to_dict())
        self.dtype = torch.bfloat16 if bf16 else self.core.dtype
        self.model.train()
        self._rope_index = lru_cache(8192)(partial(_rope_index, self.core.model))

    def task(
        self,
        examples: Mapping[str, Sequence[Example]],
        neutral: Sequence[str],
        about: Mapping,
        also: Callable[[], dict],
    ) -> Task:
        """Return the training on examples["train"], judged on examples["valid"].

        `about` enters adapter.json; `also` gives more files when the adapter is finished. Raises
        DataError.
        """
        options = self.options
        lines = {split: self._encoded(split, rows, neutral) for split, rows in examples.items()}
        train, held_out = lines["train"], lines["valid"]
        seen = {
            split: Features(self.core, some, self._most_kept()) for split, some in lines.items()
        }
        plan = self._means(train, sum(features.bytes for features in seen.values()))
        order = Sampler(len(train), options.batch_sequences, self.seed)
        held = _held_out(held_out, options.eval_tokens)
        counts = {
            split: {"kept": len(some), "dropped": dict(some.drops.counts)}
            for split, some in lines.items()
        }

        def batch(first: int, count: int) -> tuple[dict, float]:
            offset = first % options.batch_sequences
            whole = order.at(first - offset, options.batch_sequences)
            whole.sort(
                key=lambda i: train.lines[i].tokens
            )  # so that what runs together is alike in length
            weight = options.batch_sequences / (count * train.targets(whole))
            asked = self._swaps(neutral, first, count)
            return self.inputs(train, seen["train"], whole[offset : offset + count], asked), weight

        def loss(weighed: tuple[dict, float]) -> torch.Tensor:
            # so that micro-batches add up to the mean over all learned tokens of the batch
            inputs, weight = weighed
            return self.token_loss(inputs, plan.chunk_logits) * weight

        def validate() -> float:
            with self._answering():
                asked = (
                    self.inputs(held_out, seen["valid"], at, self._swaps(neutral, at[0], len(at)))
                    for at in held
                )
                total = sum(self.token_loss(inputs, plan.chunk_logits).item() for inputs in asked)
            return total / sum(map(held_out.targets, held))

        def export(_kept_step: int) -> dict:
            with self._answering():
                return files(self.model, self.name, self.pin, {**about, "rows": counts}) | also()

        row_tokens, parameters = train.mean_tokens, own(self.model, self.name)
        return Task(
            options=options,
            parameters=parameters,
            batch=batch,
            loss=loss,
            export=export,
            zero_first_gradient=tuple(
                name for name in parameters if "lora_A" in name
            ),  # lora_B is zero in the first step
            validate=validate if held else None,
            tokens_per_row=row_tokens,
            bf16=self.dtype == torch.bfloat16,
            steps=options.resolve_steps(row_tokens, row_tokens * len(train)),
            memory_plan=plan,
            flops_per_token=self.sizes.train_flops_per_token(
                options, vision=not seen["train"].keep
            ),
            notes=tuple(
                self._left_out(split, some) for split, some in lines.items() if some.drops.total
            ),
        )

    def inputs(
        self,
        lines: TokenizedDataset,
        seen: Features,
        at: Sequence[int],
        asked: Sequence[str | None],
    ) -> dict:
        """Return what `nats` takes for some lines, each asked as it is (None) or otherwise, on the
        device."""
        text = lines.batch(at, asked)
        pictures = seen.inputs(lines.images(at))
        if pictures:
            grids = iter(pictures["image_grid_thw"].tolist())
            own_grids = [tuple(tuple(next(grids)) for _ in lines.lines[i].images) for i in at]
            pictures["position_ids"] = self._positions(text, own_grids)
        both = text | pictures
        return {
            key: value.to(device()) if torch.is_tensor(value) else value
            for key, value in both.items()
        }

    def token_loss(self, inputs: Mapping, chunk_logits: int = CHUNK_LOGITS) -> torch.Tensor:
        """Return the summed nats of the learned tokens, a scalar; logits are only ever made of
        those."""
        rest = {key: value for key, value in inputs.items() if key != "labels"}
        labels_BT = inputs["labels"][:, 1:]
        learned_BT = labels_BT != IGNORED
        with torch.autocast(labels_BT.device.type, torch.bfloat16, enabled=self.bf16):
            h_BTD = self.core.model(**rest, use_cache=False).last_hidden_state
        h_ND = h_BTD[:, :-1][learned_BT]
        head_VD = self.core.lm_head.weight
        chunk = chunk_of(len(head_VD), chunk_logits)
        return cross_entropy(h_ND, head_VD, labels_BT[learned_BT], self.dtype, chunk)

    def logits(self, examples: Sequence[Example], ids: Sequence[int]) -> torch.Tensor:
        """Return logits_BK of the labels' tokens for requests, as the stack will compute them: no
        autocast."""
        out = []
        with self._answering():
            for at in range(0, len(examples), VALID_ROWS):
                some = examples[at : at + VALID_ROWS]
                asked = self.chat.requests(
                    (e.prompt, [opened_picture(path) for path in e.images]) for e in some
                )
                out.append(
                    label_logits(
                        self.model, {k: v.to(device()) for k, v in asked.items()}, ids
                    ).cpu()
                )
        return torch.cat(out)

    def _most_kept(self) -> int:
        """Return how many bytes the pictures' features may take: none of a tower that is trained."""
        budget = self.cfg.runtime.memory_budget
        return (
            -1 if self.options.allow_vision else min(KEPT_BYTES, (budget or 10 * KEPT_BYTES) // 10)
        )

    def _means(self, train: TokenizedDataset, kept_bytes: int) -> MemoryPlan:
        """Choose how to run under the memory budget, by the longest row; turns checkpointing on
        where it is chosen."""
        longest = max(line.tokens for line in train.lines)
        name = f"{self.where.partition('.')[2]} ({self.name})"
        chosen = memory_plan(
            self.cfg, self.options, self.sizes, train.mean_tokens, longest, name, kept_bytes
        )
        if chosen.checkpointing:
            self.core.activation_checkpointing_enable({"use_reentrant": False})
        return chosen

    def _swaps(self, neutral: Sequence[str], first: int, count: int) -> list[str | None]:
        return prompt_augmentation(neutral, self.options.neutral_share, self.seed, first, count)

    def _encoded(
        self, split: str, rows: Sequence[Example], neutral: Sequence[str]
    ) -> TokenizedDataset:
        lines = encode(self.chat, rows, self.options.max_tokens, neutral)
        if split == "train" and not lines.lines:
            why = f"all {len(rows)} are over {self.where}.max_tokens = {self.options.max_tokens}; raise it, or lower "
            raise DataError(
                f"{self.name} has no rows to train on: "
                + (
                    f"{why}loras.base.image.max_pixels"
                    if rows
                    else "its preprocess left none in the split train"
                )
            )
        return lines

    def _left_out(self, split: str, lines: TokenizedDataset) -> str:
        limit = f"{self.where}.max_tokens = {self.options.max_tokens}"
        return f"{lines.drops.total} of {lines.drops.seen} rows of {split} are over {limit} and were left out"

    def _positions(self, text: Mapping[str, torch.Tensor], grids: Sequence[tuple]) -> torch.Tensor:
        """Return position_ids [3, B, T]: the model's own, looked up by what they depend on, as it
        is slow at them."""
        types_BT, mask_BT = text["mm_token_type_ids"], text["attention_mask"]
        out = torch.zeros(3, *types_BT.shape, dtype=torch.long)
        for i, (types_T, tokens) in enumerate(zip(types_BT, mask_BT.sum(1).tolist(), strict=True)):
            found = self._rope_index(types_T[:tokens].numpy().tobytes(), grids[i])
            out[:, i, :tokens] = found
        return out

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Evaluation mode without gradients, back to training afterwards."""
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train()


def _rope_index(inner, types: bytes, grids: tuple) -> torch.Tensor:
    """Return the [3, T] positions of one row without padding; types are its mm_token_type_ids,
    int32."""
    types_1T = torch.frombuffer(bytearray(types), dtype=torch.int32)[None]
    grid_N3 = torch.tensor(grids) if grids else None
    return inner.get_rope_index(types_1T.long(), types_1T, image_grid_thw=grid_N3)[0][:, 0]


def _held_out(lines: TokenizedDataset, tokens: int) -> list[list[int]]:
    """Return batches of the first lines that have up to so many tokens together, at least one line;
    alike in length."""
    taken, total = [], 0
    for i, line in enumerate(lines.lines):
        total += line.tokens
        if taken and total > tokens:
            break
        taken.append(i)
    taken.sort(key=lambda i: (lines.lines[i].tokens, i))
    return [taken[at : at + VALID_ROWS] for at in range(0, len(taken), VALID_ROWS)]
