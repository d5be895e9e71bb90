"""Parameters and floating-point operations of a job.

L layers, D model width, F feed-forward width, V vocabulary, T context tokens.
"""

from dataclasses import dataclass

from .memory_plan import MemoryPlan


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
    def from_config(cls, trunk, vocab_size: int) -> "Shape":
        """Return the shape of a new trunk from its configuration section."""
        head = trunk.head_dim or trunk.d_model // trunk.heads
        kv = (trunk.kv_heads or trunk.heads) * head
        sizes = (
            trunk.layers,
            trunk.d_model,
            trunk.heads * head,
            kv,
            trunk.d_ff,
            vocab_size,
            trunk.context_tokens,
        )
        return cls(*sizes, trunk.tie_embeddings)

    @classmethod
    def from_hf_config(cls, hf: dict, context_tokens: int) -> "Shape":
        """Return the shape of a trunk from its Hugging Face config fields."""
        heads, width = hf["num_attention_heads"], hf["hidden_size"]
        head = hf.get("head_dim") or width // heads
        sizes = (hf["num_hidden_layers"], width, heads * head, hf["num_key_value_heads"] * head)
        return cls(
            *sizes,
            hf["intermediate_size"],
            hf["vocab_size"],
            context_tokens,
            hf["tie_word_embeddings"],
        )

    @property
    def ffn_parameters(self) -> int:
        """Parameters of one SwiGLU network in every layer."""
        return self.layers * 3 * self.d_model * self.d_ff

    @property
    def attention_parameters(self) -> int:
        """Parameters of the attention projections."""
        return self.layers * 2 * self.d_model * (self.heads_width + self.kv_width)

    @property
    def trunk_parameters(self) -> int:
        """Parameters of the trunk: embedding, attention, norms (approximately), LM head."""
        tables = self.vocab_size * self.d_model * (1 if self.tied else 2)
        return tables + self.attention_parameters + (2 * self.layers + 1) * self.d_model

    def stack_parameters(self, ffns: float) -> int:
        """Parameters of the trunk with so many feed-forward networks a layer."""
        return int(self.trunk_parameters + ffns * self.ffn_parameters)

    def forward_flops_per_token(self, ffn_active: float = 1.0) -> float:
        """Matrix-product operations of one forward pass, causal attention counted at half."""
        weights = (
            self.attention_parameters
            + ffn_active * self.ffn_parameters
            + self.vocab_size * self.d_model
        )
        return 2 * weights + 2 * self.layers * self.context_tokens * self.heads_width

    def train_flops_per_token(self, trains: str) -> float:
        """Operations of forward and backward; `trains` is all, ffn or gates (frozen weights need no
        gradient)."""
        forward = self.forward_flops_per_token(2.0 if trains == "gates" else 1.0)
        own = {"all": forward, "ffn": 2 * self.ffn_parameters, "gates": 0}[trains]
        return 2 * forward + own

    def layer_activations(self, trains: str, active: int = 1) -> int:
        """Numbers per token that a layer keeps for its backward pass; frozen weights do not need
        what they multiply.

        What enters the norms and the feed-forward networks (`active` a token), queries and keys
        before and after, values, W_gate x, W_up x; of gates also what each network gives.
        """
        inputs = {
            "all": self.d_model + self.heads_width,
            "ffn": 0,
            "gates": (2 * active - 1) * self.d_model,
        }[trains]
        return (
            inputs
            + 3 * self.d_model
            + 4 * self.heads_width
            + self.kv_width
            + 2 * active * self.d_ff
        )


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
    ) -> "JobCost":
        """Return the cost of a job of `tokens` tokens (None: not known yet) that trains
        `parameters` numbers and runs as planned."""
        flops = None if tokens is None else tokens * flops_per_token
        return cls(stage, item, tokens, parameters, flops, peak_bytes, plan.summary)
