"""The tables of experiments, described once and drawn on terminal and page."""

from collections.abc import Iterable, Iterator, Mapping
from statistics import median

from .format import DASH, beside_limit, count, ends, fixed, limit, reaches, seconds, share, signed
from .run_facts import RESULTS
from .schema.base import Interval
from .schema.experiments import (
    ExperimentResults,
    TrialCriterion,
    TrialRun,
    TrialSummary,
    TrialTiming,
)
from .table import Cell, Row, Table, lowest

# Phases of a step, in order
PHASES = ("data", "forward", "backward", "optimizer")
ASKED = ("primary", "secondary", "tertiary")
HALVES = {
    "loss": "by the loss alone",
    "gap": "by the gap alone",
    "both": "by loss and gap",
    "neither": "neither loss nor gap",
}


def overview(results: ExperimentResults) -> Table:
    """Every trial over its seeds: losses, sizes, and what was asked."""
    tokens = compared_tokens(results)
    best = lowest([trial.valid if has_tokens(trial, tokens) else None for trial in results.trials])
    best_bits = lowest([trial.bits_per_byte for trial in results.trials])
    rows = []
    for number, trial in enumerate(results.trials):
        cells = [
            Cell(trial.makes),
            Cell(_states(trial)),
            Cell(fixed(trial.valid, 4), _valid_note(trial, tokens), best=number in best),
            Cell(
                fixed(trial.bits_per_byte, 4),
                interval_note(trial.bits_interval),
                best=number in best_bits,
            ),
            Cell(signed(trial.gap, 4)),
            Cell(count(_of_first(trial, "active"))),
            Cell(count(_of_first(trial, "total"))),
            Cell(count(median_of(each.tokens for each in times(trial)))),
            *(_asked(trial, name) for name in ASKED),
        ]
        rows.append(Row(trial.name, tuple(cells), kind=trial.origin, main=trial.is_dense))
    return Table(
        name="Trials",
        title="Losses and sizes of every trial, and what was asked of it",
        corner="trial",
        columns=(
            "makes",
            "seeds",
            "valid nats",
            "bits per byte",
            "gap",
            "active",
            "total",
            "tokens",
            *ASKED,
        ),
        rows=tuple(rows),
        reading=(
            "Lower is better; in brackets the 95 % interval of the mean over seeds, by Student's "
            "t: seeds draw weights and the order of rows, the text is the same. Valid: nats a "
            "token, which compare where tokens are the same. Bits per byte: of held-out documents, "
            "mean over domains, whatever tokens are. Gap: validation less training loss. Active "
            "and total are parameters; tokens are those of all trainings that a model is made of. "
            "The marked row is the dense model that others are held against."
        ),
        words=(0, 1, 8, 9, 10),
    )


def criteria(results: ExperimentResults) -> Table:
    """What was asked of each trial, with the number behind it."""
    rows = []
    for trial in results.trials:
        for each in trial.criteria:
            half = HALVES[each.half] if each.half else ""
            cells = (
                RESULTS[each.passed],
                Cell(_number(each), interval_note(each.interval)),
                Cell("; ".join(filter(None, (half, each.detail)))),
            )
            rows.append(Row(f"{trial.name}, {each.name}", cells, kind=trial.name))
    return Table(
        name="Criteria",
        title="What was asked of each trial",
        corner="trial, criterion",
        columns=("result", "number", "found"),
        rows=tuple(rows),
        reading=(
            "Primary: validation loss less the dense model's, below zero, or a gap of validation "
            "to training loss that is smaller by the share that is asked; in brackets the 95 % "
            "interval over seeds. Of other tokens than the dense model's, bits per byte of "
            "held-out documents less its own. Secondary: tokens per second of processor time as a "
            "share of the dense model's, which other programs on the machine hardly move; on GPUs "
            "by the clock; of other tokens, bytes of text. Tertiary: share of tokens of the expert "
            "that gets least. Open: it cannot be told."
        ),
        words=(0, 2),
    )


