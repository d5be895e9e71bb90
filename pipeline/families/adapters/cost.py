"""What training an adapter will spend: tokens, parameters, operations, memory, from the sizes of
its base.

Invariant: no weight is opened, so that a plan can be made before the base is on this machine.

D width, H width of all heads, K of all key-value heads, F of a feed-forward network, V vocabulary.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from transformers import AutoConfig

from ...config.base import NONE, is_folder
from ...errors import DataError
from ...hardware import gpu_bytes
from ...model.chunks import workspace_bytes
from ...store.foreign import read_object
from ...train.flops import JobCost
from ...train.lr_search import PLANNED_RATES, in_small
from ...train.memory_plan import MemoryPlan, plan_memory
from .. import ExportWish
from .config import AdapterRunConfig
from .sections import AdapterBaseConfig, AdapterConfig
from .stages import SEARCHES

KERNEL_BYTES = 60_000_000  # code that the first step touches, the allocator's arenas
COPY_BYTES = 40_000_000  # code and buffers of what copies files


@dataclass(frozen=True)
class DecoderSizes:
    """The sizes of a decoder that decide cost; a base that reads more adds those of its encoder."""

    layers: int
    d: int
    heads_width: int
    kv_width: int
    d_ff: int
    vocab_size: int
    tied: bool

    # where the layers are in the model, as the patterns of targets see it
    prefix: ClassVar[str] = "model.layers"

    @staticmethod
    def decoder_fields(raw: Mapping) -> dict:
        """Return the fields above from a decoder's part of a config.json."""
        head = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
        return {
            "layers": raw["num_hidden_layers"],
            "d": raw["hidden_size"],
            "heads_width": head * raw["num_attention_heads"],
            "kv_width": head * raw["num_key_value_heads"],
            "d_ff": raw["intermediate_size"],
            "vocab_size": raw["vocab_size"],
        }

    @classmethod
    def of_config(cls, raw: Mapping) -> "DecoderSizes":
        """Return the sizes in a config.json. Raises KeyError where it says too little."""
        return cls(**cls.decoder_fields(raw), tied=raw.get("tie_word_embeddings", True))

    @property
    def layer_modules(self) -> dict[str, tuple[int, int]]:
        """Width in and out of each projection of a layer, by its name in the layer."""
        # their names are part of what a pattern of targets matches
        return {
            "self_attn.q_proj": (self.d, self.heads_width),
            "self_attn.k_proj": (self.d, self.kv_width),
            "self_attn.v_proj": (self.d, self.kv_width),
            "self_attn.o_proj": (self.heads_width, self.d),
            "mlp.gate_proj": (self.d, self.d_ff),
            "mlp.up_proj": (self.d, self.d_ff),
            "mlp.down_proj": (self.d_ff, self.d),
        }

    @property
    def body_parameters(self) -> int:
        """Parameters of the decoder's layers."""
        layer = sum(a * b for a, b in self.layer_modules.values())
        return self.layers * layer

    @property
    def encoder_parameters(self) -> int:
        """Parameters of what encodes media."""
        return 0

    @property
    def encoder_flops_per_token(self) -> int:
        """Operations that encoding one token of a medium takes."""
        return 0

    @property
    def parameters(self) -> int:
        """All parameters, vectors left out."""
        # the LM head is the embedding again where they are tied
        tables = self.vocab_size * self.d * (1 if self.tied else 2)
        return tables + self.body_parameters + self.encoder_parameters

    def adapter_parameters(self, options: AdapterConfig) -> int:
        """Parameters of an adapter on the decoder, by the pattern of its targets."""
        width = 0
        for name, (wide_in, wide_out) in self.layer_modules.items():
            if re.fullmatch(options.targets, f"{self.prefix}.0.{name}"):
                width += wide_in + wide_out
        return self.layers * options.r * width

    def train_flops_per_token(self, options: AdapterConfig, encodes: bool = True) -> float:
        """Operations per token: forward and what comes back through the frozen base, the adapter's
        three products.

        Every token is taken for a medium's when the batches are encoded as they come (`encodes`).
        """
        # a frozen weight is multiplied twice, on the way there and on the way back
        flops = 4 * self.body_parameters + 6 * self.adapter_parameters(options)
        if encodes:
            flops += self.encoder_flops_per_token
        return flops

    def activation_bytes(self, options: AdapterConfig, unit: int, checkpointing: bool) -> int:
        """Bytes per token kept for the way back, of numbers of `unit` bytes."""
        numbers = 12 * self.d + 3 * self.heads_width + 4 * self.kv_width + 3 * self.d_ff
        layer = unit * numbers
        # adapters of a bf16 base keep fp32 copies of what they read, and so does dropout
        copies = (unit == 2) + (options.dropout > 0)
        layer += 4 * (5 * self.d + self.heads_width + self.d_ff) * copies
        layer += 4 * 14 * options.r
        if checkpointing:
            # one layer at a time, and what enters each of the others
            return layer + self.layers * self.d * unit
        return self.layers * layer

    def encoding_bytes(self, tokens: int, unit: int) -> int:
        """Bytes that encoding media of so many tokens takes."""
        return 0

    def peak_bytes(
        self, base: AdapterBaseConfig, options: AdapterConfig, plan: MemoryPlan, longest: int
    ) -> int:
        """Return the predicted peak above imports of one adapter's training, whose longest row has
        so many tokens; the base's mapped pages are counted."""
        unit = 2 if base.dtype == "bfloat16" else 4
        rows = plan.micro_batch_sequences
        tokens = rows * longest
        media_tokens = min(tokens, base.most_media_tokens(rows))
        held = (
            self.adapter_parameters(options) * plan.state_bytes,
            tokens * self.activation_bytes(options, unit, plan.checkpointing),
            self.encoding_bytes(media_tokens, unit),
            workspace_bytes(tokens, self.vocab_size, plan.chunk_logits, unit),
        )
        return int(KERNEL_BYTES + unit * self.parameters + sum(held))


