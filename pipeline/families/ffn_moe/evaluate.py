"""The report of an ffn_moe run: quality, opt-out, routing and active experts, on the same held-out
tokens.

B sequences, T tokens, N = B*T, E experts, K experts per token, L layers, D model width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...data.text.figures import lost_share
from ...hardware import machine
from ...metrics.language import Scores, oracle_gain, posterior_mix, routing
from ...model.router import Mixture
from ...protocols import Progress
from ...report.schema.base import Difference, MachineFacts
from ...report.schema.language import (
    ActiveRow,
    DomainMatrix,
    LanguageModelFacts,
    LanguageReport,
    OptOutRow,
    QualityRow,
    TextCounts,
    TokenRouting,
)
from ...store.artifacts import now
from ...train.flops import Shape
from .. import Parts
from ..searches import searched
from .config import FfnMoeConfig
from .continuations import ContinuationWriter, writers
from .cost import expert_shape
from .criteria import TrainTestGap, criteria, notes, speed, train_test_gap, wins
from .evaluator import EvalRow, Evaluator
from .networks import SOUP, TRUNK, network_rows, stack_row
from .parts import (
    expert_bytes,
    mixture_of,
    shards_of,
    stored_experts,
    stored_trunk,
)
from .samples import by_token, samples
from .speakers import Listener
from .stack import FfnStack, join
from .stages import SEARCHES

ENSEMBLE = "posterior ensemble"
ORACLE = "oracle expert"


def tables(cfg: FfnMoeConfig, parts: Parts, progress: Progress) -> LanguageReport:
    """Return the report of a run: quality, opt-out, routing, active experts, the domain x expert
    matrix, criteria, speed."""
    shards = shards_of(parts, cfg.partition.names)
    trunk, dummy = stored_trunk(cfg, parts)
    experts = dict(stored_experts(cfg, parts, dummy))
    stack = join(cfg, parts, trunk, experts)
    shape = Shape.from_hf_config(trunk.config.to_dict(), cfg.trunk.context_tokens)
    evaluator = Evaluator(cfg, shards, progress)
    writer = ContinuationWriter(cfg, parts, shards, progress)
    writing = writers(cfg, TRUNK, stack_row(cfg))
    networks: list[EvalRow] = []
    gaps: dict[str, TrainTestGap] = {}
    counters = _counters(evaluator, stack)
    for row in network_rows(cfg, parts, shards, dummy, stack):
        is_expert = row.kind == "expert"
        is_stack = row.name == stack_row(cfg)
        # Of the stack's one pass both figures come: what it scores, and where tokens go
        watched = counters if is_stack else None
        evaluator.score(row.name, row.trunk, row.ffn, is_expert, watched)
        if is_stack:
            heard = Listener(stack.mixture, stack.names)
            writer.add(row.name, row.trunk, heard, heard=heard.speakers)
        elif row.name in writing:
            writer.add(row.name, row.trunk, row.ffn)
        if row.kind == "dense" or is_stack:
            gaps[row.name] = train_test_gap(cfg, evaluator, row)
        networks.append(row.told)
        # A dense model goes before the next one is opened
        del row
    score_combined(evaluator)
    quality = _quality(cfg, evaluator, networks, shape)
    token_routing = _routing(counters, stack)
    return language_report(
        cfg,
        parts,
        evaluator,
        writer,
        experts=stack.names,
        model=_model(cfg, parts, shape, stack),
        quality=quality,
        opt_out=_opt_out(cfg, evaluator, stack),
        routing=token_routing,
        active=_active(evaluator, stack, shape) if cfg.evaluate.rivals == "all" else (),
        matrix=_matrix(evaluator, networks),
        wins=wins(quality, TRUNK),
        criteria=criteria(cfg, evaluator, networks, gaps, token_routing),
        samples=samples(cfg, parts, shards, progress, by_token(stack, cfg)),
    )


def language_report(
    cfg: FfnMoeConfig,
    parts: Parts,
    evaluator: Evaluator,
    writer: ContinuationWriter,
    *,
    more_notes: Sequence[str] = (),
    **own: Any,
) -> LanguageReport:
    """Return a report of what every run has, whatever its experts are, and of a run's own fields by
    their names."""
    counts = text_counts(evaluator)
    return LanguageReport(
        run=cfg.name,
        family=cfg.family,
        seed=cfg.seed,
        made=now(),
        domains=evaluator.shards.domains,
        labels=cfg.partition.shown_labels,
        metric="bits per byte on held-out text",
        data=counts,
        speed=speed(cfg, parts),
        rates=searched(cfg, parts, SEARCHES.values()),
        machine=MachineFacts(**machine(torch.get_num_threads(), evaluator.bf16)),
        notes=[*notes(cfg, _lost_share(parts, evaluator.shards.domains), counts), *more_notes],
        continuations=writer.texts(),
        **own,
    )


def _lost_share(parts: Parts, domains: Sequence[str]) -> float:
    return lost_share(parts.manifest("preprocess", domain).metrics for domain in domains)


def score_combined(evaluator: Evaluator) -> None:
    """Add the rows that follow from the experts' own: posterior ensemble and oracle."""
    experts = evaluator.token_nats_of
    mixed = {}
    oracle = {}
    for domain, documents in evaluator.documents.items():
        nats_ET = np.stack([nats[domain] for nats in experts.values()])
        mixed[domain] = documents.sums(posterior_mix(nats_ET, documents.starts_n))
        sums = {name: documents.sums(nats[domain]) for name, nats in experts.items()}
        # A domain without an expert of its own has the best one for its oracle
        best = min(sums.values(), key=np.sum)
        oracle[domain] = sums.get(domain, best)
    evaluator.scores.add(ENSEMBLE, mixed)
    evaluator.scores.add(ORACLE, oracle)