def timing(results: ExperimentResults) -> Table:
    """Where the time of each trial's trainings went, the median over its seeds."""
    rows = []
    for trial in results.trials:
        seeds = times(trial)
        if not seeds:
            continue
        cells = [Cell(seconds(median(each.seconds for each in seeds)))]
        whole = median(sum(each.cpu_s.values()) for each in seeds)
        cells.append(Cell(seconds(whole)))
        for phase in PHASES:
            spent = median(each.cpu_s.get(phase, 0.0) for each in seeds)
            cells.append(Cell(share(spent / whole) if whole else DASH))
        cells.append(Cell(count(median_of(each.tokens_per_s for each in seeds))))
        cells.append(Cell(count(_speed(trial))))
        rows.append(Row(trial.name, tuple(cells), main=trial.is_dense))
    return Table(
        name="Timing",
        title="Where the time went",
        corner="trial",
        columns=(
            "clock",
            "processor",
            *PHASES,
            "tokens per second",
            "tokens per CPU second",
        ),
        rows=tuple(rows),
        reading=(
            "Steps alone, of all trainings of a model, median over seeds. Processor time is that "
            "of all threads, and its phases are shares of it: unlike the clock it grows hardly "
            "when others use the machine. On a GPU it says nothing and is not counted."
        ),
    )


def experts(results: ExperimentResults) -> Table:
    """Where the gates of each trial send tokens, seed by seed."""
    rows = []
    for trial in results.trials:
        for run in trial.done:
            if run.use is None:
                continue
            cells = (
                Cell(share(run.use.least, 1)),
                Cell(run.use.where),
                Cell(count(run.use.tokens)),
                Cell(fixed(run.use.entropy)),
                Cell(fixed(run.use.max_entropy)),
                Cell(share(run.use.dropped, 1)),
            )
            rows.append(Row(f"{trial.name}, seed {run.seed}", cells, kind=trial.name))
    return Table(
        name="Experts",
        title="Where tokens go",
        corner="trial, seed",
        columns=("least share", "of", "tokens", "entropy", "of an even load", "over capacity"),
        rows=tuple(rows),
        reading=(
            "Tokens are those of training that the shares are of: shares of few are partly chance. "
            "Of the whole stack an expert is one in all layers, and the load is that of the last "
            "steps of the gates' training that were written down; of a joint model each layer has "
            "experts of its own, and it is that of the kept epoch. Entropy in nats, mean over "
            "layers."
        ),
        words=(1,),
    )


def each_run(results: ExperimentResults) -> Table:
    """Every trial with every seed, also those that failed."""
    rows = []
    for trial in results.trials:
        for run in trial.runs:
            rows.append(Row(f"{trial.name}, seed {run.seed}", _run_cells(run), kind=trial.name))
    return Table(
        name="Runs",
        title="Every trial with every seed",
        corner="trial, seed",
        columns=(
            *("state", "valid nats", "train nats", "bits per byte"),
            *("steps", "kept at", "artifact", "why"),
        ),
        rows=tuple(rows),
        reading="Kept at: the step whose state is the model. Early: patience ended the training.",
        words=(0, 6, 7),
    )


def _run_cells(run: TrialRun) -> tuple[Cell, ...]:
    tones = {"failed": "bad", "missing": "bad"}
    losses = run.losses
    early = "early" if losses and losses.stopped_early else ""
    return (
        Cell(run.state, tone=tones.get(run.state, "")),
        Cell(fixed(losses and losses.valid, 4)),
        Cell(fixed(losses and losses.train, 4)),
        Cell(fixed(run.score and run.score.bits_per_byte, 4)),
        Cell(count(losses and losses.steps), early),
        Cell(count(losses and losses.kept_step)),
        Cell(run.address),
        Cell(run.error or run.unmeasured),
    )


def changes(results: ExperimentResults) -> Table:
    """What each trial changes of the base."""
    rows = []
    for trial in results.trials:
        words = ", ".join(f"{name} {value}" for name, value in flat(trial.changes))
        rows.append(Row(trial.name, (Cell(trial.makes), Cell(words or "nothing"))))
    return Table(
        name="Settings",
        title="What each trial changes",
        corner="trial",
        columns=("makes", "changes"),
        rows=tuple(rows),
        reading="Over the base; whole configurations stand in experiment_results.json.",
        words=(0, 1),
    )


def flat(settings: Mapping[str, object], above: str = "") -> Iterator[tuple[str, object]]:
    """Yield settings of sections in each other by dotted name, a section without any as it is."""
    for name, value in settings.items():
        dotted = f"{above}.{name}" if above else str(name)
        if isinstance(value, dict) and value:
            yield from flat(value, dotted)
        else:
            yield dotted, value


