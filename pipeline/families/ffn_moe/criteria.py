"""What the tables of an ffn_moe run add up to: wins by axis, success criteria, speed, notes.

B sequences, T tokens, N = B*T.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...metrics.bootstrap import LEAST_UNITS
from ...metrics.language import verdict
from ...report.format import beside_limit, limit, places, reaches
from ...report.schema.base import Criterion, JobSpeed
from ...report.schema.language import (
    QualityRow,
    TextCounts,
    TokenRouting,
    Win,
)
from .. import Parts
from .config import FfnMoeConfig
from .evaluator import EvalRow, Evaluator, NetworkRow
from .parts import batch_of, token_losses, training_rows
from .passes import TRAIN_SAMPLE_TOKENS
from .stages import SEARCHES


def wins(
    rows: Sequence[QualityRow],
    trunk: str,
    alone: str = "best single expert, which runs one FFN a token",
) -> list[Win]:
    """Return the stack against every dense row, best single expert, the trunk and random routing,
    each with its axis; `alone` is that of the expert."""
    # Each expert alone would be beaten on average: it knows one domain. The best one decides
    experts = [row for row in rows if row.kind == "expert"]
    best_expert = min(experts, key=lambda row: row.mean).name
    out = []
    for row in rows:
        axis = row.axis
        if row.name == best_expert:
            axis = alone
        elif row.name == trunk or row.name.startswith("random"):
            axis = "same trunk"
        elif row.kind not in ("dense", "joint"):
            continue
        against = row.versus_stack
        if against is None:  # the stack is no rival of its own
            continue
        out.append(
            Win(
                against=row.name,
                axis=axis,
                difference=against.difference,
                interval=against.interval,
                verdict=verdict(against.interval),
            )
        )
    return out


@dataclass(frozen=True)
class TrainTestGap:
    """A network's loss on held-out text, and how far that is above its loss on training text."""

    test: float  # nats per token, mean over domains
    gap: float


def criteria(
    cfg: FfnMoeConfig,
    evaluator: Evaluator,
    networks: Sequence[EvalRow],
    gaps: Mapping[str, TrainTestGap],
    routing: TokenRouting,
) -> list[Criterion]:
    """Return the success criteria of the run, each passed or not and why; networks end with the
    stack. gaps are of it and of the dense baselines, by name."""
    wanted = cfg.evaluate.gap_share
    decides = not evaluator.scores.too_few
    mine = gaps[networks[-1].name]
    out = []
    for rival in networks:
        if rival.kind == "dense":
            passed, detail = against(mine, gaps[rival.name], wanted)
            out.append(
                Criterion(
                    name=f"primary, {rival.name}",
                    text=f"beats {rival.name} ({rival.axis}) or closes {limit(wanted)} of its "
                    "train-test gap",
                    passed=passed if decides else None,
                    detail=detail,
                )
            )
    labels = cfg.partition.shown_labels
    out.append(all_used(routing, cfg.evaluate.min_expert_share, labels))
    return out


def all_used(routing: TokenRouting, least: float, labels: Mapping[str, str]) -> Criterion:
    """Return whether every expert gets a share of tokens; its words name experts by their domains'
    labels, as the tables beside them do."""
    expert, share = routing.least
    return Criterion(
        name="tertiary",
        text=f"every expert is used by at least {limit(least)} of tokens",
        passed=reaches(share, least),
        detail=f"least {labels.get(expert, expert)} {beside_limit(share, least, 1)}, "
        f"entropy {routing.entropy:.3f} of {routing.max_entropy:.3f} nats",
    )


def against(mine: TrainTestGap, theirs: TrainTestGap, wanted: float) -> tuple[bool, str]:
    """Return whether the stack beats a rival on the test or closes the wanted share of its gap, and
    in words which of the two."""
    is_better = not reaches(mine.test, theirs.test)
    digits = places(lambda one, other: not reaches(one, other), mine.test, theirs.test, least=4)
    losses = f"{mine.test:.{digits}f} against {theirs.test:.{digits}f} nats"
    is_closed = False
    gap = "it has no train-test gap to close"
    # A rival that does no worse on the test has no gap that could be closed
    if theirs.gap > 0:
        closed = 1 - mine.gap / theirs.gap
        is_closed = reaches(closed, wanted)
        gaps = mine.gap, theirs.gap
        digits = places(lambda one, other: reaches(1 - one / (other or 1), wanted), *gaps, least=4)
        # A gap that is none any more is closed, by how much beyond that says nothing
        share = beside_limit(closed, wanted, 0) if mine.gap > 0 else "all"
        gap = f"{share} of its gap closed ({mine.gap:.{digits}f} against {theirs.gap:.{digits}f})"
    half = "neither"
    if is_better:
        half = "both" if is_closed else "by the test alone"
    elif is_closed:
        half = "by the gap alone"
    better = "better" if is_better else "no better"
    return is_better or is_closed, f"{half}: {better} on the test ({losses}); {gap}"


