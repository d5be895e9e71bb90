"""The report of a run of adapters: the base and each adapter run over the held-out text once, and
what a router makes of them follows from the losses of these.

B texts, T tokens of a stream, n documents, C choices (experts, then the base), S layers that are
read, D model width.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy import ndarray

from ....data.text.shards import Shards
from ....model.language_model import filled
from ....protocols import Progress
from ....report.schema.language import (
    DomainMatrix,
    LanguageModelFacts,
    LanguageReport,
    OptOutRow,
    PromptRow,
    QualityRow,
    TextRouting,
)
from ....train.flops import Shape
from ... import Parts
from ...adapters.peft_io import TENSORS
from ..config import FfnMoeConfig
from ..continuations import ContinuationWriter, writers
from ..cost import stage_tokens
from ..criteria import wins
from ..evaluate import (
    ENSEMBLE,
    ORACLE,
    language_report,
    measured_row,
    opt_out_row,
    score_combined,
)
from ..evaluator import EvalRow, Evaluator
from ..networks import rival_rows
from ..parts import expert_bytes, shards_of, training_tokens
from ..samples import Reading, samples
from ..sections import BASE
from .criteria import criteria
from .router import TextRouter, ValidationTexts, calibrated, untrained
from .stack import RequestStack, assemble
from .texts import Texts, first_tokens_of, routed_nats

# Numbers of first tokens that the report compares, beside the run's own
PROMPTS = (16, 64, 128)


@dataclass(frozen=True, kw_only=True)
class AdapterRow(EvalRow):
    """A row whose models are the base, with or without adapters."""

    active_numbers: int = 0  # of the adapters that run per token
    kept_numbers: int = 0
    passes: float = 1.0  # of the whole model per token


@dataclass(frozen=True)
class RoutedTexts:
    """One way of choosing adapters: what it chooses, and what that scores."""

    name: str
    prompt_tokens: int
    index_n: Mapping[str, ndarray]  # by domain, the choice of each document


def stack_row(cfg: FfnMoeConfig) -> str:
    """Return the name of the run's own stack in the quality table."""
    return f"{cfg.router.init} from {cfg.router.prompt_tokens} tokens (the stack)"


def tables(cfg: FfnMoeConfig, parts: Parts, progress: Progress) -> LanguageReport:
    """Return the report of a run: quality, opt-out, where texts go, the domain x expert matrix,
    criteria, speed."""
    shards = shards_of(parts, cfg.partition.names)
    stack = assemble(cfg, parts)
    shape = Shape.from_hf_config(stack.model.config.to_dict(), cfg.trunk.context_tokens)
    evaluator = Evaluator(cfg, shards, progress)
    writer = ContinuationWriter(cfg, parts, shards, progress)
    writing = writers(cfg, BASE, stack_row(cfg))
    for name in (None, *cfg.experts):
        # The base first: a document's oracle and the ensemble may be the base too
        model = stack.model.under(name)
        evaluator.score(name or BASE, model, filled, keep_tokens=True)
    writer.add(BASE, stack.reader(len(cfg.experts)), filled)
    dense = []
    for row in rival_rows(cfg, parts, training_tokens(shards)):
        evaluator.score(row.name, row.trunk, row.ffn)
        if row.name in writing:
            writer.add(row.name, row.trunk, row.ffn)
        dense.append(row.told)
        # A rival is a whole model: it goes before the next one is opened
        del row
    _write_on(cfg, writer, stack)
    score_combined(evaluator)
    progress("what the first tokens of each text choose", None)
    texts = first_tokens_of(evaluator, stack, _prompts(cfg))
    ways = list(_ways(cfg, parts, shards, evaluator, stack, texts))
    for way in ways:
        evaluator.scores.add(way.name, routed_nats(evaluator, cfg.experts, way))
    numbers = _numbers(cfg, parts)
    quality = _quality(cfg, parts, numbers, evaluator, shards, dense, ways, shape)
    routing = _routing(cfg, evaluator, stack, ways)
    return language_report(
        cfg,
        parts,
        evaluator,
        writer,
        more_notes=[_causal(cfg), *_unproven(cfg, parts)],
        experts=cfg.experts,
        model=_model(cfg, parts, shape, numbers),
        quality=quality,
        opt_out=_opt_out(cfg, evaluator, stack, texts),
        text_routing=routing,
        matrix=_matrix(cfg, evaluator),
        wins=wins(quality, BASE, "best single adapter on every text"),
        criteria=criteria(cfg, evaluator, [row.name for row in dense], stack_row(cfg), routing),
        samples=samples(cfg, parts, shards, progress, _reading(stack, evaluator.bf16)),
    )


