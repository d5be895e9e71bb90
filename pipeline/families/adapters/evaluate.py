"""The report of a run of adapters: who routes how well, who answers what, and whether the run did
what it was asked.

Invariant: what is measured is what is served: every number comes from the stack that `assemble`
builds.

N requests.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from ...config.base import NONE
from ...hardware import machine
from ...metrics.answers import mean
from ...metrics.routing import GroupBootstrap
from ...protocols import Progress
from ...report.schema.base import Difference, JobSpeed, MachineFacts
from ...report.schema.requests import (
    AdapterModelFacts,
    AdapterScores,
    AnsweredRequest,
    AnswerRow,
    AnswerScore,
    AnswerSet,
    RequestCounts,
    RequestReport,
    RequestRouting,
    TaskAnswers,
    TaskScores,
)
from ...store.artifacts import now
from ...store.reading import read_object
from .. import Parts
from ..searches import searched
from .config import AdapterRunConfig
from .criteria import criteria, measured_on_few
from .eval_data import AdapterEvaluator, EvalRequest, Judged
from .inference import BASE
from .peft_io import ABOUT
from .routing_eval import NEUTRAL, REORDERED, REWORDED, Routed, routed_sets, routing
from .shown import Gallery
from .stack import ROUTER, AdapterStack, Answer
from .stages import SEARCHES

WAYS = ("stack", "choice", "oracle", "base")  # who answers a routed request


def evaluate(
    cfg: AdapterRunConfig, parts: Parts, progress: Progress, stack: AdapterStack
) -> RequestReport:
    """Return the report of a run whose parts are assembled as `stack`."""
    evaluator = AdapterEvaluator(cfg, parts, stack, progress)
    adapters = _adapters(evaluator)
    sets = routed_sets(evaluator)
    routes = routing(evaluator, sets)
    gallery = Gallery(evaluator)
    misrouted = gallery.misrouted(sets)
    answers, examples = _answers(evaluator, sets, gallery)
    # figures of time mean little without it, and bf16 rounds them all
    facts = machine(torch.get_num_threads(), stack.model.core.dtype == torch.bfloat16)
    return RequestReport(
        run=cfg.name,
        family=cfg.family,
        seed=cfg.seed,
        made=now(),
        experts=cfg.experts,
        metric="accuracy of routes and answers on held-out requests",
        model=_model(cfg, stack),
        requests=RequestCounts(
            sets={name: len(routed.requests) for name, routed in sets.items()},
            left_out=evaluator.left_out,
            trained_on=len(evaluator.learned),
        ),
        routing=routes,
        adapters=adapters,
        answers=tuple(answers),
        misrouted=misrouted,
        examples=tuple(examples),
        rates=tuple(searched(cfg, parts, SEARCHES.values())),
        speed=tuple(_jobs(cfg, parts)),
        machine=MachineFacts.model_validate(facts),
        notes=(*_notes(evaluator, routes), *measured_on_few(sets, adapters, evaluator.media.name)),
        criteria=tuple(criteria(cfg, sets, adapters, answers)),
    )


def _adapters(evaluator: AdapterEvaluator) -> AdapterScores:
    """Return what every adapter and the base score on every task's test rows."""
    names = (*evaluator.cfg.experts, BASE)
    tasks = []
    for task in evaluator.cfg.experts:
        requests = evaluator.task(task)
        judged = evaluator.scores(requests, [names] * len(requests), f"every adapter on {task}")
        bootstrap = _bootstrap(evaluator, requests)
        scores = {}
        intervals = {}
        for name in names:
            score_N = np.array([answers[name].figures["score"] for answers in judged])
            scores[name] = _mean(score_N)
            intervals[name] = bootstrap.interval(score_N)
        tasks.append(
            TaskScores(
                task=task,
                metric=evaluator.cfg.loras.entry(task).metric,
                requests=len(requests),
                scores=scores,
                intervals=intervals,
                figures=_figures([answers[task].figures for answers in judged]),
            )
        )
    return AdapterScores(adapters=names, tasks=tuple(tasks))


