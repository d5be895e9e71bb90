"""What each job of a lora_vlm run will spend: tokens, parameters, operations, memory, from the
sizes of its base.

Invariant: no weight is opened. A base that is not on this machine yet is priced by its published
sizes, and a row that is not prepared yet as one with a picture of the largest area.

D width, H width of all heads, K of all key-value heads, F of a feed-forward network, V vocabulary.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...config.base import NONE, is_folder
from ...hardware import device
from ...model.loss import workspace_bytes
from ...train.flops import JobCost
from ...train.memory_plan import MemoryPlan, plan_memory
from ..adapters.config import AdapterConfig
from .config import LoraVlmConfig, VlmBaseConfig

KERNEL_BYTES = 60_000_000  # code that the first step touches, the allocator's arenas
PICTURE_TOKEN_PX = 1024  # area that becomes one token
PATCH_VALUES, PATCHES_PER_TOKEN = 1536, 4
TEXT_TOKENS = 64  # assumed of a request and its answer until they are known


@dataclass(frozen=True)
class Sizes:
    """The sizes of a Qwen3-VL that decide cost."""

    layers: int
    d: int
    heads_width: int
    kv_width: int
    d_ff: int
    vocab_size: int
    tied: bool
    vision_layers: int
    vision_d: int
    vision_d_ff: int
    mergers: int

    @classmethod
    def of_config(cls, raw: Mapping) -> "Sizes":
        """Return the sizes in a config.json."""
        text, vision = raw["text_config"], raw["vision_config"]
        head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
        return cls(
            text["num_hidden_layers"],
            text["hidden_size"],
            head * text["num_attention_heads"],
            head * text["num_key_value_heads"],
            text["intermediate_size"],
            text["vocab_size"],
            raw.get("tie_word_embeddings", True),
            vision["depth"],
            vision["hidden_size"],
            vision["intermediate_size"],
            1 + len(vision["deepstack_visual_indexes"]),
        )

    @property
    def layer_modules(self) -> dict[str, tuple[int, int]]:
        """Width in and out of each projection of a layer, by its name in the layer."""
        d, h, k, f = self.d, self.heads_width, self.kv_width, self.d_ff
        heads = {"q_proj": (d, h), "k_proj": (d, k), "v_proj": (d, k), "o_proj": (h, d)}
        network = {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}
        return {f"self_attn.{n}": w for n, w in heads.items()} | {
            f"mlp.{n}": w for n, w in network.items()
        }

    @property
    def body_parameters(self) -> int:
        """Parameters of the language model's layers."""
        return self.layers * sum(a * b for a, b in self.layer_modules.values())

    @property
    def vision_parameters(self) -> int:
        """Parameters of the vision tower and what joins it to the language model."""
        merged = PATCHES_PER_TOKEN * self.vision_d
        block = 4 * self.vision_d**2 + 2 * self.vision_d * self.vision_d_ff
        joints = self.mergers * merged * (merged + self.d)
        return self.vision_layers * block + joints + PATCH_VALUES * self.vision_d

    @property
    def parameters(self) -> int:
        """All parameters, vectors left out."""
        tables = self.vocab_size * self.d * (1 if self.tied else 2)
        return tables + self.body_parameters + self.vision_parameters

    def adapter_parameters(self, options: AdapterConfig) -> int:
        """Parameters of an adapter on the language model, by the pattern of its targets."""
        widths = self.layer_modules.items()
        one = [
            sum(w)
            for n, w in widths
            if re.fullmatch(options.targets, f"model.language_model.layers.0.{n}")
        ]
        return self.layers * options.r * sum(one)

    def train_flops_per_token(self, options: AdapterConfig, vision: bool = True) -> float:
        """Operations per token: forward and what comes back through the frozen base, the adapter's
        three products.

        Every token is taken for a picture's when `vision`.
        """
        tower = 2 * PATCHES_PER_TOKEN * self.vision_parameters if vision else 0
        return 4 * self.body_parameters + 6 * self.adapter_parameters(options) + tower

    def activation_bytes(self, options: AdapterConfig, unit: int, checkpointing: bool) -> int:
        """Bytes per token kept for the way back; adapters of a bf16 base keep fp32 copies of what
        they read."""
        d, h, k, f = self.d, self.heads_width, self.kv_width, self.d_ff
        layer = unit * (12 * d + 3 * h + 4 * k + 3 * f)
        layer += 4 * (5 * d + h + f) * ((unit == 2) + (options.dropout > 0)) + 4 * 14 * options.r
        return layer + self.layers * d * unit if checkpointing else self.layers * layer


# layers, D, H, K, F, V, tied, then the vision tower's layers, width, feed-forward width, mergers
PUBLISHED = {
    "Qwen/Qwen3-VL-2B-Instruct": Sizes(
        28, 2048, 2048, 1024, 6144, 151_936, True, 24, 1024, 4096, 4
    ),
    "Qwen/Qwen3-VL-4B-Instruct": Sizes(
        36, 2560, 4096, 1024, 9728, 151_936, True, 24, 1024, 4096, 4
    ),
    "Qwen/Qwen3-VL-8B-Instruct": Sizes(
        36, 4096, 4096, 1024, 12_288, 151_936, False, 27, 1152, 4304, 4
    ),
}