def train_test_gap(cfg: FfnMoeConfig, evaluator: Evaluator, row: NetworkRow) -> TrainTestGap:
    """Return how far a network's loss on held-out text, which was measured before, is above that on
    training text."""
    evaluator.progress(f"train-test gap of {row.name}", None)
    domains = evaluator.shards.domains
    per_domain = []
    for domain in domains:
        rows = training_rows(cfg, evaluator.shards, "gap", (domain,))
        windows = rows.tokens() // rows.context_tokens - 1
        # The first rows of an order of their own, which no training goes by
        wanted = TRAIN_SAMPLE_TOKENS // rows.context_tokens // len(domains)
        count = max(1, min(wanted, windows))
        # as many at a time as of held-out text: all at once would take more than any other pass
        batches = batch_of(rows, 0, count).split(cfg.evaluate.batch_sequences)
        nats_N = token_losses(row.trunk, row.ffn, batches, evaluator.bf16)
        per_domain.append(nats_N.mean().item())
    test = evaluator.scores.nats_per_token(row.name)
    return TrainTestGap(test, test - float(np.mean(per_domain)))


def speed(cfg: FfnMoeConfig, parts: Parts) -> list[JobSpeed]:
    """Return throughput, time by phase and peak memory of every training job, from the
    manifests."""
    jobs: list[tuple[str, str | None]] = [("train_shared", None)]
    jobs += [("train_experts", name) for name in cfg.experts]
    jobs.append(("train_router", None))
    jobs += [("train_dense", name) for name in cfg.dense.baselines]
    jobs += [("train_joint", name) for name in cfg.joint.models]
    jobs += [(stage, item) for stage in SEARCHES.values() for item in cfg.items(stage)]
    out = []
    for stage, item in jobs:
        name = f"{stage} {item}" if item else stage
        metrics = parts.manifest(stage, item).metrics
        out.append(JobSpeed.from_metrics(name, metrics))
    return out


def notes(cfg: FfnMoeConfig, lost: float, counts: TextCounts) -> list[str]:
    """Return what a reader of the report has to know beside it; `lost` is the share of the text's
    bytes that did not survive the tokenizer."""
    longest = cfg.data.max_document_bytes
    out = [
        "Intervals resample documents within each domain (paired across rows), of a longer text "
        f"its pieces of {longest:,} bytes, though these are alike; they do not cover training "
        "seeds."
    ]
    labels = cfg.partition.shown_labels
    if counts.too_few:
        found = []
        for name in counts.too_few:
            found.append(f"{labels.get(name, name)} {counts.test_documents[name]}")
        out.append(
            f"Test documents that were measured: {', '.join(found)}. Over fewer than {LEAST_UNITS} "
            "in a domain there is no interval, and nothing is decided: raise "
            "evaluate.tokens_per_domain or data.test_share, or lower data.max_document_bytes."
        )
    if labels:
        named = [f"{name} is “{label}”" for name, label in labels.items()]
        out.append(f"Domains by what their data calls them: {', '.join(named)}.")
    without = [name for name in cfg.experts if name not in cfg.experts_with_text]
    if without:
        out.append(
            f"Trained elsewhere, on text that is not here: {', '.join(without)}. What others gain "
            "or lose by it is told; what it is for was not measured, and its share of tokens is of "
            "other domains' text."
        )
    if lost:
        out.append(
            f"{lost:.2%} of the text's bytes do not survive the tokenizer, so nobody had to guess "
            "them, and bits per byte are too good by about as much."
        )
    if cfg.router.balance == "bias":
        out.append(
            "The selection bias shaped training only: Qwen3-MoE has no place for it, "
            "so it is not used here."
        )
    return out
