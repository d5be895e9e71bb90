"""What the stock classes of mixtures call tensors, from what they are called in the store."""

from collections.abc import Callable
from dataclasses import dataclass

IN_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@dataclass(frozen=True)
class Naming:
    """How one class names the tensors that a dense model has not, or has one of."""

    expert: Callable[[int, str], str]  # of the expert with that number in the stack
    gate: Callable[[str], str]


def _in_qwen3_moe(number: int, name: str) -> str:
    return name.replace(".mlp.", f".mlp.experts.{number}.")


def _in_mixtral(number: int, name: str) -> str:
    head, _, tail = name.partition(".mlp.")
    projection, _, end = tail.partition(".")
    return f"{head}.block_sparse_moe.experts.{number}.{IN_MIXTRAL[projection]}.{end}"


def _gate_in_qwen3_moe(name: str) -> str:
    return name


def _gate_in_mixtral(name: str) -> str:
    return name.replace(".mlp.", ".block_sparse_moe.")


NAMINGS = {
    "Qwen3MoeForCausalLM": Naming(_in_qwen3_moe, _gate_in_qwen3_moe),
    "MixtralForCausalLM": Naming(_in_mixtral, _gate_in_mixtral),
}
