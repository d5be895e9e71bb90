"""The routing tables of a run of adapters: the router beside what needs no training or reads the
words alone.

Invariant: every row of a set is judged on the same requests, and intervals draw whole groups of
requests, as those on one medium are not independent.

N requests, C choices, E experts, K choices that are looked at, F features of a request.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...config.base import NONE
from ...data.routing.dataset import RoutingRow
from ...metrics import routing as metrics
from ...metrics.routing import GroupBootstrap, softmax
from ...report.schema.base import Difference
from ...report.schema.requests import (
    CalibrationRow,
    ConsistencyRow,
    CoverageCurve,
    CoveragePoint,
    NoneDetection,
    ReliabilityBin,
    RequestRouting,
    RoutedSet,
    RouterRow,
)
from .eval_data import AdapterEvaluator, EvalRequest
from .inference import BASE
from .perturb import change_media, reorder_labels, reword

SPLITS = ("test", "test_held")
NEUTRAL = "neutral prompts"  # the words tell nothing
ROUTER = "router"
TEXT = "text only"
REORDERED = "order of labels"
REWORDED = "other words"


@dataclass(frozen=True)
class Routed:
    """The requests of one set, and what each router makes of them."""

    name: str
    requests: list[EvalRequest]
    own_N: np.ndarray  # numbers of their experts among the choices
    logit_NC: np.ndarray  # the router's
    rivals: Mapping[str, np.ndarray]  # name -> prob_NC
    bootstrap: GroupBootstrap
    temperature: float

    @property
    def prob_NC(self) -> np.ndarray:
        """The router's calibrated probabilities."""
        return softmax(self.logit_NC, self.temperature)

    def hits(self, row: str = ROUTER) -> np.ndarray:
        """Return hit_N of a row, 1.0 where its first choice is right."""
        prob_NC = self.prob_NC if row == ROUTER else self.rivals[row]
        return metrics.hits(prob_NC, self.own_N).astype(float)

    def ahead(self, row: str) -> Difference | None:
        """Return the router's accuracy less a rival's, and its interval; None without requests."""
        rival_N = self.hits(row)
        found = self.bootstrap.difference(self.hits(), rival_N)
        return None if found is None else Difference.model_validate(found)


@dataclass(frozen=True)
class _Baselines:
    """What rivals of the router learn from: training requests, and some of them as the frozen base
    reads them."""

    texts: list[str]
    own_N: np.ndarray
    feature_NF: np.ndarray
    feature_own_N: np.ndarray


def routed_sets(evaluator: AdapterEvaluator) -> dict[str, Routed]:
    """Return both test splits of the routing set and the neutral prompts of each, by name."""
    learned = evaluator.learned
    # a forward pass each: words are learned from all requests, features from some
    some = evaluator.for_baselines()
    baselines = _Baselines(
        texts=[row.prompt for row in learned],
        own_N=_numbers(evaluator, learned),
        feature_NF=evaluator.features(some),
        feature_own_N=_numbers(evaluator, some),
    )
    out = {}
    for split in SPLITS:
        requests = evaluator.routed(split)
        if not requests:
            continue
        out[split] = _routed(evaluator, split, requests, baselines)
        neutral = _neutral_part(evaluator, out[split])
        if neutral.requests:
            out[neutral.name] = neutral
    return out


def routing(evaluator: AdapterEvaluator, sets: Mapping[str, Routed]) -> RequestRouting:
    """Return the routing tables: accuracy beside baselines, recall, confusion, calibration,
    coverage, none."""
    cfg = evaluator.cfg
    stack = evaluator.stack
    top_k = cfg.loras.router.top_k
    confusion = {}
    recall = {}
    calibration = []
    coverage = []
    none = []
    for name in SPLITS:
        # a part of a split is too small for more than its accuracy
        if name not in sets:
            continue
        routed = sets[name]
        count_CC = metrics.confusion(routed.prob_NC, routed.own_N)
        confusion[name] = tuple(map(tuple, count_CC.tolist()))
        recall[name] = tuple(metrics.recall(count_CC))
        calibration.append(_calibration(routed))
        coverage.append(_coverage(routed, cfg.evaluate.thresholds))
        if NONE in stack.choices:
            none.append(_none_detection(routed, stack.choices))
    consistency = _consistency(evaluator, sets["test"]) if "test" in sets else []
    return RequestRouting(
        choices=stack.choices,
        top_k=top_k,
        temperature=stack.calibration.temperature,
        threshold=stack.policy.threshold,
        sets=tuple(_set(routed, top_k) for routed in sets.values()),
        confusion=confusion,
        recall=recall,
        calibration=tuple(calibration),
        coverage=tuple(coverage),
        none=tuple(none),
        consistency=tuple(consistency),
    )