def _write_on(cfg: FfnMoeConfig, writer: ContinuationWriter, stack: RequestStack) -> None:
    """Let the stack go on with every text: whoever its first tokens choose."""
    if not writer.domains:
        return
    chosen = stack.choose(writer.prompts(writer.domains), writer.bf16).tolist()
    for number in sorted(set(chosen)):
        own = [domain for domain, at in zip(writer.domains, chosen, strict=True) if at == number]
        speaker = stack.names[number]
        heard = partial(_of_one, speaker, len(own))
        writer.add(stack_row(cfg), stack.reader(number), filled, own, heard)


def _of_one(speaker: str, texts: int) -> list[list[str]]:
    """Return who speaks the newest token of some texts that one speaker goes on with."""
    return [[speaker]] * texts


def _reading(stack: RequestStack, bf16: bool) -> Reading:
    """Return who reads a text: whom its first tokens choose, from its beginning."""

    def read(ids_BT: torch.Tensor) -> list[str]:
        (number,) = stack.choose(ids_BT, bf16).tolist()
        return [stack.names[number]] * ids_BT.shape[1]

    return read


def _causal(cfg: FfnMoeConfig) -> str:
    return (
        f"The first {cfg.router.prompt_tokens} tokens of a document are the base's in every routed "
        "row; from the next one on they are those of the adapter that these tokens chose, which "
        "has read the document from its beginning."
    )


def _unproven(cfg: FfnMoeConfig, parts: Parts) -> Iterator[str]:
    """Yield what is not known of adapters that PEFT saved elsewhere."""
    for name in cfg.expert.imported:
        metrics = parts.manifest("train_experts", name).metrics
        if not metrics["base_is_proven"]:
            yield (
                f"Nothing proves that {name}, which came as PEFT saves it, was trained on this "
                f"base: on text of its domain it has {metrics['probe_nats']:.4f} nats a token, and "
                f"the base without it {metrics['probe_base_nats']:.4f}."
            )


def _numbers(cfg: FfnMoeConfig, parts: Parts) -> dict[str, int]:
    """Return how many numbers each expert's adapter is: one from elsewhere may have another rank,
    and other modules."""
    found = {}
    for name in cfg.experts:
        tensors = parts.tensors("train_experts", TENSORS, name)
        found[name] = sum(tensor.numel() for tensor in tensors.values())
    return found


def _prompts(cfg: FfnMoeConfig) -> list[int]:
    """Return the numbers of first tokens that are compared, the run's own among them."""
    most = cfg.trunk.context_tokens
    return sorted({n for n in (*PROMPTS, cfg.router.prompt_tokens) if n <= most})


