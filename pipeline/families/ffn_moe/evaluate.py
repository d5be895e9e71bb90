"""The report of an ffn_moe run: quality, opt-out, routing and active experts, on the same held-out
tokens.

B sequences, T tokens, N = B*T, E experts, K experts per token, L layers, D model width.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch

from ...data.text.shards import Shards
from ...hardware import device, machine, uses_bf16
from ...metrics.language import Documents, Scores, oracle_gain, posterior_mix, routing
from ...model.experts import Expert, average
from ...model.router import Mixture, UniformMixture
from ...model.router_init import random as random_gates
from ...model.trunk import Ffn, Trunk, build, load_dense
from ...protocols import Progress
from ...report import LanguageReport
from ...store.artifacts import now
from ...train.flops import Shape
from .config import FfnMoeConfig
from .cost import stage_tokens
from .criteria import criteria, notes, speed, wins
from .parts import (
    ANCHOR,
    initial_gates,
    mixture_of,
    stored_experts,
    stored_statistics,
    stored_trunk,
    token_loss,
)

AXES = {
    "total": "same total tokens",
    "path": "tokens and wall-clock of one expert's path",
    "ffn": "same total tokens, FFN only",
    "wide": "same active parameters, same total tokens",
    "scratch": "same total tokens, from zero",
}


@dataclass(frozen=True)
class EvalRow:
    """One row of the quality table: a network that gives every token a loss."""

    row: str
    kind: str
    trunk: Trunk
    ffn: Ffn
    ffns: float = 1.0  # feed-forward networks that run per token
    held: float = 1.0  # feed-forward networks that are kept
    axis: str = ""
    train_tokens: int | None = None


class Evaluator:
    """The held-out text, and what every contender scores on it."""

    def __init__(self, cfg: FfnMoeConfig, shards: Shards, progress: Progress):
        self.cfg, self.shards, self.progress, self.bf16 = (
            cfg,
            shards,
            progress,
            uses_bf16(cfg.dtype),
        )
        self.documents = {d: _documents(cfg, shards, d) for d in shards.domains}
        self.scores = Scores(self.documents, cfg.evaluate.bootstrap, cfg.data.seed)
        self.tokens: dict[str, dict[str, np.ndarray]] = {}

    def token_nats(self, trunk: Trunk, ffn: Ffn, domain: str) -> np.ndarray:
        """Return nats_T of a domain's held-out stream; 0 where a token is given and not predicted."""
        documents, context = self.documents[domain], self.cfg.trunk.context_tokens
        end = int(documents.starts_n[-1])
        stream_T = np.asarray(self.shards.stream("test", domain)[:end], dtype=np.int64)
        padded = np.full(ceil((end - 1) / context) * context + 1, self.shards.end_id)
        padded[:end] = stream_T
        rows = np.lib.stride_tricks.sliding_window_view(padded, context + 1)[::context]
        batches = (
            torch.from_numpy(rows.copy()).to(device()).split(self.cfg.evaluate.batch_sequences)
        )
        found = (
            torch.cat([token_loss(trunk, ffn, ids, self.bf16).flatten() for ids in batches])
            .cpu()
            .numpy()
        )
        nats_T = np.concatenate([[0.0], found[: end - 1]])
        nats_T[documents.starts_n[:-1]] = 0.0
        return nats_T

    def score(self, row: str, trunk: Trunk, ffn: Ffn, keep_tokens: bool = False) -> None:
        """Run a contender over all domains."""
        self.progress(f"evaluating {row}", None)
        found = {d: self.token_nats(trunk, ffn, d) for d in self.documents}
        self.scores.add(row, {d: self.documents[d].sums(n) for d, n in found.items()})
        if keep_tokens:
            self.tokens[row] = found


