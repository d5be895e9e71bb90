"""What the preprocess of several domains came to, told as one."""

from collections.abc import Iterable, Mapping
from typing import Any

Metrics = Mapping[str, Any]


def training_tokens(metrics: Iterable[Metrics]) -> dict[str, int]:
    """Return the training tokens of each domain."""
    found: dict[str, int] = {}
    for each in metrics:
        found |= each["tokens"]["train"]
    return found


def lost_share(metrics: Iterable[Metrics]) -> float:
    """Return the share of the domains' training text that did not survive a pretrained
    tokenizer."""
    lost = 0.0
    size = 0
    for each in metrics:
        if "tokenizer" in each:
            own_bytes = sum(each["bytes"]["train"].values())
            lost += each["tokenizer"]["lost_share"] * own_bytes
            size += own_bytes
    return lost / max(size, 1)
