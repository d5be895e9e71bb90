"""Recipes of experiments against each other: the best of each kind, and how a stack's tokens are
divided between its parts."""

from statistics import fmean

from .experiments import compared_tokens, has_tokens, interval_note, median_of, times
from .format import count, fixed, seconds, share, signed
from .schema.experiments import ExperimentResults, TrialSummary, TrialTiming
from .table import Cell, Row, Table, lowest

STACK = "stack"
# Parts of a stack by the stages that train them, in order
PARTS = {"trunk": "train_shared", "experts": "train_experts", "gates": "train_router"}
OTHER_TOKENS = "other tokens"


def side_by_side(results: ExperimentResults) -> Table:
    """The best trial of each kind of model, by bits per byte of the same held-out text."""
    kinds = _kinds(results)
    best = [min(trials, key=lambda trial: trial.bits_per_byte or 0.0) for trials in kinds.values()]
    least = lowest([trial.bits_per_byte for trial in best])
    rows = []
    for number, (kind, trial) in enumerate(zip(kinds, best, strict=True)):
        dense = _dense_of(trial, results)
        against = "" if dense is None or dense.is_dense or dense is trial else dense.name
        cells = (
            Cell(trial.name),
            Cell(str(len(kinds[kind]))),
            Cell(
                fixed(trial.bits_per_byte, 4),
                interval_note(trial.bits_interval),
                best=number in least,
            ),
            Cell(signed(_difference(trial, dense), 4), against),
            Cell(count(median_of(each.tokens for each in times(trial)))),
            Cell(seconds(median_of(sum(each.cpu_s.values()) for each in times(trial)) or None)),
            Cell(seconds(median_of(each.seconds for each in times(trial)))),
            Cell(count(median_of(each.tokens_per_s for each in times(trial)))),
        )
        rows.append(Row(kind, cells, main=trial.is_dense))
    return Table(
        name="Side by side",
        title="The best trial of each kind of model",
        corner="kind",
        columns=(
            *("trial", "of trials", "bits per byte", "less the dense"),
            *("tokens", "processor", "clock", "tokens per second"),
        ),
        rows=tuple(rows) if len(rows) > 1 else (),
        reading=(
            "By bits per byte of the same held-out documents, mean over seeds, with its 95 % "
            "interval; the best of several trials is chosen by the very figure that it shows. "
            "Other tokens: those of another tokenizer than the dense model's, as of a pretrained "
            "trunk, whose own training is in no column; the dense model is then the one that is "
            "named, of the same tokens. Tokens, processor time and clock are "
            "those of all trainings that the model is made of, medians over seeds."
        ),
        words=(0,),
    )


def _kinds(results: ExperimentResults) -> dict[str, list[TrialSummary]]:
    """Return the trials that were measured by what they make and whether its tokens are others."""
    tokens = compared_tokens(results)
    found: dict[str, list[TrialSummary]] = {}
    for trial in results.trials:
        if trial.bits_per_byte is None:
            continue
        others = "" if has_tokens(trial, tokens) else OTHER_TOKENS
        found.setdefault(", ".join(filter(None, (trial.makes, others))), []).append(trial)
    return found


def _dense_of(mine: TrialSummary, results: ExperimentResults) -> TrialSummary | None:
    """Return the dense trial that has a trial's tokens, else the one that all are held against."""
    tokens = _tokens_of(mine)
    same = [trial for trial in results.trials if _tokens_of(trial) == tokens]
    of_all = [trial for trial in results.trials if trial.is_dense]
    asked = [trial for trial in same if trial.is_dense]
    whole = [trial for trial in same if trial.runs_whole]
    return next(iter((*asked, *whole, *of_all)), None)


def _tokens_of(trial: TrialSummary) -> set[str]:
    return {run.tokens for run in trial.done}


def _difference(mine: TrialSummary, dense: TrialSummary | None) -> float | None:
    """Return the mean difference of bits per byte over the seeds that both were measured with on
    the same documents; None for a dense one itself."""
    if dense is None or mine is dense:
        return None
    theirs = {run.seed: run.score for run in dense.done if run.score}
    found = []
    for run in mine.done:
        other = theirs.get(run.seed)
        if run.score and other and run.score.text == other.text:
            found.append(run.score.bits_per_byte - other.bits_per_byte)
    return fmean(found) if found else None


def split(results: ExperimentResults) -> Table:
    """How the tokens of each stack are divided between trunk, experts and gates."""
    stacks = []
    for trial in results.trials:
        if trial.makes == STACK and times(trial):
            stacks.append(trial)
    rows = []
    for trial in sorted(stacks, key=_trunk_share):
        cells = (
            *(_part(trial, stage) for stage in PARTS.values()),
            Cell(share(_trunk_share(trial))),
            Cell(fixed(trial.valid, 4), interval_note(trial.valid_interval)),
            Cell(fixed(trial.bits_per_byte, 4), interval_note(trial.bits_interval)),
        )
        rows.append(Row(trial.name, cells))
    return Table(
        name="Split",
        title="How the tokens of a stack are divided between trunk and experts",
        corner="trial",
        columns=(*PARTS, "share of trunk", "valid nats", "bits per byte"),
        rows=tuple(rows),
        reading=(
            "Tokens that each part was trained on, experts together, medians over seeds; in order "
            "of the trunk's share of trunk and experts. A trunk without any was pretrained. "
            "Trials that differ in nothing else tell what a split is worth."
        ),
    )


def _part(trial: TrialSummary, stage: str) -> Cell:
    return Cell(count(median_of(_tokens(each, stage) for each in times(trial))))


def _tokens(timing: TrialTiming, stage: str) -> int:
    return sum(job.tokens or 0 for job in timing.jobs if job.job.split(" ")[0] == stage)


def _trunk_share(trial: TrialSummary) -> float:
    timing = times(trial)[0]
    trunk = _tokens(timing, PARTS["trunk"])
    both = trunk + _tokens(timing, PARTS["experts"])
    return trunk / both if both else 0.0