def _quality(
    cfg: FfnMoeConfig,
    evaluator: Evaluator,
    networks: Sequence[EvalRow],
    shape: Shape,
) -> list[QualityRow]:
    experts = float(sum(row.kind == "expert" for row in networks))
    joined_tokens = next(row.train_tokens for row in networks if row.name == SOUP)
    ensemble = EvalRow(
        name=ENSEMBLE,
        kind="merge",
        active_ffns=experts,
        kept_ffns=experts,
        train_tokens=joined_tokens,
    )
    # It is told each document's domain: one expert runs, but all have to be kept
    oracle = EvalRow(
        name=ORACLE,
        kind="oracle",
        kept_ffns=experts,
        train_tokens=joined_tokens,
    )
    *before, stack = networks
    rows: list[EvalRow] = [*before, ensemble, stack, oracle]
    return [_quality_row(evaluator, row, shape, stack.name) for row in rows]


def _quality_row(
    evaluator: Evaluator,
    row: EvalRow,
    shape: Shape,
    stack: str,
) -> QualityRow:
    """Return one row of the quality table; sizes count the trunk and the feed-forward networks that
    run or are kept."""
    expert = expert_shape(evaluator.cfg, shape)
    active = row.active_ffns
    kept = row.kept_ffns
    # The trunk's own network, rivals and the mean of all experts are told in whole networks
    if expert is not None and row.kind not in ("part", "dense", "joint") and row.name != SOUP:
        active = shape.ffns(active, expert)
        kept = shape.ffns(kept, expert)
    if row.name == ENSEMBLE:
        # Its experts share no layer: each runs a whole network
        one = 1.0 if expert is None else shape.ffns(1, expert)
        flops = row.active_ffns * shape.forward_flops_per_token(one)
    else:
        flops = shape.forward_flops_per_token(active)
    return measured_row(
        evaluator.scores,
        row,
        active_parameters=shape.stack_parameters(active),
        total_parameters=shape.stack_parameters(kept),
        flops_per_token=int(flops),
        trunk=TRUNK,
        stack=stack,
    )


def measured_row(
    scores: Scores,
    row: EvalRow,
    *,
    active_parameters: int,
    total_parameters: int,
    flops_per_token: int,
    trunk: str,
    stack: str,
) -> QualityRow:
    """Return a row of the quality table of given sizes; `trunk` and `stack` are the names of the
    rows that its gain and its distance are told from."""
    nats = scores.nats_per_token(row.name)
    trunk_nats = scores.nats_per_token(trunk)
    oracle_nats = scores.nats_per_token(ORACLE)
    versus_stack = None
    if row.name != stack:
        difference, interval = scores.difference(row.name, stack)
        versus_stack = Difference(difference=difference, interval=interval)
    return QualityRow(
        name=row.name,
        kind=row.kind,
        axis=row.axis,
        bits_per_byte=scores.bits_per_byte(row.name),
        mean=scores.mean(row.name),
        interval=scores.interval(row.name),
        intervals=scores.intervals(row.name),
        perplexity=scores.perplexity(row.name),
        mean_perplexity=float(np.exp(nats)),
        active_parameters=active_parameters,
        total_parameters=total_parameters,
        flops_per_token=flops_per_token,
        train_tokens=row.train_tokens,
        oracle_gain=oracle_gain(nats, trunk=trunk_nats, oracle=oracle_nats),
        versus_stack=versus_stack,
        is_stack=row.name == stack,
    )


def _opt_out(cfg: FfnMoeConfig, evaluator: Evaluator, stack: FfnStack) -> list[OptOutRow]:
    """Return the opt-out table: the stack with one expert and its gate rows taken away."""
    if len(stack.names) == 1:
        return []
    every = list(stack.experts.values())
    rows = []
    for gone, name in enumerate(stack.names):
        keep = [i for i in range(len(stack.names)) if i != gone]
        experts = [every[i] for i in keep]
        k = min(cfg.router.top_k, len(keep))  # fewer than top_k may be left
        without = f"without {name}"
        mixture = mixture_of(experts, stack.weight_LED[:, keep], k)
        evaluator.score(without, stack.trunk, mixture)
        rows.append(opt_out_row(evaluator.scores, name, without, stack_row(cfg)))
    return rows