def _numbers(evaluator: AdapterEvaluator, rows: Sequence[EvalRequest | RoutingRow]) -> np.ndarray:
    """Return own_N, the number of each row's expert among the stack's choices."""
    number = {name: i for i, name in enumerate(evaluator.stack.choices)}
    own = [number[row.expert] for row in rows]
    # of no rows too these are numbers of choices
    return np.array(own, dtype=int)


def _bootstrap(evaluator: AdapterEvaluator, requests: Sequence[EvalRequest]) -> GroupBootstrap:
    cfg = evaluator.cfg
    groups = [request.group for request in requests]
    return GroupBootstrap(groups, cfg.evaluate.bootstrap, cfg.seed)


def _routed(
    evaluator: AdapterEvaluator,
    name: str,
    requests: list[EvalRequest],
    known: _Baselines,
) -> Routed:
    width = len(evaluator.stack.choices)
    texts = [request.prompt for request in requests]
    # all rivals get the same requests, and none of them gets more than the router got
    x_NF = evaluator.features(requests)
    learned = (known.feature_NF, known.feature_own_N)
    asked_NC = evaluator.logits(requests, BASE)
    rivals = {
        "majority": metrics.majority(known.own_N, width, len(requests)),
        TEXT: metrics.text_only(known.texts, known.own_N, texts, width),
        "frozen base, asked": softmax(asked_NC, 1.0),
        "frozen base, centroid": metrics.nearest_centroid(*learned, x_NF, width),
        "frozen base, regression": metrics.linear_probe(*learned, x_NF, width),
    }
    return Routed(
        name=name,
        requests=requests,
        own_N=_numbers(evaluator, requests),
        logit_NC=evaluator.logits(requests),
        rivals=rivals,
        bootstrap=_bootstrap(evaluator, requests),
        temperature=evaluator.stack.calibration.temperature,
    )


def _neutral_part(evaluator: AdapterEvaluator, whole: Routed) -> Routed:
    """Return the requests of a set whose words tell nothing."""
    ambiguous = [request.ambiguous for request in whole.requests]
    keep_N = np.array(ambiguous, dtype=bool)
    requests = [request for request in whole.requests if request.ambiguous]
    rivals = {}
    for name, prob_NC in whole.rivals.items():
        rivals[name] = prob_NC[keep_N]
    return replace(
        whole,
        name=f"{whole.name}, {NEUTRAL}",
        requests=requests,
        own_N=whole.own_N[keep_N],
        logit_NC=whole.logit_NC[keep_N],
        rivals=rivals,
        bootstrap=_bootstrap(evaluator, requests),
    )


def _set(routed: Routed, top_k: int) -> RoutedSet:
    rows = [_row(routed, ROUTER, routed.prob_NC, top_k)]
    for name, prob_NC in routed.rivals.items():
        rows.append(_row(routed, name, prob_NC, top_k))
    return RoutedSet(
        name=routed.name,
        requests=len(routed.requests),
        rows=tuple(rows),
    )


def _row(
    routed: Routed,
    name: str,
    prob_NC: np.ndarray,
    top_k: int,
) -> RouterRow:
    hit_N = routed.hits(name)
    among_NK = metrics.hits(prob_NC, routed.own_N, top_k)
    is_router = name == ROUTER
    return RouterRow(
        name=name,
        accuracy=float(hit_N.mean()),
        interval=routed.bootstrap.interval(hit_N),
        top_k_accuracy=float(among_NK.mean()),
        nats=metrics.negative_log_likelihood(prob_NC, routed.own_N),
        ece=metrics.calibration_error(prob_NC, routed.own_N),
        is_router=is_router,
        router_ahead=None if is_router else routed.ahead(name),
    )


