"""One adapter's training: batches of its rows, the loss on their answers, and what is kept of it.

Invariant: only the adapter's tensors get gradients, and a batch is a function of its place and the
seed: which rows, which prompts, which bits of their media's features.

B rows, T tokens, D width, V vocabulary, N learned tokens of a batch, K labels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from ...config.base import hashed_fields
from ...data.routing.dataset import RoutingRows
from ...data.tasks.rows import TaskRows
from ...errors import DataError
from ...hardware import device, uses_bf16
from ...model.chunks import chunk_logits_on, chunk_of
from ...model.loss import cross_entropy
from ...train.loop import Task
from ...train.memory_plan import MemoryPlan
from .. import Parts
from .base import LoadedBase
from .chat import IGNORED, Example, Sampler, TokenizedDataset, encode, prompt_augmentation
from .config import AdapterRunConfig
from .cost import memory_plan
from .media import FeatureCache, Media
from .peft_io import adapter_parameters, add, core_of, files, label_ids
from .router import CALIBRATION, calibrate, label_logits, routing_prompt

SPLITS = ("train", "valid")
VALID_ROWS = 32  # per forward pass without gradients
CALIBRATION_ROWS = 4096  # most validation requests that the temperature is fitted on


def expert_task(
    cfg: AdapterRunConfig,
    parts: Parts,
    item: str,
    base: LoadedBase,
) -> Task:
    """Return one expert's training: its adapter on its own task's rows, some asked in neutral
    words.

    Raises MissingArtifact, ConfigError for labels or targets, DataError for rows that do not do.
    """
    options = cfg.loras.options(item)
    rows = TaskRows(parts.folder("preprocess", item))
    media = base.chat.media
    examples = {split: examples_of(media, rows, split) for split in SPLITS}
    training = _start(cfg, base, item, cfg.section("train_experts", item))
    # a neutral prompt must fit wherever it may be asked, so none is encoded where none ever is
    neutral = cfg.dataset.neutral.seen if options.neutral_share else ()
    # what its address holds, so that equal addresses give equal bytes
    about = {"options": hashed_fields(options)}
    return training.task(examples, neutral, about, dict)


def examples_of(media: Media, rows: TaskRows, split: str) -> list[Example]:
    """Return a task's rows of a split as they are asked and answered."""
    found = []
    for row in rows.rows(split):
        paths = media.paths(rows.folder, row)
        found.append(Example(paths, row.prompt, row.answer))
    return found


def router_task(
    cfg: AdapterRunConfig,
    parts: Parts,
    base: LoadedBase,
) -> Task:
    """Return the router's training: its adapter answers each request of the routing set with a
    label.

    Raises MissingArtifact, ConfigError for labels or targets, DataError for rows that do not do.
    """
    entry = cfg.loras.router
    labels = cfg.loras.labels
    rows = RoutingRows(parts.folder("routing"))
    # its pictures are those of the tasks: opened, so that they are compared with their sums
    for name in cfg.tasks:
        parts.folder("preprocess", name)
    media = base.chat.media
    training = _start(cfg, base, entry.name, cfg.section("train_router", None))
    ids = label_ids(base.chat.tokenizer, labels)
    numbers = {name: i for i, name in enumerate(ids)}
    examples: dict[str, list[Example]] = {}
    targets: dict[str, list[int]] = {}
    for split in SPLITS:
        examples[split] = []
        targets[split] = []
        for row in rows.rows(split):
            paths = media.paths(rows.folder, row)
            prompt = routing_prompt(entry.instruction, row.prompt)
            examples[split].append(Example(paths, prompt, labels[row.expert]))
            targets[split].append(numbers[row.expert])

    def calibration() -> dict:
        # on requests that no step was taken on, with the state that is kept
        requests = examples["valid"][:CALIBRATION_ROWS]
        logits_BK = training.logits(requests, list(ids.values()))
        own = targets["valid"][:CALIBRATION_ROWS]
        fitted = calibrate(logits_BK, own, entry.instruction, labels)
        return {CALIBRATION: fitted.values()}

    options = cfg.loras.options(entry.name)
    about = {
        # pairs, as their order is that of the logits and JSON keeps none
        "labels": [list(pair) for pair in labels.items()],
        "instruction": entry.instruction,
        # nobody asks the router in neutral words
        "options": hashed_fields(options, frozenset({"neutral_share"})),
    }
    return training.task(examples, (), about, calibration)


def _start(
    cfg: AdapterRunConfig,
    base: LoadedBase,
    name: str,
    where: str,
) -> "Training":
    """Return a new adapter on the run's base, its labels checked before anything is trained for
    them."""
    label_ids(base.chat.tokenizer, cfg.loras.labels)
    return Training(
        base,
        name,
        cfg,
        seed=cfg.seed_of(name),
        bf16=uses_bf16(cfg.dtype),
        where=where,
    )


