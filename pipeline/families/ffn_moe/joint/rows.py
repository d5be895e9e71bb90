"""The joint models as rows of the quality table."""

from collections.abc import Iterator

from ....train.flops import Shape
from ... import Parts
from ..config import FfnMoeConfig
from ..evaluator import NetworkRow
from ..parts import stored_settings
from .cost import active_ffns, kept_ffns
from .network import opened
from .section import MOE

AXIS = "trained end to end, from zero"


def joint_rows(cfg: FfnMoeConfig, parts: Parts) -> Iterator[NetworkRow]:
    """Yield the models that were trained end to end, each opened when its turn comes."""
    for item in cfg.joint.models:
        yield _joint_row(cfg, parts, item)


def _joint_row(cfg: FfnMoeConfig, parts: Parts, item: str) -> NetworkRow:
    # A function of its own, so that no name of the loop holds one model while the next is opened
    stored = parts.tensors("train_joint", "model.safetensors", item)
    settings = stored_settings(parts, "train_joint", item)
    trunk, ffn = opened(cfg, item, settings, stored)
    shape = Shape.from_hf_config(settings, cfg.trunk.context_tokens)
    is_mixture = item == MOE
    return NetworkRow(
        name=f"joint moe top-{cfg.joint.top_k}" if is_mixture else "joint dense",
        kind="joint" if is_mixture else "dense",
        trunk=trunk.eval(),
        ffn=ffn.eval(),
        active_ffns=active_ffns(cfg, item, shape),
        kept_ffns=kept_ffns(cfg, item, shape),
        axis=AXIS,
        # Fewer than were planned where patience ended it
        train_tokens=parts.manifest("train_joint", item).metrics["tokens"],
    )