def sizes_of(base: VlmBaseConfig) -> Sizes | None:
    """Return the sizes of the base that the settings name, or None when nothing here tells."""
    if base.build is not None:
        b = base.build
        return Sizes(
            b.layers,
            b.hidden,
            b.heads * b.head_dim,
            b.kv_heads * b.head_dim,
            b.intermediate,
            b.vocab_size,
            True,
            b.vision_layers,
            b.vision_hidden,
            b.vision_intermediate,
            2,
        )
    path = Path(base.model).expanduser() / "config.json" if is_folder(base.model) else _cached(base)
    if path is not None:
        try:
            return Sizes.of_config(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            return None  # the plan is made without it, and train_shared will say what is wrong
    return PUBLISHED.get(base.model)


def cost(
    cfg: LoraVlmConfig, stage: str, item: str | None, made: Mapping[tuple, dict], _bf16: bool
) -> JobCost | None:
    """Return what a training will spend, as far as finished jobs tell; None for the base, which
    needs none."""
    if (
        stage not in ("train_experts", "train_router")
        or (sizes := sizes_of(cfg.loras.base)) is None
    ):
        return None
    name = item or cfg.loras.router.name
    options, row = cfg.loras.options(name), row_tokens(cfg, name)
    rows = _rows(cfg, stage, item, made)
    steps = options.steps
    if steps is None and (options.tokens is not None or rows):
        steps = options.resolve_steps(row, row * (rows or 0))
    tokens = None if steps is None else steps * options.batch_sequences * row
    plan = memory_plan(cfg, options, sizes, row, row, f"{stage} {name}")
    peak = peak_bytes(cfg.loras.base, sizes, options, plan, row)
    return JobCost.of(
        stage,
        item,
        tokens=tokens,
        flops_per_token=sizes.train_flops_per_token(options),
        parameters=sizes.adapter_parameters(options),
        plan=plan,
        peak_bytes=peak,
    )


def memory_plan(
    cfg: LoraVlmConfig,
    options: AdapterConfig,
    sizes: Sizes,
    row: int,
    longest: int,
    name: str,
    kept_bytes: int = 0,
) -> MemoryPlan:
    """Return how a training runs under runtime.memory_budget.

    `row` and `longest` are its mean and longest row, tokens; kept_bytes are its pictures'. Raises
    BudgetError.
    """
    return plan_memory(
        options,
        row,
        cfg.runtime.memory_budget,
        lambda tried: kept_bytes + peak_bytes(cfg.loras.base, sizes, options, tried, longest),
        gpu=device() == "cuda",
        name=name,
    )


def peak_bytes(
    base: VlmBaseConfig, sizes: Sizes, options: AdapterConfig, plan: MemoryPlan, longest: int
) -> int:
    """Return the predicted peak above imports of one adapter's training; the base's mapped pages
    are counted."""
    unit = 2 if base.dtype == "bfloat16" else 4
    own = sizes.adapter_parameters(options) * plan.state_bytes
    tokens = plan.micro_batch_sequences * longest
    per_token = sizes.activation_bytes(options, unit, plan.checkpointing)
    patches = (
        min(tokens, plan.micro_batch_sequences * base.image.max_pixels // PICTURE_TOKEN_PX)
        * PATCHES_PER_TOKEN
    )
    seen = patches * (4 * PATCH_VALUES + unit * (6 * sizes.vision_d + 2 * sizes.vision_d_ff))
    workspace = workspace_bytes(tokens, sizes.vocab_size, plan.chunk_logits, unit)
    return int(KERNEL_BYTES + unit * sizes.parameters + own + tokens * per_token + seen + workspace)


def row_tokens(cfg: LoraVlmConfig, name: str) -> int:
    """Return the assumed tokens of a row: a picture of the largest area there can be, and some
    text."""
    synthetic = (
        [cfg.loras.entry(name).dataset.synthetic]
        if name in cfg.experts
        else [e.dataset.synthetic for e in cfg.loras.experts]
    )
    image = cfg.loras.base.image
    area = max(d.size_px**2 if d else image.max_pixels for d in synthetic)
    picture = min(max(area, image.min_pixels), image.max_pixels) // PICTURE_TOKEN_PX
    return min(cfg.loras.options(name).max_tokens, picture + TEXT_TOKENS)


def _rows(
    cfg: LoraVlmConfig, stage: str, item: str | None, made: Mapping[tuple, dict]
) -> int | None:
    """Return the training rows of a job, once it is known how many there are."""
    if stage == "train_experts":
        found = made.get(("preprocess", item))
        return found["rows"]["train"] if found else None
    if ("routing", None) in made:
        return sum(made["routing", None]["rows"]["train"].values())
    asked = {source.expert: source.per_split for source in cfg.dataset.sources}
    counts = [
        (asked[name] or cfg.dataset.per_expert).train
        for name in (*cfg.experts, NONE)
        if name in asked
    ]
    return sum(counts) if cfg.dataset.balance == "equal" else None


def _cached(base: VlmBaseConfig) -> Path | None:
    """Return the config.json of a Hub model, when the Hub's cache on this machine has it."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(base.model, "config.json", revision=base.revision)
    return Path(found) if isinstance(found, str) else None
