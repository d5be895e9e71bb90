"""Parameters and floating-point operations of a job.

L layers, D model width, F feed-forward width, V vocabulary, T context tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from .memory_plan import MemoryPlan

# What moves: everything, the feed-forward networks on a frozen trunk, an expert that is deltas on
# them or of chosen layers, a LoRA on all linear layers of a frozen model, or the gates alone.
Trains = Literal["all", "ffn", "expert", "adapter", "gates"]


class TrunkSizes(Protocol):
    """A configuration section that says how large a new trunk is."""

    @property
    def layers(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int | None: ...
    @property
    def head_dim(self) -> int | None: ...
    @property
    def d_ff(self) -> int: ...
    @property
    def context_tokens(self) -> int: ...
    @property
    def tie_embeddings(self) -> bool: ...


@dataclass(frozen=True)
class ExpertShape:
    """What one expert adds to a trunk: low-rank deltas (rank 0: whole networks) in some layers."""

    layers: tuple[int, ...]
    rank: int = 0


@dataclass(frozen=True)
class Shape:
    """The sizes that decide cost."""

    layers: int
    d_model: int
    heads_width: int  # heads * head_dim
    kv_width: int  # kv_heads * head_dim
    d_ff: int
    vocab_size: int
    context_tokens: int
    tied: bool = True

    @classmethod
    def from_config(cls, trunk: TrunkSizes, vocab_size: int) -> "Shape":
        """Return the shape of a new trunk from its configuration section."""
        head_dim = trunk.head_dim or trunk.d_model // trunk.heads
        kv_heads = trunk.kv_heads or trunk.heads
        return cls(
            layers=trunk.layers,
            d_model=trunk.d_model,
            heads_width=trunk.heads * head_dim,
            kv_width=kv_heads * head_dim,
            d_ff=trunk.d_ff,
            vocab_size=vocab_size,
            context_tokens=trunk.context_tokens,
            tied=trunk.tie_embeddings,
        )

    @classmethod
    def from_hf_config(cls, hf: Mapping[str, Any], context_tokens: int) -> "Shape":
        """Return the shape of a trunk from its Hugging Face config fields."""
        heads = hf["num_attention_heads"]
        # Llama's and Mistral's older configurations do not state it
        head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
        return cls(
            layers=hf["num_hidden_layers"],
            d_model=hf["hidden_size"],
            heads_width=heads * head_dim,
            kv_width=hf["num_key_value_heads"] * head_dim,
            d_ff=hf["intermediate_size"],
            vocab_size=hf["vocab_size"],
            context_tokens=context_tokens,
            tied=hf["tie_word_embeddings"],
        )

    @property
    def ffn_parameters(self) -> int:
        """Parameters of one SwiGLU network in every layer."""
        return self.layers * 3 * self.d_model * self.d_ff

    @property
    def attention_parameters(self) -> int:
        """Parameters of the attention projections."""
        return self.layers * 2 * self.d_model * (self.heads_width + self.kv_width)

    def adapter_parameters(self, rank: int, layers: int | None = None) -> int:
        """Parameters of a LoRA of a rank on all seven linear layers of so many layers; none: of
        every one."""
        attention = 2 * (self.d_model + self.heads_width) + 2 * (self.d_model + self.kv_width)
        ffn = 3 * (self.d_model + self.d_ff)
        chosen = self.layers if layers is None else layers
        return chosen * rank * (attention + ffn)

    @property
    def trunk_parameters(self) -> int:
        """Parameters of the trunk: embedding, attention, norms (approximately), LM head."""
        tables = 1 if self.tied else 2
        norms = 2 * self.layers + 1
        return (
            tables * self.vocab_size * self.d_model
            + self.attention_parameters
            + norms * self.d_model
        )

    def expert_parameters(self, expert: ExpertShape) -> int:
        """Parameters of one expert's own."""
        a_layer = 3 * self.d_model * self.d_ff
        if expert.rank:
            a_layer = 3 * expert.rank * (self.d_model + self.d_ff)
        return len(expert.layers) * a_layer

    def ffns(self, experts: float, expert: ExpertShape) -> float:
        """How many feed-forward networks in every layer so many experts are together, with the
        trunk's own below deltas and in the layers without experts."""
        own = self.expert_parameters(expert) / self.ffn_parameters
        shared = 1.0 if expert.rank else 1.0 - own
        return shared + experts * own

    def stack_parameters(self, ffns: float) -> int:
        """Parameters of the trunk with so many feed-forward networks a layer."""
        return round(self.trunk_parameters + ffns * self.ffn_parameters)

    def forward_flops_per_token(self, ffn_active: float = 1.0) -> float:
        """Matrix-product operations of one forward pass, causal attention counted at half."""
        weights: float = self.attention_parameters
        weights += ffn_active * self.ffn_parameters
        weights += self.vocab_size * self.d_model
        # q k^T and p v are 4 T a token and number of width, and a causal mask leaves half of it
        attention = 2 * self.layers * self.context_tokens * self.heads_width
        return 2 * weights + attention

    def train_flops_per_token(
        self, trains: Trains, expert: ExpertShape | None = None, active: int = 2
    ) -> float:
        """Operations of forward and backward (frozen weights need no gradient); expert: what
        trains, or what gates choose between; active: how many of these run for a token."""
        if trains == "expert" and expert is not None:
            forward = self.forward_flops_per_token(self.ffns(1, expert))
            to_weights = 2.0 * self.expert_parameters(expert)
            return forward + self._backward_flops(forward, expert) + to_weights
        if trains == "gates":
            # the gates' own products are too small to count
            ffns = float(active) if expert is None else self.ffns(active, expert)
            forward = self.forward_flops_per_token(ffns)
            return forward + self._backward_flops(forward, expert)
        forward = self.forward_flops_per_token()
        # the backward pass to the inputs costs as much as the forward pass, and so does that to
        # the weights, of those that move; an adapter's are too small to count
        of_weights = {"all": forward, "ffn": 2.0 * self.ffn_parameters}
        return 2 * forward + of_weights.get(trains, 0.0)

    def _backward_flops(self, forward: float, expert: ExpertShape | None) -> float:
        """Operations of the backward pass to inputs: nothing below the lowest expert has one."""
        if expert is None:
            return forward
        body = forward - 2 * self.vocab_size * self.d_model
        return forward - body * min(expert.layers) / self.layers

    def layer_activations(
        self, trains: Trains, active: float = 1, in_blocks: bool = False
    ) -> float:
        """Numbers per token that a layer keeps for its backward pass; frozen weights do not need
        what they multiply. in_blocks: attention is ours, which repeats no keys.

        What enters the norms and the feed-forward networks (`active` a token), queries and keys
        before and after, values, W_gate x, W_up x; of gates also what each network gives.
        """
        kept: float = 3 * self.d_model
        if in_blocks:
            kept += 2 * self.heads_width + 3 * self.kv_width
        else:
            kept += 4 * self.heads_width + self.kv_width
        kept += 2 * active * self.d_ff
        if trains == "all":
            kept += self.d_model + self.heads_width
        elif trains == "adapter":
            # also what enters each linear layer: PEFT computes the network module by module
            kept += self.d_model + self.heads_width + 2 * self.d_ff
        elif trains == "gates":
            kept += (2 * active - 1) * self.d_model
        return kept