def memory_plan(
    cfg: AdapterRunConfig,
    options: AdapterConfig,
    sizes: DecoderSizes,
    row: int,
    longest: int,
    name: str,
    kept_bytes: int = 0,
) -> MemoryPlan:
    """Return how a training runs under runtime.memory_budget.

    `row` and `longest` are its mean and longest row, tokens; kept_bytes are those of features that
    are held throughout. Raises BudgetError.
    """

    def predict(plan: MemoryPlan) -> int:
        return kept_bytes + sizes.peak_bytes(cfg.loras.base, options, plan, longest)

    budget = cfg.runtime.memory_budget
    return plan_memory(options, row, budget, predict, gpu_bytes=gpu_bytes(), name=name)


def job_cost(
    cfg: AdapterRunConfig,
    stage: str,
    item: str | None,
    made: Mapping[tuple, dict],
    sizes: DecoderSizes | None,
    row_tokens: Callable[[str], int],
) -> JobCost | None:
    """Return what a training will spend, as far as finished jobs tell; None for the base and for an
    imported adapter, which need none.

    `made` has the metrics of finished jobs, `sizes` are the base's (None: unknown), `row_tokens`
    gives the assumed tokens of a row by the adapter's name.
    """
    trained = {search: training for training, search in SEARCHES.items()}
    searches = stage in trained
    training = trained.get(stage, stage)
    if training not in SEARCHES or sizes is None:
        return None
    if training == "train_experts" and item in cfg.imported:
        return None
    name = item or cfg.loras.router.name
    options = cfg.loras.options(name)
    row = row_tokens(name)
    rows = _train_rows(cfg, training, item, made)
    steps = options.steps
    if steps is None and (options.tokens is not None or rows):
        steps = options.resolve_steps(row, row * (rows or 0))
    if searches and steps is not None:
        steps = PLANNED_RATES * (in_small(options, cfg.lr_search, steps).steps or 0)
    tokens = None if steps is None else steps * options.batch_sequences * row
    plan = memory_plan(cfg, options, sizes, row, row, f"{stage} {name}")
    found = JobCost.of(
        stage,
        item,
        tokens=tokens,
        flops_per_token=sizes.train_flops_per_token(options),
        parameters=sizes.adapter_parameters(options),
        plan=plan,
        peak_bytes=sizes.peak_bytes(cfg.loras.base, options, plan, row),
    )
    if searches:
        return replace(found, summary=f"{found.summary}; {PLANNED_RATES} rates")
    if item in cfg.items(SEARCHES[training]):
        return replace(found, summary=f"{found.summary}; lr from {SEARCHES[training]}")
    return found


def writing_cost(
    cfg: AdapterRunConfig, sizes: DecoderSizes | None, wish: ExportWish | None
) -> JobCost | None:
    """Return what the run's bundle takes, or its adapters as they are exported: files are copied as
    they are. None where the base's sizes are unknown."""
    if sizes is None:
        return None
    base = cfg.loras.base
    written = 0
    if base.model is None or is_folder(base.model):
        # One of the Hub is fetched by its revision
        written += (2 if base.dtype == "bfloat16" else 4) * sizes.parameters
    for name in (*cfg.experts, cfg.loras.router.name):
        written += 4 * sizes.adapter_parameters(cfg.loras.options(name))
    return JobCost(
        stage="export" if wish else "deploy",
        item=wish.format if wish else None,
        tokens=0,
        parameters=0,
        flops=0,
        peak_bytes=COPY_BYTES,
        written_bytes=written,
        summed_bytes=(1 if wish else 2) * written,
    )


def read_config(base: AdapterBaseConfig) -> dict | None:
    """Return the config.json of a base in a folder or in the Hub's cache on this machine; None
    where there is none yet. Raises DataError."""
    if base.model is None:
        return None
    if is_folder(base.model):
        path: Path | None = Path(base.model).expanduser() / "config.json"
    else:
        path = _cached(base.model, base.revision)
    if path is None:
        return None
    try:
        settings = read_object(path.parent, path.name)
        # what is not of its type is refused here, before anybody reckons with it
        AutoConfig.for_model(**settings)
    except Exception as error:  # a library raises what it likes at settings of another version
        raise DataError(f"loras.base.model: {path} cannot be read: {error}") from None
    return settings


def _train_rows(
    cfg: AdapterRunConfig, stage: str, item: str | None, made: Mapping[tuple, dict]
) -> int | None:
    """Return the training rows of a job, once it is known how many there are."""
    if stage == "train_experts":
        found = made.get(("preprocess", item))
        return found["rows"]["train"] if found else None
    if ("routing", None) in made:
        return sum(made["routing", None]["rows"]["train"].values())
    if cfg.dataset.balance != "equal":
        return None  # shares of rows that nobody has counted yet
    wanted = {source.expert: source.per_split for source in cfg.dataset.sources}
    total = 0
    for name in (*cfg.experts, NONE):
        if name in wanted:
            total += (wanted[name] or cfg.dataset.per_expert).train
    return total


def _cached(model: str, revision: str | None) -> Path | None:
    """Return the config.json of a Hub model, when the Hub's cache on this machine has it."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json", revision=revision)
    # it may also be a mark that the file is known to be absent
    return Path(found) if isinstance(found, str) else None
