"""The routing tables of a lora_vlm run: the router beside what needs no training or no picture.

Invariant: every row of a set is judged on the same requests, and intervals draw whole pictures.

N requests, C choices, F features of a request.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ...config.base import NONE
from ...metrics import routing as measures
from ...metrics.routing import GroupBootstrap, softmax
from .eval_data import AdapterEvaluator, EvalRequest
from .inference import BASE
from .perturb import PICTURES, reordered, reworded, with_pictures

SPLITS = ("test", "test_held")
NEUTRAL = "neutral prompts"  # only the picture tells
ROUTER, TEXT = "router", "text only"


@dataclass(frozen=True)
class Routed:
    """The requests of one set, and what each router makes of them."""

    name: str
    asked: list[EvalRequest]
    own_N: np.ndarray
    logit_NC: np.ndarray  # the router's
    rivals: Mapping[str, np.ndarray]  # name -> prob_NC
    resamples: GroupBootstrap
    temperature: float

    @property
    def prob_NC(self) -> np.ndarray:
        """The router's calibrated probabilities."""
        return softmax(self.logit_NC, self.temperature)

    def hits(self, row: str = ROUTER) -> np.ndarray:
        """Return hit_N of a row, 1.0 where its first choice is right."""
        prob_NC = self.prob_NC if row == ROUTER else self.rivals[row]
        return measures.hits(prob_NC, self.own_N).astype(float)

    def ahead(self, row: str) -> dict | None:
        """Return the router's accuracy less a rival's, and its interval."""
        return self.resamples.difference(self.hits(), self.hits(row))


def routed_sets(bench: AdapterEvaluator) -> dict[str, Routed]:
    """Return both test splits of the routing set and the neutral prompts of each, by name."""
    train = bench.learned
    choices = list(bench.stack.choices)
    learned = {
        "texts": [row.prompt for row in train],
        "own": np.array([choices.index(row.expert) for row in train]),
    }
    some = bench.for_baselines()
    features = (
        bench.features(some),
        np.array([choices.index(each.expert) for each in some], dtype=int),
    )
    out = {}
    for split in SPLITS:
        asked = bench.routed(split)
        if asked:
            whole = _routed(bench, split, asked, learned, features)
            out[split] = whole
            neutral = _part(bench, whole, np.array([each.ambiguous for each in asked], dtype=bool))
            if neutral.asked:
                out[neutral.name] = neutral
    return out


def routing(bench: AdapterEvaluator, sets: Mapping[str, Routed]) -> dict:
    """Return the routing tables: accuracy beside baselines, recall, confusion, calibration,
    coverage, none."""
    stack, k = bench.stack, bench.cfg.loras.router.top_k
    whole = {name: each for name, each in sets.items() if name in SPLITS}
    return {
        "choices": list(stack.choices),
        "top_k": k,
        "temperature": stack.calibration.temperature,
        "threshold": stack.policy.threshold,
        "sets": [_set(each, k) for each in sets.values()],
        "confusion": {
            name: measures.confusion(each.prob_NC, each.own_N).tolist()
            for name, each in whole.items()
        },
        "recall": {
            name: measures.recall(measures.confusion(each.prob_NC, each.own_N))
            for name, each in whole.items()
        },
        "calibration": [_calibration(each) for each in whole.values()],
        "coverage": [_coverage(each, bench.cfg.evaluate.thresholds) for each in whole.values()],
        "none": [_none(each, stack.choices) for each in whole.values() if NONE in stack.choices],
        "consistency": _consistency(bench, sets["test"]) if "test" in sets else [],
    }


def _routed(
    bench: AdapterEvaluator, name: str, asked: list[EvalRequest], learned: dict, features: tuple
) -> Routed:
    choices = list(bench.stack.choices)
    width, own_N = len(choices), np.array([choices.index(each.expert) for each in asked], dtype=int)
    texts, (train_NF, train_N) = [each.prompt for each in asked], features
    x_NF = bench.features(asked)
    rivals = {
        "majority": measures.majority(learned["own"], width, len(asked)),
        TEXT: measures.text_only(learned["texts"], learned["own"], texts, width),
        "frozen base, asked": softmax(bench.logits(asked, BASE), 1.0),
        "frozen base, centroid": measures.centroid(train_NF, train_N, x_NF, width),
        "frozen base, regression": measures.linear(train_NF, train_N, x_NF, width),
    }
    resamples = GroupBootstrap(
        [each.group for each in asked], bench.cfg.evaluate.bootstrap, bench.cfg.seed
    )
    temperature = bench.stack.calibration.temperature
    return Routed(name, asked, own_N, bench.logits(asked), rivals, resamples, temperature)