def _calibration(routed: Routed) -> CalibrationRow:
    # as the adapter says it, before the temperature
    raw_NC = softmax(routed.logit_NC, 1.0)
    bins = metrics.reliability(routed.prob_NC, routed.own_N)
    return CalibrationRow(
        set=routed.name,
        nats_before=metrics.negative_log_likelihood(raw_NC, routed.own_N),
        nats_after=metrics.negative_log_likelihood(routed.prob_NC, routed.own_N),
        ece_before=metrics.calibration_error(raw_NC, routed.own_N),
        ece_after=metrics.calibration_error(routed.prob_NC, routed.own_N),
        reliability=tuple(ReliabilityBin.model_validate(each) for each in bins),
    )


def _coverage(routed: Routed, thresholds: Sequence[float]) -> CoverageCurve:
    confidence_N = routed.prob_NC.max(1)
    # from 0, where every request counts
    found = metrics.coverage(confidence_N, routed.hits(), (0.0, *thresholds))
    points = [CoveragePoint.model_validate(each) for each in found]
    return CoverageCurve(set=routed.name, points=tuple(points))


def _none_detection(routed: Routed, choices: Sequence[str]) -> NoneDetection:
    """Return how well requests that are nobody's are told, by the probability of none and by low
    confidence."""
    at = choices.index(NONE)
    nobody_N = routed.own_N == at
    experts_NE = np.delete(routed.prob_NC, at, axis=1)
    confidence_N = experts_NE.max(1)
    return NoneDetection(
        set=routed.name,
        requests=int(nobody_N.sum()),
        auroc=metrics.auroc(routed.prob_NC[:, at], nobody_N),
        auroc_of_confidence=metrics.auroc(-confidence_N, nobody_N),
    )


def _consistency(evaluator: AdapterEvaluator, routed: Routed) -> list[ConsistencyRow]:
    """Return the share of requests whose expert stays the same after each change."""
    settings = evaluator.cfg.evaluate
    most = settings.consistency_rows
    if settings.smoke:
        most = min(most, settings.smoke_rows)
    # spread over the set, whose requests stand by expert
    requests = routed.requests
    step = max(1, len(requests) // max(1, most))
    every = range(0, len(requests), step)
    places = list(every[:most])
    reworded = {}
    for i in places:
        request = reword(requests[i], evaluator.cfg.dataset)
        if request is not None:
            reworded[i] = request
    out = [_after(evaluator, routed, REWORDED, reworded)]
    # a request of text alone is the same after each of these, and would count as consistent
    with_media = [i for i in places if requests[i].open()]
    for name, change in evaluator.media.perturbations.items():
        changed = {}
        for i in with_media:
            changed[i] = change_media(requests[i], change)
        out.append(_after(evaluator, routed, name, changed))
    return [*out, _after_reordering(evaluator, routed, places)]


def _after(
    evaluator: AdapterEvaluator,
    routed: Routed,
    name: str,
    changed: Mapping[int, EvalRequest],
) -> ConsistencyRow:
    logit_NC = evaluator.logits(list(changed.values()))
    return _consistency_row(name, routed, list(changed), logit_NC)


def _after_reordering(
    evaluator: AdapterEvaluator,
    routed: Routed,
    places: list[int],
) -> ConsistencyRow:
    """Return consistency under another order of the labels, where the instruction lists them at
    all."""
    stack = evaluator.stack
    calibration = stack.calibration
    instruction = reorder_labels(calibration.instruction, calibration.labels)
    if instruction is None:
        return ConsistencyRow(change=REORDERED, requests=0, same=None)
    requests = [routed.requests[i] for i in places]
    # the stack that everything else is measured on gets its own instruction back
    stack.calibration = replace(calibration, instruction=instruction)
    try:
        logit_NC = evaluator.logits(requests)
    finally:
        stack.calibration = calibration
    return _consistency_row(REORDERED, routed, places, logit_NC)


def _consistency_row(
    name: str,
    routed: Routed,
    places: list[int],
    logit_NC: np.ndarray,
) -> ConsistencyRow:
    before_N = routed.logit_NC[places].argmax(1)
    after_N = logit_NC.argmax(1)
    return ConsistencyRow(
        change=name,
        requests=len(places),
        same=metrics.consistency(before_N, after_N),
    )
