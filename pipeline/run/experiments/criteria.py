"""What is asked of each trial, held against the dense one: passed or not, with its number."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ...config.experiments import CriteriaConfig
from ...metrics.seeds import interval_of_mean
from ...report.format import beside_limit, fixed, limit, reaches
from ...report.format import share as written_share
from ...report.schema.experiments import Asked, TrialCriterion, TrialSummary


def judged(summaries: Sequence[TrialSummary], wanted: CriteriaConfig) -> list[TrialSummary]:
    """Return trials with what is asked of each and whether it holds; of the dense one nothing
    is."""
    by_name = {each.name: each for each in summaries}
    dense = by_name.get(wanted.dense)
    gap_of = by_name.get(wanted.gap_of or wanted.dense)
    found = []
    for each in summaries:
        if each.is_dense:
            found.append(each)
            continue
        asked = [
            primary(each, dense, gap_of, wanted.gap_share),
            secondary(each, dense, wanted.speed_share),
        ]
        if not each.runs_whole:
            asked.append(tertiary(each, wanted.min_expert_share))
        found.append(each.model_copy(update={"criteria": tuple(asked)}))
    return found


def primary(
    mine: TrialSummary, dense: TrialSummary | None, gap_of: TrialSummary | None, share: float
) -> TrialCriterion:
    """Whether a trial has a lower validation loss than the dense one, or a gap smaller by a share
    than another's; its number is the difference of the losses."""
    if mine.valid is None or dense is None or dense.valid is None:
        why = "it has no loss" if mine.valid is None else "there is no dense model to compare with"
        return _open("primary", why)
    if not _same_tokens(mine, dense):
        return _by_bits(mine, dense)
    # A seed that only one of them has would be compared with nothing
    differences = _paired(mine, dense)
    if not differences:
        return _open("primary", "it has no seed in common with the dense model")
    difference = statistics.fmean(differences)
    is_lower = difference < 0
    detail = f"validation {fixed(mine.valid, 4)} against {fixed(dense.valid, 4)} nats"
    detail += _chance(differences)
    closed = _closed(mine, gap_of)
    is_closed = closed is not None and reaches(closed, share)
    name = gap_of.name if gap_of else dense.name
    if closed is None:
        detail += "; there is no gap to close"
    elif closed < 0:
        detail += f"; a gap {written_share(-closed)} larger than that of {name}"
    else:
        smaller = beside_limit(closed, share, 0)
        detail += f"; a gap {smaller} smaller than that of {name}, asked {limit(share)}"
    half = "neither"
    if is_lower:
        half = "both" if is_closed else "loss"
    elif is_closed:
        half = "gap"
    return TrialCriterion(
        name="primary",
        passed=is_lower or is_closed,
        number=difference,
        interval=interval_of_mean(differences),
        limit=0.0,
        half=half,
        detail=detail,
    )


def _same_tokens(mine: TrialSummary, dense: TrialSummary) -> bool:
    return len({run.tokens for run in (*mine.done, *dense.done)}) == 1


def _by_bits(mine: TrialSummary, dense: TrialSummary) -> TrialCriterion:
    """Judge a trial of other tokens than the dense one's by bits per byte; a gap of losses a token
    says nothing of the other's."""
    theirs = {run.seed: run.score for run in dense.done}
    found = []
    for run in mine.done:
        other = theirs.get(run.seed)
        if run.score and other and run.score.text == other.text:
            found.append(run.score.bits_per_byte - other.bits_per_byte)
    if not found or mine.bits_per_byte is None or dense.bits_per_byte is None:
        why = "its tokens are others, and no seed of both was measured on the same documents"
        return _open("primary", why)
    difference = statistics.fmean(found)
    return TrialCriterion(
        name="primary",
        passed=difference < 0,
        number=difference,
        interval=interval_of_mean(found),
        limit=0.0,
        half="loss" if difference < 0 else "neither",
        detail=f"held-out text {fixed(mine.bits_per_byte, 4)} against "
        f"{fixed(dense.bits_per_byte, 4)} bits per byte, as its tokens are others"
        f"{_chance(found)}",
    )


def _chance(differences: Sequence[float]) -> str:
    """Return in words that seeds do not tell differences from none, where they do not."""
    ends = interval_of_mean(differences)
    if ends is None or ends[0] * ends[1] > 0:
        return ""
    return ", which these seeds do not tell from equal"