def _answers(
    evaluator: AdapterEvaluator, sets: Mapping[str, Routed], gallery: Gallery
) -> tuple[list[AnswerSet], list[AnsweredRequest]]:
    """Return per test split how well the stack answers beside the router's first choice, the oracle
    and the base; and some of the first split's answers."""
    out: list[AnswerSet] = []
    examples: list[AnsweredRequest] = []
    for name, routed in sets.items():
        # what is right is known of requests made from a task's row, and of nobody's never
        keep = []
        for i, request in enumerate(routed.requests):
            if request.wanted and request.expert != NONE:
                keep.append(i)
        if name.endswith(NEUTRAL) or not keep:
            continue
        chosen = []
        for number in routed.prob_NC[keep].argmax(1):
            chosen.append(evaluator.answered_by(evaluator.stack.choices[number]))
        requests = [routed.requests[i] for i in keep]
        judged, answers = _answered(evaluator, requests, chosen)
        if not out:
            examples += gallery.answered(name, requests, answers, judged)
        out.append(_answer_set(evaluator, name, requests, chosen, judged, answers))
    return out, examples


def _answered(
    evaluator: AdapterEvaluator, requests: list[EvalRequest], chosen: Sequence[str]
) -> tuple[list[dict[str, Judged]], list[Answer]]:
    """Return the answers of the right expert, the base and `chosen` to requests, and the stack's
    own."""
    adapters = []
    for request, first in zip(requests, chosen, strict=True):
        # one generation where two of them are the same
        adapters.append(tuple(dict.fromkeys((request.expert, BASE, first))))
    # the stack's own answers are made again, as it may have ranked several experts' answers
    what = "the right expert and the base on routed requests"
    judged = evaluator.scores(requests, adapters, what)
    return judged, evaluator.answers(requests)


def _answer_set(
    evaluator: AdapterEvaluator,
    name: str,
    requests: list[EvalRequest],
    chosen: Sequence[str],
    judged: Sequence[Mapping[str, Judged]],
    answers: Sequence[Answer],
) -> AnswerSet:
    """Return how well requests are answered; `chosen` is who answers when the router's first choice
    always does."""
    score: dict[str, list] = {way: [] for way in WAYS}
    for i, request in enumerate(requests):
        score["stack"].append(evaluator.judge(request, answers[i].text)["score"])
        score["choice"].append(judged[i][chosen[i]].figures["score"])
        score["oracle"].append(judged[i][request.expert].figures["score"])
        score["base"].append(judged[i][BASE].figures["score"])
    score_N = {way: np.array(values) for way, values in score.items()}
    own_N = np.array([request.expert for request in requests])
    tasks = []
    for task in evaluator.cfg.experts:
        if (own_N == task).any():
            row = _answer_row(evaluator, requests, score_N, own_N == task)
            tasks.append(TaskAnswers(task=task, **dict(row)))
    return AnswerSet(
        set=name,
        tasks=tuple(tasks),
        all=_answer_row(evaluator, requests, score_N, np.ones(len(requests), dtype=bool)),
        ranked_share=float(np.mean([bool(answer.others) for answer in answers])),
        cut_share=float(np.mean([answer.finish == "length" for answer in answers])),
    )


def _answer_row(
    evaluator: AdapterEvaluator,
    requests: Sequence[EvalRequest],
    score_N: Mapping[str, np.ndarray],
    keep_N: np.ndarray,
) -> AnswerRow:
    kept = [request for request, keep in zip(requests, keep_N, strict=True) if keep]
    bootstrap = _bootstrap(evaluator, kept)
    ways = {}
    for way in WAYS:
        own_N = score_N[way][keep_N]
        ways[way] = AnswerScore(score=_mean(own_N), interval=bootstrap.interval(own_N))
    behind = bootstrap.difference(score_N["oracle"][keep_N], score_N["stack"][keep_N])
    return AnswerRow(
        requests=len(kept),
        behind_oracle=None if behind is None else Difference.model_validate(behind),
        **ways,
    )