def opt_out_row(scores: Scores, removed: str, without: str, stack: str) -> OptOutRow:
    """Return what is lost in the row `without` an expert, against the stack's."""
    full_perplexity = scores.perplexity(stack)
    full_bits = scores.bits_per_byte(stack)
    ratio = {}
    for domain, perplexity in scores.perplexity(without).items():
        ratio[domain] = perplexity / full_perplexity[domain]
    delta_bits = {}
    for domain, bits in scores.bits_per_byte(without).items():
        delta_bits[domain] = bits - full_bits[domain]
    return OptOutRow(removed=removed, ratio=ratio, delta_bits=delta_bits)


class _ChoiceCounter:
    """Counts a mixture's choices while it stands in the trunk's slot."""

    def __init__(self, mixture: Mixture, layers: int, experts: int):
        self.mixture = mixture
        self.all_LE = np.zeros((layers, experts))
        self.first_LE = np.zeros((layers, experts))

    def __call__(self, layer: int, x_BTD: torch.Tensor) -> torch.Tensor:
        router = self.mixture.router
        # Where there are no experts nothing is chosen
        if layer in router.place:
            place = router.place[layer]
            # Routed twice, here and by the mixture: the router itself counts only while it trains
            index_NK, _ = router.route(layer, x_BTD.flatten(0, -2))
            self.all_LE[place] += self._counts(index_NK.flatten())
            # Of the k chosen the most probable one stands first
            self.first_LE[place] += self._counts(index_NK[:, 0])
        return self.mixture(layer, x_BTD)

    def _counts(self, index: torch.Tensor) -> np.ndarray:
        experts = self.all_LE.shape[1]
        return index.bincount(minlength=experts).cpu().numpy()


def _counters(evaluator: Evaluator, stack: FfnStack) -> dict[str, _ChoiceCounter]:
    """Return by domain what stands for the stack's mixture and counts."""
    layers = len(stack.weight_LED)
    counters = {}
    for domain in evaluator.documents:
        counters[domain] = _ChoiceCounter(stack.mixture, layers, len(stack.names))
    return counters


def _routing(counters: Mapping[str, _ChoiceCounter], stack: FfnStack) -> TokenRouting:
    counts = {domain: counter.all_LE for domain, counter in counters.items()}
    first = {domain: counter.first_LE for domain, counter in counters.items()}
    numbers = stack.mixture.router.layers
    return TokenRouting.model_validate(routing(counts, first, stack.names, numbers))


def _active(evaluator: Evaluator, stack: FfnStack, shape: Shape) -> list[ActiveRow]:
    """Return the stack's score for every number of active experts."""
    scores = evaluator.scores
    experts = list(stack.experts.values())
    rows = []
    for k in range(1, len(stack.names) + 1):
        name = f"{k} active"
        mixture = mixture_of(experts, stack.weight_LED, k)
        evaluator.score(name, stack.trunk, mixture)
        rows.append(
            ActiveRow(
                top_k=k,
                bits_per_byte=scores.bits_per_byte(name),
                mean=scores.mean(name),
                interval=scores.interval(name),
                active_parameters=_parameters(evaluator.cfg, shape, k),
            )
        )
    return rows


def _matrix(evaluator: Evaluator, networks: Sequence[EvalRow]) -> DomainMatrix:
    names = [row.name for row in networks if row.kind in ("part", "expert")]
    values = []
    for name in [*names, networks[-1].name]:
        bits = evaluator.scores.bits_per_byte(name)
        values.append(list(bits.values()))
    # The stack's own name is too wide for a matrix
    return DomainMatrix(rows=(*names, "stack"), bits_per_byte=values)


def _model(cfg: FfnMoeConfig, parts: Parts, shape: Shape, stack: FfnStack) -> LanguageModelFacts:
    return LanguageModelFacts(
        layers=shape.layers,
        d_model=shape.d_model,
        d_ff=shape.d_ff,
        vocab_size=shape.vocab_size,
        context_tokens=shape.context_tokens,
        top_k=cfg.router.top_k,
        active_parameters=_parameters(cfg, shape, cfg.router.top_k),
        total_parameters=_parameters(cfg, shape, len(stack.names)),
        expert_bytes=expert_bytes(cfg, parts),
    )


def _parameters(cfg: FfnMoeConfig, shape: Shape, experts: int) -> int:
    """Return the parameters of the trunk with so many experts."""
    expert = expert_shape(cfg, shape)
    ffns = float(experts) if expert is None else shape.ffns(experts, expert)
    return shape.stack_parameters(ffns)


def text_counts(evaluator: Evaluator) -> TextCounts:
    """Return how much text stands behind the figures."""
    shards = evaluator.shards
    documents = evaluator.documents
    return TextCounts(
        test_tokens={domain: each.tokens for domain, each in documents.items()},
        test_documents={domain: len(each.bytes_n) for domain, each in documents.items()},
        train_tokens={domain: shards.tokens("train", domain) for domain in documents},
        too_few=evaluator.scores.too_few,
    )
