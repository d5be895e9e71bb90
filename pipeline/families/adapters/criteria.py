"""Whether a run of adapters did what it was asked, from the tables of its report.

What was measured on too few requests for an interval decides nothing: such a criterion stays open.
"""

from collections.abc import Iterator, Mapping, Sequence

from ...metrics.bootstrap import LEAST_UNITS
from ...report.format import beside_limit, limit, places, reaches, share
from ...report.schema.base import Criterion
from ...report.schema.requests import AdapterScores, AnswerSet, TaskScores
from .config import AdapterRunConfig
from .routing_eval import NEUTRAL, TEXT, Routed


def criteria(
    cfg: AdapterRunConfig,
    sets: Mapping[str, Routed],
    adapters: AdapterScores,
    answers: Sequence[AnswerSet],
) -> Iterator[Criterion]:
    """Yield the success criteria of the run, each passed or not and why."""
    wanted = cfg.evaluate
    neutral = [name for name in sets if name.endswith(NEUTRAL)]
    whole = [name for name in sets if not name.endswith(NEUTRAL)]
    for name in neutral:
        yield _beats_words(sets[name])
    # whole splits first: they are what a reader looks for
    for name in (*whole, *neutral):
        yield _routes_well(sets[name], wanted.min_router_accuracy)
    yield _all_learned(adapters, wanted.min_expert_score)
    yield _all_specialised(adapters)
    for each in answers:
        yield _near_the_oracle(each, wanted.oracle_gap)


def _beats_words(routed: Routed) -> Criterion:
    ahead = routed.ahead(TEXT)
    if ahead is None:
        raise ValueError(f"{routed.name} has no requests, so nothing was compared")
    passed = None
    by = f"ahead by {ahead.difference:+.3f}"
    if ahead.interval:
        low, high = ahead.interval
        passed = not reaches(0.0, low)
        digits = places(lambda each: not reaches(0.0, each), low, least=3)
        by += f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    alone = share(routed.hits(TEXT).mean(), 1)
    return Criterion(
        name=f"looks, {routed.name}",
        text="where the words tell nothing, the router beats a router that reads them alone",
        passed=passed,
        detail=f"{share(routed.hits().mean(), 1)} against {alone}; {by}",
    )


def _routes_well(routed: Routed, least: float) -> Criterion:
    accuracy = float(routed.hits().mean())
    return Criterion(
        name=f"router, {routed.name}",
        text=f"the router is right for at least {limit(least)}",
        passed=reaches(accuracy, least) if routed.bootstrap.decides else None,
        detail=f"{beside_limit(accuracy, least, 1)} of {len(routed.requests)} requests",
    )


def _all_learned(adapters: AdapterScores, least: float) -> Criterion:
    # a score that could not be measured is none that was reached
    own = {task.task: task.scores[task.task] or 0.0 for task in adapters.tasks}
    worst = min(own, key=lambda name: own[name])
    digits = places(lambda each: reaches(each, least), own[worst], least=3)
    return Criterion(
        name="experts",
        text=f"every expert scores at least {least:.12g} on its own task",
        passed=reaches(own[worst], least) if _decides(adapters) else None,
        detail=f"least: {worst} with {own[worst]:.{digits}f}",
    )


def _all_specialised(adapters: AdapterScores) -> Criterion:
    """Return whether each expert beats every other adapter and the base on its own task."""
    lost = []
    for task in adapters.tasks:
        others = {name: score or 0.0 for name, score in task.scores.items()}
        own = others.pop(task.task)
        best = max(others, key=lambda name: others[name])
        # as good as another is no reason to have it
        if reaches(others[best], own):
            lost.append(f"{best} on {task.task} ({others[best]:.3f} against {own:.3f})")
    return Criterion(
        name="specialised",
        text="every expert is the best on its own task, the base included",
        passed=not lost if _decides(adapters) else None,
        detail=f"not so: {', '.join(lost)}" if lost else "each one leads on its own",
    )


def _near_the_oracle(answers: AnswerSet, most: float) -> Criterion:
    oracle = answers.all.oracle.score or 0.0
    own = answers.all.stack.score or 0.0
    behind = oracle - own
    # in points, which the text is about, and in the scores that they come from
    digits = places(lambda one, other: reaches(most, one - other), oracle, own, least=3)
    points = places(lambda each: reaches(most, each), behind, least=3) - 2
    return Criterion(
        name=f"stack, {answers.set}",
        text=f"the stack's answers score at most {100 * most:.12g} points below the right expert's",
        passed=reaches(most, behind) if answers.all.stack.interval else None,
        detail=f"{100 * behind:.{points}f} points below: {own:.{digits}f} against "
        f"{oracle:.{digits}f}",
    )


def measured_on_few(
    sets: Mapping[str, Routed], adapters: AdapterScores, medium: str
) -> Iterator[str]:
    """Yield what was measured on too few groups of requests to decide anything."""
    few = []
    for name, routed in sets.items():
        if not routed.bootstrap.decides:
            few.append(f"{name} ({len(routed.requests)} requests)")
    for task in adapters.tasks:
        if not _is_decided(task):
            few.append(f"{task.task} ({task.requests} rows)")
    if few:
        yield (
            f"Too few to decide on: {', '.join(few)}. Over fewer than {LEAST_UNITS} groups of "
            f"requests, such as all with the same {medium}, there is no interval and no colour, "
            "and criteria stay open: give the tasks and the routing set more test rows."
        )


def _decides(adapters: AdapterScores) -> bool:
    return all(_is_decided(task) for task in adapters.tasks)


def _is_decided(task: TaskScores) -> bool:
    return task.intervals.get(task.task) is not None
