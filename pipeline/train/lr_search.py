"""Which learning rate a training gets when nobody says: a few of them, each for a few steps.

Every rate starts from the same weights, sees the same rows and is judged on the same validation
text, with a whole schedule in small, so that it ends as the training will. Nothing is kept of it
but its losses, and one is let go of before the next is made.
"""

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ..config.fit import FitConfig, LrSearchConfig
from ..errors import NotFiniteError, PipelineError
from .loop import HistoryWriter, Task, TrainIO, fit
from .memory_meter import trim_heap

FOUND = "lr.json"  # what a search leaves
FIRST_RATES = 3  # that every search tries: the middle one and its neighbours
# A few steps flatter high rates: on SmolLM2-135M rank 16 gained 6 % more at 1e-2 than at 3e-3 in 6
# steps, and in 39 .11 nats less; all weights 18 % more at 3e-4 than at 1e-4 in 15, and in the whole
# training .03 bits per byte less. Of rates that gain as much but for this share the lowest is taken
CLOSE = 0.2
MOST_RATES = 7  # three decades: whatever is best beyond them has another fault
# What a search is planned with: three rates, and one more where the best of them is at an end
PLANNED_RATES = 4
# Fewer tell rates apart by noise
LEAST_STEPS = 6
# Of a finished rate's metrics those that add up
ADDED = ("tokens", "seconds", "training_s", "evaluate_s")

Fit = TypeVar("Fit", bound=FitConfig)


@dataclass(frozen=True)
class Search:
    """A rate to be found instead of a training to be done."""

    task: Callable[[float], Task]  # the short training at a rate, its network opened anew
    middle: float  # the rate that the first ones lie around
    steps: int  # of each rate


@dataclass(frozen=True)
class Tried:
    """A rate and what came of it; None where the loss was not finite on the way."""

    lr: float
    valid_nats: float | None
    train_nats: float | None

    @property
    def loss(self) -> float:
        """The loss that rates are compared by."""
        return math.inf if self.valid_nats is None else self.valid_nats


@dataclass(frozen=True)
class Found:
    """What a search leaves: equal searches leave equal bytes."""

    lr: float
    steps: int  # of each rate
    before_nats: float  # validation loss of what all of them start from
    tried: tuple[Tried, ...]  # by rate


def in_small(opts: Fit, how: LrSearchConfig, all_steps: float, jobs: int = 1) -> Fit:
    """Return the settings of a search's trainings, whose rate is still open; all_steps are those of
    all trainings that the rate is for, `jobs` how many these are."""
    whole = max(1, round(all_steps / jobs))
    steps = how.steps
    if steps is None:
        fitting = round(how.share * all_steps / PLANNED_RATES)
        steps = min(max(fitting, LEAST_STEPS), whole)
    # As much of the whole as in the training itself
    warmup_steps = round(min(opts.warmup_steps, whole) * steps / whole)
    return opts.model_copy(
        update={
            "steps": steps,
            "epochs": None,
            "tokens": None,
            "warmup_steps": warmup_steps,
            "eval_every_steps": 0,
            "patience": 0,
            "keep": "last",
        }
    )


def rate_of(rung: int) -> float:
    """Return a rate of the ladder, whose rungs are a factor of about 3 apart: -8 is 1e-4, -7 is
    3e-4."""
    return float(f"{(1, 3)[rung % 2]}e{rung // 2}")


def rung_of(rate: float) -> int:
    """Return the rung that is nearest to a rate."""
    return round(2 * math.log10(rate))


def search(
    wanted: Search, io: TrainIO, tell: Callable[[float, int, int], HistoryWriter]
) -> tuple[Found, dict[str, Any]]:
    """Return the lowest rate whose short training gains about as much as the best one's, and
    metrics of all rates together, as `fit` names them.

    The ladder grows where its best rate is at an end of it. `tell` gives who hears of a rate's
    steps: the rate, which one it is and of how many so far. Raises PipelineError when no rate
    gives a finite loss, and what `fit` raises but NotFiniteError.
    """
    middle = rung_of(wanted.middle)
    reach = FIRST_RATES // 2
    waiting = list(range(middle - reach, middle + reach + 1))
    tried: dict[int, Tried] = {}
    metrics: dict[str, Any] = {"cpu_s": {}, **dict.fromkeys(ADDED, 0.0)}
    before_nats = _before(wanted)
    while waiting:
        rung = waiting.pop(0)
        rate = rate_of(rung)
        count = len(tried) + len(waiting) + 1
        heard = replace(io, recorder=tell(rate, len(tried), count), resumable=False)
        tried[rung] = _try(wanted, rate, heard, metrics)
        best = _best(tried, before_nats)
        if not waiting and len(tried) < MOST_RATES:
            # Of rates that all diverge the lowest counts as the best
            if best == min(tried):
                waiting.append(best - 1)
            elif best == max(tried):
                waiting.append(best + 1)
    if math.isinf(tried[best].loss):
        raise PipelineError(
            f"{io.name}: the loss is not finite at any rate from {rate_of(min(tried)):g} to "
            f"{rate_of(max(tried)):g}; set {io.rate_setting} to a lower one, or dtype: fp32"
        )
    ordered = tuple(tried[rung] for rung in sorted(tried))
    trained_s = metrics["training_s"]
    metrics["tokens_per_s"] = metrics["tokens"] / trained_s if trained_s else 0.0
    return Found(tried[best].lr, wanted.steps, before_nats, ordered), metrics


def _before(wanted: Search) -> float:
    """Return the validation loss before any step."""
    try:
        validate = wanted.task(wanted.middle).validate
        if validate is None:
            raise AssertionError("a search without validation text")
        return validate()
    finally:
        gc.collect()
        trim_heap()


def _best(tried: dict[int, Tried], before_nats: float) -> int:
    """Return the lowest rung that keeps most of what the best one gains."""
    least = min(each.loss for each in tried.values())
    slack = CLOSE * max(0.0, before_nats - least)
    return min(rung for rung, each in tried.items() if each.loss <= least + slack)


def _try(wanted: Search, rate: float, io: TrainIO, metrics: dict[str, Any]) -> Tried:
    """Return what comes of one rate, its metrics added to those of the others."""
    try:
        done = fit(wanted.task(rate), io)
    except NotFiniteError:
        io.recorder.note(f"{io.name}: the loss at rate {rate:g} is not finite")
        return Tried(rate, None, None)
    finally:
        # Its weights, gradients and moments, before those of the next are made
        gc.collect()
        trim_heap()
    for name in ADDED:
        metrics[name] += done.get(name, 0.0)
    spent_s: dict[str, float] = metrics["cpu_s"]
    for phase, seconds in done.get("cpu_s", {}).items():
        spent_s[phase] = spent_s.get(phase, 0.0) + seconds
    kept = ("flops_per_token", "memory_plan", "rounding", "parameters")
    metrics.update({name: done[name] for name in kept})
    return Tried(rate, done["valid_nats"], done["train_nats"])