def _part(bench: AdapterEvaluator, whole: Routed, keep_N: np.ndarray) -> Routed:
    asked = [each for each, keep in zip(whole.asked, keep_N, strict=True) if keep]
    rivals = {name: prob_NC[keep_N] for name, prob_NC in whole.rivals.items()}
    resamples = GroupBootstrap(
        [each.group for each in asked], bench.cfg.evaluate.bootstrap, bench.cfg.seed
    )
    name = f"{whole.name}, {NEUTRAL}"
    return replace(
        whole,
        name=name,
        asked=asked,
        own_N=whole.own_N[keep_N],
        logit_NC=whole.logit_NC[keep_N],
        rivals=rivals,
        resamples=resamples,
    )


def _set(routed: Routed, k: int) -> dict:
    rows = [_row(routed, ROUTER, routed.prob_NC, k)]
    rows += [
        _row(routed, name, prob_NC, k) | {"router_ahead": routed.ahead(name)}
        for name, prob_NC in routed.rivals.items()
    ]
    return {"name": routed.name, "requests": len(routed.asked), "rows": rows}


def _row(routed: Routed, name: str, prob_NC: np.ndarray, k: int) -> dict:
    hit_N = routed.hits(name)
    return {
        "name": name,
        "accuracy": float(hit_N.mean()),
        "interval": routed.resamples.interval(hit_N),
        "top_k_accuracy": float(measures.hits(prob_NC, routed.own_N, k).mean()),
        "nats": measures.nats(prob_NC, routed.own_N),
        "ece": measures.calibration_error(prob_NC, routed.own_N),
        "is_router": name == ROUTER,
    }


def _calibration(routed: Routed) -> dict:
    raw_NC = softmax(routed.logit_NC, 1.0)
    return {
        "set": routed.name,
        "nats_before": measures.nats(raw_NC, routed.own_N),
        "nats_after": measures.nats(routed.prob_NC, routed.own_N),
        "ece_before": measures.calibration_error(raw_NC, routed.own_N),
        "ece_after": measures.calibration_error(routed.prob_NC, routed.own_N),
        "reliability": measures.reliability(routed.prob_NC, routed.own_N),
    }


def _coverage(routed: Routed, thresholds) -> dict:
    confidence_N, hit_N = routed.prob_NC.max(1), routed.hits()
    return {
        "set": routed.name,
        "points": measures.coverage(confidence_N, hit_N, (0.0, *thresholds)),
    }


def _none(routed: Routed, choices) -> dict:
    """Return how well requests that are nobody's are told, by the probability of none and by low
    confidence."""
    mine_N, at = routed.own_N == choices.index(NONE), choices.index(NONE)
    return {
        "set": routed.name,
        "requests": int(mine_N.sum()),
        "auroc": measures.auroc(routed.prob_NC[:, at], mine_N),
        "auroc_of_confidence": measures.auroc(
            -np.delete(routed.prob_NC, at, axis=1).max(1), mine_N
        ),
    }


def _consistency(bench: AdapterEvaluator, routed: Routed) -> list[dict]:
    """Return the share of requests whose expert stays the same after each change."""
    settings = bench.cfg.evaluate
    most = (
        min(settings.consistency_rows, settings.smoke_rows)
        if settings.smoke
        else settings.consistency_rows
    )
    step = max(1, len(routed.asked) // max(1, most))
    places = np.arange(0, len(routed.asked), step)[:most]
    pictured = [int(i) for i in places if routed.asked[i].open()]
    out = [_after(bench, routed, "other words", _other_words(bench, routed, places))]
    out += [
        _after(bench, routed, name, {i: with_pictures(routed.asked[i], change) for i in pictured})
        for name, change in PICTURES.items()
    ]
    return [*out, _after_order(bench, routed, places)]


def _other_words(bench: AdapterEvaluator, routed: Routed, places) -> dict[int, EvalRequest]:
    found = {int(i): reworded(routed.asked[i], bench.cfg.dataset) for i in places}
    return {i: asked for i, asked in found.items() if asked is not None}


def _after(
    bench: AdapterEvaluator, routed: Routed, name: str, changed: Mapping[int, EvalRequest]
) -> dict:
    choice_N = bench.logits(list(changed.values())).argmax(1)
    return _told(name, routed, list(changed), choice_N)


def _after_order(bench: AdapterEvaluator, routed: Routed, places) -> dict:
    """Return consistency under another order of the labels, where the instruction lists them at
    all."""
    calibration = bench.stack.calibration
    turned = reordered(calibration.instruction, calibration.labels)
    if turned is None:
        return _told("order of labels", routed, [], np.empty(0, dtype=int))
    bench.stack.calibration = replace(calibration, instruction=turned)
    try:
        choice_N = bench.logits([routed.asked[i] for i in places]).argmax(1)
    finally:
        bench.stack.calibration = calibration
    return _told("order of labels", routed, [int(i) for i in places], choice_N)


def _told(name: str, routed: Routed, places: list[int], choice_N: np.ndarray) -> dict:
    same = measures.same(routed.logit_NC[places].argmax(1), choice_N)
    return {"change": name, "requests": len(places), "same": same}