class Training:
    """A base with one new adapter, and the way from rows to its loss."""

    def __init__(
        self,
        base: LoadedBase,
        name: str,
        cfg: AdapterRunConfig,
        *,
        seed: int,
        bf16: bool,
        where: str,
    ):
        """Put the adapter on the base; `where` is its options' setting, for messages. Raises
        ConfigError."""
        self.base = base
        self.name = name
        self.cfg = cfg
        self.bf16 = bf16
        self.where = where
        self.seed = seed
        self.chat = base.chat
        self.options = cfg.loras.options(name)
        # the adapter's first weights are drawn from torch's generator
        torch.manual_seed(seed)
        check = self.chat.media.check_targets
        self.model = add(base.model, name, self.options, where, check)
        self.core = core_of(self.model)
        self.dtype = torch.bfloat16 if bf16 else self.core.dtype
        self.model.train()

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
        train = self._encoded("train", examples["train"], neutral)
        valid = self._encoded("valid", examples["valid"], neutral)
        train_cache = self.feature_cache(train)
        valid_cache = self.feature_cache(valid)
        plan = self._memory_plan(train, train_cache.bytes + valid_cache.bytes)
        sampler = Sampler(len(train), options.batch_sequences, self.seed)
        held_out = _held_out(valid, options.eval_tokens)
        counts = {}
        notes = []
        for split, dataset in (("train", train), ("valid", valid)):
            drops = dataset.drops
            counts[split] = {"kept": len(dataset), "dropped": dict(drops.counts)}
            if drops.total:
                notes.append(
                    f"{drops.total} of {drops.seen} rows of {split} are over {self._limit()} and "
                    "were left out"
                )

        def batch(first: int, count: int) -> tuple[dict, float]:
            offset = first % options.batch_sequences
            whole = sampler.at(first - offset, options.batch_sequences)
            # what runs together is alike in length, so that little of it is padding
            whole.sort(key=lambda i: train.rows[i].tokens)
            # micro-batches add up to the mean over all learned tokens of the whole batch
            weight = options.batch_sequences / (count * train.target_count(whole))
            at = whole[offset : offset + count]
            prompts = self._prompts(neutral, first, count)
            inputs = self.inputs(train, train_cache, at, prompts)
            return inputs, weight

        def loss(weighed: tuple[dict, float]) -> torch.Tensor:
            inputs, weight = weighed
            return self.token_loss(inputs, plan.chunk_logits) * weight

        def validate() -> float:
            total = 0.0
            targets = 0
            with self._evaluating():
                for at in held_out:
                    # the first row's place decides, so that every evaluation asks alike
                    prompts = self._prompts(neutral, at[0], len(at))
                    inputs = self.inputs(valid, valid_cache, at, prompts)
                    nats = self.token_loss(inputs, plan.chunk_logits)
                    total += nats.item()
                    targets += valid.target_count(at)
            return total / targets

        def export(_kept_step: int) -> dict:
            told = {**about, "rows": counts}
            with self._evaluating():
                kept = files(self.model, self.name, self.base.pin, told)
                return kept | also()

        parameters = adapter_parameters(self.model, self.name)
        row_tokens = train.mean_tokens
        # kept features were encoded once, which is no part of a step
        encodes = not train_cache.keep
        flops = self.base.sizes.train_flops_per_token(options, encodes)
        return Task(
            options=options,
            parameters=parameters,
            batch=batch,
            loss=loss,
            export=export,
            # lora_B is zero in the first step, and so is every gradient of lora_A
            zero_first_gradient=tuple(name for name in parameters if "lora_A" in name),
            validate=validate if held_out else None,
            tokens_per_row=row_tokens,
            bf16=self.dtype == torch.bfloat16,
            steps=options.resolve_steps(row_tokens, row_tokens * len(train)),
            memory_plan=plan,
            flops_per_token=flops,
            notes=tuple(notes),
        )

    def feature_cache(self, dataset: TokenizedDataset) -> FeatureCache:
        """Return what gives the model a split's media."""
        return self.chat.media.feature_cache(
            self.core,
            dataset.paths,
            dataset.path_tokens,
            encoder_trains=self.options.changes_encoder,
            memory_budget=self.cfg.runtime.memory_budget,
        )

    def inputs(
        self,
        dataset: TokenizedDataset,
        cache: FeatureCache,
        at: Sequence[int],
        prompts: Sequence[str | None],
    ) -> dict[str, Any]:
        """Return what `token_loss` takes for some rows; see batch_inputs."""
        return batch_inputs(dataset, cache, at, prompts)

    def token_loss(
        self, inputs: Mapping[str, Any], chunk_logits: int | None = None
    ) -> torch.Tensor:
        """Return the summed nats of the learned tokens, a scalar; see answer_nats."""
        return answer_nats(self.core, inputs, self.bf16, chunk_logits)

    def logits(self, examples: Sequence[Example], ids: Sequence[int]) -> torch.Tensor:
        """Return logits_BK of the labels' tokens for requests, as the stack will compute them: no
        autocast."""
        out = []
        with self._evaluating():
            for at in range(0, len(examples), VALID_ROWS):
                requests = []
                for example in examples[at : at + VALID_ROWS]:
                    media = [self.chat.media.open(path) for path in example.media]
                    requests.append((example.prompt, media))
                inputs = self.chat.requests(requests)
                for key, tensor in inputs.items():
                    inputs[key] = tensor.to(device())
                logits_BK = label_logits(self.model, inputs, ids)
                out.append(logits_BK.cpu())
        return torch.cat(out)

    def _memory_plan(self, train: TokenizedDataset, kept_bytes: int) -> MemoryPlan:
        """Plan how to run under the memory budget, by the longest row; turns checkpointing on where
        the plan has it."""
        longest = max(row.tokens for row in train.rows)
        name = f"{self.where.partition('.')[2]} ({self.name})"
        plan = memory_plan(
            self.cfg,
            self.options,
            self.base.sizes,
            row=train.mean_tokens,
            longest=longest,
            name=name,
            kept_bytes=kept_bytes,
        )
        if plan.checkpointing:
            # the reentrant kind asks for gradients of its inputs, which a frozen base has none of
            self.core.activation_checkpointing_enable({"use_reentrant": False})
        return plan

    def _prompts(
        self,
        neutral: Sequence[str],
        first: int,
        count: int,
    ) -> list[str | None]:
        share = self.options.neutral_share
        return prompt_augmentation(neutral, share, self.seed, first, count)

    def _encoded(
        self,
        split: str,
        examples: Sequence[Example],
        neutral: Sequence[str],
    ) -> TokenizedDataset:
        dataset = encode(self.chat, examples, self.options.max_tokens, neutral)
        if split == "train" and not dataset.rows:
            why = "its preprocess left none in the split train"
            if examples:
                hint = self.chat.media.shorten_hint
                why = f"all {len(examples)} are over {self._limit()}; raise it{hint}"
            raise DataError(f"{self.name} has no rows to train on: {why}")
        return dataset

    def _limit(self) -> str:
        """Return the setting that rows may be too long for, and what it is."""
        return f"{self.where}.max_tokens = {self.options.max_tokens}"

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients, back to training afterwards."""
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train()


def batch_inputs(
    dataset: TokenizedDataset,
    cache: FeatureCache,
    at: Sequence[int],
    prompts: Sequence[str | None],
) -> dict[str, Any]:
    """Return what `answer_nats` takes for some rows, each asked as it is (None) or otherwise, on
    the device."""
    text = dataset.batch(at, prompts)
    inputs = text | cache.inputs(text, dataset.media(at))
    for key, value in inputs.items():
        if torch.is_tensor(value):
            inputs[key] = value.to(device())
    return inputs


def answer_nats(
    core: PreTrainedModel,
    inputs: Mapping[str, Any],
    bf16: bool,
    chunk_logits: int | None = None,
) -> torch.Tensor:
    """Return the summed nats of the learned tokens, a scalar; logits are only ever made of
    those."""
    rest = dict(inputs)
    # the model would make logits of every token for them
    del rest["labels"]
    # the state at a token predicts the one after it
    labels_BT = inputs["labels"][:, 1:]
    learned_BT = labels_BT != IGNORED
    with torch.autocast(labels_BT.device.type, torch.bfloat16, enabled=bf16):
        out = core.base_model(**rest, use_cache=False)
    h_BTD = out.last_hidden_state
    h_ND = h_BTD[:, :-1][learned_BT]
    head: Any = core.get_output_embeddings()
    head_VD = head.weight
    target_N = labels_BT[learned_BT]
    chunk = chunk_of(len(head_VD), chunk_logits or chunk_logits_on(head_VD.device.type))
    dtype = torch.bfloat16 if bf16 else core.dtype
    return cross_entropy(h_ND, head_VD, target_N, dtype, chunk)


def _held_out(valid: TokenizedDataset, tokens: int) -> list[list[int]]:
    """Return batches of the first rows that have up to so many tokens together, at least one row;
    alike in length."""
    taken: list[int] = []
    total = 0
    for i, row in enumerate(valid.rows):
        total += row.tokens
        if taken and total > tokens:
            break
        taken.append(i)
    taken.sort(key=lambda i: (valid.rows[i].tokens, i))
    starts = range(0, len(taken), VALID_ROWS)
    return [taken[at : at + VALID_ROWS] for at in starts]
