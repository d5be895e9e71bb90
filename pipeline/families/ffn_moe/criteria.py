"""What the tables of an ffn_moe run add up to: wins by axis, success criteria, speed, notes.

B sequences, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...metrics.language import verdict
from ...report.schema import Criterion, JobSpeed, QualityRow, TokenRouting, Win
from ...train.loop import PHASES
from .. import Parts
from .config import FfnMoeConfig
from .evaluator import Evaluator, NetworkRow
from .parts import batch_of, token_loss, training_rows

TRAIN_SAMPLE_SEQUENCES = 128  # of training text behind a train-test gap, all domains together


def wins(rows: Sequence[QualityRow], trunk: str) -> list[Win]:
    """Return the stack against every dense row, best single expert, the trunk and random routing,
    each with its axis."""
    # Each expert alone would be beaten on average: it knows one domain. The best one decides
    experts = [row for row in rows if row.kind == "expert"]
    best_expert = min(experts, key=lambda row: row.mean).name
    out = []
    for row in rows:
        axis = row.axis
        if row.name == best_expert:
            axis = "best single expert, which runs one FFN a token"
        elif row.name == trunk or row.name.startswith("random"):
            axis = "same trunk"
        elif row.kind != "dense":
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


def criteria(
    cfg: FfnMoeConfig,
    evaluator: Evaluator,
    networks: Sequence[NetworkRow],
    jobs: Sequence[JobSpeed],
    routing: TokenRouting,
) -> list[Criterion]:
    """Return the success criteria of the run, each passed or not and why; networks end with the
    stack."""
    wanted = cfg.evaluate.gap_share
    rivals = [row for row in networks if row.kind == "dense"]
    mine = _gap(cfg, evaluator, networks[-1])
    out = []
    for rival in rivals:
        theirs = _gap(cfg, evaluator, rival)
        # A rival that does no worse on the test has no gap that could be closed
        closed = 1 - mine.gap / theirs.gap if theirs.gap > 0 else 0.0
        out.append(
            Criterion(
                name=f"primary, {rival.name}",
                text=f"beats {rival.name} ({rival.axis}) or closes {wanted:.0%} of its "
                "train-test gap",
                passed=mine.test < theirs.test or closed >= wanted,
                detail=f"{mine.test:.4f} against {theirs.test:.4f} nats; train-test gap "
                f"{mine.gap:.4f} against {theirs.gap:.4f} ({closed:+.0%} closed)",
            )
        )
    out.append(_throughput(jobs))
    least = cfg.evaluate.min_expert_share
    out.append(
        Criterion(
            name="tertiary",
            text=f"every expert is used by at least {least:.0%} of tokens",
            passed=routing.least.share >= least,
            detail=f"least {routing.least.expert} {routing.least.share:.1%}, "
            f"entropy {routing.entropy:.3f} of {routing.max_entropy:.3f} nats",
        )
    )
    return out


def _throughput(jobs: Sequence[JobSpeed]) -> Criterion:
    """Return the throughput criterion: an expert on the frozen trunk trains at least as fast as the
    trunk did."""
    trunk = next(job for job in jobs if job.job == "train_shared")
    experts = [job for job in jobs if job.job.startswith("train_experts")]
    rates = sorted(job.tokens_per_s or 0.0 for job in experts)
    # Of an even number the faster of the two in the middle
    mine = rates[len(rates) // 2]
    theirs = trunk.tokens_per_s or 0.0
    seconds = {phase: getattr(trunk, f"{phase}_s") for phase in PHASES}
    total = sum(seconds.values()) or 1.0
    phases = ", ".join(f"{phase} {each / total:.0%}" for phase, each in seconds.items())
    return Criterion(
        name="secondary",
        text="an expert trains at least as many tokens a second as the trunk did",
        passed=mine >= theirs,
        detail=f"expert {mine:,.0f} (median), trunk {theirs:,.0f} tokens/s; trunk's time: {phases}",
        of_machine=True,
    )


@dataclass(frozen=True)
class _Gap:
    test: float  # nats per token, mean over domains
    gap: float  # how far that is above the same on training text


def _gap(cfg: FfnMoeConfig, evaluator: Evaluator, row: NetworkRow) -> _Gap:
    evaluator.progress(f"train-test gap of {row.name}", None)
    domains = evaluator.shards.domains
    per_domain = []
    for domain in domains:
        rows = training_rows(cfg, evaluator.shards, "gap", (domain,))
        windows = rows.tokens() // rows.context_tokens - 1
        # The first rows of an order of their own, which no training goes by
        count = max(1, min(TRAIN_SAMPLE_SEQUENCES // len(domains), windows))
        ids_BT = batch_of(rows, 0, count)
        nats_BT = token_loss(row.trunk, row.ffn, ids_BT, evaluator.bf16)
        per_domain.append(nats_BT.mean().item())
    test = evaluator.scores.nats_per_token(row.name)
    return _Gap(test, test - float(np.mean(per_domain)))


def speed(cfg: FfnMoeConfig, parts: Parts) -> list[JobSpeed]:
    """Return throughput, time by phase and peak memory of every training job, from the
    manifests."""
    jobs: list[tuple[str, str | None]] = [("train_shared", None)]
    jobs += [("train_experts", name) for name in cfg.experts]
    jobs.append(("train_router", None))
    jobs += [("train_dense", name) for name in cfg.dense.baselines]
    out = []
    for stage, item in jobs:
        name = f"{stage} {item}" if item else stage
        metrics = parts.manifest(stage, item).metrics
        out.append(JobSpeed.from_metrics(name, metrics))
    return out


def notes(cfg: FfnMoeConfig, prepared: Mapping[str, Any]) -> list[str]:
    """Return what a reader of the report has to know beside it; `prepared` are the metrics of
    preprocess."""
    out = [
        "Intervals resample documents within each domain (paired across rows); "
        "they do not cover training seeds."
    ]
    labels = cfg.partition.shown_labels
    if labels:
        named = [f"{name} is “{label}”" for name, label in labels.items()]
        out.append(f"Domains by what their data calls them: {', '.join(named)}.")
    lost = prepared.get("tokenizer", {}).get("lost_share", 0)
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