def _paired(mine: TrialSummary, dense: TrialSummary) -> list[float]:
    """Return the difference of validation losses of each seed that both have."""
    theirs = {run.seed: run.losses.valid for run in dense.done if run.losses}
    found = []
    for run in mine.done:
        other = theirs.get(run.seed)
        if run.losses and run.losses.valid is not None and other is not None:
            found.append(run.losses.valid - other)
    return found


def _closed(mine: TrialSummary, other: TrialSummary | None) -> float | None:
    """Return the share by which a gap is smaller than another's; None where that one has none."""
    if other is None or mine.gap is None or not other.gap or other.gap <= 0:
        return None
    return 1 - mine.gap / other.gap


def secondary(mine: TrialSummary, dense: TrialSummary | None, share: float) -> TrialCriterion:
    """Whether a trial trains as fast as a share of the dense one does: in processor time, so that
    what else the machine does decides nothing, or by the clock on GPUs of one kind, which nobody
    else uses meanwhile. Its number is the share: of tokens, or of the text that they are where the
    dense one's tokens are others."""
    own = _speed(mine)
    theirs = None if dense is None else _speed(dense)
    if own is None or theirs is None or own.measure != theirs.measure:
        return _open("secondary", "there are no times of both that could be compared")
    rates = (own.tokens_per_s, theirs.tokens_per_s)
    unit = "tokens"
    if dense is not None and not _same_tokens(mine, dense):
        sizes = (_bytes_per_token(mine), _bytes_per_token(dense))
        if sizes[0] is None or sizes[1] is None:
            return _open("secondary", "its tokens are others, and how much text they are is open")
        rates = (rates[0] * sizes[0], rates[1] * sizes[1])
        unit = "bytes of text"
    found = rates[0] / rates[1]
    return TrialCriterion(
        name="secondary",
        passed=reaches(found, share),
        number=found,
        limit=share,
        detail=f"{beside_limit(found, share, 1)} of the dense model's {unit} per second of "
        f"{own.measure} ({rates[0]:,.0f} against {rates[1]:,.0f}), asked {limit(share)}",
    )


def _bytes_per_token(summary: TrialSummary) -> float | None:
    """Return how much held-out text a token of a model is; None where it was not measured."""
    for run in summary.done:
        if run.score and run.score.tokens:
            return run.score.bytes / run.score.tokens
    return None


@dataclass(frozen=True)
class TrainingSpeed:
    """How fast a model is trained, and what seconds are counted."""

    measure: str
    tokens_per_s: float


def _speed(summary: TrialSummary) -> TrainingSpeed | None:
    """Return the median over seeds; None where they were not measured alike."""
    found: dict[str, list[float]] = {}
    for run in summary.done:
        timing = run.timing
        if timing and timing.tokens_per_cpu_s:
            found.setdefault("processor time", []).append(timing.tokens_per_cpu_s)
        elif timing and timing.gpu and timing.tokens_per_s:
            found.setdefault(f"the clock on {timing.gpu}", []).append(timing.tokens_per_s)
    if len(found) != 1:
        return None
    ((measure, speeds),) = found.items()
    return TrainingSpeed(measure, statistics.median(speeds))


def tertiary(mine: TrialSummary, share: float) -> TrialCriterion:
    """Whether every expert gets a share of the tokens, with every seed; its number is the least
    share."""
    uses = [run.use for run in mine.done if run.use]
    if not uses:
        return _open("tertiary", "no gate of it was trained")
    worst = min(uses, key=lambda use: use.least)
    of = "tokens" if worst.tokens is None else f"{worst.tokens:,} tokens"
    return TrialCriterion(
        name="tertiary",
        passed=reaches(worst.least, share),
        number=worst.least,
        limit=share,
        detail=f"least: {worst.where}, {beside_limit(worst.least, share, 1)} of {of}, asked "
        f"{limit(share)}; entropy {worst.entropy:.3f} of {worst.max_entropy:.3f} nats",
    )


def _open(name: Asked, why: str) -> TrialCriterion:
    return TrialCriterion(
        name=name,
        passed=None,
        number=None,
        limit=None,
        detail=why,
    )