def tables(cfg: FfnMoeConfig, parts, progress: Progress) -> LanguageReport:
    """Return the report of a run: quality, opt-out, routing, active experts, the domain x expert
    matrix, criteria, speed."""
    from .stack import assemble

    shards = Shards(parts.folder("preprocess"))
    bench, stack = Evaluator(cfg, shards, progress), assemble(cfg, parts)
    trunk, dummy = stored_trunk(cfg, parts)
    contenders = list(_contenders(cfg, parts, shards, trunk, dummy, stack))
    for c in contenders:
        bench.score(c.row, c.trunk, c.ffn, keep_tokens=c.kind == "expert")
    _combined(cfg, bench)
    rows = _quality(cfg, bench, contenders, stack, _shape(cfg, trunk))
    report = {
        "run": cfg.name,
        "family": cfg.family,
        "seed": cfg.seed,
        "made": now(),
        "experts": list(stack.names),
        "domains": list(shards.domains),
        "metric": "bits per byte on held-out text",
        "model": _model(cfg, trunk, stack),
        "data": _data(bench),
        "quality": rows,
        "opt_out": _opt_out(cfg, bench, stack),
        "routing": _routing(bench, stack),
        "active": _active(cfg, bench, stack, _shape(cfg, trunk)),
        "matrix": _matrix(bench, contenders),
        "wins": wins(rows),
        "speed": speed(cfg, parts),
        "machine": machine(torch.get_num_threads(), bench.bf16),
        "notes": notes(cfg),
    }
    report["criteria"] = criteria(cfg, bench, report, contenders)
    return LanguageReport.model_validate(report)


def stack_row(cfg: FfnMoeConfig) -> str:
    """Return the name of the run's own stack in the quality table."""
    trained = cfg.router.resolve_steps(cfg.trunk.context_tokens, 10**9) > 0
    anchor = " + anchor" if cfg.trunk.anchor == "keep" else ""
    return f"{cfg.router.init}{' trained' if trained else ''} top-{cfg.router.top_k}{anchor} (the stack)"


def _contenders(cfg, parts, shards, trunk, dummy, stack) -> Iterator[EvalRow]:
    """Yield the rows of the quality table that a network can be run for."""
    named = list(stored_experts(cfg, parts))
    own = [(n, e) for n, e in named if n != ANCHOR]
    experts, only_own = [e for _, e in named], [e for _, e in own]
    budget = {d: shards.tokens("train", d) for d in shards.domains}
    on_trunk = stage_tokens(cfg, "train_shared", None, budget)
    each = {n: stage_tokens(cfg, "train_experts", n, budget) for n, _ in own}
    joined = on_trunk + sum(each.values())
    n, k = float(len(experts)), cfg.router.top_k
    yield EvalRow("trunk + dummy", "part", trunk, dummy, train_tokens=on_trunk)
    for name, expert in own:
        yield EvalRow(name, "expert", trunk, expert, train_tokens=on_trunk + each[name])
    yield from _dense(cfg, parts, budget, on_trunk)
    yield EvalRow("weight soup", "merge", trunk, average(only_own), train_tokens=joined)
    yield EvalRow(
        "uniform mixture",
        "merge",
        trunk,
        UniformMixture(only_own),
        len(own),
        len(own),
        train_tokens=joined,
    )
    torch.manual_seed(cfg.seed_of("random router"))
    random_LED = random_gates(stored_statistics(cfg, parts, cfg.trunk.anchor == "keep"))
    yield EvalRow(
        f"random router top-{k}",
        "router",
        trunk,
        mixture_of(experts, random_LED, k),
        k,
        n,
        train_tokens=joined,
    )
    for init in ("centroid", "ridge"):
        gates = mixture_of(experts, initial_gates(cfg, parts, init), k)
        yield EvalRow(
            f"{init} top-{k}, untrained", "router", trunk, gates, k, n, train_tokens=joined
        )
    total = joined + stage_tokens(cfg, "train_router", None, budget)
    weight_LED = torch.stack([g.data for g in stack.mixture.router.gates])
    for other in sorted({1, 2} - {k}):
        if other <= len(experts):
            gates = mixture_of(experts, weight_LED, other)
            yield EvalRow(
                f"the stack's router, top-{other}",
                "router",
                trunk,
                gates,
                other,
                n,
                train_tokens=total,
            )
    yield _other_anchor(cfg, parts, trunk, dummy, only_own, joined)
    yield EvalRow(stack_row(cfg), "router", trunk, stack.mixture, k, n, train_tokens=total)


def _other_anchor(cfg, parts, trunk, dummy, own: list[Expert], joined: int) -> EvalRow:
    """Return the stack's alternative: with the anchor when it was discarded, without it when it was
    kept."""
    keep = cfg.trunk.anchor == "discard"
    experts = [dummy, *own] if keep else own
    k = min(cfg.router.top_k, len(experts))
    gates = mixture_of(experts, initial_gates(cfg, parts, "ridge", anchor=keep), k)
    row = f"ridge top-{k} {'with' if keep else 'without'} anchor, untrained"
    return EvalRow(row, "router", trunk, gates, k, float(len(experts)), train_tokens=joined)


