"""What the tables of an ffn_moe run add up to: wins by axis, success criteria, speed, notes."""

import numpy as np
import torch

from ...hardware import device
from ...metrics.language import verdict
from ...train.loop import PHASES
from .config import FfnMoeConfig
from .parts import token_loss, training_rows

TRAIN_SAMPLE_SEQUENCES = 128


def wins(rows: list[dict]) -> list[dict]:
    """Return the stack against every dense row, best single expert and random routing, each with
    its axis."""
    single = min((r for r in rows if r["kind"] == "expert"), key=lambda r: r["mean"])["name"]
    out = []
    for row in rows:
        best = row["name"] == single
        if (
            row["kind"] == "dense"
            or best
            or row["name"] == "trunk + dummy"
            or row["name"].startswith("random")
        ):
            against = row["versus_stack"]
            axis = row["axis"] or (
                "best single expert, which runs one FFN a token" if best else "same trunk"
            )
            out.append(
                {"against": row["name"], "axis": axis, **against, "verdict": verdict(**against)}
            )
    return out


def criteria(cfg: FfnMoeConfig, bench, report: dict, contenders) -> list[dict]:
    """Return the success criteria of the run, each passed or not and why."""
    out = []
    gaps = {
        c.row: _gap(cfg, bench, c) for c in contenders if c.kind == "dense" or c is contenders[-1]
    }
    mine = gaps.pop(contenders[-1].row)
    for row, theirs in gaps.items():
        better = mine["test"] < theirs["test"]
        closed = 1 - mine["gap"] / theirs["gap"] if theirs["gap"] > 0 else 0.0
        axis = next(c.axis for c in contenders if c.row == row)
        out.append(
            {
                "name": f"primary, {row}",
                "passed": better or closed >= cfg.evaluate.gap_share,
                "text": f"beats {row} ({axis}) or closes {cfg.evaluate.gap_share:.0%} of its train-test gap",
                "detail": f"{mine['test']:.4f} against {theirs['test']:.4f} nats; train-test gap {mine['gap']:.4f} "
                f"against {theirs['gap']:.4f} ({closed:+.0%} closed)",
            }
        )
    out.append(_secondary(report["speed"]))
    routing, least = report["routing"], cfg.evaluate.min_expert_share
    out.append(
        {
            "name": "tertiary",
            "text": f"every expert is used by at least {least:.0%} of tokens",
            "passed": routing["least"][1] >= least,
            "detail": f"least {routing['least'][0]} {routing['least'][1]:.1%}, "
            f"entropy {routing['entropy']:.3f} of {routing['max_entropy']:.3f} nats",
        }
    )
    return out


def _secondary(jobs: list[dict]) -> dict:
    """Return the throughput criterion: an expert on the frozen trunk trains at least as fast as the
    trunk did."""
    trunk = next(j for j in jobs if j["job"] == "train_shared")
    rates = sorted(j["tokens_per_s"] for j in jobs if j["job"].startswith("train_experts"))
    mine = rates[len(rates) // 2]
    total = sum(trunk[f"{p}_s"] for p in PHASES) or 1.0
    phases = ", ".join(f"{p} {trunk[f'{p}_s'] / total:.0%}" for p in PHASES)
    return {
        "name": "secondary",
        "text": "an expert trains at least as many tokens a second as the trunk did",
        "passed": mine >= trunk["tokens_per_s"],
        "detail": f"expert {mine:,.0f} (median), trunk {trunk['tokens_per_s']:,.0f} tokens/s; trunk's time: {phases}",
    }


def _gap(cfg: FfnMoeConfig, bench, c) -> dict:
    """Return test loss and its distance from the loss on training text, nats per token, mean over
    domains."""
    bench.progress(f"train-test gap of {c.row}", None)
    per_domain = []
    for domain in bench.shards.domains:
        rows = training_rows(cfg, bench.shards, "gap", (domain,))
        count = max(
            1,
            min(
                TRAIN_SAMPLE_SEQUENCES // len(bench.shards.domains),
                rows.tokens() // rows.context_tokens - 1,
            ),
        )
        ids = torch.from_numpy(rows.rows(0, count)).to(device())
        per_domain.append(token_loss(c.trunk, c.ffn, ids, bench.bf16).mean().item())
    test = bench.scores.nats_per_token(c.row)
    return {"test": test, "gap": test - float(np.mean(per_domain))}


def speed(cfg: FfnMoeConfig, parts) -> list[dict]:
    """Return throughput, time by phase and peak memory of every training job, from the manifests."""
    jobs = [
        ("train_shared", None),
        *(("train_experts", e) for e in cfg.experts),
        ("train_router", None),
    ]
    jobs += [("train_dense", b) for b in cfg.dense.baselines]
    out = []
    for stage, item in jobs:
        m = parts.manifest(stage, item).metrics
        phases = {f"{p}_s": m.get(f"{p}_s", 0.0) for p in PHASES}
        out.append(
            {
                "job": f"{stage} {item}" if item else stage,
                "seconds": m["seconds"],
                "tokens": m["tokens"],
                "tokens_per_s": m["tokens_per_s"],
                "peak_mb": m["peak_mb"],
                "mfu": m["mfu"],
                **phases,
            }
        )
    return out


def notes(cfg: FfnMoeConfig) -> list[str]:
    """Return what a reader of the report has to know beside it."""
    out = [
        "Intervals resample documents within each domain (paired across rows); they do not cover training seeds."
    ]
    if cfg.router.balance == "bias":
        out.append(
            "The selection bias shaped training only: Qwen3-MoE has no place for it, so it is not used here."
        )
    return out