def tiles(results: ExperimentResults) -> list[tuple[str, str, str]]:
    """Return the numbers at the top: name, value, what stands beside it."""
    found = []
    tokens = compared_tokens(results)
    same = [trial for trial in results.trials if has_tokens(trial, tokens)]
    ended = [trial for trial in same if trial.valid is not None]
    best = min(ended, key=lambda trial: trial.valid or 0.0, default=None)
    if best is not None:
        found.append(("lowest validation loss", fixed(best.valid, 4), f"{best.name}, nats"))
    measured = [trial for trial in results.trials if trial.bits_per_byte is not None]
    best = min(measured, key=lambda trial: trial.bits_per_byte or 0.0, default=None)
    if best is not None:
        found.append(("lowest bits per byte", fixed(best.bits_per_byte, 4), best.name))
    dense = next((trial for trial in results.trials if trial.is_dense), None)
    if dense is not None and dense.valid is not None:
        found.append(("dense", fixed(dense.valid, 4), f"{dense.name}, nats"))
    for name in ASKED:
        asked = [each for trial in results.trials for each in trial.criteria if each.name == name]
        passed = sum(each.passed is True for each in asked)
        if asked:
            found.append((f"{name} passed", f"{passed} of {len(asked)}", ""))
    failed = sum(run.state == "failed" for trial in results.trials for run in trial.runs)
    if failed:
        found.append(("failed", str(failed), "runs"))
    return found


def facts(results: ExperimentResults) -> list[str]:
    """Return what the figures must be read with, in a few words each."""
    found = [f"seeds {', '.join(map(str, results.seeds))}", results.made]
    machine = results.machine
    if machine is not None:
        found.append(machine.gpu or machine.cpu)
        found.append(f"{machine.threads} of {machine.cores} cores a job")
        found.append(machine.dtype)
        found.append(f"torch {machine.torch}")
    return [fact for fact in found if fact]


def conditions(results: ExperimentResults) -> list[str]:
    """Return what a committed copy has to say beside that, in a few words each."""
    found = []
    if results.machine is not None:
        found.append(f"{results.machine.system}, Python {results.machine.python}")
    for name, version in results.packages.items():
        if name != "torch":
            found.append(f"{name} {version}")
    if results.work is not None:
        taken = seconds(results.work.seconds)
        found.append(f"{results.work.jobs:,} jobs, which took {taken} one after another")
    return found


def _asked(trial: TrialSummary, name: str) -> Cell:
    for each in trial.criteria:
        if each.name == name:
            result = RESULTS[each.passed]
            return Cell(result.text, _number(each), tone=result.tone)
    return Cell(DASH)


def _number(each: TrialCriterion) -> str:
    if each.number is None:
        return ""
    if each.name == "primary":
        return signed(each.number, 4)
    asked = each.limit or 0.0
    sign = "≥" if reaches(each.number, asked) else "<"
    return f"{beside_limit(each.number, asked, 1)} {sign} {limit(asked)}"


def _states(trial: TrialSummary) -> str:
    done = len(trial.done)
    others = [run.state for run in trial.runs if run.state != "done"]
    if not others:
        return str(done)
    told = ", ".join(f"{others.count(state)} {state}" for state in dict.fromkeys(others))
    return f"{done}, {told}"


def compared_tokens(results: ExperimentResults) -> str:
    """Return what tokens losses are compared in: the dense model's, else the first trial's."""
    done = [(trial.is_dense, run.tokens) for trial in results.trials for run in trial.done]
    return max(done, key=lambda each: each[0], default=(False, ""))[1]


def has_tokens(trial: TrialSummary, tokens: str) -> bool:
    """Whether all that came of a trial is of some tokens."""
    return all(run.tokens == tokens for run in trial.done)


def _valid_note(trial: TrialSummary, tokens: str) -> str:
    others = "" if has_tokens(trial, tokens) else "other tokens"
    return ", ".join(filter(None, (interval_note(trial.valid_interval), others)))


def interval_note(pair: Interval | None) -> str:
    """Write the interval of a loss to stand beside it; nothing of none."""
    low, high = ends(pair)
    return "" if low is None or high is None else f"[{fixed(low, 4)}, {fixed(high, 4)}]"


def _of_first(trial: TrialSummary, name: str) -> int | None:
    for run in trial.done:
        if run.sizes is not None:
            return getattr(run.sizes, name)
    return None


def _speed(trial: TrialSummary) -> float | None:
    return median_of(each.tokens_per_cpu_s for each in times(trial))


def times(trial: TrialSummary) -> list[TrialTiming]:
    """Return what the trainings of a trial took, seed by seed."""
    return [run.timing for run in trial.done if run.timing]


def median_of(values: Iterable[float | None]) -> float | None:
    """Return the median of those that are there; None without any."""
    found = [value for value in values if value is not None]
    return median(found) if found else None
