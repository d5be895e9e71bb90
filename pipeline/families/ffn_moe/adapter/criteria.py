"""Whether a run of adapters did what it was asked.

C choices (experts, then the base), E experts.
"""

from collections.abc import Sequence

import numpy as np

from ....metrics.language import Scores
from ....report.format import beside_limit, limit, reaches
from ....report.schema.base import Criterion
from ....report.schema.language import TextRouting
from ..config import FfnMoeConfig
from ..evaluator import Evaluator


def criteria(
    cfg: FfnMoeConfig,
    evaluator: Evaluator,
    dense: Sequence[str],
    stack: str,
    routing: TextRouting,
) -> list[Criterion]:
    """Return the success criteria of the run, each passed or not and why."""
    scores = evaluator.scores
    decides = not scores.too_few
    out = [_beats(scores, name, stack, decides) for name in dense]
    if cfg.experts_with_text:
        out.append(_all_used(cfg, routing))
    return out


def _beats(scores: Scores, rival: str, stack: str, decides: bool) -> Criterion:
    mine = scores.mean(stack)
    theirs = scores.mean(rival)
    return Criterion(
        name=f"primary, {rival}",
        text=f"beats {rival} on held-out text",
        passed=mine < theirs if decides else None,
        detail=f"{mine:.4f} against {theirs:.4f} bits per byte",
    )


def _all_used(cfg: FfnMoeConfig, routing: TextRouting) -> Criterion:
    """Return whether every adapter whose domain has texts here reads a share of them, domains
    weighing the same."""
    shares = []
    for counts in routing.texts.values():
        count_C = np.array(counts, float)
        shares.append(count_C / count_C.sum())
    mean_C = np.mean(shares, axis=0)
    share_of = {name: float(mean_C[cfg.experts.index(name)]) for name in cfg.experts_with_text}
    labels = cfg.partition.shown_labels
    wanted = cfg.evaluate.min_expert_share
    name = min(share_of, key=share_of.__getitem__)
    share = share_of[name]
    return Criterion(
        name="tertiary",
        text=f"every adapter reads at least {limit(wanted)} of the texts",
        passed=reaches(share, wanted),
        detail=f"least {labels.get(name, name)} {beside_limit(share, wanted, 1)}",
    )