def _dense(cfg, parts, budget, on_trunk) -> Iterator[EvalRow]:
    """Yield the dense baselines, each with the axis it shares with the stack."""
    for item in cfg.dense.baselines:
        trunk, ffn = build(
            json.loads((parts.folder("train_dense", item) / "trunk.json").read_text("utf-8"))
        )
        load_dense(trunk, ffn, parts.tensors("train_dense", "model.safetensors", item))
        wide = cfg.router.top_k if item == "wide" else 1.0
        spent = stage_tokens(cfg, "train_dense", item, budget) + (
            on_trunk if item in ("total", "path", "ffn") else 0
        )
        yield EvalRow(
            f"dense {item}",
            "dense",
            trunk.to(device()).eval(),
            ffn.to(device()).eval(),
            wide,
            wide,
            AXES[item],
            spent,
        )


def _combined(cfg: FfnMoeConfig, bench: Evaluator) -> None:
    """Add the rows that follow from the experts' own: posterior ensemble and oracle."""
    names = list(bench.tokens)
    mixed, oracle = {}, {}
    for domain, documents in bench.documents.items():
        nats_ET = np.stack([bench.tokens[n][domain] for n in names])
        mixed[domain] = documents.sums(posterior_mix(nats_ET, documents.starts_n))
        sums = {n: documents.sums(bench.tokens[n][domain]) for n in names}
        oracle[domain] = sums.get(domain, min(sums.values(), key=np.sum))
    bench.scores.add("posterior ensemble", mixed)
    bench.scores.add("oracle expert", oracle)


def _quality(
    cfg, bench: Evaluator, contenders: Sequence[EvalRow], stack, shape: Shape
) -> list[dict]:
    last, own = stack_row(cfg), float(sum(c.kind == "expert" for c in contenders))
    listed = [*contenders]
    trunk = contenders[0].trunk
    tokens = next(c.train_tokens for c in contenders if c.row == "weight soup")
    listed.insert(-1, EvalRow("posterior ensemble", "merge", trunk, None, own, own, "", tokens))
    listed.append(EvalRow("oracle expert", "oracle", trunk, None, 1.0, own, "", tokens))
    scores = bench.scores
    bounds = (scores.nats_per_token("trunk + dummy"), scores.nats_per_token("oracle expert"))
    return [_quality_row(scores, c, shape, bounds, last) for c in listed]


def _quality_row(scores: Scores, c: EvalRow, shape: Shape, bounds, last: str) -> dict:
    """Return one row of the quality table; sizes count the trunk and the feed-forward networks that run or are
    kept."""
    perplexity = scores.perplexity(c.row)
    against = scores.difference(c.row, last) if c.row != last else None
    ensemble = (
        c.row == "posterior ensemble"
    )  # its experts share no layer: each runs a whole network
    flops = (
        shape.forward_flops_per_token(c.ffns)
        if not ensemble
        else c.ffns * shape.forward_flops_per_token(1.0)
    )
    active = shape.trunk_parameters + c.ffns * shape.ffn_parameters
    return {
        "name": c.row,
        "kind": c.kind,
        "axis": c.axis,
        "bits_per_byte": scores.bits_per_byte(c.row),
        "mean": scores.mean(c.row),
        "interval": scores.interval(c.row),
        "perplexity": perplexity,
        "mean_perplexity": float(np.exp(scores.nats_per_token(c.row))),
        "active_parameters": int(active),
        "total_parameters": int(shape.trunk_parameters + c.held * shape.ffn_parameters),
        "flops_per_token": int(flops),
        "train_tokens": c.train_tokens,
        "oracle_gain": oracle_gain(scores.nats_per_token(c.row), *bounds),
        "versus_stack": against and {"difference": against[0], "interval": against[1]},
        "is_stack": c.row == last,
    }