@dataclass(frozen=True)
class JobCost:
    """What one job of a plan will need."""

    stage: str
    item: str | None
    tokens: int | None
    parameters: int
    flops: float | None
    peak_bytes: int
    summary: str = ""  # how it will run
    mapped_bytes: int = 0  # of the peak, pages of files: the kernel drops them when memory is short
    # 0: unknown. Jobs are alike by it; of one that trains nothing it is that of a forward pass
    flops_per_token: float = 0.0
    # of what is brought out of the store: bytes of its files, and what is summed on the way
    written_bytes: int = 0
    summed_bytes: int = 0

    @classmethod
    def of(
        cls,
        stage: str,
        item: str | None,
        *,
        tokens: int | None,
        flops_per_token: float,
        parameters: int,
        plan: MemoryPlan,
        peak_bytes: int,
        mapped_bytes: int = 0,
        beside_flops: float = 0.0,
    ) -> "JobCost":
        """Return the cost of a job of `tokens` tokens (None: not known yet) that trains
        `parameters` numbers and runs as planned; beside_flops are of passes that train nothing."""
        flops = None if tokens is None else tokens * flops_per_token + beside_flops
        told = (plan.summary, mapped_bytes, flops_per_token)
        return cls(stage, item, tokens, parameters, flops, peak_bytes, *told)