def _bootstrap(evaluator: AdapterEvaluator, requests: Sequence[EvalRequest]) -> GroupBootstrap:
    groups = [request.group for request in requests]
    return GroupBootstrap(groups, evaluator.cfg.evaluate.bootstrap, evaluator.cfg.seed)


def _figures(judged: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Return the means of a metric's own figures, in the order in which they first come."""
    out: dict[str, float | None] = {}
    for figures in judged:
        for name in figures:
            if name != "score" and name not in out:
                out[name] = mean(judged, name)
    return out


def _mean(score_N: np.ndarray) -> float | None:
    return float(score_N.mean()) if len(score_N) else None


def _model(cfg: AdapterRunConfig, stack: AdapterStack) -> AdapterModelFacts:
    base = cfg.loras.base
    total = 0
    in_adapters = 0
    for name, parameter in stack.model.core.named_parameters():
        total += parameter.numel()
        # the base keeps its parameters' names, with base_layer in them
        if ".lora_" in name:
            in_adapters += parameter.numel()
    return AdapterModelFacts(
        base=base.model or "built at random",
        revision=base.revision,
        dtype=base.dtype,
        base_parameters=total - in_adapters,
        adapter_parameters=in_adapters,
        adapters=len(stack.model.adapters),
    )


def _jobs(cfg: AdapterRunConfig, parts: Parts) -> Iterator[JobSpeed]:
    """Yield throughput, time by phase and peak memory of every training, from the manifests."""
    for stage in (*SEARCHES, *SEARCHES.values()):
        for item in cfg.items(stage):
            name = f"{stage} {item}" if item else stage
            yield JobSpeed.from_metrics(name, parts.manifest(stage, item).metrics)


def _notes(evaluator: AdapterEvaluator, routes: RequestRouting) -> Iterator[str]:
    """Yield what a reader of the report has to know beside it."""
    cfg = evaluator.cfg
    yield (
        "Intervals resample whole groups of requests, such as all with the same "
        f"{evaluator.media.name}, paired across rows; they do not cover training seeds."
    )
    if cfg.evaluate.smoke:
        rows = cfg.evaluate.smoke_rows
        yield f"A smoke evaluation: at most {rows} rows of each set, too few to decide much."
    if cfg.loras.base.model is None:
        yield (
            "The base is random: the numbers show that the pipeline works, not what a pretrained "
            "base reaches."
        )
    # said in words, as a dash in a table looks like a failure
    untested = [row.change for row in routes.consistency if not row.requests]
    if REORDERED in untested:
        yield (
            "The router's instruction does not list its labels, so their order is nowhere it could "
            "matter."
        )
    if REWORDED in untested:
        yield (
            "dataset.paraphrases and dataset.neutral hold no other words, so rewording was not "
            "tried."
        )
    for name, count in evaluator.left_out.items():
        yield (
            f"{count} rows of {name} were left out: over the limits of a request, or with a right "
            "answer that their metric cannot read."
        )
    for name in cfg.imported:
        metrics = evaluator.parts.manifest("train_experts", name).metrics
        if not metrics["base_is_proven"]:
            yield (
                f"Nothing proves that {name}, which came as PEFT saves it, was trained on this "
                f"base: on answers of its task it has {metrics['probe_nats']:.4f} nats a token, "
                f"and the base without it {metrics['probe_base_nats']:.4f}."
            )
    for name in cfg.experts:
        yield from _dropped_rows(evaluator.parts, name, "train_experts", name)
    yield from _dropped_rows(evaluator.parts, ROUTER, "train_router", None)


def _dropped_rows(parts: Parts, name: str, stage: str, item: str | None) -> Iterator[str]:
    """Yield of which splits a training left rows out as too long, from what its adapter says."""
    about = read_object(parts.folder(stage, item) / ABOUT)
    for split, rows in about.get("rows", {}).items():
        count = sum(rows["dropped"].values())
        if count:
            total = count + rows["kept"]
            yield (
                f"{name} was trained without {count} of its {total} {split} rows, which are over "
                "max_tokens."
            )