def _opt_out(cfg: FfnMoeConfig, bench: Evaluator, stack) -> list[dict]:
    """Return the opt-out table: the stack with one expert and its gate rows taken away."""
    full, rows = bench.scores.perplexity(stack_row(cfg)), []
    bits = bench.scores.bits_per_byte(stack_row(cfg))
    for gone, name in enumerate(stack.names):
        if len(stack.names) == 1:
            break
        keep = [i for i in range(len(stack.names)) if i != gone]
        experts = [stack.mixture.experts[i] for i in keep]
        weight_LED = torch.stack([g.data[keep] for g in stack.mixture.router.gates])
        row = f"without {name}"
        bench.score(
            row, stack.trunk, mixture_of(experts, weight_LED, min(cfg.router.top_k, len(keep)))
        )
        ratio = {d: p / full[d] for d, p in bench.scores.perplexity(row).items()}
        delta = {d: b - bits[d] for d, b in bench.scores.bits_per_byte(row).items()}
        rows.append({"removed": name, "ratio": ratio, "delta_bits": delta})
    return rows


class _Tally:
    """Counts a mixture's choices while it fills."""

    def __init__(self, mixture: Mixture, layers: int, experts: int):
        self.mixture = mixture
        self.all_LE, self.first_LE = np.zeros((layers, experts)), np.zeros((layers, experts))

    def __call__(self, layer: int, x_BTD: torch.Tensor) -> torch.Tensor:
        index_NK, _ = self.mixture.router.route(layer, x_BTD.flatten(0, -2))
        experts = self.all_LE.shape[1]
        self.all_LE[layer] += index_NK.flatten().bincount(minlength=experts).cpu().numpy()
        self.first_LE[layer] += index_NK[:, 0].bincount(minlength=experts).cpu().numpy()
        return self.mixture(layer, x_BTD)


def _routing(bench: Evaluator, stack) -> dict:
    counts, first = {}, {}
    for domain in bench.documents:
        tally = _Tally(stack.mixture, len(stack.mixture.router.gates), len(stack.names))
        bench.token_nats(stack.trunk, tally, domain)
        counts[domain], first[domain] = tally.all_LE, tally.first_LE
    return routing(counts, first, list(stack.names))


def _active(cfg: FfnMoeConfig, bench: Evaluator, stack, shape: Shape) -> list[dict]:
    """Return the stack's score for every number of active experts."""
    weight_LED, out = torch.stack([g.data for g in stack.mixture.router.gates]), []
    for k in range(1, len(stack.names) + 1):
        row = f"{k} active"
        bench.score(row, stack.trunk, mixture_of(list(stack.mixture.experts), weight_LED, k))
        out.append(
            {
                "top_k": k,
                "bits_per_byte": bench.scores.bits_per_byte(row),
                "mean": bench.scores.mean(row),
                "interval": bench.scores.interval(row),
                "active_parameters": int(shape.trunk_parameters + k * shape.ffn_parameters),
            }
        )
    return out


def _matrix(bench: Evaluator, contenders: Sequence[EvalRow]) -> dict:
    rows = [c.row for c in contenders if c.kind in ("part", "expert")] + [contenders[-1].row]
    values = [list(bench.scores.bits_per_byte(row).values()) for row in rows]
    return {"rows": [*rows[:-1], "stack"], "bits_per_byte": values}


def _documents(cfg: FfnMoeConfig, shards: Shards, domain: str) -> Documents:
    """Return the first whole test documents of a domain, up to evaluate.tokens_per_domain, at least
    one."""
    starts, sizes = shards.documents("test", domain)
    count = max(1, int(np.searchsorted(starts, cfg.evaluate.tokens_per_domain, side="right")) - 1)
    return Documents(domain, starts[: count + 1].copy(), sizes[:count].copy())


def _shape(cfg: FfnMoeConfig, trunk: Trunk) -> Shape:
    return Shape.from_hf_config(trunk.config.to_dict(), cfg.trunk.context_tokens)


def _model(cfg: FfnMoeConfig, trunk: Trunk, stack) -> dict:
    shape = _shape(cfg, trunk)
    return {
        "layers": shape.layers,
        "d_model": shape.d_model,
        "d_ff": shape.d_ff,
        "vocab_size": shape.vocab_size,
        "context_tokens": shape.context_tokens,
        "top_k": cfg.router.top_k,
        "active_parameters": int(shape.trunk_parameters + cfg.router.top_k * shape.ffn_parameters),
        "total_parameters": int(shape.trunk_parameters + len(stack.names) * shape.ffn_parameters),
    }


def _data(bench: Evaluator) -> dict:
    train = {d: bench.shards.tokens("train", d) for d in bench.documents}
    return {
        "test_tokens": {d: x.tokens for d, x in bench.documents.items()},
        "test_documents": {d: len(x.bytes_n) for d, x in bench.documents.items()},
        "train_tokens": train,
    }