def _ways(
    cfg: FfnMoeConfig,
    parts: Parts,
    shards: Shards,
    evaluator: Evaluator,
    stack: RequestStack,
    texts: Texts,
) -> Iterator[RoutedTexts]:
    """Yield the ways of choosing that the report compares, the stack's own last."""
    own = cfg.router.prompt_tokens
    held_out = ValidationTexts(cfg, shards, stack.model, parts.progress)
    draw = np.random.default_rng(cfg.seed_of("random router"))
    index = {}
    for domain, documents in evaluator.documents.items():
        index[domain] = draw.integers(len(cfg.experts), size=len(documents.bytes_n))
    yield RoutedTexts("random adapter for each text", own, index)
    other = "ridge" if cfg.router.init == "centroid" else "centroid"
    plain = untrained(cfg, parts, shards, stack.model, other)
    fitted, _ = calibrated(plain, held_out)
    yield _way(f"{other} from {own} tokens", fitted, texts)
    always = replace(stack.text_router.router, threshold=0.0)
    always = replace(always, weight_SCD=always.weight_SCD[:, : len(cfg.experts)])
    named = f"{cfg.router.init} from {own} tokens, never the base"
    yield _way(named, replace(stack.text_router, router=always), texts)
    for prompt in _prompts(cfg):
        if prompt != own:
            shorter = replace(stack.text_router, prompt_tokens=prompt)
            fitted, _ = calibrated(shorter, held_out)
            yield _way(f"{cfg.router.init} from {prompt} tokens", fitted, texts)
    yield _way(stack_row(cfg), stack.text_router, texts)


def _way(name: str, router: TextRouter, texts: Texts) -> RoutedTexts:
    index = {}
    for domain, x_nSD in texts[router.prompt_tokens].items():
        index[domain] = router.router.choose(x_nSD).cpu().numpy()
    return RoutedTexts(name, router.prompt_tokens, index)


def _quality(
    cfg: FfnMoeConfig,
    parts: Parts,
    numbers: Mapping[str, int],
    evaluator: Evaluator,
    shards: Shards,
    dense: Sequence[EvalRow],
    ways: Sequence[RoutedTexts],
    shape: Shape,
) -> list[QualityRow]:
    """Return the quality table: the base, each adapter, dense rivals, ensembles, the routed rows,
    the oracle."""
    domain_tokens = training_tokens(shards)
    shared = stage_tokens(cfg, "train_shared", None, domain_tokens)
    rows: list[EvalRow] = [AdapterRow(name=BASE, kind="part", train_tokens=shared)]
    joined = shared
    for name in cfg.experts:
        tokens = stage_tokens(cfg, "train_experts", name, domain_tokens)
        if name in cfg.expert.imported:
            # Spent elsewhere, and told where a package says it
            tokens = parts.manifest("train_experts", name).metrics["trained_tokens"]
        joined += tokens
        rows.append(
            AdapterRow(
                name=name,
                kind="expert",
                train_tokens=shared + tokens,
                active_numbers=numbers[name],
                kept_numbers=numbers[name],
            )
        )
    rows += dense
    every = sum(numbers.values())
    # Of the largest: whichever reads a text
    largest = max(numbers.values())
    ensemble = AdapterRow(
        name=ENSEMBLE,
        kind="merge",
        train_tokens=joined,
        active_numbers=every,
        kept_numbers=every,
        passes=len(cfg.experts) + 1.0,
    )
    routed = []
    for way in ways:
        routed.append(
            AdapterRow(
                name=way.name,
                kind="router",
                train_tokens=joined,
                active_numbers=largest,
                kept_numbers=every,
            )
        )
    *before, stack = routed
    oracle = replace(stack, name=ORACLE, kind="oracle")
    rows += [*before, ensemble, stack, oracle]
    return [_quality_row(cfg, evaluator, row, shape) for row in rows]


def _quality_row(cfg: FfnMoeConfig, evaluator: Evaluator, row: EvalRow, shape: Shape) -> QualityRow:
    active = kept = 0
    passes = 1.0
    if isinstance(row, AdapterRow):
        active = row.active_numbers
        kept = row.kept_numbers
        passes = row.passes
    base = shape.stack_parameters(1)
    flops = passes * shape.forward_flops_per_token() + 2 * active
    return measured_row(
        evaluator.scores,
        row,
        active_parameters=int(base + active),
        total_parameters=int(base + kept),
        flops_per_token=int(flops),
        trunk=BASE,
        stack=stack_row(cfg),
    )


def _opt_out(
    cfg: FfnMoeConfig, evaluator: Evaluator, stack: RequestStack, texts: Texts
) -> list[OptOutRow]:
    """Return the opt-out table: the stack without one expert and its rows of the router."""
    if len(cfg.experts) == 1:
        return []
    rows = []
    for gone, name in enumerate(cfg.experts):
        router = replace(stack.text_router, router=stack.text_router.router.without(gone))
        way = _way(f"without {name}", router, texts)
        left = tuple(each for each in cfg.experts if each != name)
        evaluator.scores.add(way.name, routed_nats(evaluator, left, way))
        rows.append(opt_out_row(evaluator.scores, name, way.name, stack_row(cfg)))
    return rows


def _routing(
    cfg: FfnMoeConfig, evaluator: Evaluator, stack: RequestStack, ways: Sequence[RoutedTexts]
) -> TextRouting:
    own = ways[-1]
    router = stack.text_router.router
    texts = {}
    for domain, index_n in own.index_n.items():
        counts_C = np.bincount(index_n, minlength=len(cfg.experts) + 1)
        texts[domain] = tuple(counts_C.tolist())
    prompts = []
    for way in ways:
        # those that differ from the stack's in the number of tokens alone, and the stack's
        if way is own or way.name == f"{cfg.router.init} from {way.prompt_tokens} tokens":
            prompts.append(_prompt_row(cfg, evaluator, way, way is own))
    prompts.sort(key=lambda row: row.prompt_tokens)
    return TextRouting(
        choices=stack.names,
        prompt_tokens=own.prompt_tokens,
        temperature=router.temperature,
        threshold=router.threshold,
        texts=texts,
        agreement_by_domain=_agreement(cfg, own),
        prompts=prompts,
    )


def _prompt_row(
    cfg: FfnMoeConfig, evaluator: Evaluator, way: RoutedTexts, is_served: bool
) -> PromptRow:
    agreement = list(_agreement(cfg, way).values())
    others = []
    for domain, index_n in way.index_n.items():
        if domain not in cfg.experts:
            others.append(float((index_n == len(cfg.experts)).mean()))
    return PromptRow(
        prompt_tokens=way.prompt_tokens,
        agreement=float(np.mean(agreement)) if agreement else None,
        base_share=float(np.mean(others)) if others else None,
        bits_per_byte=evaluator.scores.bits_per_byte(way.name),
        mean=evaluator.scores.mean(way.name),
        is_served=is_served,
    )


def _agreement(cfg: FfnMoeConfig, way: RoutedTexts) -> dict[str, float]:
    """Return by domain with an expert the share of its documents that reach it."""
    out = {}
    for number, name in enumerate(cfg.experts):
        if name in way.index_n:
            out[name] = float((way.index_n[name] == number).mean())
    return out


def _matrix(cfg: FfnMoeConfig, evaluator: Evaluator) -> DomainMatrix:
    names = (BASE, *cfg.experts)
    values = []
    for name in (*names, stack_row(cfg)):
        values.append(list(evaluator.scores.bits_per_byte(name).values()))
    return DomainMatrix(rows=(*names, "stack"), bits_per_byte=values)


def _model(
    cfg: FfnMoeConfig, parts: Parts, shape: Shape, numbers: Mapping[str, int]
) -> LanguageModelFacts:
    base = shape.stack_parameters(1)
    return LanguageModelFacts(
        layers=shape.layers,
        d_model=shape.d_model,
        d_ff=shape.d_ff,
        vocab_size=shape.vocab_size,
        context_tokens=shape.context_tokens,
        top_k=1,
        active_parameters=base + max(numbers.values()),
        total_parameters=base + sum(numbers.values()),
        expert_bytes=expert_bytes(cfg, parts, TENSORS),
    )
